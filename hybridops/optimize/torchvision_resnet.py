"""torchvision's ResNets: norm, activation and residual inside the convolutions."""

from __future__ import annotations

from functools import partial

import torch
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from ..nn._pieces import in_pieces
from .convs import Residual, Stem, run, run_pooled, takes_pieces


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
        stages = (self.layer1, self.layer2, self.layer3, self.layer4)

        def body(x):
            return run(stages, run_pooled(stem, x, self.maxpool))

        x = in_pieces(body, x, partial(takes_pieces, (self.maxpool, *stages), x))
        return self.fc(torch.flatten(self.avgpool(x), 1))
