"""Attention of timm's smaller families: qkv, scores with or without a bias, proj; class tokens."""

from __future__ import annotations

import torch
from timm.layers.norm import LayerNorm
from timm.models.beit import Attention as BeitAttention
from timm.models.beit import Block as BeitBlock
from timm.models.cait import ClassAttn
from timm.models.crossvit import CrossAttention
from timm.models.davit import WindowAttention
from timm.models.efficientformer import Attention as EfficientFormerAttention
from timm.models.efficientformer import MetaBlock1d
from timm.models.fastvit import Attention as FastVitAttention
from timm.models.metaformer import Attention as MetaFormerAttention
from timm.models.nest import Attention as NestAttention
from timm.models.tiny_vit import Attention as TinyVitAttention
from timm.models.tiny_vit import NormMlp
from timm.models.visformer import Attention as VisformerAttention
from timm.models.volo import Attention as VoloAttention

from ..nn._derived import Weights
from ..ops import attention, linear, mlp_layer
from .fast import (
    Fast,
    activation_name,
    first,
    norm_of,
    not_activation,
    not_layer_norm,
    not_plain_linear,
    one_dtype,
    packed_linear,
    scaled,
)
from .grid import image_of, tokens_of
from .qkv import (
    QkvAttention,
    as_they_are,
    dropout_in_training,
    drops,
    not_pointwise_attention,
    pointwise,
    scale_of,
    split_bias,
)
from .timm_block import PreNormBlock


class FastWindowAttention(QkvAttention, WindowAttention):
    pass


class FastMetaFormerAttention(QkvAttention, MetaFormerAttention):
    pass


class FastVoloAttention(QkvAttention, VoloAttention):
    def forward(self, x):
        y = self.attended(x.flatten(1, 2))
        return VoloAttention.forward(self, x) if y is None else y.view(x.shape)


class FastVisformerAttention(QkvAttention, VisformerAttention):
    @classmethod
    def unserved(cls, module, mode):
        return not_pointwise_attention(module, mode)

    def products(self):
        return pointwise(self.qkv), pointwise(self.proj)

    def forward(self, x):
        y = self.attended(tokens_of(x))
        return VisformerAttention.forward(self, x) if y is None else image_of(y, x)


class FastNestAttention(QkvAttention, NestAttention):
    """NesT's heads lie side by side in its output, feature by feature."""

    def products(self):
        proj = self.proj
        turned = proj.weight.unflatten(1, (-1, self.num_heads)).transpose(1, 2).flatten(1)
        return as_they_are(self.qkv), Weights(turned, proj.bias, None)

    def forward(self, x):
        y = self.attended(x.flatten(0, 1))
        return NestAttention.forward(self, x) if y is None else y.view(x.shape)


class FastFastVitAttention(QkvAttention, FastVitAttention):
    def forward(self, x):
        y = self.attended(tokens_of(x))
        if y is None:
            return FastVitAttention.forward(self, x)
        return y.transpose(1, 2).unflatten(2, x.shape[2:])  # channels_last, as timm's own is


class _Interleaved(QkvAttention):
    """Base: LeViT's attention without its norms."""

    interleaved = True

    def score_bias(self):
        return self.attention_biases, self.attention_bias_idxs


class FastEfficientFormerAttention(_Interleaved, EfficientFormerAttention):
    pass


class FastMetaBlock1d(PreNormBlock, MetaBlock1d):
    rule = FastEfficientFormerAttention
    attention_name = "token_mixer"


class FastTinyVitAttention(_Interleaved, TinyVitAttention):
    @classmethod
    def unserved(cls, module, mode):
        return super().unserved(module, mode) or not_layer_norm("norm", module.norm, LayerNorm)

    def forward(self, x):
        weights = self._hybridops_plan.derived(self, x)
        if weights is not None and one_dtype((self.norm.weight, self.qkv.weight)):
            return self.folded(x, weights, norm=norm_of(self.norm))
        y = self.attended(self.norm(x)) if self._hybridops_plan.intact() else None
        return TinyVitAttention.forward(self, x) if y is None else y


class FastNormMlp(Fast, NormMlp):
    @classmethod
    def unserved(cls, module, mode):
        return first(
            (
                not_layer_norm("norm", module.norm, LayerNorm),
                not_plain_linear("fc1", module.fc1),
                not_plain_linear("fc2", module.fc2),
                not_activation("act", module.act),
            )
        )

    @classmethod
    def facts(cls, module):
        return activation_name(module.act)

    def forward(self, x):
        plan = self._hybridops_plan
        weights = plan.derived(self, x)
        if weights is not None:
            return mlp_layer(x, *weights, norm=norm_of(self.norm), activation=plan.facts)
        if not plan.intact():
            return NormMlp.forward(self, x)
        fc1, fc2 = self.fc1, self.fc2
        hidden = linear(self.norm(x), fc1.weight, fc1.bias, activation=plan.facts)
        return self.drop2(linear(self.drop1(hidden), fc2.weight, fc2.bias))

    def derive(self):
        same = one_dtype((self.norm.weight, self.fc1.weight))
        return (scaled(self.fc1), scaled(self.fc2)) if same else None


class FastBeitAttention(QkvAttention, BeitAttention):
    invisible = ("k_bias",)  # q's product with it is the same for all keys: softmax cancels it

    def products(self):
        return split_bias(self), as_they_are(self.proj)

    def score_bias(self):
        if self.relative_position_bias_table is None:
            return None, None
        return self.relative_position_bias_table.t(), self.relative_position_index

    def forward(self, x, shared_rel_pos_bias=None):
        y = self.attended(x, shared_rel_pos_bias)
        return BeitAttention.forward(self, x, shared_rel_pos_bias) if y is None else y


class FastBeitBlock(PreNormBlock, BeitBlock):
    rule = FastBeitAttention
    invisible = FastBeitAttention.invisible

    def gammas(self):
        return self.gamma_1, self.gamma_2

    def forward(self, x, shared_rel_pos_bias=None):
        weights = self._hybridops_plan.derived(self, x)
        if weights is None:
            return BeitBlock.forward(self, x, shared_rel_pos_bias)
        return self.fed_forward(self.attended(x, weights, shared_rel_pos_bias), weights)


class _ClassAttention(Fast):
    """Base of the rules for attention of the first token to all."""

    names = ("q", "k", "v")
    invisible = ("k.bias",)  # softmax cancels it

    @classmethod
    def unserved(cls, module, mode):
        layers = (*cls.names, "proj")
        reason = dropout_in_training(module, mode) or first(
            not_plain_linear(name, getattr(module, name)) for name in layers
        )
        _, k, v = (getattr(module, name) for name in cls.names)
        mixed = not reason and (k.bias is None) != (v.bias is None)
        return "only one of k and v has a bias" if mixed else reason

    def forward(self, x):
        plan = self._hybridops_plan
        weights = plan.derived(self, x)
        if weights is not None:
            q, kv, proj = weights
            kv = linear(x, kv.weight, kv.bias, packed=kv.packed)
            return self._attend(x, q, *kv.chunk(2, dim=2), proj)
        if drops(self) or not plan.intact():
            return self.replaces.forward(self, x)
        q, k, v = (as_they_are(getattr(self, name)) for name in self.names)
        k, v = (linear(x, layer.weight, layer.bias) for layer in (k, v))
        return self.proj_drop(self._attend(x, q, k, v, as_they_are(self.proj)))

    def derive(self):
        q, k, v = (getattr(self, name) for name in self.names)
        bias = None if k.bias is None else torch.cat([k.bias, v.bias])
        kv = packed_linear(torch.cat([k.weight, v.weight]), bias)
        return scaled(q), kv, scaled(self.proj)

    def _attend(self, x, q, k, v, proj):
        first_token = linear(x[:, :1], q.weight, q.bias, packed=q.packed)
        q, k, v = (t.unflatten(2, (self.num_heads, -1)) for t in (first_token, k, v))
        out = attention(q, k, v, scale=scale_of(self)).flatten(2)
        return linear(out, proj.weight, proj.bias, packed=proj.packed)


class FastClassAttn(_ClassAttention, ClassAttn):
    pass


class FastCrossAttention(_ClassAttention, CrossAttention):
    names = ("wq", "wk", "wv")
    invisible = ("wk.bias",)
