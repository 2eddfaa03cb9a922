"""Tensors made from a module's parameters for inference (norms folded, weights packed), never stale.

A module keeps its own parameters and buffers, so its state_dict never changes. What is derived from them is cached on
the module together with the version of every source, and made again as soon as one changes: load_state_dict, an
optimizer step, `.to()`, an assignment are all seen. Copies and pickles of a module leave the cache behind.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..ops import pack_conv, pack_linear
from ..ops.patch_embed import pack_patch

_KEY = "_hybridops_derived"


class _Cache(dict):
    def __deepcopy__(self, memo):
        return _Cache()

    def __reduce__(self):
        return _Cache, ()


class _Entry(NamedTuple):
    sources: tuple[Tensor | None, ...]  # aliases: they keep the storage alive, so an equal data_ptr means the same one
    versions: tuple[int | None, ...]
    value: Any


def clear(module: nn.Module) -> None:
    """Forget what was derived for this module."""
    module.__dict__.pop(_KEY, None)


def derived(owner: nn.Module, name: str, sources: Sequence[Tensor | None], make: Callable[[], Any]) -> Any:
    """make(), cached on `owner` under `name` until one of `sources` changes.

    Not cached where it must stay part of the graph: while compiling, and while a source collects gradients.
    """
    if torch.compiler.is_compiling():
        return make()
    if torch.is_grad_enabled() and any(s is not None and s.requires_grad for s in sources):
        return make()
    cache = owner.__dict__.get(_KEY)
    if cache is None:
        cache = owner.__dict__[_KEY] = _Cache()
    entry = cache.get(name)
    if entry is not None and _is_fresh(entry, sources):
        return entry.value
    with torch.inference_mode(False), torch.no_grad():
        value = make()
    if not any(s is not None and s.is_inference() for s in sources):  # those carry no version to watch
        versions = tuple(None if s is None else s._version for s in sources)
        cache[name] = _Entry(tuple(None if s is None else s.detach() for s in sources), versions, value)
    return value


def _is_fresh(entry: _Entry, sources: Sequence[Tensor | None]) -> bool:
    for source, alias, version in zip(sources, entry.sources, entry.versions, strict=True):
        if source is None or alias is None:
            if source is not alias:
                return False
        elif source.is_inference() or source._version != version or source.data_ptr() != alias.data_ptr():
            return False
        elif source.dtype != alias.dtype or source.shape != alias.shape:
            return False
    return True


class Weights(NamedTuple):
    """What a kernel takes: the (folded) weight and bias, and the weight packed, or None where packing does not pay."""

    weight: Tensor
    bias: Tensor | None
    packed: Tensor | None


def _norm_sources(norm):
    return () if norm is None else (norm.weight, norm.bias, norm.running_mean, norm.running_var)


def norm_affine(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """An eval-mode BatchNorm as y = x * scale + shift, in fp64 so that folding adds no error of its own."""
    mean, var = norm.running_mean.double(), norm.running_var.double()
    scale = (var + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.double()
    shift = -mean * scale
    return scale, shift if norm.bias is None else shift + norm.bias.double()


def fold_behind(weight: Tensor, bias: Tensor | None, norm: nn.Module | None) -> tuple[Tensor, Tensor | None]:
    """norm(weight * x + bias) as one weight and bias; output channels come first."""
    if norm is None:
        return weight, bias
    scale, shift = norm_affine(norm)
    folded = weight.double() * scale.view(-1, *[1] * (weight.ndim - 1))
    shift = shift if bias is None else shift + bias.double() * scale
    return folded.to(weight.dtype), shift.to(weight.dtype)


def fold_in_front(weight: Tensor, bias: Tensor | None, norm: nn.Module) -> tuple[Tensor, Tensor]:
    """weight @ norm(x) + bias as one weight (N, K) and bias."""
    scale, shift = norm_affine(norm)
    wide = weight.double()
    moved = wide @ shift if bias is None else wide @ shift + bias.double()
    return (wide * scale).to(weight.dtype), moved.to(weight.dtype)


def _weights(owner, name, layer, norm, fold, pack):
    def make():
        weight, bias = fold(layer.weight, layer.bias, norm)
        graph = torch.compiler.is_compiling() or weight.requires_grad
        return Weights(weight, bias, None if graph else pack(weight))

    return derived(owner, name, (layer.weight, layer.bias, *_norm_sources(norm)), make)


def linear_weights(owner: nn.Module, name: str, linear: nn.Module, norm: nn.Module | None = None) -> Weights:
    """An nn.Linear (or 1x1 convolution), with the eval-mode BatchNorm behind it folded in."""

    def fold(weight, bias, norm):
        return fold_behind(weight.flatten(1), bias, norm)

    return _weights(owner, name, linear, norm, fold, pack_linear)


def normed_linear_weights(owner: nn.Module, name: str, norm: nn.Module, linear: nn.Module) -> Weights:
    """An nn.Linear with the eval-mode BatchNorm in front of it folded in (LeViT's heads)."""
    return _weights(owner, name, linear, norm, fold_in_front, pack_linear)


def conv_weights(owner: nn.Module, name: str, conv: nn.Module, norm: nn.Module | None = None) -> Weights:
    """An nn.Conv2d of a stem, with the eval-mode BatchNorm behind it folded in."""
    return _weights(owner, name, conv, norm, fold_behind, pack_conv)


def patch_weights(owner: nn.Module, name: str, conv: nn.Module, norm: nn.Module | None = None) -> Weights:
    """An nn.Conv2d that cuts an image into patches."""
    return _weights(owner, name, conv, norm, fold_behind, pack_patch)
