"""Tensors made from a module's parameters for inference (folded, packed), never stale.

A module keeps its own parameters and buffers, so its state_dict never changes. What is derived from
them is cached on the module together with the version of every source, and made again as soon as
one changes: load_state_dict, an optimizer step, `.to()`, an assignment are all seen. Copies and
pickles of a module leave the cache behind. Where a kernel reads a packed copy, nothing else is kept
of a derived weight but its shape: see packed_weights().
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from operator import attrgetter, is_
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from .. import backend
from ..ops import pack_conv, pack_linear
from ..ops._contract import is_autocast_on
from ..ops.layer import Weights
from ..ops.patch_embed import pack_patch

_KEY = "_hybridops_derived"
_version = attrgetter("_version")
_shape = attrgetter("shape")


class _Cache(dict):
    def __deepcopy__(self, memo):
        return _Cache()

    def __reduce__(self):
        return _Cache, ()


class _Entry(NamedTuple):
    sources: tuple[Tensor | None, ...]
    tensors: tuple[Tensor, ...]  # the sources that are not None
    versions: tuple[int, ...]
    # aliases keep the storage alive, so that an equal data_ptr means the same storage
    aliases: tuple[Tensor, ...]
    pointers: tuple[int, ...]
    shapes: tuple[torch.Size, ...]
    strides: tuple[tuple[int, ...], ...]
    readable: bool  # whether gradients could be recorded when it was made: packed_weights()
    value: Any


def clear(module: nn.Module) -> None:
    """Forget what was derived for this module."""
    module.__dict__.pop(_KEY, None)


def kept(module: nn.Module, name: Hashable) -> Any:
    """What was kept for this module under a name, fresh or not, or None."""
    cache = module.__dict__.get(_KEY)
    return None if cache is None else cache.get(name)


def keep(module: nn.Module, name: Hashable, value: Any) -> None:
    """Keep a value where derived() keeps its own: copies and pickles leave it behind."""
    module.__dict__.setdefault(_KEY, _Cache())[name] = value


def forget(module: nn.Module, name: Hashable) -> None:
    """Let go what was kept under a name."""
    cache = module.__dict__.get(_KEY)
    if cache is not None:
        cache.pop(name, None)


def derived(
    owner: nn.Module,
    name: Hashable,
    sources: Sequence[Tensor | None],
    make: Callable[[], Any],
) -> Any:
    """make(), cached on `owner` under `name` until one of `sources` changes.

    Not cached where it must stay in the graph: while one is made, and while a source wants
    gradients.
    """
    if backend.is_captured():
        return make()
    recording = torch.is_grad_enabled()
    if recording and any(s is not None and s.requires_grad for s in sources):
        return make()
    if backend.reference_forced():
        name = name, "reference"  # which packs nothing
    cache = owner.__dict__.get(_KEY)
    if cache is None:
        cache = owner.__dict__[_KEY] = _Cache()
    entry = cache.get(name)
    if entry is not None and _is_fresh(entry, sources) and (entry.readable or not recording):
        return entry.value
    entry = None
    cache.pop(name, None)  # gone before the new one comes
    with torch.inference_mode(False), torch.set_grad_enabled(recording):
        value = make()
    tensors = tuple(s for s in sources if s is not None)
    if not any(t.is_inference() for t in tensors):  # those carry no version to watch
        cache[name] = _Entry(
            tuple(sources),
            tensors,
            tuple(map(_version, tensors)),
            tuple(t.detach() for t in tensors),
            tuple(map(Tensor.data_ptr, tensors)),
            tuple(map(_shape, tensors)),
            tuple(map(Tensor.stride, tensors)),
            recording,
            value,
        )
    return value


def _is_fresh(entry: _Entry, sources: Sequence[Tensor | None]) -> bool:
    """Whether the sources are the very tensors of the entry, and none was written or given data."""
    tensors = entry.tensors
    return (
        len(sources) == len(entry.sources)
        and all(map(is_, sources, entry.sources))
        and tuple(map(_version, tensors)) == entry.versions
        and tuple(map(Tensor.data_ptr, tensors)) == entry.pointers
        and tuple(map(_shape, tensors)) == entry.shapes
        and tuple(map(Tensor.stride, tensors)) == entry.strides
    )


def _count_fused_step(optimizer: Optimizer, *_: Any) -> None:
    """An optimizer with fused=True writes its parameters without bumping their versions."""
    for group in optimizer.param_groups:
        if group.get("fused"):
            increment_version([p for p in group["params"] if p.grad is not None])


register_optimizer_step_post_hook(_count_fused_step)


def _norm_sources(norm):
    # torch's batch_norm moves the running statistics without bumping their version, but counts
    if norm is None:
        return ()
    p, b = norm._parameters, norm._buffers
    if "weight" in p and "num_batches_tracked" in b:  # nn.Module's own look-up costs 0.5 us a name
        moving = (b["running_mean"], b["running_var"], b["num_batches_tracked"])
        return (p["weight"], p["bias"], *moving)
    return norm.weight, norm.bias, norm.running_mean, norm.running_var


def norm_affine(norm: Any) -> tuple[Tensor, Tensor]:
    """An eval-mode BatchNorm as y = x * scale + shift, in fp64 so that folding adds no error."""
    mean, var = norm.running_mean.double(), norm.running_var.double()
    scale = (var + getattr(norm, "eps", 1e-5)).rsqrt()  # frozen ones may have it in their code
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


def in_graph(weight: Tensor) -> bool:
    """Whether a packed copy of this weight would leave the graph, captured or differentiated."""
    return backend.is_captured() or (torch.is_grad_enabled() and weight.requires_grad)


def packed_weights(
    weight: Tensor, bias: Tensor | None, pack: Callable[[Tensor], Tensor | None]
) -> Weights:
    """A layer as the kernels take it, pack(weight) beside it where that may leave the graph.

    Of the weight a kernel then asks no more than shape and dtype. Only gradients read its numbers,
    and the reference, which packs nothing; for all others a single NaN stands for all of them, so
    that memory holds a weight once and a reader it should not have had cannot go unseen.
    """
    if in_graph(weight) or backend.reference_forced():
        return Weights(weight, bias)
    packed = pack(weight)
    if packed is not None and not torch.is_grad_enabled():
        weight = weight.new_full((), torch.nan).expand(weight.shape)
    return Weights(weight, bias, packed)


def folded_weights(owner, name, sources, fold, pack) -> Weights:
    """What fold() gives, packed; under autocast in its dtype, rounded once behind the fold."""
    lead = sources[0]
    dtype = torch.get_autocast_dtype(lead.device.type) if is_autocast_on(lead) else None

    def make():
        weight, bias = fold()
        if dtype is not None and weight.dtype != torch.float64:
            weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
        return packed_weights(weight, bias, pack)

    return derived(owner, name if dtype is None else (name, dtype), sources, make)


def linear_weights(owner: nn.Module, name: str, linear: Any, norm: Any = None) -> Weights:
    """An nn.Linear (or 1x1 convolution), with the eval-mode BatchNorm behind it folded in."""
    weight, bias = linear.weight, linear.bias
    sources = (weight, bias, *_norm_sources(norm))
    return folded_weights(
        owner, name, sources, lambda: fold_behind(weight.flatten(1), bias, norm), pack_linear
    )


def normed_linear_weights(owner: nn.Module, name: str, norm: Any, linear: Any) -> Weights:
    """An nn.Linear with the eval-mode BatchNorm in front of it folded in (LeViT's heads)."""
    weight, bias = linear.weight, linear.bias
    sources = (weight, bias, *_norm_sources(norm))
    return folded_weights(
        owner, name, sources, lambda: fold_in_front(weight, bias, norm), pack_linear
    )


def weight_rows(
    owner: nn.Module,
    name: str,
    weight: Tensor,
    bias: Tensor | None,
    start: int,
    stop: int,
    bias_start: int | None = None,
) -> Weights:
    """Output features start ... stop of a linear layer (queries alone out of a packed qkv, say).

    bias_start: where their biases begin, if not at `start`.
    """
    first = start if bias_start is None else bias_start

    def rows():
        part = None if bias is None else bias[first : first + stop - start]
        return weight[start:stop], part

    return folded_weights(owner, name, (weight, bias), rows, pack_linear)


def conv_weights(owner: nn.Module, name: str, conv: Any, norm: Any = None) -> Weights:
    """An nn.Conv2d of a stem, with the eval-mode BatchNorm behind it folded in."""
    weight, bias = conv.weight, conv.bias
    sources = (weight, bias, *_norm_sources(norm))
    return folded_weights(owner, name, sources, lambda: fold_behind(weight, bias, norm), pack_conv)


def patch_weights(owner: nn.Module, name: str, conv: Any, norm: Any = None) -> Weights:
    """An nn.Conv2d that cuts an image into patches."""
    weight, bias = conv.weight, conv.bias
    sources = (weight, bias, *_norm_sources(norm))
    return folded_weights(owner, name, sources, lambda: fold_behind(weight, bias, norm), pack_patch)
