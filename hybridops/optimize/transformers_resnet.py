"""transformers' ResNet."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers.models.resnet.modeling_resnet import (
    ResNetBasicLayer,
    ResNetBottleNeckLayer,
    ResNetConvLayer,
)

from . import convs


class ResidualLayer(convs.Residual):
    """activation(layer(x) + shortcut(x))"""

    @classmethod
    def parts(cls, module: Any):
        shortcut = None if type(module.shortcut) is nn.Identity else module.shortcut
        return [module.layer], shortcut, module.activation


class FastConvLayer(convs.Chain, ResNetConvLayer):
    pass


class FastBasicLayer(ResidualLayer, ResNetBasicLayer):
    pass


class FastBottleNeckLayer(ResidualLayer, ResNetBottleNeckLayer):
    pass
