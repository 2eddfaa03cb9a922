"""timm's MaxViT, CoAtNet, GCViT and relative ViTs: attention with a rel_pos module."""

from __future__ import annotations

from timm.layers.pos_embed_rel import RelPosBias
from timm.models.gcvit import WindowAttentionGlobal
from timm.models.maxxvit import Attention2d, AttentionCl, PartitionAttentionCl
from timm.models.vision_transformer_relpos import RelPosAttention, RelPosBlock
from torch import nn

from ..ops import attention, linear
from .grid import from_grids, from_windows, image_of, into_grids, into_windows, tokens_of
from .qkv import QkvAttention, drops, not_pointwise_attention, pointwise
from .timm_block import PreNormBlock

_SHIFT = ("rel_pos.mlp.fc2.bias", "k_norm.bias")  # the same for all keys: softmax cancels it


class _RelPosAttention(QkvAttention):
    """Base: a bias of its own (timm's rel_pos modules), or one that is shared and passed in."""

    invisible = _SHIFT

    @classmethod
    def facts(cls, module):
        return module.num_heads, module.dim_head

    @property
    def interleaved(self):
        return self.head_first

    def score_bias(self):
        rel_pos = self.rel_pos
        if rel_pos is None:
            return None, None
        if type(rel_pos) is not RelPosBias:
            return rel_pos.get_bias(), None
        index = rel_pos.relative_position_index
        return rel_pos.relative_position_bias_table.t(), index.view(rel_pos.bias_shape[:2])

    def shared(self, shared_rel_pos):
        """What of a shared bias counts: nothing beside an own one."""
        return shared_rel_pos if self.rel_pos is None else None


class FastRelPosAttention(_RelPosAttention, RelPosAttention):
    interleaved = False

    @classmethod
    def facts(cls, module):
        return module.num_heads, module.head_dim

    @property
    def changes_qk(self):
        return type(self.q_norm) is not nn.Identity

    def changed(self, q, k):
        return self.q_norm(q), self.k_norm(k)

    def forward(self, x, shared_rel_pos=None):
        y = self.attended(x, self.shared(shared_rel_pos))
        return RelPosAttention.forward(self, x, shared_rel_pos) if y is None else y


class FastRelPosBlock(PreNormBlock, RelPosBlock):
    rule = FastRelPosAttention
    invisible = _SHIFT

    def forward(self, x, shared_rel_pos=None):
        weights = self._hybridops_plan.derived(self, x)
        if weights is None:
            return RelPosBlock.forward(self, x, shared_rel_pos)
        shared = self.attn.shared(shared_rel_pos)
        return self.fed_forward(self.attended(x, weights, shared), weights)


class FastAttentionCl(_RelPosAttention, AttentionCl):
    def forward(self, x, shared_rel_pos=None):
        y = self.attended(x.flatten(1, -2), self.shared(shared_rel_pos))
        if y is None:
            return AttentionCl.forward(self, x, shared_rel_pos)
        return y.view(*x.shape[:-1], y.shape[-1])


class FastAttention2d(_RelPosAttention, Attention2d):
    @classmethod
    def unserved(cls, module, mode):
        return not_pointwise_attention(module, mode)

    def products(self):
        return pointwise(self.qkv), pointwise(self.proj)

    def forward(self, x, shared_rel_pos=None):
        y = self.attended(tokens_of(x), self.shared(shared_rel_pos))
        return Attention2d.forward(self, x, shared_rel_pos) if y is None else image_of(y, x)


class FastPartitionAttentionCl(PreNormBlock, PartitionAttentionCl):
    rule = FastAttentionCl
    invisible = _SHIFT

    def forward(self, x):
        weights = self._hybridops_plan.derived(self, x)
        if weights is None:
            return PartitionAttentionCl.forward(self, x)
        windows = self.partition_block
        into, back = (into_windows, from_windows) if windows else (into_grids, from_grids)
        size, part = tuple(x.shape[1:3]), self.partition_size
        tokens = self.attended(into(x.flatten(1, 2), size, part), weights)
        return back(self.fed_forward(tokens, weights), size, part).view(x.shape)


class FastWindowAttentionGlobal(_RelPosAttention, WindowAttentionGlobal):
    """The windows' own queries, or those of the whole image, which all its windows share."""

    interleaved = False

    @classmethod
    def facts(cls, module):
        return module.num_heads, module.head_dim

    def forward(self, x, q_global=None):
        shared = self.use_global and q_global is not None
        y = self._with(q_global, x) if shared else self.attended(x)
        return WindowAttentionGlobal.forward(self, x, q_global) if y is None else y

    def _with(self, q_global, x):
        plan = self._hybridops_plan
        weights, index = plan.derived(self, x), None
        if weights is None:
            if drops(self) or not plan.intact():
                return None
            (kv, proj), (bias, index) = self.products(), self.score_bias()
        else:
            kv, bias, proj = weights
        B, N, _ = x.shape
        split = B, N, self.num_heads, self.head_dim
        images = len(q_global)
        q = q_global.reshape(images, 1, N, -1).expand(-1, B // images, -1, -1).reshape(split)
        k, v = linear(x, kv.weight, kv.bias, packed=kv.packed).chunk(2, dim=2)
        out = attention(
            q, k.view(split), v.view(split), bias=bias, bias_index=index, scale=self.scale
        )
        return self.proj_drop(linear(out.flatten(2), proj.weight, proj.bias, packed=proj.packed))
