"""ResNet-50 and -101 as DETR uses them: frozen BatchNorm, channels_last, features at four strides.

He et al. 2016, with the stride in the 3x3 convolution, as in torchvision.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...nn._fusion import SEQUENTIALS, is_plain
from ...nn.conv_body import FrozenBatchNorm2d, conv_norm


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 convolution around a residual: x (B, Ci, H, W) -> (B, 4 * width, H', W')."""

    def __init__(
        self, in_channels: int, width: int, stride: int, dilation: int, projects: bool
    ) -> None:
        super().__init__()
        out = 4 * width
        self.conv1 = nn.Conv2d(in_channels, width, 1, bias=False)
        self.bn1 = FrozenBatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, dilation, dilation, bias=False)
        self.bn2 = FrozenBatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, out, 1, bias=False)
        self.bn3 = FrozenBatchNorm2d(out)
        self.downsample = None
        if projects:
            conv = nn.Conv2d(in_channels, out, 1, stride, bias=False)
            self.downsample = nn.Sequential(conv, FrozenBatchNorm2d(out))

    def forward(self, x: Tensor, overwrite: bool = False) -> Tensor:
        """overwrite: nobody but the caller holds x, who wants it no more."""
        identity, down = x, self.downsample
        if down is not None:
            identity, overwrite = conv_norm(down[0], down[1], x), True
        y = conv_norm(self.conv1, self.bn1, x, "relu")
        y = conv_norm(self.conv2, self.bn2, y, "relu")
        return conv_norm(self.conv3, self.bn3, y, "relu", identity, overwrite)


class ResNet(nn.Module):
    """images (B, 3, H, W) -> features at stride 4, 8, 16 and 32, channels 256, 512, 1024, 2048.

    dilated: the last stage keeps stride 16 and spreads its 3x3 convolutions instead (DC5).
    """

    channels = (256, 512, 1024, 2048)

    def __init__(self, depths: tuple[int, ...] = (3, 4, 6, 3), dilated: bool = False) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.bn1 = FrozenBatchNorm2d(64)
        before = 64
        for i, depth in enumerate(depths):
            stays = dilated and i == 3
            stride = 1 if i == 0 or stays else 2
            blocks = []
            for j in range(depth):
                first = j == 0  # the first block sees what lies in front, which is not spread yet
                dilation = 2 if stays and not first else 1
                blocks.append(
                    Bottleneck(before, 64 << i, stride if first else 1, dilation, projects=first)
                )
                before = 256 << i
            self.add_module(f"layer{i + 1}", nn.Sequential(*blocks))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def freeze_early(self) -> None:
        """Stop training the stem and the first stage, as DETR's authors do."""
        for part in (self.conv1, self.get_submodule("layer1")):
            part.requires_grad_(False)

    def forward(self, x: Tensor) -> list[Tensor]:
        x = x.contiguous(memory_format=torch.channels_last)
        x = conv_norm(self.conv1, self.bn1, x, "relu")
        x = F.max_pool2d(x, 3, 2, 1)
        features = []
        for i in range(1, 5):
            x = _run(self.get_submodule(f"layer{i}"), x)
            features.append(x)
        return features


def _run(stage: Any, x: Tensor) -> Tensor:
    """stage(x), with each block's result in the memory of the one in front, if none is watched."""
    if not is_plain(stage, SEQUENTIALS) or any(not is_plain(b, {Bottleneck}) for b in stage):
        return stage(x)
    for i, block in enumerate(stage):
        x = block(x, overwrite=i > 0)
    return x
