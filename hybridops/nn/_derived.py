"""Tensors made from a module's parameters for inference (folded, packed), never stale.

A module keeps its own parameters and buffers, so its state_dict never changes. What is derived from
them is cached on the module together with the version of every source, and made again as soon as
one changes: load_state_dict, an optimizer step, `.to()`, an assignment are all seen. Copies and
pickles of a module leave the cache behind.
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
    # aliases keep the storage alive, so that an equal data_ptr means the same storage
    sources: tuple[Tensor | None, ...]
    versions: tuple[int | None, ...]
    value: Any


def clear(module: nn.Module) -> None:
    """Forget what was derived for this module."""
    module.__dict__.pop(_KEY, None)


def derived(
    owner: nn.Module,
    name: str | tuple[str, torch.dtype],
    sources: Sequence[Tensor | None],
    make: Callable[[], Any],
) -> Any:
    """make(), cached on `owner` under `name` until one of `sources` changes.

    Not cached where it must stay in the graph: while compiling, and while a source wants gradients.
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
    # inference tensors carry no version to watch
    if not any(s is not None and s.is_inference() for s in sources):
        versions = tuple(None if s is None else s._version for s in sources)
        aliases = tuple(None if s is None else s.detach() for s in sources)
        cache[name] = _Entry(aliases, versions, value)
    return value


def _is_fresh(entry: _Entry, sources: Sequence[Tensor | None]) -> bool:
    for source, alias, version in zip(sources, entry.sources, entry.versions, strict=True):
        if source is None or alias is None:
            if source is not alias:
                return False
        elif (
            source.is_inference()
            or source._version != version
            or source.data_ptr() != alias.data_ptr()
            or source.dtype != alias.dtype
            or source.shape != alias.shape
        ):
            return False
    return True


class Weights(NamedTuple):
    """What a kernel takes: (folded) weight and bias, and the weight packed or None."""

    weight: Tensor
    bias: Tensor | None
    packed: Tensor | None


def _norm_sources(norm):
    return () if norm is None else (norm.weight, norm.bias, norm.running_mean, norm.running_var)


def norm_affine(norm: Any) -> tuple[Tensor, Tensor]:
    """An eval-mode BatchNorm as y = x * scale + shift, in fp64 so that folding adds no error."""
    mean, var = norm.running_mean.double(), norm.running_var.double()
    scale = (var + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.double()
    shift = -mean * scale
    return scale, shift if norm.bias is None else shift + norm.bias.double()


def fold_behind(weight: Tensor, bias: Tensor | None, norm: Any) -> tuple[Tensor, Tensor | None]:
    """norm(weight * x + bias) as one weight and bias; output channels come first."""
    if norm is None:
        return weight, bias
    scale, shift = norm_affine(norm)
    folded = weight.double() * scale.view(-1, *[1] * (weight.ndim - 1))
    shift = shift if bias is None else shift + bias.double() * scale
    return folded.to(weight.dtype), shift.to(weight.dtype)


def fold_in_front(weight: Tensor, bias: Tensor | None, norm: Any) -> tuple[Tensor, Tensor]:
    """weight @ norm(x) + bias as one weight (N, K) and bias."""
    scale, shift = norm_affine(norm)
    wide = weight.double()
    moved = wide @ shift if bias is None else wide @ shift + bias.double()
    return (wide * scale).to(weight.dtype), moved.to(weight.dtype)


def _weights(owner, name, sources, fold, pack) -> Weights:
    """What fold() gives, packed; under autocast in its dtype, rounded once behind the fold."""
    device = sources[0].device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None

    def make():
        weight, bias = fold()
        if dtype is not None and weight.dtype != torch.float64:
            weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
        graph = torch.compiler.is_compiling() or weight.requires_grad
        return Weights(weight, bias, None if graph else pack(weight))

    return derived(owner, name if dtype is None else (name, dtype), sources, make)


def linear_weights(owner: nn.Module, name: str, linear: nn.Module, norm: Any = None) -> Weights:
    """An nn.Linear (or 1x1 convolution), with the eval-mode BatchNorm behind it folded in."""
    weight, bias = linear.weight, linear.bias
    sources = (weight, bias, *_norm_sources(norm))
    return _weights(
        owner, name, sources, lambda: fold_behind(weight.flatten(1), bias, norm), pack_linear
    )


def normed_linear_weights(owner: nn.Module, name: str, norm: Any, linear: Any) -> Weights:
    """An nn.Linear with the eval-mode BatchNorm in front of it folded in (LeViT's heads)."""
    weight, bias = linear.weight, linear.bias
    sources = (weight, bias, *_norm_sources(norm))
    return _weights(owner, name, sources, lambda: fold_in_front(weight, bias, norm), pack_linear)


def weight_rows(
    owner: nn.Module, name: str, weight: Tensor, bias: Tensor | None, start: int, stop: int
) -> Weights:
    """Output features start ... stop of a linear layer (queries alone out of a packed qkv, say)."""

    def rows():
        return weight[start:stop], None if bias is None else bias[start:stop]

    return _weights(owner, name, (weight, bias), rows, pack_linear)


def conv_weights(owner: nn.Module, name: str, conv: nn.Module, norm: Any = None) -> Weights:
    """An nn.Conv2d of a stem, with the eval-mode BatchNorm behind it folded in."""
    weight, bias = conv.weight, conv.bias
    sources = (weight, bias, *_norm_sources(norm))
    return _weights(owner, name, sources, lambda: fold_behind(weight, bias, norm), pack_conv)


def patch_weights(owner: nn.Module, name: str, conv: nn.Module, norm: Any = None) -> Weights:
    """An nn.Conv2d that cuts an image into patches."""
    weight, bias = conv.weight, conv.bias
    sources = (weight, bias, *_norm_sources(norm))
    return _weights(owner, name, sources, lambda: fold_behind(weight, bias, norm), pack_patch)
