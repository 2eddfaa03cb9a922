"""torchvision's vision transformers, and the perceptron that they share with its Swins."""

from __future__ import annotations

import torch
from torch import nn
from torchvision.models.vision_transformer import EncoderBlock, MLPBlock, VisionTransformer
from torchvision.ops.misc import MLP

from ..ops import linear, mlp_layer, patch_embed
from . import convs
from .block import BlockWeights, fused_layers
from .chained import Chained
from .fast import (
    Fast,
    activation_name,
    first,
    norm_of,
    not_activation,
    not_layer_norm,
    not_one_of,
    not_plain_conv,
    not_plain_linear,
    one_dtype,
    packed_linear,
    packed_patch,
    scaled,
)
from .torch_transformer import FastMultiheadAttention


class _Perceptron(Fast):
    """An MLP of one hidden layer: Linear, activation, Dropout, Linear, Dropout."""

    @classmethod
    def unserved(cls, module, mode):
        if len(module) != 5:
            return f"{len(module)} layers in place of linear, activation, dropout, linear, dropout"
        return first(
            (
                not_plain_linear("0", module[0]),
                not_activation("1", module[1]),
                not_one_of("2", module[2], nn.Dropout),
                not_plain_linear("3", module[3]),
                not_one_of("4", module[4], nn.Dropout),
            )
        )

    @classmethod
    def facts(cls, module):
        return activation_name(module[1])

    def forward(self, x):
        plan = self._hybridops_plan
        weights = plan.derived(self, x)
        if weights is not None:
            return mlp_layer(x, *weights, activation=plan.facts)
        if not plan.intact():
            return nn.Sequential.forward(self, x)
        up, _, inner, down, outer = self._modules.values()
        h = linear(x, up.weight, up.bias, activation=plan.facts)
        return outer(linear(inner(h), down.weight, down.bias))

    def derive(self):
        return scaled(self[0]), scaled(self[3])


class FastMLP(_Perceptron, MLP):
    pass


class FastMLPBlock(_Perceptron, MLPBlock):
    pass


class FastEncoderBlock(Chained, EncoderBlock):
    @classmethod
    def unserved(cls, module, mode):
        if mode == "train":
            return "training keeps the block as it is; self_attention and mlp are served"
        return first(
            (
                not_one_of("self_attention", module.self_attention, nn.MultiheadAttention),
                FastMultiheadAttention.unserved(module.self_attention, mode),
                not_one_of("mlp", module.mlp, MLPBlock) or FastMLPBlock.unserved(module.mlp, mode),
                not_layer_norm("ln_1", module.ln_1),
                not_layer_norm("ln_2", module.ln_2),
                not_one_of("dropout", module.dropout, nn.Dropout),
            )
        )

    @classmethod
    def facts(cls, module):
        return activation_name(module.mlp[1])

    def forward(self, input):
        if input.ndim != 3:
            return EncoderBlock.forward(self, input)
        return Chained.forward(self, input)

    def layers(self):
        attn, mlp = self.self_attention, self.mlp
        if not one_dtype(self.parameters()):
            return None
        qkv = packed_linear(attn.in_proj_weight, attn.in_proj_bias)
        weights = BlockWeights(qkv, scaled(attn.out_proj), scaled(mlp[0]), scaled(mlp[3]))
        norms = norm_of(self.ln_1), norm_of(self.ln_2)
        return fused_layers(
            weights, norms, attn.num_heads, attn.head_dim, self._hybridops_plan.facts
        )


class FastTransformer(Fast, VisionTransformer):
    """The patch convolution straight into tokens; a stem of convolutions, fused, by view."""

    @classmethod
    def bypassed(cls, module):
        return (module.conv_proj,)

    @classmethod
    def unserved(cls, module, mode):
        proj = module.conv_proj
        if not isinstance(proj, nn.Conv2d):
            return convs.TRAINING if mode == "train" else convs.why_not([proj])
        if proj.kernel_size != proj.stride or proj.padding != (0, 0):
            geometry = proj.kernel_size, proj.stride, proj.padding
            return "conv_proj has kernel {}, stride {} and padding {}".format(*geometry)
        return not_plain_conv("conv_proj", proj)

    @property
    def channels_last(self) -> bool:  # type: ignore[override]
        return not isinstance(self.conv_proj, nn.Conv2d)

    def forward(self, x):
        plan, proj, size = self._hybridops_plan, self.conv_proj, self.image_size
        weights = plan.derived(self, x)
        fits = x.ndim == 4 and x.shape[2:] == (size, size)
        if not fits or weights is None and not (plan.intact() and isinstance(proj, nn.Conv2d)):
            return VisionTransformer.forward(self, x)
        if isinstance(proj, nn.Conv2d):
            weight, bias, packed = weights or (proj.weight, proj.bias, None)
            prefix = self.class_token
            x = patch_embed(x, weight, bias, stride=self.patch_size, prefix=prefix, packed=packed)
        else:
            x = convs.run(weights, x).flatten(2).transpose(1, 2)
            x = torch.cat([self.class_token.expand(len(x), -1, -1), x], 1)
        return self.heads(self.encoder(x)[:, 0])

    def derive(self):
        proj = self.conv_proj
        if isinstance(proj, nn.Conv2d):
            return packed_patch(proj)
        return convs.steps([proj]) if convs.one_dtype_in([proj]) else None
