"""transformers' RT-DETR, its ResNet, and what RT-DETR v2, D-FINE and OmDet copy of them."""

from __future__ import annotations

from typing import Any

from transformers.models.rt_detr.modeling_rt_detr import (
    RTDetrConvNormLayer,
    RTDetrEncoderLayer,
    RTDetrMLP,
    RTDetrRepVggBlock,
    RTDetrSelfAttention,
)
from transformers.models.rt_detr.modeling_rt_detr_resnet import (
    RTDetrResNetBasicLayer,
    RTDetrResNetBottleNeckLayer,
    RTDetrResNetConvLayer,
)

from . import convs
from . import detr_layers as shape
from .transformers_resnet import ResidualLayer


class TwoBranches(convs.Residual):
    """activation(conv1(x) + conv2(x)), each with its norm."""

    @classmethod
    def parts(cls, module: Any):
        return [module.conv1], module.conv2, module.activation


class FastSelfAttention(shape.SelfAttention, RTDetrSelfAttention):
    pass


class FastMLP(shape.Perceptron, RTDetrMLP):
    pass


class FastEncoderLayer(shape.EncoderLayer, RTDetrEncoderLayer):
    attentions = (("self_attn", "self_attn_layer_norm", FastSelfAttention),)
    perceptron = FastMLP


class FastConvNormLayer(convs.Chain, RTDetrConvNormLayer):
    pass


class FastRepVggBlock(TwoBranches, RTDetrRepVggBlock):
    pass


class FastResNetConvLayer(convs.Chain, RTDetrResNetConvLayer):
    pass


class FastResNetBasicLayer(ResidualLayer, RTDetrResNetBasicLayer):
    pass


class FastResNetBottleNeckLayer(ResidualLayer, RTDetrResNetBottleNeckLayer):
    pass
