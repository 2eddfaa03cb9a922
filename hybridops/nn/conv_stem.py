"""Convolution stems: conv + BatchNorm + activation several times over, one op in eval mode."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from .. import backend, ops
from ..ops import ConvLayer, MaxPool
from ._derived import conv_weights
from ._fusion import (
    CONVS,
    activation_name,
    finish,
    folds,
    is_hooked,
    is_ours,
    is_plain,
    norm_batch,
    takes_statistics,
)
from .conv import max_pool_of


class ConvNorm(nn.Module):
    """A convolution and its BatchNorm; children `linear` (the convolution) and `bn`, as in timm.

    x (B, in_chs, H, W) -> (B, out_chs, H', W')
    """

    def __init__(
        self,
        in_chs: int,
        out_chs: int,
        kernel_size: int = 1,
        stride: int = 1,
        padding: int = 0,
        dilation: int = 1,
        groups: int = 1,
        bn_weight_init: float = 1,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        self.linear = nn.Conv2d(
            in_chs,
            out_chs,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            bias=False,
            device=device,
            dtype=dtype,
        )
        self.bn = nn.BatchNorm2d(out_chs, device=device, dtype=dtype)
        nn.init.constant_(self.bn.weight, bn_weight_init)

    def forward(self, x: Tensor) -> Tensor:
        return conv_norm(self, x, "none")


def conv_norm(module: Any, x: Tensor, activation: str) -> Tensor:
    """activation(module(x)) for a ConvNorm."""
    linear, bn = module._modules["linear"], module._modules["bn"]
    if backend.reference_forced() or not _is_served(linear):
        return finish(bn(linear(x)), activation)
    if folds(bn):
        return ops.conv_stem(x, [_layer(module, linear, bn, activation)], layout="image")
    y = ops.conv_stem(x, [_layer(module, linear, None)], layout="image")
    tokens = y.permute(0, 2, 3, 1)
    if takes_statistics(bn, tokens):
        return norm_batch(bn, tokens, activation).permute(0, 3, 1, 2)
    # torch sums batch statistics naively over channels_last: 40 times the error at 64 x 64
    return finish(bn(y.contiguous()), activation)


class ConvStem(nn.Sequential):
    """conv{i} (ConvNorm), act{i}, ..., pool: image (B, in_chans, H, W) -> tokens (B, H'*W', C).

    LeViT's stem: ConvStem(3, (32, 64, 128, 256)). ResNet's: ConvStem(3, (64,), kernel_size=7,
    act_layer=nn.ReLU, last_act=True, pool=True). kernel_size and stride: one value, or one per
    layer; padding is kernel_size // 2. norm=False gives plain convolutions with a bias.
    layout="image" gives the same bytes as an image (B, C, H', W') in channels_last.
    """

    layout = "image"  # of a Sequential that a rule turned into a ConvStem

    def __init__(
        self,
        in_chans: int,
        channels: Sequence[int],
        kernel_size: int | Sequence[int] = 3,
        stride: int | Sequence[int] = 2,
        norm: bool = True,
        act_layer: Callable[..., nn.Module] = nn.Hardswish,
        last_act: bool = False,
        pool: bool = False,
        layout: str = "tokens",
        device=None,
        dtype=None,
    ) -> None:
        if layout not in ("tokens", "image"):
            raise ValueError(f"ConvStem: layout must be 'tokens' or 'image', got {layout!r}")
        super().__init__()
        count = len(channels)
        sizes = (kernel_size,) * count if isinstance(kernel_size, int) else kernel_size
        strides = (stride,) * count if isinstance(stride, int) else stride
        if len(sizes) != count or len(strides) != count:
            raise ValueError(
                f"ConvStem: {count} channels need {count} kernel sizes and strides, "
                f"got {len(sizes)} and {len(strides)}"
            )
        where = {"device": device, "dtype": dtype}
        make = ConvNorm if norm else nn.Conv2d
        before = in_chans
        for i, (after, size, step) in enumerate(zip(channels, sizes, strides, strict=True), 1):
            self.add_module(f"conv{i}", make(before, after, size, step, size // 2, **where))
            if i < count or last_act:
                self.add_module(f"act{i}", act_layer())
            before = after
        if pool:
            self.add_module("pool", nn.MaxPool2d(3, stride=2, padding=1))
        self.layout = layout

    def forward(self, x: Tensor) -> Tensor:
        plan = None if backend.reference_forced() else _plan(self)
        if plan is not None:
            return ops.conv_stem(x, plan[0], pool=plan[1], layout=self.layout)
        children = list(self)
        while children:
            child = children.pop(0)
            name = activation_name(children[0]) if children else None
            if name is not None and is_ours(child, ConvNorm):
                x = conv_norm(child, x, name)
                children.pop(0)
            else:
                x = child(x)
        return x if self.layout == "image" else x.flatten(2).transpose(1, 2)


def _is_served(conv):
    """What ops.conv_stem means: no groups, no dilation, zeros around, one stride."""
    return (
        is_plain(conv, CONVS)
        and conv.groups == 1
        and conv.dilation == (1, 1)
        and conv.padding_mode == "zeros"
        and not isinstance(conv.padding, str)
        and conv.stride[0] == conv.stride[1]
    )


def _layer(owner, conv, bn, activation="none", name="conv"):
    w = conv_weights(owner, name if bn is None else name + " folded", conv, bn)
    return ConvLayer(w.weight, w.bias, conv.stride[0], conv.padding * 2, activation, w.packed)


def _plan(stem: nn.Module) -> tuple[list[ConvLayer], MaxPool | None] | None:
    """The whole chain as one op's arguments, or None where a child must be called itself."""
    found: list[list] = []  # [owner, conv, bn, activation]
    pool = None
    for child in stem._modules.values():
        name = activation_name(child)
        if pool is not None:
            return None
        if name is not None:
            if not found or found[-1][3] != "none":
                return None
            found[-1][3] = name
        elif is_ours(child, ConvNorm):
            conv, bn = child._modules["linear"], child._modules["bn"]  # type: ignore[union-attr]
            if not (_is_served(conv) and folds(bn)):
                return None
            found.append([child, conv, bn, "none"])
        elif _is_served(child):
            found.append([child, child, None, "none"])
        elif type(child) is nn.MaxPool2d and not is_hooked(child):
            pool = max_pool_of(child)
            if pool is None:
                return None
        else:
            return None
    if not found:
        return None
    return [_layer(owner, conv, bn, name) for owner, conv, bn, name in found], pool
