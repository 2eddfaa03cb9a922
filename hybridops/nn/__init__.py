"""Drop-in modules: each holds the parameters of the class it replaces, and calls our ops."""

from .attention import Attention
from .block import Block, DropPath, LayerScale
from .conv_stem import ConvNorm, ConvStem
from .linear import Linear, LinearNorm, NormLinear
from .mlp import Mlp
from .multihead_attention import MultiheadAttention
from .patch_embed import PatchEmbed
from .peg import PEG
from .rel_pos_attention import RelPosAttention, RelPosAttentionDownsample, Subsample

__all__ = [
    "PEG",
    "Attention",
    "Block",
    "ConvNorm",
    "ConvStem",
    "DropPath",
    "LayerScale",
    "Linear",
    "LinearNorm",
    "Mlp",
    "MultiheadAttention",
    "NormLinear",
    "PatchEmbed",
    "RelPosAttention",
    "RelPosAttentionDownsample",
    "Subsample",
]
