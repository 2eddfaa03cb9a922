"""torchvision's MaxViT: attention in windows and grids with a table of relative positions."""

from __future__ import annotations

from torch import nn
from torchvision.models.maxvit import PartitionAttentionLayer, RelativePositionalMultiHeadAttention
from torchvision.ops.stochastic_depth import StochasticDepth

from ..ops import attention, attention_layer, linear
from ..ops.chain import Chain
from .block import BlockWeights, fused_layers
from .fast import (
    Fast,
    activation_name,
    first,
    norm_of,
    not_activation,
    not_layer_norm,
    not_one_of,
    not_plain_linear,
    one_dtype,
    scaled,
)


class FastAttention(Fast, RelativePositionalMultiHeadAttention):
    @classmethod
    def unserved(cls, module, mode):
        return not_plain_linear("to_qkv", module.to_qkv) or not_plain_linear("merge", module.merge)

    def forward(self, x):
        plan = self._hybridops_plan
        weights = plan.derived(self, x)
        if weights is None and not plan.intact():
            return RelativePositionalMultiHeadAttention.forward(self, x)
        tokens, heads = x.flatten(0, 1), (self.n_heads, self.head_dim)
        if weights is not None:
            qkv, bias, merge = weights
            out = attention_layer(
                tokens,
                qkv,
                merge,
                heads=heads[0],
                key_dim=heads[1],
                scale=self.scale_factor,
                bias=bias,
            )
            return out.view(x.shape)
        qkv = linear(tokens, self.to_qkv.weight, self.to_qkv.bias)
        q, k, v = qkv.unflatten(2, (3, *heads)).unbind(2)
        table, index = self.relative_position_bias_table.t(), self.relative_position_index
        out = attention(q, k, v, bias=table, bias_index=index, scale=self.scale_factor)
        return linear(out.flatten(2), self.merge.weight, self.merge.bias).view(x.shape)

    def derive(self):
        return scaled(self.to_qkv), self.get_relative_positional_bias(), scaled(self.merge)


class FastPartition(Fast, PartitionAttentionLayer):
    """Norms, residuals, attention and perceptron of a partition in two dispatches."""

    @classmethod
    def unserved(cls, module, mode):
        if mode == "train":
            return "training keeps the layer as it is; its attention is served"
        (norm1, attn, drop1), (norm2, fc1, act, fc2, drop2) = module.attn_layer, module.mlp_layer
        return first(
            (
                not_one_of("attn_layer.1", attn, RelativePositionalMultiHeadAttention),
                FastAttention.unserved(attn, mode),
                not_layer_norm("attn_layer.0", norm1),
                not_one_of("attn_layer.2", drop1, nn.Dropout),
                not_layer_norm("mlp_layer.0", norm2),
                not_plain_linear("mlp_layer.1", fc1),
                not_activation("mlp_layer.2", act),
                not_plain_linear("mlp_layer.3", fc2),
                not_one_of("mlp_layer.4", drop2, nn.Dropout),
                not_one_of("stochastic_dropout", module.stochastic_dropout, StochasticDepth),
            )
        )

    @classmethod
    def facts(cls, module):
        return activation_name(module.mlp_layer[2])

    def forward(self, x):
        plan = self._hybridops_plan
        chain = plan.derived(self, x)
        fits = x.shape[2:] == tuple(self.grid_size)
        if chain is None or not fits:
            return PartitionAttentionLayer.forward(self, x)
        parts = self.partition_swap(self.partition_op(x, self.p))
        y = self.departition_swap(chain(parts.flatten(0, 1)).view(parts.shape))
        return self.departition_op(y, self.p, *(side // self.p for side in self.grid_size))

    def derive(self):
        (norm1, attn, _), (norm2, fc1, _, fc2, _) = self.attn_layer, self.mlp_layer
        if not one_dtype(self.parameters()):
            return None
        weights = BlockWeights(scaled(attn.to_qkv), scaled(attn.merge), scaled(fc1), scaled(fc2))
        return Chain(
            fused_layers(
                weights,
                (norm_of(norm1), norm_of(norm2)),
                attn.n_heads,
                attn.head_dim,
                self._hybridops_plan.facts,
                attn.scale_factor,
                attn.get_relative_positional_bias(),
            )
        )
