"""Layers one behind the other in one dispatch, for inference.

    chain(x) = layer_n(... layer_1(x))

Each layer is one of `ops/layer.py`'s, or LeViT's subsampling attention. At batch 1 a dispatch and
what Python does around it cost as much as a small product, and a model has dozens of them: a
`Chain` is made once, of weights that are packed already, and has the kernels read and check all of
its layers once: a call hands over x and the number of that plan. Wherever one dispatch cannot
serve, it calls the layers one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress
from enum import IntEnum
from functools import partial
from itertools import chain as joined
from typing import Any, NamedTuple
from weakref import finalize

import torch
from torch import Tensor

from .. import backend
from ._contract import CODES, LARGEST_PADDING, REFUSALS, check_int, library
from .attention import attention
from .layer import NO_NORM, REFUSED, Norm, Weights, attention_layer, mlp_layer
from .linear import linear


class Step(IntEnum):
    """What csrc/cpu/chain.cpp calls the layers."""

    ATTENTION = 0
    MLP = 1
    SUBSAMPLE = 2
    WINDOWS = 3
    REDUCED = 4
    POSITIONS = 5
    LINEAR = 6
    MEAN = 7


class Layer(NamedTuple):
    """One layer of a chain: what it means, and its operands in the order of csrc/cpu/chain.cpp."""

    call: Callable[[Tensor], Tensor]
    code: Step
    tensors: tuple[Tensor | None, ...]
    ints: tuple[int, ...]
    floats: tuple[float, ...]


def attention_step(
    qkv: Weights,
    out: Weights,
    *,
    heads: int,
    key_dim: int,
    scale: float | None = None,
    interleaved: bool = False,
    norm: Norm | None = None,
    bias: Tensor | None = None,
    activation: str = "none",
    residual: bool = False,
) -> Layer:
    """attention_layer(x, ...) as a layer of a chain."""
    call = partial(
        attention_layer,
        qkv=qkv,
        out=out,
        heads=heads,
        key_dim=key_dim,
        scale=scale,
        interleaved=interleaved,
        norm=norm,
        bias=bias,
        activation=activation,
        residual=residual,
    )
    gamma, beta, eps = norm or NO_NORM
    ints = (heads, key_dim, int(interleaved), CODES[activation], int(residual))
    factor = key_dim**-0.5 if scale is None else scale
    return Layer(call, Step.ATTENTION, (gamma, beta, *qkv, bias, *out), ints, (eps, factor))


def mlp_step(
    up: Weights,
    down: Weights,
    *,
    activation: str,
    norm: Norm | None = None,
    residual: bool = False,
) -> Layer:
    """mlp_layer(x, ...) as a layer of a chain."""
    call = partial(mlp_layer, up=up, down=down, activation=activation, norm=norm, residual=residual)
    gamma, beta, eps = norm or NO_NORM
    ints = (CODES[activation], int(residual))
    return Layer(call, Step.MLP, (gamma, beta, *up, *down), ints, (eps,))


def linear_step(w: Weights, *, norm: Norm | None = None) -> Layer:
    """linear(x, ...) as a layer of a chain."""
    gamma, beta, eps = norm or NO_NORM
    call = partial(linear, weight=w.weight, bias=w.bias, norm=norm, packed=w.packed)
    return Layer(call, Step.LINEAR, (gamma, beta, *w), (), (eps,))


def mean_step() -> Layer:
    """The mean of an image's tokens: (B, N, C) -> (B, 1, C)."""
    return Layer(partial(torch.mean, dim=1, keepdim=True), Step.MEAN, (), (), ())


def subsample_step(
    kv: Weights,
    q: Weights,
    out: Weights,
    *,
    heads: int,
    key_dim: int,
    scale: float,
    grid: tuple[int, int],
    stride: int,
    bias: Tensor,
    activation: str,
) -> Layer:
    """LeViT's subsampling attention: (B, H*W, C) -> (B, ceil(H/stride) * ceil(W/stride), Co).

    Queries are those of every stride-th token down and across the grid (H, W); kv.weight's rows are
    k and v head by head; bias (1, heads, Nq, H*W); activation stands between attention and `out`.
    Raises ValueError for numbers that are none of a grid or of heads.
    """
    sizes = {"heads": heads, "key_dim": key_dim, "height": grid[0], "width": grid[1]}
    for name, value in (sizes | {"stride": stride}).items():
        check_int("subsample_step", name, value, 1, LARGEST_PADDING)

    def call(x):
        B, N, C = x.shape
        kept = x.view(B, *grid, C)[:, ::stride, ::stride].reshape(B, -1, C)
        keys = linear(x, kv.weight, kv.bias, packed=kv.packed).view(B, N, heads, -1)
        k, v = keys.split([key_dim, keys.shape[3] - key_dim], 3)
        queries = linear(kept, q.weight, q.bias, packed=q.packed).view(B, -1, heads, key_dim)
        mixed = attention(queries, k, v, bias=bias, scale=scale, activation=activation)
        return linear(mixed.flatten(2), out.weight, out.bias, packed=out.packed)

    ints = (heads, key_dim, *grid, stride, CODES[activation])
    return Layer(call, Step.SUBSAMPLE, (*kv, *q, bias, *out), ints, (scale,))


class _Plan:
    """A plan of the kernels', which they forget when it goes."""

    def __init__(self, layers: tuple[Layer, ...]) -> None:
        tensors = joined.from_iterable(layer.tensors for layer in layers)
        self.number: int = torch.ops.hybridops.chain_plan.default(
            [layer.code for layer in layers],
            # aliases, so that what the plan reads stays when a parameter is given other data
            [None if t is None else t.detach() for t in tensors],
            list(joined.from_iterable(layer.ints for layer in layers)),
            list(joined.from_iterable(layer.floats for layer in layers)),
        )
        finalize(self, torch.ops.hybridops.chain_forget.default, self.number).atexit = False


class Chain:
    """Layers that run one behind the other: chain(x), x (B, N, C), is one dispatch where it may.

    Its layers' tensors are read when it first runs; for others make another chain.
    """

    _plan: _Plan | None = None

    def __init__(self, layers: Iterable[Layer]) -> None:
        self.layers = tuple(layers)
        if not self.layers:
            raise ValueError("Chain: needs one layer at least")

    def __getstate__(self) -> dict[str, Any]:
        return {"layers": self.layers}  # a copy makes a plan of its own

    def __call__(self, x: Tensor) -> Tensor:
        if type(x) is Tensor and backend.runs_at_once(x):
            with suppress(*REFUSALS), backend.below_autograd():
                if self._plan is None:
                    self._plan = _Plan(self.layers)
                return _chain(x, self._plan.number)
            backend.fallbacks["chain", REFUSED] += 1
        for layer in self.layers:
            x = layer.call(x)
        return x


# contract
library.define("chain_plan(int[] layers, Tensor?[] tensors, int[] ints, float[] floats) -> int")
library.define("chain(Tensor x, int plan) -> Tensor")
library.define("chain_forget(int plan) -> int")

_chain = torch.ops.hybridops.chain.default
