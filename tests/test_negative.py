"""Bad calls: each raises a ValueError, TypeError or IndexError that names the op; none crashes.

Every entry changes one argument of a call that works, and says a word that the message must hold.
"""

from __future__ import annotations

import math

import pytest
import torch

from hybridops import ops


def f(*shape, dtype=torch.float32, device="cpu"):
    return torch.zeros(shape, dtype=dtype, device=device)


def ints(*shape, value=0, dtype=torch.int64):
    return torch.full(shape, value, dtype=dtype)


# Packed and with a bias: in inference such a layer goes to the kernel before the door looks at it.
LAYER = ops.ConvLayer(f(6, 3, 3, 3), f(6), stride=2, packed=ops.pack_conv(f(6, 3, 3, 3)))
GOOD = {
    "attention": {"q": f(2, 5, 3, 8), "k": f(2, 7, 3, 8), "v": f(2, 7, 3, 4)},
    "linear": {"x": f(2, 5, 8), "weight": f(6, 8)},
    "peg": {"x": f(2, 13, 8), "weight": f(8, 1, 3, 3), "grid": (3, 4), "prefix": 1},
    "patch_embed": {"image": f(2, 3, 16, 16), "weight": f(6, 3, 8, 8)},
    "conv_stem": {"image": f(2, 3, 16, 16), "layers": [LAYER]},
}
HOSTILE = {
    "negative": -1,
    "2**31": 2**31,
    "2**63": 2**63,
    "bool": True,
    "float": 1.0,
    "text": "1",
    "tensor": torch.tensor(1),
}


def layer(**changes):
    return {"layers": [LAYER._replace(**changes)]}


BAD = {
    "attention": {
        "q not a tensor": ({"q": [[1.0]]}, TypeError, "q must be a Tensor, got list"),
        "k not a tensor": ({"k": None}, TypeError, "k must be a Tensor, got NoneType"),
        "q integer": ({"q": ints(2, 5, 3, 8)}, TypeError, "floating-point"),
        "q complex": ({"q": f(2, 5, 3, 8, dtype=torch.complex64)}, TypeError, "floating-point"),
        "q rank 3": ({"q": f(2, 5, 8)}, ValueError, r"4 dimensions, got shape \(2, 5, 8\)"),
        "v rank 5": ({"v": f(2, 7, 3, 4, 1)}, ValueError, "4 dimensions"),
        "k bf16": ({"k": f(2, 7, 3, 8, dtype=torch.bfloat16)}, TypeError, "float32 like"),
        "v fp64": ({"v": f(2, 7, 3, 4, dtype=torch.float64)}, TypeError, "float32 like"),
        "k on meta": ({"k": f(2, 7, 3, 8, device="meta")}, ValueError, "on cpu"),
        "k other batch": ({"k": f(1, 7, 3, 8)}, ValueError, r"k must be \(2, Nk, 3, 8\)"),
        "k other heads": ({"k": f(2, 7, 1, 8)}, ValueError, r"got \(2, 7, 1, 8\)"),
        "k other size": ({"k": f(2, 7, 3, 9)}, ValueError, r"got \(2, 7, 3, 9\)"),
        "v other tokens": ({"v": f(2, 8, 3, 4)}, ValueError, r"v must be \(2, 7, 3, Dv\)"),
        "bias rank 2": ({"bias": f(5, 7)}, ValueError, "broadcast"),
        "bias rank 5": ({"bias": f(1, 1, 1, 5, 7)}, ValueError, "broadcast"),
        "bias transposed": ({"bias": f(2, 3, 7, 5)}, ValueError, r"\(2, 3, 5, 7\)"),
        "bias bf16": ({"bias": f(1, 3, 5, 7, dtype=torch.bfloat16)}, TypeError, "bias"),
        "bias bool": ({"bias": f(1, 3, 5, 7).bool()}, TypeError, "bias"),
        "bias not a tensor": ({"bias": 1.0}, TypeError, "bias must be a Tensor"),
        "index without table": ({"bias_index": ints(5, 7)}, ValueError, "needs bias"),
        "index float": ({"bias": f(3, 9), "bias_index": f(5, 7)}, TypeError, "int64 or int32"),
        "index bool": ({"bias": f(3, 9), "bias_index": f(5, 7).bool()}, TypeError, "int64 or"),
        "index a list": ({"bias": f(3, 9), "bias_index": [[0]]}, TypeError, "tensor"),
        "index transposed": (
            {"bias": f(3, 9), "bias_index": ints(7, 5)},
            ValueError,
            r"\(5, 7\), got \(7, 5\)",
        ),
        "index too large": (
            {"bias": f(3, 9), "bias_index": ints(5, 7, value=9)},
            IndexError,
            r"\[0, 9\)",
        ),
        "index negative": (
            {"bias": f(3, 9), "bias_index": ints(5, 7, value=-1)},
            IndexError,
            "bias_index",
        ),
        "index into nothing": (
            {"bias": f(3, 0), "bias_index": ints(5, 7)},
            IndexError,
            "bias_index",
        ),
        "index huge": (
            {"bias": f(3, 9), "bias_index": ints(5, 7, value=2**62)},
            IndexError,
            "bias_index",
        ),
        "table other heads": ({"bias": f(2, 9), "bias_index": ints(5, 7)}, ValueError, r"\(3, T\)"),
        "table dense": ({"bias": f(3, 5, 7), "bias_index": ints(5, 7)}, ValueError, "2 dimensions"),
        "mask float": ({"key_padding_mask": f(2, 7)}, TypeError, "bool"),
        "mask a list": ({"key_padding_mask": [True]}, TypeError, "bool"),
        "mask of queries": ({"key_padding_mask": f(2, 5).bool()}, ValueError, r"\(2, 7\)"),
        "scale NaN": ({"scale": math.nan}, ValueError, "finite"),
        "scale infinite": ({"scale": math.inf}, ValueError, "finite"),
        "scale text": ({"scale": "1"}, TypeError, "number"),
        "scale bool": ({"scale": True}, TypeError, "number"),
        "activation unknown": ({"activation": "softplus"}, ValueError, "hardswish"),
        "activation None": ({"activation": None}, ValueError, "activation"),
        "activation a list": ({"activation": ["relu"]}, ValueError, "activation"),
    },
    "linear": {
        "x not a tensor": ({"x": 3}, TypeError, "x must be a Tensor, got int"),
        "weight not a tensor": ({"weight": None}, TypeError, "weight must be a Tensor"),
        "x integer": ({"x": ints(2, 5, 8)}, TypeError, "floating-point"),
        "x scalar": ({"x": f()}, ValueError, "scalar"),
        "weight rank 3": ({"weight": f(6, 8, 1)}, ValueError, "2 dimensions"),
        "weight transposed": ({"weight": f(8, 6)}, ValueError, r"\(..., 6\).*got \(2, 5, 8\)"),
        "weight bf16": ({"weight": f(6, 8, dtype=torch.bfloat16)}, TypeError, "float32 like"),
        "weight on meta": ({"weight": f(6, 8, device="meta")}, ValueError, "on cpu"),
        "x on meta": ({"x": f(2, 5, 8, device="meta")}, ValueError, "on meta"),
        "bias of inputs": ({"bias": f(8)}, ValueError, r"bias must have shape \(6,\), got \(8,\)"),
        "bias rank 2": ({"bias": f(1, 6)}, ValueError, "1 dimension"),
        "bias a number": ({"bias": 0.5}, TypeError, "bias must be a Tensor"),
        "norm of outputs": ({"norm": (f(6), f(6), 1e-5)}, ValueError, r"norm weight.*\(8,\)"),
        "norm bias": ({"norm": (f(8), f(6), 1e-5)}, ValueError, "norm bias"),
        "norm bf16": (
            {"norm": (f(8, dtype=torch.bfloat16), None, 1e-5)},
            TypeError,
            "norm weight",
        ),
        "norm of two": ({"norm": (f(8), f(8))}, ValueError, "norm must be"),
        "norm a tensor": ({"norm": f(8)}, (ValueError, TypeError), "norm must be"),
        "norm without weight": ({"norm": (None, f(8), 1e-5)}, TypeError, "norm weight"),
        "eps a bool": ({"norm": (f(8), None, True)}, TypeError, "eps"),
        "eps text": ({"norm": (f(8), None, "1")}, TypeError, "eps"),
        "eps NaN": ({"norm": (f(8), None, math.nan)}, ValueError, "eps"),
        "residual of inputs": ({"residual": f(2, 5, 8)}, ValueError, r"\(2, 5, 6\)"),
        "residual broadcast": ({"residual": f(1, 5, 6)}, ValueError, r"\(2, 5, 6\)"),
        "residual rank": ({"residual": f(10, 6)}, ValueError, "residual"),
        "residual bf16": ({"residual": f(2, 5, 6).bfloat16()}, TypeError, "residual"),
        "packed not a tensor": ({"packed": True}, TypeError, "packed"),
        "activation unknown": ({"activation": "tanh"}, ValueError, "relu"),
    },
    "peg": {
        "x not a tensor": ({"x": "x"}, TypeError, "x must be a Tensor, got str"),
        "x integer": ({"x": ints(2, 13, 8)}, TypeError, "floating-point"),
        "x an image": ({"x": f(2, 8, 3, 4)}, ValueError, "3 dimensions"),
        "weight rank 3": ({"weight": f(8, 3, 3)}, ValueError, "4 dimensions"),
        "weight dense": ({"weight": f(8, 8, 3, 3)}, ValueError, r"\(8, 1, K, K\)|\(8, 1, 3, 3\)"),
        "weight not square": ({"weight": f(8, 1, 3, 5)}, ValueError, "weight"),
        "weight of nothing": ({"weight": f(8, 1, 0, 0)}, ValueError, "weight"),
        "weight other channels": ({"weight": f(4, 1, 3, 3)}, ValueError, r"got \(4, 1, 3, 3\)"),
        "weight fp64": ({"weight": f(8, 1, 3, 3).double()}, TypeError, "float32 like"),
        "weight on meta": ({"weight": f(8, 1, 3, 3, device="meta")}, ValueError, "on cpu"),
        "bias size": ({"bias": f(7)}, ValueError, r"\(8,\)"),
        "bias integer": ({"bias": ints(8)}, TypeError, "bias"),
        "grid does not fit": ({"grid": (4, 4)}, ValueError, r"4\*4"),
        "grid of one": ({"grid": (12,)}, ValueError, r"\(H, W\)"),
        "grid a number": ({"grid": 12}, ValueError, r"\(H, W\)"),
        "grid None": ({"grid": None}, ValueError, r"\(H, W\)"),
        "grid negative twice": ({"grid": (-3, -4)}, ValueError, "grid height"),
        "grid of 2**64 cells": ({"grid": (2**33, 2**31), "prefix": 13}, ValueError, "grid height"),
        "prefix forgotten": ({"prefix": 0}, ValueError, r"0 \+ 3\*4"),
        "stride with residual": ({"stride": 2}, ValueError, "residual and gate"),
        "gate and stride": (
            {"stride": 2, "gate": True, "residual": False},
            ValueError,
            "residual and gate",
        ),
        "kernel too large": (
            {"weight": f(8, 1, 9, 9), "padding": 0, "residual": False},
            ValueError,
            "does not fit",
        ),
        "activation unknown": ({"activation": "mish"}, ValueError, "silu"),
        "residual text": ({"residual": "yes"}, TypeError, "residual"),
        "gate a tensor": ({"gate": f(1)}, TypeError, "gate"),
        **{
            f"{name} {what}": ({name: value}, (ValueError, TypeError), name)
            for name in ("prefix", "stride", "padding")
            for what, value in HOSTILE.items()
        },
        "stride zero": ({"stride": 0}, ValueError, "stride"),
        "padding huge": ({"padding": 2**31 - 1, "residual": False}, ValueError, "padding"),
        **{
            f"grid {what}": ({"grid": (value, 4)}, (ValueError, TypeError), "peg: (grid|x)")
            for what, value in HOSTILE.items()
        },
    },
    "patch_embed": {
        "image not a tensor": ({"image": None}, TypeError, "image must be a Tensor"),
        "image int64": ({"image": ints(2, 3, 16, 16)}, TypeError, "image"),
        "image rank 3": ({"image": f(3, 16, 16)}, ValueError, "4 dimensions"),
        "bytes rank 3": ({"image": f(3, 16, 16).byte()}, ValueError, "4 dimensions"),
        "image bf16": ({"image": f(2, 3, 16, 16).bfloat16()}, TypeError, "image"),
        "image on meta": (
            {"image": f(2, 3, 16, 16, device="meta")},
            ValueError,
            "image must be on cpu",
        ),
        "bytes on meta": (
            {"image": f(2, 3, 16, 16, device="meta", dtype=torch.uint8)},
            ValueError,
            "image must be on cpu",
        ),
        "image NHWC": ({"image": f(2, 16, 16, 3)}, ValueError, r"\(C, 16, Kh, Kw\)"),
        "weight rank 2": ({"weight": f(6, 192)}, ValueError, "4 dimensions"),
        "weight integer": ({"weight": ints(6, 3, 8, 8)}, TypeError, "floating-point"),
        "weight None": ({"weight": None}, TypeError, "weight must be a Tensor"),
        "weight empty window": ({"weight": f(6, 3, 0, 8)}, ValueError, "weight"),
        "image too small": ({"image": f(2, 3, 4, 16)}, ValueError, "does not fit"),
        "bias size": ({"bias": f(3)}, ValueError, r"\(6,\)"),
        "bias fp64": ({"bias": f(6).double()}, TypeError, "bias"),
        "bias rank 2": ({"bias": f(2, 3)}, ValueError, "bias"),
        "bias on meta": ({"bias": f(6, device="meta")}, ValueError, "bias must be on cpu"),
        "weight on meta": ({"weight": f(6, 3, 8, 8, device="meta")}, ValueError, "must be on"),
        "norm size": ({"norm": (f(3), f(3), 1e-5)}, ValueError, "norm weight"),
        "norm of two": ({"norm": (f(6), f(6))}, ValueError, "norm must be"),
        "norm bias on meta": ({"norm": (f(6), f(6, device="meta"), 1e-5)}, ValueError, "norm bias"),
        "norm eps negative": ({"norm": (f(6), f(6), -1e-5)}, ValueError, "norm eps"),
        "norm eps NaN": ({"norm": (f(6), f(6), float("nan"))}, ValueError, "norm eps"),
        "norm eps a bool": ({"norm": (f(6), f(6), True)}, TypeError, "norm eps"),
        "prefix bf16": ({"prefix": f(1, 6).bfloat16()}, TypeError, "prefix"),
        "pos_embed rows": ({"pos_embed": f(5, 6)}, ValueError, r"got \(5, 6\)"),
        "pos_embed channels": ({"pos_embed": f(4, 3)}, ValueError, "pos_embed"),
        "pos_embed per image": ({"pos_embed": f(2, 4, 6)}, ValueError, "pos_embed"),
        "prefix channels": ({"prefix": f(1, 3)}, ValueError, "prefix"),
        "prefix rank 1": ({"prefix": f(6)}, ValueError, "prefix"),
        "mean alone": ({"mean": f(3)}, ValueError, "together"),
        "std alone": ({"std": f(3)}, ValueError, "together"),
        "mean channels": ({"mean": f(1), "std": f(1)}, ValueError, r"mean.*\(3,\)"),
        "mean a tuple": ({"mean": (0.5,) * 3, "std": f(3)}, TypeError, "mean must be a Tensor"),
        "packed and mean": (
            {"mean": f(3), "std": f(3) + 1, "packed": f(9)},
            ValueError,
            "packed excludes",
        ),
        "padding word": ({"padding": "valid"}, ValueError, "'same'"),
        "padding of two": ({"padding": (1, 1)}, ValueError, "top, left, bottom, right"),
        "padding of floats": ({"padding": (1.0, 1, 1, 1)}, TypeError, "padding"),
        "stride zero": ({"stride": 0}, ValueError, "stride"),
        "padding huge": ({"padding": 2**31 - 1}, ValueError, "padding"),
        **{
            f"{name} {what}": ({name: value}, (ValueError, TypeError), name)
            for name in ("stride", "padding")
            for what, value in HOSTILE.items()
        },
    },
    "conv_stem": {
        "image not a tensor": ({"image": [1]}, TypeError, "image must be a Tensor"),
        "image int32": ({"image": ints(2, 3, 16, 16).int()}, TypeError, "image"),
        "image rank 3": ({"image": f(3, 16, 16)}, ValueError, "4 dimensions"),
        "image fp64": ({"image": f(2, 3, 16, 16).double()}, TypeError, "image"),
        "image bf16": ({"image": f(2, 3, 16, 16).bfloat16()}, TypeError, "image"),
        "image on meta": (
            {"image": f(2, 3, 16, 16, device="meta")},
            ValueError,
            "image must be on cpu",
        ),
        "bytes on meta": (
            {"image": f(2, 3, 16, 16, device="meta", dtype=torch.uint8)},
            ValueError,
            "image must be on cpu",
        ),
        "weight on meta": (layer(weight=f(6, 3, 3, 3, device="meta")), ValueError, "must be on"),
        "bias on meta": (layer(bias=f(6, device="meta")), ValueError, "layer 0 bias"),
        "bias rank 2": (layer(bias=f(2, 3)), ValueError, "layer 0 bias"),
        "image channels": ({"image": f(2, 4, 16, 16)}, ValueError, r"\(Co, 4, Kh, Kw\)"),
        "no layers": ({"layers": []}, ValueError, "at least one"),
        "layers None": ({"layers": None}, TypeError, "layers"),
        "layer a tensor": ({"layers": [f(6, 3, 3, 3)]}, TypeError, "ConvLayer"),
        "layer a module": ({"layers": [torch.nn.Conv2d(3, 6, 3)]}, TypeError, "ConvLayer"),
        "weight None": (layer(weight=None), TypeError, "layer 0 weight must be a Tensor"),
        "weight rank 2": (layer(weight=f(6, 27)), ValueError, "layer 0 weight"),
        "weight grouped": (layer(weight=f(6, 1, 3, 3)), ValueError, r"\(Co, 3, Kh, Kw\)"),
        "weight empty window": (layer(weight=f(6, 3, 3, 0)), ValueError, "layer 0 weight"),
        "weight integer": (layer(weight=ints(6, 3, 3, 3)), TypeError, "floating-point|like"),
        "second layer channels": (
            {"layers": [ops.ConvLayer(f(6, 3, 3, 3)), ops.ConvLayer(f(6, 3, 3, 3))]},
            ValueError,
            r"layer 1 weight must be \(Co, 6, Kh, Kw\)",
        ),
        "second layer dtype": (
            {"layers": [ops.ConvLayer(f(6, 3, 3, 3)), ops.ConvLayer(f(6, 6, 3, 3).double())]},
            TypeError,
            "layer 1 weight",
        ),
        "bias size": (layer(bias=f(3)), ValueError, "layer 0 bias"),
        "bias dtype": (layer(bias=f(6).bfloat16()), TypeError, "layer 0 bias"),
        "activation unknown": (layer(activation="swish"), ValueError, "activation"),
        "groups do not divide": (
            layer(group_norm=(4, f(6), f(6), 1e-5)),
            ValueError,
            "divide 6 channels, got 4",
        ),
        "group_norm of three": (layer(group_norm=(2, f(6), f(6))), ValueError, "group_norm"),
        "group_norm size": (layer(group_norm=(2, f(3), f(6), 1e-5)), ValueError, "group_norm"),
        "affine size": (layer(affine=(f(6), f(3))), ValueError, "affine shift"),
        "affine of one": (layer(affine=(f(6),)), ValueError, "affine"),
        "packed a number": (layer(packed=1), TypeError, "layer 0 packed"),
        "padding word": (layer(padding="full"), ValueError, "'same'"),
        "padding of three": (layer(padding=(1, 1, 1)), ValueError, "top, left"),
        "image too small": ({"image": f(2, 3, 2, 2)}, ValueError, "layer 0 does not fit"),
        "pool too large": ({"pool": ops.MaxPool(9, 1, 0)}, ValueError, "pool does not fit"),
        "pool zero": ({"pool": ops.MaxPool(0)}, ValueError, "pool kernel"),
        "pool stride": ({"pool": ops.MaxPool(3, -2)}, ValueError, "pool stride"),
        "pool a number": ({"pool": 3}, TypeError, "pool"),
        "layout": ({"layout": "nhwc"}, ValueError, "tokens"),
        "stride zero": (layer(stride=0), ValueError, "stride"),
        "padding huge": (layer(padding=2**31 - 1), ValueError, "padding"),
        **{
            f"{name} {what}": (layer(**{name: value}), (ValueError, TypeError), name)
            for name in ("stride", "padding")
            for what, value in HOSTILE.items()
        },
        **{
            f"pool padding {what}": (
                {"pool": ops.MaxPool(3, 2, value)},
                (ValueError, TypeError),
                "padding",
            )
            for what, value in HOSTILE.items()
        },
    },
}
CALLS = [
    pytest.param(op, *bad, id=f"{op}-{what}")
    for op, calls in BAD.items()
    for what, bad in calls.items()
]


@pytest.mark.parametrize("op", GOOD)
def test_the_good_call_works_and_many_bad_ones_are_listed(op):
    getattr(ops, op)(**GOOD[op])
    assert len(BAD[op]) >= 15


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize(("op", "change", "error", "words"), CALLS)
def test_bad_call(op, change, error, words, mode):
    with mode(), pytest.raises(error, match=rf"^{op}: .*") as raised:
        getattr(ops, op)(**GOOD[op] | change)
    assert raised.match(words)
    assert type(raised.value) in (ValueError, TypeError, IndexError)


@pytest.mark.parametrize("packed", [f(3), f(0), f(6, 3, 8, 8).double(), f(6 * 192 * 4)[::2]])
@pytest.mark.parametrize("op", ["linear", "patch_embed", "conv_stem"])
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.inference_mode])
def test_a_packed_weight_of_another_shape_is_refused(op, packed, mode, cpu_library):
    """Only the library knows its panel order, so this one check is in C++ (RuntimeError)."""
    good = GOOD[op]
    change = layer(packed=packed) if op == "conv_stem" else {"packed": packed}
    with mode(), pytest.raises(RuntimeError, match=f"{op}: packed is not pack_"):
        getattr(ops, op)(**good | change)


@pytest.mark.parametrize("op", GOOD)
def test_the_call_works_on_meta_tensors(op):
    def to_meta(value):
        if isinstance(value, ops.ConvLayer):
            return ops.ConvLayer(*map(to_meta, value))
        if isinstance(value, list):
            return [to_meta(v) for v in value]
        return value.to("meta") if isinstance(value, torch.Tensor) else value

    y = getattr(ops, op)(**{name: to_meta(value) for name, value in GOOD[op].items()})
    assert y.is_meta
    assert y.shape == getattr(ops, op)(**GOOD[op]).shape
