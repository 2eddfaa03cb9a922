"""transformers' DETR."""

from __future__ import annotations

from transformers.models.detr.modeling_detr import (
    DetrConvEncoder,
    DetrCrossAttention,
    DetrDecoderLayer,
    DetrEncoderLayer,
    DetrMLP,
    DetrSelfAttention,
)

from . import detr_layers as shape
from .transformers_backbone import ConvEncoder


class FastSelfAttention(shape.SelfAttention, DetrSelfAttention):
    pass


class FastCrossAttention(shape.CrossAttention, DetrCrossAttention):
    pass


class FastMLP(shape.Perceptron, DetrMLP):
    pass


class FastEncoderLayer(shape.EncoderLayer, DetrEncoderLayer):
    attentions = (("self_attn", "self_attn_layer_norm", FastSelfAttention),)
    perceptron = FastMLP


class FastDecoderLayer(shape.DecoderLayer, DetrDecoderLayer):
    attentions = (
        ("self_attn", "self_attn_layer_norm", FastSelfAttention),
        ("encoder_attn", "encoder_attn_layer_norm", FastCrossAttention),
    )
    perceptron = FastMLP


class FastConvEncoder(ConvEncoder, DetrConvEncoder):
    pass
