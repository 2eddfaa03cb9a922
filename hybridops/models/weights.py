"""Weights into our models, from our own keys or another implementation's: all of them or nothing.

LeViT's keys are timm's. The official code and transformers name and order the same tensors
differently; `levit_names` builds the three spellings of every module from the model itself. DETR's
and the hybrids' differ by patterns: detr/keys.py, hybrid_vit/keys.py.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .detr import Detr
from .detr import keys as detr_keys
from .fit import State, WeightsError, check, is_dense, some
from .hybrid_vit import HybridVit
from .hybrid_vit import keys as hybrid_vit_keys
from .levit import Levit


def read_file(path: str | Path) -> Any:
    """What a .safetensors, .npz, .pt or .pth file holds, read without running code."""
    path = Path(path)
    if not path.is_file():
        raise WeightsError(f"{path}: there is no such file")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as arrays:
                return {name: torch.from_numpy(arrays[name]) for name in arrays.files}
        return torch.load(path, map_location="cpu", weights_only=True)
    except ImportError as error:
        raise WeightsError(f"{path}: {error} (pip install safetensors)") from error
    except pickle.UnpicklingError as error:
        raise WeightsError(
            f"{path}: holds more than tensors (code that loading would run), or is damaged"
        ) from error
    except Exception as error:  # zip, safetensors and pickle readers raise a dozen kinds
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise WeightsError(f"{path}: cannot be read, truncated perhaps: {reason}") from error


def _state_of(content: Any) -> dict[str, Tensor]:
    for key in ("model", "state_dict"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not content:
        raise WeightsError(f"no state dict, but {type(content).__name__} {str(content)[:40]}")
    odd = [str(k) for k, v in content.items() if not isinstance(k, str) or not torch.is_tensor(v)]
    if odd:
        raise WeightsError(f"no state dict: no tensor at {some(odd)}")
    return dict(content)


def load_weights(model: nn.Module, source: State | str | Path) -> str:
    """Copy weights into the model: a state dict, or a file. Returns the family they came from.

    Everything is checked first; on a WeightsError the model is as it was.
    """
    content = read_file(source) if isinstance(source, (str, Path)) else source
    where = f"{source}: " if isinstance(source, (str, Path)) else ""
    try:
        family, state = to_own_keys(model, _state_of(content))
        check(model, state)
    except WeightsError as error:
        details = (error.missing, error.unexpected, error.mismatched, error.unusable)
        raise WeightsError(f"{where}{error}", *details) from None
    model.load_state_dict(state)
    return family


def to_own_keys(model: nn.Module, state: State) -> tuple[str, dict[str, Tensor]]:
    """(family, the state dict under our keys); names unknown to the family stay as they are."""
    if isinstance(model, Detr):
        family = detr_keys.family_of(state)
    elif isinstance(model, HybridVit):
        family = hybrid_vit_keys.family_of(state)
    elif isinstance(model, Levit):
        family = levit_family(state)
    else:
        family = "hybridops" if set(state) & set(model.state_dict()) else None
    if family is None:
        raise WeightsError(_unknown(model, state))
    if isinstance(model, Detr):
        return family, detr_keys.own_keys(family, state)
    if isinstance(model, HybridVit):
        return family, hybrid_vit_keys.own_keys(model, family, state)
    return family, _levit_keys(model, family, state) if isinstance(model, Levit) else dict(state)


def _levit_keys(model: Levit, family: str, state: State) -> dict[str, Tensor]:
    column = ("timm", "official", "transformers").index(family)
    renames = {names[column]: names[0] for names in levit_names(model)}
    own = model.state_dict()
    renamed: dict[str, Tensor] = {}
    for key, value in state.items():
        if key.endswith(
            "attention_bias_idxs"
        ):  # persistent in the official code, fixed by the grid
            continue
        name = renames.get(key, key)
        # The same nets exist with 1x1 convolutions for linear layers.
        if name in own and own[name].ndim == 2 and is_dense(value) and value.ndim == 4:
            value = value.flatten(1) if value.shape[2:] == (1, 1) else value
        renamed[name] = value
    return renamed


def _unknown(model, state):
    return (
        f"no weights that {type(model).__name__} knows, neither by our keys nor another "
        f"implementation's: {some(state) or 'an empty state dict'}"
    )


def levit_family(state: State) -> str | None:
    """Which implementation names a LeViT's tensors like this."""
    for family, key in (
        ("timm", "stem.conv1.linear.weight"),
        ("official", "patch_embed.0.c.weight"),
        ("transformers", "levit.patch_embeddings.embedding_layer_1.convolution.weight"),
    ):
        if key in state:
            return family
    return None


_NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


def levit_names(model: Levit) -> list[tuple[str, str, str]]:
    """(timm's and ours, official, transformers) for every tensor of a LeViT."""
    names: list[tuple[str, str, str]] = []

    def product(ours: str, official: str, hf: str, layer: str = "linear") -> None:
        """A linear layer or convolution without bias, and its BatchNorm."""
        names.append((f"{ours}.linear.weight", f"{official}.c.weight", f"{hf}.{layer}.weight"))
        for n in _NORM:
            names.append((f"{ours}.bn.{n}", f"{official}.bn.{n}", f"{hf}.batch_norm.{n}"))

    def biases(*owners: str) -> None:
        a, b, c = (f"{owner}.attention_biases" for owner in owners)
        names.append((a, b, c))

    def mlp(ours: str, official: str, hf: str) -> None:
        product(f"{ours}.ln1", f"{official}.m.0", f"{hf}.module.linear_up")
        product(f"{ours}.ln2", f"{official}.m.2", f"{hf}.module.linear_down")

    for i in range(4):
        hf = f"levit.patch_embeddings.embedding_layer_{i + 1}"
        product(f"stem.conv{i + 1}", f"patch_embed.{2 * i}", hf, "convolution")
    n = 0  # the official code counts layers through, transformers within a stage
    for s, depth in enumerate(model.depth):
        layers = f"levit.encoder.stages.{s}.layers"
        for b in range(depth):
            ours, official = f"stages.{s}.blocks.{b}", f"blocks.{n}.m"
            hf = f"{layers}.{2 * b}.module"
            product(f"{ours}.attn.qkv", f"{official}.qkv", f"{hf}.queries_keys_values")
            product(f"{ours}.attn.proj.ln", f"{official}.proj.1", f"{hf}.projection")
            biases(f"{ours}.attn", official, hf)
            mlp(f"{ours}.mlp", f"blocks.{n + 1}", f"{layers}.{2 * b + 1}")
            n += 2
        if s + 1 < len(model.depth):
            ours, official = f"stages.{s + 1}.downsample", f"blocks.{n}"
            attn, hf = f"{ours}.attn_downsample", f"{layers}.{2 * depth}"
            product(f"{attn}.kv", f"{official}.kv", f"{hf}.keys_values")
            product(f"{attn}.q.ln", f"{official}.q.1", f"{hf}.queries")
            product(f"{attn}.proj.ln", f"{official}.proj.1", f"{hf}.projection")
            biases(attn, official, hf)
            mlp(f"{ours}.mlp", f"blocks.{n + 1}", f"{layers}.{2 * depth + 1}")
            n += 2
    for ours, hf in (("head", "classifier"), ("head_dist", "classifier_distill")):
        for leaf in ("weight", "bias"):
            names.append((f"{ours}.linear.{leaf}", f"{ours}.l.{leaf}", f"{hf}.linear.{leaf}"))
        for leaf in _NORM:
            names.append((f"{ours}.bn.{leaf}", f"{ours}.bn.{leaf}", f"{hf}.batch_norm.{leaf}"))
    return names
