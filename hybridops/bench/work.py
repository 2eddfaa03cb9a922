"""How many operations a module takes: torch's count, and the least that anybody needs for it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import torch
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count

T = TypeVar("T")


class Work(NamedTuple):
    """flop: as written, which rates are made of. least: by Winograd, where that could be.

    What takes less time than the machine needs for the least has left something out.
    """

    flop: float
    least: float


def left_by_winograd(stride: int) -> float:
    """Of a 3 x 3 convolution's products, the share that Winograd's filtering leaves
    (ops/conv3x3.py): of 2 x 4 outputs for stride 1, of 2 x 2 for stride 2."""
    return {1: 24 / 72, 2: 25 / 36}.get(stride, 1.0)


def counted(run: Callable[[], T]) -> tuple[T, Work]:
    """run()'s result and its work, by the shapes that it sees."""
    spared = 0.0

    def convolution(x, weight, _bias, stride, _padding, dilation, transposed, *rest, out_shape):
        nonlocal spared
        flop = conv_flop_count(x, weight, out_shape, transposed=transposed)
        steps, groups = set(stride), rest[1]
        plain = groups == 1 and not transposed and set(dilation) == {1} and len(steps) == 1
        if plain and tuple(weight[2:]) == (3, 3):
            spared += flop * (1 - left_by_winograd(steps.pop()))
        return flop

    aten = torch.ops.aten
    mapping = {
        aten.convolution: convolution,
        aten.convolution_backward: _convolution_backward,
    }
    with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        result = run()
    total = float(counter.get_total_flops())
    return result, Work(total, total - spared)


def _convolution_backward(dy, _x, weight, *args, out_shape=None, **kwargs) -> int:
    """torch's own count forgets that a depthwise weight gradient looks at one channel at a time."""
    asked = args[-1] if args and isinstance(args[-1], (list, tuple)) else (True, True)
    return 2 * math.prod(dy) * math.prod(weight[1:]) * sum(map(bool, asked[:2]))
