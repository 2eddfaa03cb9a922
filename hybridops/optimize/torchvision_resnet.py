"""torchvision's ResNets: norm, activation and residual inside the convolutions."""

from __future__ import annotations

import torch
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from .convs import Residual, Stem, run_pooled


class FastBottleneck(Residual, Bottleneck):
    @classmethod
    def parts(cls, module):
        m = module
        main = [m.conv1, m.bn1, m.relu, m.conv2, m.bn2, m.relu, m.conv3, m.bn3]
        return main, m.downsample, m.relu


class FastBasicBlock(Residual, BasicBlock):
    @classmethod
    def parts(cls, module):
        m = module
        return [m.conv1, m.bn1, m.relu, m.conv2, m.bn2], m.downsample, m.relu


class FastResNet(Stem, ResNet):
    overrides = "_forward_impl"
    names = ("conv1", "bn1", "relu")

    def _forward_impl(self, x):
        stem = self._hybridops_plan.derived(self, x)
        if stem is None:
            return ResNet._forward_impl(self, x)
        x = run_pooled(stem, x, self.maxpool)
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(torch.flatten(self.avgpool(x), 1))
