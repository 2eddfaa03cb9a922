"""No peer but a floor: a model's linear layers and convolutions, without all that lies between.

The model runs once to see what it multiplies: every linear layer and every convolution that is not
grouped, in order, with the weights that it has; attention's own products are left out. Each of them
then runs by itself, on numbers that are in cache, with its weights packed before, by torch or by
ours, whichever is faster for that shape; in training the products of its gradients follow it. No
library takes less as long as its products are no faster than these; what ours takes longer is
attention, norms, activations, data that moves, and Python. Here, too, each product is a call from
Python, and writes to memory: of a small model at batch 1 that is some per cent. The answer that is
checked is eager's, since there is none here.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ...nn.conv import Conv
from ...ops import ConvLayer, conv_stem, pack_conv, pack_linear
from ..task import Candidate, Skip, Task
from . import eager

SUMMARY = "a floor: linear layers and convolutions alone, each by the faster of torch and ours"
INSTALL = None

Call = Callable[[], Any]
_ROUNDS, _SECONDS = 5, 1e-3  # in turn, that long each: the least decides


def build(task: Task) -> Candidate:
    if task.kind != "model" or task.autocast or task.on_gpu:
        raise Skip("of a model on a CPU only, and in training of fp32")
    plain = eager.build(task)
    module = task.cast_module()
    seen = _Products(task.differentiates)
    with torch.no_grad(), task.world(), seen:
        module(*task.inputs)
    fastest: dict[tuple, str] = {}
    calls = []
    with torch.inference_mode():
        for shape, ways in seen.found:
            if shape not in fastest:
                fastest[shape] = _fastest(ways)
            calls.append(ways[fastest[shape]])

    def run() -> None:
        with torch.inference_mode():
            for call in calls:
                call()

    by_ours = sum(fastest[shape] != "torch" for shape, _ in seen.found)
    ran = f"{len(calls)}, {by_ours} by ours"
    return Candidate("products", ran, run, plain.outcome, plain.world)


class _OneDnns(Conv):
    def filters(self, x: Tensor) -> bool:
        return False

    multiplies = filters


class _Products(TorchDispatchMode):
    """Finds the products that run inside: the shape of each, and the ways to run it."""

    def __init__(self, with_gradients: bool) -> None:
        super().__init__()
        self.with_gradients = with_gradients
        self.found: list[tuple[tuple, dict[str, Call]]] = []
        self.operands: dict[tuple, Tensor] = {}  # left-hand sides, shared by all of a shape

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        y = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.addmm.default:
            self.product(args[1], args[2], y)
        elif func is torch.ops.aten.mm.default:
            self.product(args[0], args[1], y)
        elif func is torch.ops.aten.convolution.default and not args[6] and args[8] == 1:
            self.convolution(*args[:2], *args[3:6])
        return y

    def product(self, x: Tensor, b: Tensor, y: Tensor) -> None:
        if 0 in (*x.shape, *y.shape):
            return
        weight = b.t()
        x, out = self.like("x", x), self.like("y", y)
        packed = pack_linear(weight)
        ways: dict[str, Call] = {"torch": partial(torch.mm, x, b, out=out)}
        if packed is not None:
            nothing = (None, None, 0.0, None, 0)
            ours = torch.ops.hybridops.linear.default
            ways["ours"] = partial(ours, x, weight, None, packed, *nothing)
        self.found.append((("linear", *x.shape, b.shape[1]), ways))
        if self.with_gradients:
            dx, dweight = self.like("dx", x), self.like("dweight", weight)

            def torchs() -> None:
                torch.mm(out, weight, out=dx)
                torch.mm(out.t(), x, out=dweight)

            ours = torch.ops.hybridops.linear_backward.default
            ways = {"torch": torchs}
            if packed is not None:
                ways["ours"] = partial(ours, out, x, weight)
            self.found.append((("linear gradients", *x.shape, b.shape[1]), ways))

    def convolution(self, x: Tensor, weight: Tensor, stride, padding, dilation) -> None:
        if 0 in (*x.shape, *weight.shape):
            return
        x = self.like("image", x).contiguous(memory_format=torch.channels_last)
        geometry = (tuple(stride), tuple(padding), tuple(dilation))
        ways: dict[str, Call] = {"torch": partial(_OneDnns(weight, None, *geometry), x)}
        conv = Conv(weight, None, *geometry)
        if (conv.filters(x) or conv.multiplies(x)) and not self.with_gradients:
            ways["a body's"] = partial(conv, x)
        packed = pack_conv(weight)
        if packed is not None and stride[0] == stride[1] and tuple(dilation) == (1, 1):
            bias = weight.new_zeros(weight.shape[0])
            layer = ConvLayer(weight, bias, stride[0], tuple(padding) * 2, packed=packed)
            ways["ours"] = partial(conv_stem, x, [layer], layout="image")
        shape = ("conv", *x.shape, *weight.shape, *stride, *padding, *dilation)
        first = not self.found
        self.found.append((shape, ways))
        if self.with_gradients:
            ways = self.conv_gradients(x, weight, *geometry, needs_dimage=not first)
            self.found.append((("conv gradients", first, *shape[1:]), ways))

    def conv_gradients(self, x, weight, stride, padding, dilation, needs_dimage):
        H, W = (
            (n + 2 * p - d * (k - 1) - 1) // s + 1
            for n, p, d, k, s in zip(
                x.shape[2:], padding, dilation, weight.shape[2:], stride, strict=True
            )
        )
        B, Co = len(x), len(weight)
        dz = self.like("dz", x.new_empty(B, H * W, Co))
        image = dz.unflatten(1, (H, W)).permute(0, 3, 1, 2)
        torchs = partial(torch.ops.aten.convolution_backward, image, x, weight, None, stride)
        rest = (padding, dilation, False, (0, 0), 1, (needs_dimage, True, False))
        ways: dict[str, Call] = {"torch": partial(torchs, *rest)}
        if stride[0] == stride[1] and tuple(dilation) == (1, 1) and pack_conv(weight) is not None:
            ours = torch.ops.hybridops.conv_backward.default
            sides = [*padding, *padding]
            ways["ours"] = partial(ours, dz, x, weight, stride[0], sides, needs_dimage)
        return ways

    def like(self, role: str, x: Tensor) -> Tensor:
        key = (role, x.dtype, *x.shape)
        if key not in self.operands:
            self.operands[key] = torch.randn(x.shape).to(x.dtype)
        return self.operands[key]


def _fastest(ways: dict[str, Call]) -> str:
    """The name of the way that takes least."""
    least = dict.fromkeys(ways, float("inf"))
    for _ in range(_ROUNDS if len(ways) > 1 else 0):
        for name, call in ways.items():
            call()
            begin, calls = time.perf_counter(), 0
            while time.perf_counter() - begin < _SECONDS or not calls:
                call()
                calls += 1
            least[name] = min(least[name], (time.perf_counter() - begin) / calls)
    return min(least, key=lambda name: least[name])
