"""timm's vision_transformer.Block: norm, product, activation and residual as one kernel each."""

from __future__ import annotations

from typing import NamedTuple

from timm.layers import DropPath, LayerScale
from timm.layers.attention import Attention
from timm.layers.mlp import Mlp
from timm.layers.norm import LayerNorm
from timm.models.vision_transformer import Block
from torch import nn

from ..nn._derived import Weights
from ..ops import attention_layer, linear, mlp_layer
from .fast import (
    Fast,
    activation_name,
    fall_back,
    first,
    norm_of,
    not_layer_norm,
    not_one_of,
    one_dtype,
    scaled,
)
from .timm_layers import FastAttention, FastMlp, attend


class _Weights(NamedTuple):
    qkv: Weights
    proj: Weights
    fc1: Weights
    fc2: Weights


class FastBlock(Fast, Block):
    @classmethod
    def unserved(cls, module, mode):
        attn, mlp = module.attn, module.mlp
        reason = first(
            (
                not_one_of("attn", attn, Attention),
                not_one_of("mlp", mlp, Mlp),
                not_layer_norm("norm1", module.norm1, LayerNorm),
                not_layer_norm("norm2", module.norm2, LayerNorm),
                not_one_of("ls1", module.ls1, nn.Identity, LayerScale),
                not_one_of("ls2", module.ls2, nn.Identity, LayerScale),
                not_one_of("drop_path1", module.drop_path1, nn.Identity, DropPath),
                not_one_of("drop_path2", module.drop_path2, nn.Identity, DropPath),
            )
        )
        if reason:
            return reason
        reason = FastAttention.unserved(attn, "inference")
        if reason:
            return f"attn: {reason}"
        reason = FastMlp.unserved(mlp, "inference")
        if reason:
            return f"mlp: {reason}"
        if type(attn.norm) is not nn.Identity or type(mlp.norm) is not nn.Identity:
            return "a norm inside attn or mlp; those are served on their own"
        return (
            "training keeps the block as it is; attn and mlp are served"
            if mode == "train"
            else None
        )

    @classmethod
    def facts(cls, module):
        return activation_name(module.mlp.act)

    def forward(self, x, attn_mask=None, is_causal=False):
        plan = self._hybridops_plan
        if attn_mask is not None or is_causal:
            fall_back("timm Block", "mask")
            return Block.forward(self, x, attn_mask, is_causal)
        weights = plan.derived(self, x)
        if weights is None:
            return Block.forward(self, x)
        qkv, proj, fc1, fc2 = weights
        attn = self.attn
        if type(attn.q_norm) is nn.Identity:
            x = attention_layer(
                x,
                qkv,
                proj,
                heads=attn.num_heads,
                key_dim=attn.head_dim,
                scale=None if attn.fused_attn else attn.scale,
                norm=norm_of(self.norm1),
                residual=True,
            )
        else:
            out = attend(attn, linear(x, *qkv[:2], norm=norm_of(self.norm1), packed=qkv.packed))
            x = linear(out, proj.weight, proj.bias, residual=x, packed=proj.packed)
        return mlp_layer(
            x, fc1, fc2, norm=norm_of(self.norm2), activation=plan.facts, residual=True
        )

    def derive(self):
        attn, mlp = self.attn, self.mlp
        layers = (attn.qkv, attn.proj, mlp.fc1, mlp.fc2)
        norms = (self.norm1, self.norm2)
        if not one_dtype(layer.weight for layer in (*layers, *norms)):
            return None
        gammas = [ls.gamma if type(ls) is LayerScale else None for ls in (self.ls1, self.ls2)]
        qkv, fc1 = (scaled(layer, None) for layer in (attn.qkv, mlp.fc1))
        return _Weights(qkv, scaled(attn.proj, gammas[0]), fc1, scaled(mlp.fc2, gammas[1]))
