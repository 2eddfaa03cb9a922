"""What each entry of the tuning tables is tuned on: calls in shapes like those of models.

A call is the name of a function in aot.py, which makes it on meta tensors, and its arguments.
`case` gives the same as a case of the benchmark, which a GPU checks and times.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from ..bench.case import Attention, Case, Conv, ConvStem, Linear, PatchEmbed, Peg

HALF, FULL = torch.bfloat16, torch.float32
Entry = tuple[str, str, int]  # kernel, "half" or "float32", largest width
Call = tuple[str, tuple]


def calls() -> Iterator[Call]:
    """At least one call for every entry of the tuning table, and for every kernel and option."""
    for D in (64, 128):
        yield "attend", (D,)
        yield "attend", (D, FULL)
    yield "attend", (16, HALF, 32, (196, 196), 64, "table")  # LeViT, and LeViT-256 downsampling
    yield "attend", (32, HALF, 128, (49, 196), 8, "table")
    for D in (64, 128):
        yield "attend", (D, FULL, D, (197, 197), 8, "table")
    yield "attend", (32, HALF, 32, (49, 49), 64, "table", True)  # what takes most registers
    yield "attend", (64, HALF, 64, (197, 197), 8, "dense", True)
    yield "attend", (36, HALF, 36, (256, 256), 8)
    yield "attend", (32, HALF, 32, (100, 950), 2, None, True)  # DETR: padding, split keys
    yield "attend", (16, HALF, 16, (1, 1), 1, "table", True)  # sizes that become constants
    for K in (3, 7):
        yield "grid", (K,)
        yield "grid", (K, FULL)
    for N in (64, 1536):
        yield "product", (N,)
        yield "product", (N, HALF, True)
    yield "product", (1536, FULL)
    yield "stem", ((24, 48, 128),)
    yield "stem", ((32, 64), FULL)
    yield "patches", (192,)
    yield "patches", (192, FULL)
    yield "patches", (768,)


def case(call: Call, batch: int = 1) -> tuple[Case, torch.dtype]:
    """The same as a case, on `batch` times as many images; and its dtype."""
    function, arguments = call
    return _CASES[function](batch, *arguments)


def _attend(batch, D, dtype=HALF, Dv=None, N=(1024, 1024), B=8, bias=None, mask=False):
    options: dict[str, Any] = {"bias": (1, 4, *N) if bias == "dense" else bias}
    options["mask"] = "tail" if mask else None
    options["activation"] = "hardswish" if bias == "table" else "none"
    return Attention("tune", B=B * batch, H=4, Nq=N[0], Nk=N[1], D=D, Dv=Dv, **options), dtype


def _grid(batch, K, dtype=HALF):
    return Peg("tune", B=8 * batch, H=14, W=14, C=384, K=K, prefix=1), dtype


def _product(batch, N, dtype=HALF, norm=False):
    options: dict[str, Any] = {"norm": "affine" if norm else None, "residual": not norm}
    options["activation"] = "gelu" if norm else "none"
    return Linear("tune", M=(8 * batch, 196), N=N, K=384, **options), dtype


def _stem(batch, channels, dtype=HALF):
    layers = tuple(Conv(C, activation="hardswish") for C in channels)
    return ConvStem("tune", B=8 * batch, H=224, W=224, layers=layers, pool=(3, 2, 1)), dtype


def _patches(batch, C, dtype=HALF):
    size = {"H": 224, "W": 224, "C": C, "kernel": (16, 16)}
    return PatchEmbed("tune", B=8 * batch, **size, norm="affine", pos=197, prefix=1), dtype


_CASES = {
    "attend": _attend,
    "grid": _grid,
    "product": _product,
    "stem": _stem,
    "patches": _patches,
}
