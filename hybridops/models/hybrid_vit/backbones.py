"""The convolutional bodies of hybrid vision transformers: BiT's, ResNet-D's, MobileCLIP's stem.

A body takes images (B, in_chans, H, W), gives features (B, channels, h, w), and says with
`grid(H, W)` which (h, w) that will be. Children are named as timm's, whose checkpoints so load.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ...nn._fusion import is_hooked
from ...nn._pieces import in_pieces
from ...nn.conv import StdConv2dSame
from ...nn.conv_body import conv_norm, max_pool_same


def group_norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(32, channels)


class BiTStem(nn.Module):
    """7x7 convolution of stride 2, GroupNorm, ReLU, 3x3 max-pooling of stride 2; SAME throughout.

    By itself it is the whole body of R+ViT-Ti/16: (B, in_chans, H, W) -> (B, 64, H/4, W/4).
    """

    channels = 64

    def __init__(self, in_chans: int = 3) -> None:
        super().__init__()
        self.conv = StdConv2dSame(in_chans, self.channels, 7, 2)
        self.norm = group_norm(self.channels)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        return -(-height // 4), -(-width // 4)

    def forward(self, x: Tensor) -> Tensor:
        return max_pool_same(conv_norm(self.conv, self.norm, x, "relu"))


class Projection(nn.Module):
    """The shortcut of a block that changes the shape: 1x1 convolution and GroupNorm."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv = StdConv2dSame(in_channels, out_channels, 1, stride)
        self.norm = group_norm(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return conv_norm(self.conv, self.norm, x)


class BiTBottleneck(nn.Module):
    """1x1, 3x3, 1x1 around a residual: x (B, Ci, H, W) -> (B, 4 * width, H / stride, W / stride)"""

    def __init__(self, in_channels: int, width: int, stride: int, projects: bool) -> None:
        super().__init__()
        out = 4 * width
        self.downsample = Projection(in_channels, out, stride) if projects else None
        self.conv1 = StdConv2dSame(in_channels, width, 1)
        self.norm1 = group_norm(width)
        self.conv2 = StdConv2dSame(width, width, 3, stride)
        self.norm2 = group_norm(width)
        self.conv3 = StdConv2dSame(width, out, 1)
        self.norm3 = group_norm(out)

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        y = conv_norm(self.conv1, self.norm1, x, "relu")
        y = conv_norm(self.conv2, self.norm2, y, "relu")
        return conv_norm(self.conv3, self.norm3, y, "relu", identity)


class Stage(nn.Module):
    """Blocks of one resolution."""

    def __init__(self, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x)


class BiT(nn.Module):
    """Big Transfer's ResNet (Kolesnikov et al. 2020), its norms behind the convolutions.

    Weight standardisation and GroupNorm in place of BatchNorm: images (B, in_chans, H, W) ->
    (B, 128 << stages, H / S, W / S), S = 2 << stages, rounded up. The hybrids of Dosovitskiy et
    al. 2021 end after three stages, (3, 4, 9) blocks, or four.
    """

    def __init__(self, depths: Sequence[int], in_chans: int = 3) -> None:
        super().__init__()
        self.stem = BiTStem(in_chans)
        self.stages = nn.Sequential(*map(Stage, _blocks(BiTBottleneck, depths)))
        self.channels = 128 << len(depths)
        self.stride = 2 << len(depths)
        _init_convs(self)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        return -(-height // self.stride), -(-width // self.stride)

    def forward(self, x: Tensor) -> Tensor:
        return in_pieces(lambda x: self.stages(self.stem(x)), x, partial(_takes_pieces, self))


class ResNetDBottleneck(nn.Module):
    """ResNet-D's: where it halves the grid, the shortcut averages in front of its 1x1 convolution.

    x (B, Ci, H, W) -> (B, 4 * width, ceil(H / stride), ceil(W / stride))
    """

    def __init__(self, in_channels: int, width: int, stride: int, projects: bool) -> None:
        super().__init__()
        out = 4 * width
        self.conv1 = nn.Conv2d(in_channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, out, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out)
        self.downsample = None
        if projects:
            pool: nn.Module = nn.Identity()
            if stride > 1:
                pool = nn.AvgPool2d(2, stride, ceil_mode=True, count_include_pad=False)
            conv = nn.Conv2d(in_channels, out, 1, bias=False)
            self.downsample = nn.Sequential(pool, conv, nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        identity, down = x, self.downsample
        if down is not None:
            identity = conv_norm(down[1], down[2], down[0](x))
        y = conv_norm(self.conv1, self.bn1, x, "relu")
        y = conv_norm(self.conv2, self.bn2, y, "relu")
        return conv_norm(self.conv3, self.bn3, y, "relu", identity, overwrite=down is not None)


class ResNetD(nn.Module):
    """ResNet-D (He et al. 2019, "Bag of Tricks"): three 3x3 convolutions for a stem, BatchNorm.

    images (B, in_chans, H, W) -> (B, 128 << stages, H / S, W / S), S = 2 << stages, rounded up
    """

    def __init__(self, depths: Sequence[int], in_chans: int = 3) -> None:
        super().__init__()
        self.conv1 = nn.Sequential(
            nn.Conv2d(in_chans, 32, 3, 2, 1, bias=False),
            nn.BatchNorm2d(32),
            nn.ReLU(),
            nn.Conv2d(32, 32, 3, 1, 1, bias=False),
            nn.BatchNorm2d(32),
            nn.ReLU(),
            nn.Conv2d(32, 64, 3, 1, 1, bias=False),
        )
        self.bn1 = nn.BatchNorm2d(64)
        self.layers = len(depths)
        for i, blocks in enumerate(_blocks(ResNetDBottleneck, depths)):
            self.add_module(f"layer{i + 1}", nn.Sequential(*blocks))
        self.channels = 128 << len(depths)
        self.stride = 2 << len(depths)
        _init_convs(self)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        return -(-height // self.stride), -(-width // self.stride)

    def forward(self, x: Tensor) -> Tensor:
        return in_pieces(self._forward, x, partial(_takes_pieces, self))

    def _forward(self, x: Tensor) -> Tensor:
        stem = self.conv1
        x = conv_norm(stem[0], stem[1], x, "relu")
        x = conv_norm(stem[3], stem[4], x, "relu")
        x = conv_norm(stem[6], self.bn1, x, "relu")
        x = F.max_pool2d(x, 3, 2, 1)
        for i in range(self.layers):
            x = self.get_submodule(f"layer{i + 1}")(x)
        return x


_APART = {  # classes whose modules compute each image by itself
    BiT,
    BiTBottleneck,
    BiTStem,
    Projection,
    ResNetD,
    ResNetDBottleneck,
    Stage,
    StdConv2dSame,
    nn.AvgPool2d,
    nn.BatchNorm2d,
    nn.Conv2d,
    nn.GroupNorm,
    nn.Identity,
    nn.ReLU,
    nn.Sequential,
}


def _takes_pieces(body: nn.Module) -> bool:
    """Whether nobody sees that a body gets its batch in pieces, and no image another's numbers."""
    return not any(
        type(m) not in _APART
        or is_hooked(m)
        or m.training
        or (type(m) is nn.BatchNorm2d and m.running_mean is None)
        for m in body.modules()
    )


def _blocks(block: Any, depths: Sequence[int]) -> list[list[nn.Module]]:
    """A ResNet's blocks by stage; each stage but the first halves the grid, all double the width"""
    stages, before = [], 64
    for i, depth in enumerate(depths):
        width, stride = 64 << i, 1 if i == 0 else 2
        first = block(before, width, stride, projects=True)
        before = 4 * width
        rest = [block(before, width, 1, projects=False) for _ in range(depth - 1)]
        stages.append([first, *rest])
    return stages


def _init_convs(body: nn.Module) -> None:
    for module in body.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


class PatchConv(nn.Module):
    """A convolution whose patches do not overlap; with `norm`, BatchNorm and GELU behind it."""

    def __init__(self, in_channels: int, out_channels: int, patch: int, norm: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, patch, patch, bias=not norm)
        self.bn = nn.BatchNorm2d(out_channels) if norm else None

    def forward(self, x: Tensor) -> Tensor:
        return conv_norm(self.conv, self.bn, x, "none" if self.bn is None else "gelu")


class MobileClipStem(nn.Sequential):
    """MobileCLIP's (Vasu et al. 2024): patches of 4, of 2, of 2: (B, dim, H // 16, W // 16)."""

    def __init__(self, dim: int = 768, in_chans: int = 3) -> None:
        narrow = dim // 4
        super().__init__(
            PatchConv(in_chans, narrow, 4, norm=True),
            PatchConv(narrow, narrow, 2, norm=True),
            PatchConv(narrow, dim, 2, norm=False),
        )
        self.channels = dim

    def grid(self, height: int, width: int) -> tuple[int, int]:
        return height // 16, width // 16
