"""transformers' D-FINE: RT-DETR's attention and convolutions."""

from __future__ import annotations

from transformers.models.d_fine.modeling_d_fine import (
    DFineConvNormLayer,
    DFineRepVggBlock,
    DFineSelfAttention,
)

from . import convs
from . import detr_layers as shape
from .transformers_rt_detr import TwoBranches


class FastSelfAttention(shape.SelfAttention, DFineSelfAttention):
    pass


class FastConvNormLayer(convs.Chain, DFineConvNormLayer):
    pass


class FastRepVggBlock(TwoBranches, DFineRepVggBlock):
    pass
