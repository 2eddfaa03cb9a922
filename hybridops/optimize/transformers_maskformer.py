"""transformers' MaskFormer: its DETR decoder."""

from __future__ import annotations

from transformers.models.maskformer.modeling_maskformer import (
    MaskFormerDetrCrossAttention,
    MaskFormerDetrDecoderLayer,
    MaskFormerDetrMLP,
    MaskFormerDetrSelfAttention,
)

from . import detr_layers as shape


class FastSelfAttention(shape.SelfAttention, MaskFormerDetrSelfAttention):
    pass


class FastCrossAttention(shape.CrossAttention, MaskFormerDetrCrossAttention):
    pass


class FastMLP(shape.Perceptron, MaskFormerDetrMLP):
    pass


class FastDecoderLayer(shape.DecoderLayer, MaskFormerDetrDecoderLayer):
    attentions = (
        ("self_attn", "self_attn_layer_norm", FastSelfAttention),
        ("encoder_attn", "encoder_attn_layer_norm", FastCrossAttention),
    )
    perceptron = FastMLP
