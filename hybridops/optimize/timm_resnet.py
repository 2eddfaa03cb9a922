"""timm's ResNets, plain (BatchNorm) and V2 as hybrid vision transformers use it (BiT's)."""

from __future__ import annotations

from timm.layers.conv_bn_act import ConvNormAct
from timm.layers.norm_act import GroupNormAct
from timm.layers.std_conv import StdConv2d, StdConv2dSame
from timm.models._features import FeatureListNet
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from timm.models.resnetv2 import Bottleneck as BottleneckV2
from timm.models.resnetv2 import ResNetV2
from torch import nn

from ..nn.conv import folded_conv, not_bare_conv
from ..ops import group_norm
from .convs import TRAINING, Chain, Residual, Stem, is_standardised, run, why_not
from .fast import Fast, activation_name


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


class _StdConv(Fast):
    """The weight is standardised once, not in every call."""

    channels_last = True

    @classmethod
    def unserved(cls, module, mode):
        return TRAINING if mode == "train" else not_bare_conv(module)

    def forward(self, x):
        conv = self._hybridops_plan.derived(self, x)
        return self.replaces.forward(self, x) if conv is None else conv(x)

    def derive(self):
        return folded_conv(self, None, is_standardised(self))


class FastStdConv2d(_StdConv, StdConv2d):
    pass


class FastStdConv2dSame(_StdConv, StdConv2dSame):
    pass


class FastGroupNormAct(Fast, GroupNormAct):
    """Norm and activation in one pass, where the image is channels_last already."""

    @classmethod
    def unserved(cls, module, mode):
        if mode == "train":
            return "training keeps the norm as it is"
        if type(module.drop) is not nn.Identity:
            return "dropout behind the norm"
        served = activation_name(module.act) is not None
        return None if served else f"{type(module.act).__name__} has no kernel"

    @classmethod
    def facts(cls, module):
        return activation_name(module.act)

    def forward(self, x):
        plan = self._hybridops_plan
        if not plan.folds(self, x) or x.ndim != 4 or x.is_contiguous():
            return GroupNormAct.forward(self, x)
        weight, bias = self.weight, self.bias
        return group_norm(x, self.num_groups, weight, bias, self.eps, activation=plan.facts)


class FastResNetV2(Stem, ResNetV2):
    overrides = "forward_features"
    names = ("stem",)

    def forward_features(self, x):
        stem = self._hybridops_plan.derived(self, x)
        if stem is None or self.grad_checkpointing_is_on():
            return ResNetV2.forward_features(self, x)
        return self.norm(self.stages(run(stem, x)))

    def grad_checkpointing_is_on(self):
        return any(getattr(stage, "grad_checkpointing", False) for stage in self.stages)


class FastResNet(Stem, ResNet):
    overrides = "forward_features"
    names = ("conv1", "bn1", "act1")

    def forward_features(self, x):
        stem = self._hybridops_plan.derived(self, x)
        if stem is None or self.grad_checkpointing:
            return ResNet.forward_features(self, x)
        x = self.maxpool(run(stem, x))
        return self.layer4(self.layer3(self.layer2(self.layer1(x))))


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
