"""timm's MaxViT, CoAtNet and ViTs with relative positions: attention with a rel_pos module."""

from __future__ import annotations

from timm.layers.pos_embed_rel import RelPosBias
from timm.models.maxxvit import Attention2d, AttentionCl, PartitionAttentionCl
from timm.models.vision_transformer_relpos import RelPosAttention, RelPosBlock
from torch import nn

from ..nn._derived import Weights
from .fast import first, not_pointwise
from .grid import from_grids, from_windows, image_of, into_grids, into_windows, tokens_of
from .qkv import QkvAttention, dropout_in_training
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


def _pointwise(conv):
    return Weights(conv.weight.flatten(1), conv.bias, None)


class FastAttention2d(_RelPosAttention, Attention2d):
    @classmethod
    def unserved(cls, module, mode):
        return first(
            (
                dropout_in_training(module, mode),
                not_pointwise("qkv", module.qkv),
                not_pointwise("proj", module.proj),
            )
        )

    def products(self):
        return _pointwise(self.qkv), _pointwise(self.proj)

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
