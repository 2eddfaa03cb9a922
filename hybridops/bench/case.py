"""What a case is: a name, inputs drawn from a seed in any dtype and memory layout, and one call.

One class per op. The benchmark's cases, from real models, are in cases.py beside this file; the
tests have their own, odder ones.

A case draws its own inputs, `case.make_inputs(torch.bfloat16)`, and calls the public op on them,
`case.call(inputs)`. Values are drawn in float64 from a seed and the case's name, so that every
dtype sees the same numbers, rounded.
"""

from __future__ import annotations

import zlib
from dataclasses import KW_ONLY, dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from .. import ops
from ..ops.layer import Weights
from .work import left_by_winograd

Inputs = dict[str, Any]


class Draw:
    """Random values of one case: normal by default, drawn on the device where they will be."""

    def __init__(self, name: str, seed: int, device: str = "cpu"):
        self.device = device
        self.generator = torch.Generator(device).manual_seed(zlib.crc32(name.encode()) + seed)

    def __call__(self, *shape: int, std: float = 1.0, mean: float = 0.0) -> Tensor:
        options: Any = {"generator": self.generator, "device": self.device}
        return torch.randn(shape, dtype=torch.float64, **options) * std + mean

    def integers(self, *shape: int, high: int) -> Tensor:
        options: Any = {"generator": self.generator, "device": self.device}
        return torch.randint(max(high, 1), shape, **options)


INPUT_LAYOUTS = ("contiguous", "transposed", "sliced", "sliced_rows", "offset", "expanded")


def lay_out(x: Tensor, layout: str) -> Tensor:
    """x with the same shape (and values, but for "expanded") and other strides; gaps hold NaN."""
    if layout == "transposed" and x.ndim >= 2:
        return x.transpose(-1, -2).contiguous().transpose(-1, -2)
    if layout == "sliced" and x.ndim >= 1:
        return _gaps(x, (*x.shape[:-1], 2 * x.shape[-1]))[..., ::2].copy_(x)
    if layout == "sliced_rows" and x.ndim >= 2:
        rows = x.ndim - 2
        shape = list(x.shape)
        shape[rows] *= 2
        return _gaps(x, shape)[(slice(None),) * rows + (slice(None, None, 2),)].copy_(x)
    if layout == "offset":
        return _gaps(x, (x.numel() + 1,))[1:].view(x.shape).copy_(x)
    if layout == "expanded" and x.ndim >= 2 and x.shape[0] > 1:
        return x[:1].expand_as(x)
    if layout == "channels_last" and x.ndim == 4:
        return x.contiguous(memory_format=torch.channels_last)
    return x.contiguous()


def _gaps(x: Tensor, shape) -> Tensor:
    return x.new_full(shape, float("nan") if x.is_floating_point() else 0)


@dataclass(frozen=True)
class Case:
    op: ClassVar[str]
    name: str
    _: KW_ONLY
    layout: str = "contiguous"
    unserved: str | None = None  # why the CPU kernel leaves this case to the reference

    def __str__(self) -> str:
        return f"{self.op}-{self.name}"

    def make_inputs(
        self, dtype: torch.dtype, layout: str | None = None, seed: int = 0, device: str = "cpu"
    ) -> Inputs:
        """Tensors by name, floating-point ones in `dtype`, all in `layout` or the case's own."""
        layout = layout or self.layout
        drawn = self.tensors(Draw(str(self), seed, device))
        cast = {n: t.to(dtype) if t.is_floating_point() else t for n, t in drawn.items()}
        return {name: lay_out(tensor, layout) for name, tensor in cast.items()}

    def tensors(self, draw: Draw) -> dict[str, Tensor]:
        raise NotImplementedError

    def call(self, t: Inputs) -> Tensor:
        raise NotImplementedError

    def pack(self, t: Inputs) -> Inputs:
        """Packed weights under names that `call` looks for: packed once, used in many calls."""
        return {}

    def refusal(self, dtype: str, mode: str, backend: str) -> str | None:
        """Why ours has no kernel for that, if so: the op is then torch's, and not worth a row."""
        return None

    def work_share(self, t: Inputs) -> float:
        """The part of the reference's FLOPs that is needed: masked keys need none."""
        return 1.0


@dataclass(frozen=True, kw_only=True)
class Attention(Case):
    op = "attention"
    B: int = 2
    H: int = 2
    Nq: int
    Nk: int | None = None
    D: int
    Dv: int | None = None
    view: str = "separate"  # packed (B, N, 3, H, D) | interleaved (B, N, H, 2D + Dv) | maps (NCHW)
    bias: tuple[int, ...] | str | None = None  # dense shape | table | table_transposed | expanded
    index_dtype: torch.dtype = torch.int64
    mask: str | None = None  # tail | blocks (whole blocks, and one image without any key)
    scale: float | None = None
    activation: str = "none"
    spread: float = 1.0  # standard deviation of q: large makes the softmax one-hot

    def tensors(self, draw):
        B, H, Nq, D = self.B, self.H, self.Nq, self.D
        Nk, Dv = self.Nk if self.Nk is not None else Nq, self.Dv if self.Dv is not None else D
        if self.view == "packed":
            t = {"qkv": draw(B, Nq, 3, H, D)}
        elif self.view == "interleaved":
            t = {"qkv": draw(B, Nq, H, 2 * D + Dv)}
        elif self.view == "maps":
            t = {"q": draw(B, H, D, Nq), "k": draw(B, H, D, Nk), "v": draw(B, H, Dv, Nk)}
        else:
            t = {"q": draw(B, Nq, H, D, std=self.spread), "k": draw(B, Nk, H, D)}
            t["v"] = draw(B, Nk, H, Dv)
        if isinstance(self.bias, tuple):
            t["bias"] = draw(*self.bias)
        elif self.bias == "expanded":
            t["bias"] = draw(1, H, 1, Nk)
        elif self.bias == "masking":  # an additive mask: -inf closes keys, and one row entirely
            t["bias"] = draw(B, 1, Nq, Nk)
            shut = torch.rand(t["bias"].shape, generator=draw.generator, device=draw.device) < 0.3
            t["bias"][shut] = -torch.inf
            t["bias"][0, 0, 1] = -torch.inf
        elif self.bias is not None:
            T = max(Nq, Nk) + 3
            t["bias"] = draw(H, T) if self.bias == "table" else draw(T, H)
            t["bias_index"] = draw.integers(Nq, Nk, high=T).to(self.index_dtype)
        if self.mask is not None:
            padding = torch.zeros(B, Nk, dtype=torch.bool, device=draw.device)
            padding[0, Nk - Nk // 3 :] = True
            if self.mask == "blocks":
                padding[0, Nk // 8 :] = True
                padding[1] = True
                padding[2, : Nk // 2] = True
                padding[2, Nk // 2 :: 5] = True
            t["key_padding_mask"] = padding
        return t

    def call(self, t):
        if self.view == "packed":
            q, k, v = t["qkv"].unbind(2)
        elif self.view == "interleaved":
            q, k, v = t["qkv"].split([self.D, self.D, self.Dv or self.D], dim=3)
        elif self.view == "maps":
            q, k, v = (t[name].permute(0, 3, 1, 2) for name in "qkv")
        else:
            q, k, v = t["q"], t["k"], t["v"]
        bias = t.get("bias")
        if self.bias == "expanded":
            bias = bias.expand(self.B, self.H, q.shape[1], k.shape[1])
        elif self.bias == "table_transposed":  # Swin keeps its table as (T, H)
            bias = bias.t()
        extra = {name: t.get(name) for name in ("bias_index", "key_padding_mask")}
        return ops.attention(
            q, k, v, bias=bias, **extra, scale=self.scale, activation=self.activation
        )

    def work_share(self, t):
        mask = t.get("key_padding_mask")
        return 1.0 if mask is None else 1.0 - float(mask.double().mean())


@dataclass(frozen=True, kw_only=True)
class Linear(Case):
    op = "linear"
    M: int | tuple[int, ...]  # leading dimensions
    N: int
    K: int
    bias: bool = True
    norm: str | None = None  # affine | no_bias
    residual: bool = False
    activation: str = "none"
    packed: bool = False
    mean: float = 0.0  # of x: a large one makes LayerNorm's variance cancel
    spread: float = 1.0  # of x: a small one leaves LayerNorm's eps to decide

    def tensors(self, draw):
        lead = self.M if isinstance(self.M, tuple) else (self.M,)
        t = {"x": draw(*lead, self.K, std=self.spread, mean=self.mean)}
        t["weight"] = draw(self.N, self.K, std=max(self.K, 1) ** -0.5)
        if self.bias:
            t["bias"] = draw(self.N)
        if self.norm:
            t["norm_weight"] = draw(self.K, std=0.3, mean=1.0)
        if self.norm == "affine":
            t["norm_bias"] = draw(self.K, std=0.3)
        if self.residual:
            t["residual"] = draw(*lead, self.N)
        return t

    def call(self, t):
        return ops.linear(
            t["x"],
            t["weight"],
            t.get("bias"),
            norm=(t["norm_weight"], t.get("norm_bias"), 1e-6) if self.norm else None,
            activation=self.activation,
            residual=t.get("residual"),
            packed=self.pack(t)["packed"] if self.packed else None,
        )

    def pack(self, t):
        return t if "packed" in t else {"packed": ops.pack_linear(t["weight"])}


@dataclass(frozen=True, kw_only=True)
class Mlp(Case):
    """A block's MLP from norm to residual, in one dispatch where nothing is recorded."""

    op = "mlp"
    B: int = 1
    N: int
    C: int
    hidden: int
    norm: bool = True
    activation: str = "gelu"
    residual: bool = True
    packed: bool = True

    def tensors(self, draw):
        t = {"x": draw(self.B, self.N, self.C)}
        if self.norm:
            t |= {"norm_weight": draw(self.C, std=0.3, mean=1.0), "norm_bias": draw(self.C)}
        for name, N, K in (("up", self.hidden, self.C), ("down", self.C, self.hidden)):
            t |= {name: draw(N, K, std=max(K, 1) ** -0.5), f"{name}_bias": draw(N)}
        return t

    def call(self, t):
        packed = self.pack(t) if self.packed else {}
        return ops.mlp_layer(
            t["x"],
            Weights(t["up"], t["up_bias"], packed.get("packed_up")),
            Weights(t["down"], t["down_bias"], packed.get("packed_down")),
            activation=self.activation,
            norm=(t["norm_weight"], t["norm_bias"], 1e-6) if self.norm else None,
            residual=self.residual,
        )

    def pack(self, t):
        if "packed_up" in t:
            return t
        return {f"packed_{name}": ops.pack_linear(t[name]) for name in ("up", "down")}


@dataclass(frozen=True, kw_only=True)
class Peg(Case):
    op = "peg"
    B: int = 2
    H: int
    W: int
    C: int
    K: int = 3
    bias: bool = True
    prefix: int = 0
    stride: int = 1
    padding: int | None = None
    residual: bool = True
    activation: str = "none"
    gate: bool = False

    def tensors(self, draw):
        t = {"x": draw(self.B, self.prefix + self.H * self.W, self.C)}
        t["weight"] = draw(self.C, 1, self.K, self.K, std=1 / self.K)
        if self.bias:
            t["bias"] = draw(self.C)
        return t

    def call(self, t):
        return ops.peg(
            t["x"],
            t["weight"],
            t.get("bias"),
            grid=(self.H, self.W),
            prefix=self.prefix,
            stride=self.stride,
            padding=self.padding,
            residual=self.residual,
            activation=self.activation,
            gate=self.gate,
        )


@dataclass(frozen=True, kw_only=True)
class PatchEmbed(Case):
    op = "patch_embed"
    B: int = 2
    Ci: int = 3
    H: int
    W: int
    C: int
    kernel: tuple[int, int]
    stride: int | None = None
    padding: int | str | tuple[int, int, int, int] = 0
    bias: bool = True
    norm: str | None = None  # affine | no_bias
    pos: int | None = None  # rows of pos_embed: the patches, or prefix and patches
    leading: bool = False  # pos_embed and prefix as timm holds them, (1, rows, C)
    prefix: int = 0
    normalise: bool = False
    uint8: bool = False
    packed: bool = False

    def tensors(self, draw):
        image = (self.B, self.Ci, self.H, self.W)
        fan_in = max(self.Ci, 1) * self.kernel[0] * self.kernel[1]
        t = {"image": draw.integers(*image, high=256).byte() if self.uint8 else draw(*image)}
        raw = self.uint8 and not self.normalise
        t["weight"] = draw(self.C, self.Ci, *self.kernel, std=fan_in**-0.5 / (128 if raw else 1))
        lead = (1,) if self.leading else ()
        if self.bias:
            t["bias"] = draw(self.C)
        if self.norm:
            t["norm_weight"] = draw(self.C, std=0.3, mean=1.0)
        if self.norm == "affine":
            t["norm_bias"] = draw(self.C, std=0.3)
        if self.pos is not None:
            t["pos_embed"] = draw(*lead, self.pos, self.C)
        if self.prefix:
            t["prefix"] = draw(*lead, self.prefix, self.C)
        if self.normalise:
            t["mean"] = draw(self.Ci, std=0.05, mean=0.45)
            t["std"] = draw(self.Ci, std=0.01, mean=0.25)
        return t

    def call(self, t):
        return ops.patch_embed(
            t["image"],
            t["weight"],
            t.get("bias"),
            stride=self.stride,
            padding=self.padding,
            norm=(t["norm_weight"], t.get("norm_bias"), 1e-5) if self.norm else None,
            packed=self.pack(t)["packed"] if self.packed else None,
            **{name: t.get(name) for name in ("pos_embed", "prefix", "mean", "std")},
        )

    def pack(self, t):
        return t if "packed" in t else {"packed": ops.pack_patch(t["weight"])}


@dataclass(frozen=True, kw_only=True)
class BodyConv(Case):
    """A convolution of a ResNet's body, from pixels side by side to such pixels."""

    size: ClassVar[int]
    B: int = 1
    H: int
    W: int
    C: int
    N: int
    stride: int = 1
    activation: str = "relu"
    residual: bool = False
    packed: bool = True
    layout: str = "channels_last"

    def tensors(self, draw):
        fan_in = self.C * self.size**2
        t = {"x": draw(self.B, self.C, self.H, self.W), "bias": draw(self.N)}
        t["weight"] = draw(self.N, self.C, self.size, self.size, std=max(fan_in, 1) ** -0.5)
        if self.residual:
            height, width = -(-self.H // self.stride), -(-self.W // self.stride)
            t["residual"] = draw(self.B, self.N, height, width)
        return t

    def call(self, t):
        op = ops.conv1x1 if self.size == 1 else ops.conv3x3
        return op(
            t["x"],
            t["weight"],
            t["bias"],
            stride=self.stride,
            activation=self.activation,
            residual=t.get("residual"),
            packed=self.pack(t)["packed"] if self.packed else None,
        )

    def pack(self, t):
        if "packed" in t:
            return t
        if self.size == 1:
            return {"packed": ops.pack_conv1x1(t["weight"])}
        return {"packed": ops.pack_conv3x3(t["weight"], self.stride)}

    def refusal(self, dtype, mode, backend):
        served = (dtype, mode, backend) == ("fp32", "fwd", "cpu")
        return None if served else "ours is for fp32, inference and the CPU"


class Conv1x1(BodyConv):
    op = "conv1x1"
    size = 1


class Conv3x3(BodyConv):
    op = "conv3x3"
    size = 3

    def work_share(self, t):
        return left_by_winograd(self.stride)


class Conv(NamedTuple):
    """One layer of a ConvStem case."""

    Co: int
    K: int = 3
    stride: int = 2
    padding: int | str | tuple[int, int, int, int] = 1
    activation: str = "none"
    bias: bool = True
    extra: str | None = None  # group_norm (BiT) | affine (CMT)


@dataclass(frozen=True, kw_only=True)
class ConvStem(Case):
    op = "conv_stem"
    B: int = 2
    Ci: int = 3
    H: int
    W: int
    layers: tuple[Conv, ...]
    pool: tuple | None = None
    output: str = "tokens"
    uint8: bool = False
    packed: bool = False

    def tensors(self, draw):
        image = (self.B, self.Ci, self.H, self.W)
        t = {"image": draw.integers(*image, high=256).byte() if self.uint8 else draw(*image)}
        Ci = self.Ci
        for i, layer in enumerate(self.layers):
            gain = 1 / 128 if self.uint8 and i == 0 else 1.4
            std = gain * max(Ci * layer.K**2, 1) ** -0.5
            t[f"weight{i}"] = draw(layer.Co, Ci, layer.K, layer.K, std=std)
            if layer.bias:
                t[f"bias{i}"] = draw(layer.Co, std=0.3)
            if layer.extra:
                t[f"scale{i}"] = draw(layer.Co, std=0.3, mean=1.0)
                t[f"shift{i}"] = draw(layer.Co, std=0.3)
            Ci = layer.Co
        return t

    def call(self, t):
        layers = t["layers"] if "layers" in t else self._layers(t, self.packed)
        pool = None if self.pool is None else ops.MaxPool(*self.pool)
        return ops.conv_stem(t["image"], layers, pool=pool, layout=self.output)

    def _layers(self, t, packed):
        layers = []
        for i, layer in enumerate(self.layers):
            weight, extra = t[f"weight{i}"], {}
            if layer.extra == "group_norm":
                extra["group_norm"] = (2, t[f"scale{i}"], t[f"shift{i}"], 1e-5)
            elif layer.extra == "affine":
                extra["affine"] = (t[f"scale{i}"], t[f"shift{i}"])
            layers.append(
                ops.ConvLayer(
                    weight,
                    t.get(f"bias{i}"),
                    layer.stride,
                    layer.padding,
                    layer.activation,
                    packed=ops.pack_conv(weight) if packed else None,
                    **extra,
                )
            )
        return layers

    def pack(self, t):
        return {"layers": self._layers(t, True)}
