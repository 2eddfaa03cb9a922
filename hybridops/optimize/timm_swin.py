"""timm's Swin: window attention with its bias table and shift mask, cosine attention (V2)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from timm.layers.norm import LayerNorm
from timm.models.swin_transformer import PatchMerging, SwinTransformerBlock, WindowAttention
from timm.models.swin_transformer_v2 import PatchMerging as PatchMergingV2
from timm.models.swin_transformer_v2 import WindowAttention as WindowAttentionV2
from timm.models.swin_transformer_v2_cr import WindowMultiHeadAttention

from ..ops import linear
from .fast import Fast, norm_of, not_layer_norm, not_plain_linear, one_dtype, scaled
from .grid import from_windows, into_windows, squares
from .qkv import QkvAttention, as_they_are, split_bias
from .timm_block import PreNormBlock


class FastWindowAttention(QkvAttention, WindowAttention):
    def score_bias(self):
        return self.relative_position_bias_table.t(), self.relative_position_index

    def forward(self, x, mask=None):
        y = self.attended(x, None if mask is None else mask[:, None])
        return WindowAttention.forward(self, x, mask) if y is None else y


class FastBlock(PreNormBlock, SwinTransformerBlock):
    rule = FastWindowAttention

    def forward(self, x):
        weights = self._hybridops_plan.derived(self, x)
        if weights is None:
            return SwinTransformerBlock.forward(self, x)
        B, H, W, C = x.shape
        size, window, shift = (H, W), self.window_size, self.shift_size
        if H % window[0] or W % window[1]:  # zeros come behind the norm, so it is not fused
            x = x + self._attn(self.norm1(x))
            return self.fed_forward(x, weights)
        # the whole block stays in window order: only the permutations touch memory
        shifted = any(shift)
        if shifted:
            x = torch.roll(x, (-shift[0], -shift[1]), (1, 2))
        mask = self.attn_mask if not self.dynamic_mask else self.get_attn_mask(x)
        x = into_windows(x.flatten(1, 2), size, window)
        x = self.attended(x, weights, None if mask is None else mask[:, None])
        x = from_windows(self.fed_forward(x, weights), size, window).view(B, H, W, C)
        return torch.roll(x, shift, (1, 2)) if shifted else x


class _CosineAttention(QkvAttention):
    """Base: q and k of unit length, q times its head's own scale."""

    changes_qk = True

    def score_scale(self):
        return 1.0

    def changed(self, q, k):
        scale = self.logit_scale.clamp(max=math.log(100.0)).exp().view(-1, 1)
        return F.normalize(q, dim=-1) * scale, F.normalize(k, dim=-1)

    def forward(self, x, mask=None):
        y = self.attended(x, None if mask is None else mask[:, None])
        return self.replaces.forward(self, x, mask) if y is None else y


class FastWindowAttentionV2(_CosineAttention, WindowAttentionV2):
    def products(self):
        return split_bias(self), as_they_are(self.proj)

    def score_bias(self):
        table = self.cpb_mlp(self.relative_coords_table).flatten(0, 2)
        return 16 * table.sigmoid().t(), self.relative_position_index


class FastWindowMultiHeadAttention(_CosineAttention, WindowMultiHeadAttention):
    invisible = ("meta_mlp.fc2.bias",)  # the same for all scores of a head: softmax cancels it

    def score_bias(self):
        return self._relative_positional_encodings(), None


class _Merging(Fast):
    """Base of the rules for 2 x 2 tokens side by side, into a product."""

    @classmethod
    def unserved(cls, module, mode):
        reason = not_plain_linear("reduction", module.reduction)
        return reason or not_layer_norm("norm", module.norm, LayerNorm)

    def derive(self):
        same = one_dtype((self.norm.weight, self.reduction.weight))
        return scaled(self.reduction) if same else None


class FastPatchMerging(_Merging, PatchMerging):
    def forward(self, x):
        plan, norm, reduction = self._hybridops_plan, self.norm, self.reduction
        weights = plan.derived(self, x)
        if weights is not None:
            weight, bias, packed = weights
            return linear(squares(x), weight, bias, norm=norm_of(norm), packed=packed)
        if not plan.intact():
            return PatchMerging.forward(self, x)
        return linear(norm(squares(x)), reduction.weight, reduction.bias)


class FastPatchMergingV2(_Merging, PatchMergingV2):
    def forward(self, x):
        plan, norm, reduction = self._hybridops_plan, self.norm, self.reduction
        weights = plan.derived(self, x)
        if weights is None and not plan.intact():
            return PatchMergingV2.forward(self, x)
        weight, bias, packed = weights or as_they_are(reduction)
        return norm(linear(squares(x), weight, bias, packed=packed))
