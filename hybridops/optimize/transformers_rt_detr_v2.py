"""transformers' RT-DETR v2."""

from __future__ import annotations

from transformers.models.rt_detr_v2.modeling_rt_detr_v2 import (
    RTDetrV2ConvNormLayer,
    RTDetrV2EncoderLayer,
    RTDetrV2MLP,
    RTDetrV2RepVggBlock,
    RTDetrV2SelfAttention,
)

from . import convs
from . import detr_layers as shape
from .transformers_rt_detr import TwoBranches


class FastSelfAttention(shape.SelfAttention, RTDetrV2SelfAttention):
    pass


class FastMLP(shape.Perceptron, RTDetrV2MLP):
    pass


class FastEncoderLayer(shape.EncoderLayer, RTDetrV2EncoderLayer):
    attentions = (("self_attn", "self_attn_layer_norm", FastSelfAttention),)
    perceptron = FastMLP


class FastConvNormLayer(convs.Chain, RTDetrV2ConvNormLayer):
    pass


class FastRepVggBlock(TwoBranches, RTDetrV2RepVggBlock):
    pass
