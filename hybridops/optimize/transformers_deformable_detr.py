"""transformers' Deformable DETR: all but its deformable attention."""

from __future__ import annotations

from transformers.models.deformable_detr.modeling_deformable_detr import (
    DeformableDetrConvEncoder,
    DeformableDetrMLP,
    DeformableDetrSelfAttention,
)

from . import detr_layers as shape
from .transformers_backbone import ConvEncoder


class FastSelfAttention(shape.SelfAttention, DeformableDetrSelfAttention):
    pass


class FastMLP(shape.Perceptron, DeformableDetrMLP):
    pass


class FastConvEncoder(ConvEncoder, DeformableDetrConvEncoder):
    pass
