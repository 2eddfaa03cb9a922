"""timm's EfficientNets and MobileNets: norms, activations and shortcuts inside the convolutions.

The squeeze-and-excitation between them is called, and so is what blurs.
"""

from __future__ import annotations

from typing import ClassVar

from timm.models._efficientnet_blocks import (
    ConvBnAct,
    DepthwiseSeparableConv,
    EdgeResidual,
    InvertedResidual,
)
from timm.models.efficientnet import EfficientNet
from timm.models.mobilenetv3 import MobileNetV3

from ..nn._fusion import is_off
from .convs import TRAINING, Stem, one_dtype_in, run, steps, why_not
from .fast import Fast


class _Block(Fast):
    """end(between(front(x))) + x: front and end are chains of convolutions with their norms."""

    channels_last = True
    front: ClassVar[tuple[str, ...]]  # names of children, in order
    between: ClassVar[tuple[str, ...]] = ("aa", "se")
    end: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def chains(cls, module):
        return [[getattr(module, name) for name in names] for names in (cls.front, cls.end)]

    @classmethod
    def bypassed(cls, module):
        front, end = cls.chains(module)
        return front + end

    @classmethod
    def unserved(cls, module, mode):
        if mode == "train":
            return TRAINING
        if getattr(module, "conv_s2d", None) is not None:
            return "space to depth in front"
        return why_not(*filter(None, cls.chains(module)))

    def forward(self, x):
        chains = self._hybridops_plan.derived(self, x)
        if chains is None:
            return self.replaces.forward(self, x)
        front, end = chains
        y = run(front, x)
        for name in self.between:
            y = getattr(self, name)(y)
        if not self.has_skip:
            return run(end, y)
        if end and end[0].activation == "none" and is_off(self.drop_path):
            return end[0].run(y, "none", x)
        return self.drop_path(run(end, y)) + x

    def derive(self):
        if not one_dtype_in(self.bypassed(self)):
            return None
        return [steps(chain) if chain else [] for chain in self.chains(self)]


class FastConvBnAct(_Block, ConvBnAct):
    front, between = ("conv", "bn1"), ("aa",)


class FastDepthwiseSeparableConv(_Block, DepthwiseSeparableConv):
    front, end = ("conv_dw", "bn1"), ("conv_pw", "bn2")


class FastInvertedResidual(_Block, InvertedResidual):
    front, end = ("conv_pw", "bn1", "conv_dw", "bn2"), ("conv_pwl", "bn3")


class FastEdgeResidual(_Block, EdgeResidual):
    front, end = ("conv_exp", "bn1"), ("conv_pwl", "bn2")


class FastMobileNetV3(Stem, MobileNetV3):
    overrides = "forward_features"
    names = ("conv_stem", "bn1")

    def forward_features(self, x):
        stem = self._hybridops_plan.derived(self, x)
        if stem is None or self.grad_checkpointing:
            return MobileNetV3.forward_features(self, x)
        return self.blocks(run(stem, x))


class FastEfficientNet(Stem, EfficientNet):
    overrides = "forward_features"
    names = ("conv_stem", "bn1", "conv_head", "bn2")

    def forward_features(self, x):
        chain = self._hybridops_plan.derived(self, x)
        if chain is None or self.grad_checkpointing:
            return EfficientNet.forward_features(self, x)
        stem, head = chain
        return head(self.blocks(stem(x)))
