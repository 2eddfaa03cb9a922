"""timm's ResNets, plain (BatchNorm) and V2 as hybrid vision transformers use it (BiT's)."""

from __future__ import annotations

from functools import partial

from timm.layers.conv_bn_act import ConvNormAct
from timm.layers.norm_act import GroupNormAct
from timm.layers.std_conv import StdConv2d, StdConv2dSame
from timm.models._features import FeatureListNet
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from timm.models.resnetv2 import Bottleneck as BottleneckV2
from timm.models.resnetv2 import ResNetV2
from torch import nn

from ..nn._pieces import in_pieces
from .convs import (
    TRAINING,
    ActivatedGroupNorm,
    Chain,
    Residual,
    StandardisedConv,
    Stem,
    run,
    run_pooled,
    takes_pieces,
    why_not,
)


class FastBottleneckV2(Residual, BottleneckV2):
    @classmethod
    def parts(cls, module):
        m = module
        main = [m.conv1, m.norm1, m.conv2, m.norm2, m.conv3, m.norm3]
        return main, m.downsample, m.act3


def _not_bare(module):
    """A timm ResNet block's extras, none of which its fused form has."""
    for name, what in (("drop_block", "DropBlock"), ("aa", "anti-aliasing")):
        if type(getattr(module, name)) is not nn.Identity:
            return what
    return None if module.se is None else "an attention layer in the block"


class _Block(Residual):
    @classmethod
    def unserved(cls, module, mode):
        return _not_bare(module) or super().unserved(module, mode)


class FastBottleneck(_Block, Bottleneck):
    @classmethod
    def parts(cls, module):
        m = module
        main = [m.conv1, m.bn1, m.act1, m.conv2, m.bn2, m.act2, m.conv3, m.bn3]
        return main, m.downsample, m.act3


class FastBasicBlock(_Block, BasicBlock):
    @classmethod
    def parts(cls, module):
        m = module
        return [m.conv1, m.bn1, m.act1, m.conv2, m.bn2], m.downsample, m.act2


class FastConvNormAct(Chain, ConvNormAct):
    pass


class FastStdConv2d(StandardisedConv, StdConv2d):
    pass


class FastStdConv2dSame(StandardisedConv, StdConv2dSame):
    pass


class FastGroupNormAct(ActivatedGroupNorm, GroupNormAct):
    behind = "act"

    @classmethod
    def unserved(cls, module, mode):
        dropped = type(module.drop) is not nn.Identity
        return "dropout behind the norm" if dropped else super().unserved(module, mode)


class FastResNetV2(Stem, ResNetV2):
    overrides = "forward_features"
    names = ("stem",)

    def forward_features(self, x):
        stem = self._hybridops_plan.derived(self, x)
        if stem is None or self.grad_checkpointing_is_on():
            return ResNetV2.forward_features(self, x)
        alone = partial(takes_pieces, [self.stages], x)
        return self.norm(in_pieces(lambda x: self.stages(run(stem, x)), x, alone))

    def grad_checkpointing_is_on(self):
        return any(getattr(stage, "grad_checkpointing", False) for stage in self.stages)


class FastResNet(Stem, ResNet):
    overrides = "forward_features"
    names = ("conv1", "bn1", "act1")

    def forward_features(self, x):
        stem = self._hybridops_plan.derived(self, x)
        if stem is None or self.grad_checkpointing:
            return ResNet.forward_features(self, x)
        stages = (self.layer1, self.layer2, self.layer3, self.layer4)

        def body(x):
            return run(stages, run_pooled(stem, x, self.maxpool))

        return in_pieces(body, x, partial(takes_pieces, (self.maxpool, *stages), x))


class FastFeatureListNet(Stem, FeatureListNet):
    """A ResNet cut down to feature maps: the convolutions in front of the first pooling or map."""

    @classmethod
    def bypassed(cls, module):
        found = []
        for name, child in module.items():
            if why_not([*found, child]) or name in module.return_layers:
                break
            found.append(child)
        return found

    @classmethod
    def unserved(cls, module, mode):
        if mode == "train":
            return TRAINING
        if module.grad_checkpointing:
            return "gradient checkpointing"
        return None if cls.bypassed(module) else "no convolutions in front"

    def forward(self, x):
        stem = self._hybridops_plan.derived(self, x)
        if stem is None:
            return FeatureListNet.forward(self, x)
        x, found = run(stem, x), []
        for name, child in list(self.items())[self._hybridops_plan.facts :]:
            x = child(x)
            if name in self.return_layers:
                found.append(x)
        return found

    @classmethod
    def facts(cls, module):
        return len(cls.bypassed(module))
