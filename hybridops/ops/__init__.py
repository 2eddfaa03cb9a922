"""The five ops, and what serves inference or training alone.

Inference: whole layers, conv1x1, conv3x3 and group_norm. Training: batch_norm and activation.
Each file reads meaning (reference), contract (schema, fake), gradient, door (checks).
"""

from .activation import activation
from .attention import attention
from .batch_norm import batch_norm
from .conv1x1 import conv1x1, pack_conv1x1
from .conv3x3 import conv3x3, pack_conv3x3
from .conv_stem import ConvLayer, MaxPool, conv_stem, pack_conv
from .group_norm import group_norm
from .layer import attention_layer, mlp_layer
from .linear import linear, pack_linear
from .patch_embed import pack_patch, patch_embed
from .peg import peg

__all__ = [
    "ConvLayer",
    "MaxPool",
    "activation",
    "attention",
    "attention_layer",
    "batch_norm",
    "conv1x1",
    "conv3x3",
    "conv_stem",
    "group_norm",
    "linear",
    "mlp_layer",
    "pack_conv",
    "pack_conv1x1",
    "pack_conv3x3",
    "pack_linear",
    "pack_patch",
    "patch_embed",
    "peg",
]
