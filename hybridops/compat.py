"""Importing timm and torchvision where torchvision's own C++ library does not load.

torchvision's wheel on the default package index is built for CUDA. Beside a CPU build of torch its
library does not load, and its import ends in `operator torchvision::nms does not exist`. Declaring
two schemas is enough for the rest of torchvision (and all of timm) to work; calling `nms` itself
still raises torchvision's own clear error.

Nothing here runs on `import hybridops`, and nothing is declared unless the real import failed in
just that way.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

import torch

_SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
_library: torch.library.Library | None = None  # kept: its schemas vanish with it


def import_torchvision() -> ModuleType:
    """The torchvision module. Raises ImportError, with the command to install it, when missing."""
    global _library
    try:
        return _import("torchvision")
    except RuntimeError as error:
        if _library is not None or "operator torchvision::nms does not exist" not in str(error):
            raise
    _forget("torchvision")  # the failed import leaves half of its submodules behind
    _library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        _library.define(name + _SCHEMA)
    return _import("torchvision")


def import_timm() -> ModuleType:
    """The timm module, which needs torchvision. Raises ImportError when either is missing."""
    import_torchvision()
    return _import("timm")


def _import(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        raise ImportError(f"{name} is not installed: pip install {name}", name=name) from None


def _forget(package: str) -> None:
    for name in [n for n in sys.modules if n == package or n.startswith(package + ".")]:
        del sys.modules[name]


def register_transformers() -> None:
    """Make `attn_implementation="hybridops"` known to transformers (attention and mask function).

    optimize() calls it for models of transformers. Raises ImportError where that is missing.
    """
    from .hf import register

    register()
