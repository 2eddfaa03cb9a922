"""Depthwise convolutions of timm's hybrids, by the positional encoding kernel on tokens."""

from __future__ import annotations

from typing import Any

from timm.models.coat import ConvPosEnc as CoatConvPosEnc
from timm.models.davit import ConvPosEnc as DavitConvPosEnc
from timm.models.xcit import LPI
from torch import nn

from ..nn.peg import position_encoding
from .fast import (
    Fast,
    activation_name,
    fall_back,
    first,
    not_activation,
    not_one_of,
    not_plain_weight,
)
from .grid import image_of, is_channels_last, tokens_of


def not_depthwise(name: str, conv: Any) -> str | None:
    """Why peg cannot run this convolution with an output grid like its input's."""
    reason = not_one_of(name, conv, nn.Conv2d) or not_plain_weight(name, conv)
    if reason:
        return reason
    if not conv.groups == conv.in_channels == conv.out_channels:
        return f"{name} is not depthwise"
    K, other = conv.kernel_size
    geometry = conv.stride, conv.padding, conv.dilation, conv.padding_mode
    if other != K or K % 2 == 0 or geometry != ((1, 1), (K // 2, K // 2), (1, 1), "zeros"):
        return f"{name} is not a {K} x {K} convolution with stride 1 and zeros around"
    return None


def depthwise(conv, x, size, *, prefix=0, residual=False, activation="none"):
    """activation(conv(x)) + x for tokens x (B, prefix + H*W, C)"""
    return position_encoding(
        x,
        conv.weight,
        conv.bias,
        grid=tuple(size),
        prefix=prefix,
        residual=residual,
        activation=activation,
    )


class FastCoatConvPosEnc(Fast, CoatConvPosEnc):
    @classmethod
    def unserved(cls, module, mode):
        return not_depthwise("proj", module.proj)

    def forward(self, x, size):
        if not self._hybridops_plan.intact():
            return CoatConvPosEnc.forward(self, x, size)
        return depthwise(self.proj, x, size, prefix=1, residual=True)


class FastDavitConvPosEnc(Fast, DavitConvPosEnc):
    @classmethod
    def unserved(cls, module, mode):
        return not_depthwise("proj", module.proj) or not_activation("act", module.act)

    @classmethod
    def facts(cls, module):
        return activation_name(module.act)

    def forward(self, x):
        plan = self._hybridops_plan
        if not is_channels_last(x):  # with a copy into tokens it would take 1.8 times torch's time
            fall_back("timm davit ConvPosEnc", "an image that is not channels_last")
            return DavitConvPosEnc.forward(self, x)
        if not plan.intact():
            return DavitConvPosEnc.forward(self, x)
        y = depthwise(self.proj, tokens_of(x), x.shape[2:], residual=True, activation=plan.facts)
        return image_of(y, x)


class FastLPI(Fast, LPI):
    """XCiT's local interaction: two depthwise convolutions, GELU and a BatchNorm between them.

    GELU stays torch's: where a channel hardly varies, the norm behind it makes the last bits large,
    and with the kernel's a layer had 2.9 times torch's error. So does the norm, whose shift could
    not go into the second convolution: that one puts zeros around the normed grid.
    """

    @classmethod
    def unserved(cls, module, mode):
        return first(
            (
                not_depthwise("conv1", module.conv1),
                not_one_of("bn", module.bn, nn.BatchNorm2d),
                not_depthwise("conv2", module.conv2),
            )
        )

    def forward(self, x, H, W):
        if not self._hybridops_plan.intact():
            return LPI.forward(self, x, H, W)
        hidden = self.act(depthwise(self.conv1, x, (H, W)))
        image = hidden.transpose(1, 2).unflatten(2, (H, W))
        return depthwise(self.conv2, tokens_of(self.bn(image)), (H, W))
