"""Whole layers in one dispatch: as right as the ops that they are made of."""

import pytest
import torch
from check import accurate

import hybridops as ho
from hybridops import backend
from hybridops.ops import attention_layer, mlp_layer, pack_linear
from hybridops.ops.layer import Weights

needs_library = pytest.mark.skipif(backend.ISA is None, reason=f"{backend.why_no_library()}")


def weights(N, K, dtype, bias=True):
    weight = (torch.randn(N, K, dtype=torch.float64) * K**-0.5).to(dtype)
    return Weights(weight, torch.randn(N).to(dtype) if bias else None, pack_linear(weight))


def in_float64(w):
    return Weights(*(None if t is None else t.double() for t in w[:2]))


def attention_case(B, N, C, heads, key_dim, Dv, interleaved, dtype, has_bias):
    x = torch.randn(B, N, C).to(dtype)
    qkv = weights(heads * (2 * key_dim + Dv), C, dtype)
    out = weights(C, heads * Dv, dtype, bias=not interleaved)
    options = {"heads": heads, "key_dim": key_dim, "interleaved": interleaved, "residual": True}
    norm = (torch.randn(C).to(dtype), torch.randn(C).to(dtype), 1e-6)
    bias = torch.randn(1, heads, N, N).to(dtype) if has_bias else None
    return x, qkv, out, options, norm, bias


ATTENTION = [
    (1, 197, 192, 3, 64, 64, False, False),
    (2, 49, 40, 2, 16, 32, True, True),
    (3, 1, 24, 3, 8, 8, False, True),
    (1, 16, 37, 1, 7, 13, True, False),
]


@needs_library
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("shape", ATTENTION, ids=str)
def test_attention_layer_is_as_right_as_torch(shape, dtype):
    x, qkv, out, options, norm, bias = attention_case(*shape[:7], dtype, shape[7])
    activation = "hardswish" if shape[6] else "none"
    with torch.inference_mode():
        ours = attention_layer(x, qkv, out, norm=norm, bias=bias, activation=activation, **options)
        with ho.use("reference"):
            torchs = attention_layer(
                x, qkv, out, norm=norm, bias=bias, activation=activation, **options
            )
            exact = attention_layer(
                x.double(),
                in_float64(qkv),
                in_float64(out),
                norm=(norm[0].double(), norm[1].double(), norm[2]),
                bias=None if bias is None else bias.double(),
                activation=activation,
                **options,
            )
    accurate(ours, torchs, exact, "attention_layer")


@needs_library
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("M", [1, 5, 49, 197, 400])
@pytest.mark.parametrize("width", [37, 64])
def test_mlp_layer_is_as_right_as_torch(M, dtype, width):
    C, hidden = 37, 150
    x = torch.randn(2, M, width).to(dtype)[..., :C]  # of wider rows: a slice, read where it lies
    up, down = weights(hidden, C, dtype), weights(C, hidden, dtype, bias=False)
    norm = (torch.randn(C).to(dtype), None, 1e-6)
    with torch.inference_mode():
        ours = mlp_layer(x, up, down, norm=norm, activation="gelu", residual=True)
        with ho.use("reference"):
            torchs = mlp_layer(x, up, down, norm=norm, activation="gelu", residual=True)
            exact = mlp_layer(
                x.double(),
                in_float64(up),
                in_float64(down),
                norm=(norm[0].double(), None, norm[2]),
                activation="gelu",
                residual=True,
            )
    accurate(ours, torchs, exact, "mlp_layer")


@needs_library
def test_one_dispatch_in_inference_and_five_ops_with_gradients(monkeypatch):
    x, qkv, out, options, norm, _ = attention_case(1, 9, 24, 3, 8, 8, False, torch.float32, False)
    with torch.inference_mode(), torch.profiler.profile() as profile:
        expected = attention_layer(x, qkv, out, norm=norm, **options)
    names = {event.key for event in profile.key_averages()}
    assert "hybridops::attention_layer" in names
    assert "hybridops::linear" not in names
    x.requires_grad_()
    y = attention_layer(x, qkv, out, norm=norm, **options)
    torch.testing.assert_close(y, expected)
    y.sum().backward()
    assert x.grad is not None


@needs_library
@pytest.mark.parametrize("strided", [False, True])
def test_opcheck(strided):
    x, qkv, out, _, norm, _ = attention_case(2, 9, 24, 3, 8, 8, False, torch.float32, False)
    if strided:
        x = torch.randn(2, 24, 9).transpose(1, 2)
    layer = (x, *norm, *qkv, None, 3, 8, False, 0.5, 0, *out, True)
    mlp = (x, *norm, *weights(30, 24, x.dtype), 2, *weights(24, 30, x.dtype), True)
    torch.library.opcheck(torch.ops.hybridops.attention_layer.default, layer)
    torch.library.opcheck(torch.ops.hybridops.mlp_layer.default, mlp)


@pytest.mark.parametrize("grad", [False, True])
def test_refuses_what_does_not_fit(grad):
    x, qkv, out, options, norm, _ = attention_case(1, 9, 24, 3, 8, 8, False, torch.float32, False)
    narrow = Weights(out.weight[:, :-1])
    with torch.set_grad_enabled(grad):
        with pytest.raises(ValueError, match="linear"):
            attention_layer(x[..., :-1], qkv, out, **options)
        with pytest.raises(ValueError, match="linear"):
            attention_layer(x, qkv, narrow, **options)
        with pytest.raises(TypeError, match="linear"):
            mlp_layer(x.double(), qkv, out, activation="gelu")
        with pytest.raises(ValueError, match="activation"):
            mlp_layer(x, qkv, Weights(qkv.weight.T), activation="swoosh")
        with pytest.raises(ValueError, match="linear"):
            mlp_layer(x, qkv, qkv, activation="gelu", norm=norm)
        for wrong in ({"heads": 0}, {"heads": -1}, {"heads": 5}, {"key_dim": 12}, {"key_dim": 0}):
            with pytest.raises(ValueError, match="attention_layer"):
                attention_layer(x, qkv, out, **{**options, **wrong})
        with pytest.raises(ValueError, match="attention_layer"):
            attention_layer(x[0], qkv, out, **options)
