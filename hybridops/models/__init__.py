"""Whole models, assembled from hybridops.nn: create_model("levit_256"), list_models("cpvt_*")."""

from __future__ import annotations

from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from torch import nn

from . import cpvt, detr, hybrid_vit, levit
from .cpvt import Cpvt
from .detr import Detr
from .hybrid_vit import HybridVit
from .levit import Levit
from .weights import WeightsError, load_weights

__all__ = [
    "Cpvt",
    "Detr",
    "HybridVit",
    "Levit",
    "WeightsError",
    "create_model",
    "detr",
    "hybrid_vit",
    "list_models",
    "load_weights",
]

_MODELS = {**levit.MODELS, **cpvt.MODELS, **detr.MODELS, **hybrid_vit.MODELS}
_PRETRAINED = {**levit.PRETRAINED, **detr.PRETRAINED}


def list_models(pattern: str | None = None) -> list[str]:
    """The names that create_model takes, or those that match a pattern such as "cpvt_*"."""
    return sorted(name for name in _MODELS if pattern is None or fnmatch(name, pattern))


def create_model(
    name: str, pretrained: bool = False, checkpoint: str | Path | None = None, **kwargs: Any
) -> nn.Module:
    """A model by name, with random weights, published ones, or those of a file.

    pretrained: the authors' weights of LeViT or DETR, downloaded once into torch.hub's directory.
    checkpoint: a .safetensors, .pt, .pth or (JAX's, of a hybrid ViT) .npz file. kwargs go to the
    model (num_classes, ...).

    Raises ValueError for an unknown name and for a model without such a download, WeightsError
    (a ValueError too) for weights that cannot be had or do not fit.
    """
    if name not in _MODELS:
        raise ValueError(f"create_model: {name!r} is none of {', '.join(list_models())}")
    if pretrained and checkpoint is not None:
        raise ValueError("create_model: pretrained and checkpoint exclude each other")
    if pretrained and name not in _PRETRAINED:
        raise ValueError(
            f"create_model: no weights of {name} to download; checkpoint= takes a file"
        )
    model = _MODELS[name](**kwargs)
    if checkpoint is not None:
        load_weights(model, checkpoint)
    elif pretrained:
        load_weights(model, _download(name))
    return model


def _download(name):
    url = _PRETRAINED[name]
    try:
        # whoever can write here chooses our weights; torch would make it as the umask says
        (Path(torch.hub.get_dir()) / "checkpoints").mkdir(0o700, parents=True, exist_ok=True)
        state = torch.hub.load_state_dict_from_url(
            url, map_location="cpu", check_hash=True, weights_only=True
        )
    except Exception as error:  # no network, no such file, a hash that differs, a damaged file
        raise WeightsError(f"{url}: cannot be had: {error}") from error
    return state["model"]
