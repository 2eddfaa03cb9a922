"""explain(name_or_model): what optimize() would replace; nothing is changed, no weights needed."""

from __future__ import annotations

import difflib
import inspect
from contextlib import suppress
from typing import Any

import torch
from torch import nn

from ..compat import import_timm, import_torchvision
from . import rules
from .fast import original_class
from .report import Report
from .swap import survey

_SOURCES = "timm:NAME, torchvision:NAME, hybridops:NAME, transformers:NAME (or hf:NAME)"


def explain(name_or_model: str | nn.Module, mode: str = "inference", **kwargs: Any) -> Report:
    """A Report of every hot layer: the rule that optimize() would apply, or its reason not to.

    name_or_model: a model, or "timm:levit_256", "torchvision:vit_b_16", "hybridops:cpvt_tiny",
    "transformers:vit" (a model type or, as in "transformers:DetrForObjectDetection", a class, with
    its default configuration, or a name whose configuration is in the local cache). Named models
    are built without trained weights; kwargs go to the model's constructor.
    Raises ValueError for a name that nothing knows, ImportError for a library that is missing.
    """
    model = build(name_or_model, **kwargs) if isinstance(name_or_model, str) else name_or_model
    if not isinstance(model, nn.Module):
        raise TypeError(f"explain: want a name or an nn.Module, got {type(model).__name__}")
    rules.load_plugins()
    layers, _ = survey(model, mode)
    return Report(original_class(model).__name__, {"mode": mode}, layers)


def build(name: str, **kwargs: Any) -> nn.Module:
    """The named model on the meta device: all of its structure, none of its memory.

    On the CPU where its constructor reads numbers, as that of torchvision's RegNet does.
    """
    try:
        with torch.device("meta"):
            return create(name, **kwargs)
    except NotImplementedError:  # meta tensors have no numbers
        return create(name, **kwargs)


def create(name: str, **kwargs: Any) -> nn.Module:
    """The named model with random weights; hf: is short for transformers:.

    Raises ValueError for a name that nothing knows, ImportError for a library that is missing.
    """
    source, _, rest = name.partition(":")
    if source not in _BUILDERS or not rest:
        raise ValueError(f"a model's name is one of {_SOURCES}, got {name!r}")
    return _BUILDERS[source](rest, kwargs)


def _timm(name, kwargs):
    timm = import_timm()
    if not timm.is_model(name):
        close = ", ".join(timm.list_models(f"*{name.split('_')[0]}*")[:8])
        raise ValueError(f"timm has no model {name!r}" + (f"; it has {close}" if close else ""))
    return timm.create_model(name, **kwargs)


def _torchvision(name, kwargs):
    models = import_torchvision().models
    if name not in models.list_models():
        close = ", ".join(difflib.get_close_matches(name, models.list_models(), n=3))
        raise ValueError(
            f"torchvision has no model {name!r}" + (f"; close to it {close}" if close else "")
        )
    builder = models.get_model_builder(name)
    if "weights_backbone" in inspect.signature(builder).parameters:  # else it downloads them
        kwargs = {"weights_backbone": None} | kwargs
    return builder(**kwargs)


def _hybridops(name, kwargs):
    from .. import models

    if name not in models.list_models():
        raise ValueError(f"hybridops has {', '.join(models.list_models())}, not {name!r}")
    return models.create_model(name, **kwargs)


def _transformers(name, kwargs):
    with suppress(ImportError):  # transformers imports it too, and a broken one breaks its models
        import_torchvision()
    try:
        import transformers
        from transformers import CONFIG_MAPPING, MODEL_MAPPING, AutoConfig, AutoModel
    except ImportError:
        raise ImportError("transformers is not installed: pip install transformers") from None
    cls = getattr(transformers, name, None) if name.isidentifier() else None
    if isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel):
        return cls(cls.config_class(**kwargs))
    if name in CONFIG_MAPPING:
        config = AutoConfig.for_model(name, **kwargs)
    else:
        try:
            config = AutoConfig.from_pretrained(name, local_files_only=True, **kwargs)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"the configuration of {name!r} is not in the local cache, and nothing is "
                f"downloaded here; name a model type, such as 'transformers:vit'"
            ) from error
    try:
        return AutoModel.from_config(config)
    except ValueError as error:
        if type(config) in MODEL_MAPPING:
            raise
        kind = type(config).__name__.removesuffix("Config")
        raise ValueError(
            f"transformers has no bare model of {name!r}; name a class of it that has a head, such "
            f"as 'transformers:{kind}For...'"
        ) from error


_BUILDERS = {
    "timm": _timm,
    "torchvision": _torchvision,
    "hybridops": _hybridops,
    "transformers": _transformers,
    "hf": _transformers,
}
