"""timm's PVTv2: subsampled or pooled attention, a depthwise convolution in the MLP, patches."""

from __future__ import annotations

from timm.layers.norm import LayerNorm
from timm.models.pvt_v2 import Attention, Block, MlpWithDepthwiseConv, OverlapPatchEmbed
from torch import nn

from ..ops import linear, patch_embed
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
    packed_patch,
    scaled,
)
from .qkv import as_they_are
from .subsampled import SubsampledAttention
from .timm_block import PARTS, in_part, not_drop_path
from .timm_peg import depthwise, not_depthwise


class FastAttention(SubsampledAttention, Attention):
    def image(self, x, size):
        image = super().image(x, size)
        return image if self.pool is None else self.pool(image)

    def behind(self, x):
        return x if self.act is None else self.act(x)


class FastMlpWithDepthwiseConv(Fast, MlpWithDepthwiseConv):
    @classmethod
    def unserved(cls, module, mode):
        return first(
            (
                not_plain_linear("fc1", module.fc1),
                not_one_of("relu", module.relu, nn.ReLU, nn.Identity),
                not_depthwise("dwconv", module.dwconv),
                not_activation("act", module.act),
                not_plain_linear("fc2", module.fc2),
            )
        )

    @classmethod
    def facts(cls, module):
        return activation_name(module.relu), activation_name(module.act)

    def forward(self, x, feat_size):
        plan = self._hybridops_plan
        weights = plan.derived(self, x)
        if weights is not None:
            return self.folded(x, feat_size, weights)
        if not plan.intact():
            return MlpWithDepthwiseConv.forward(self, x, feat_size)
        fc1, fc2 = as_they_are(self.fc1), as_they_are(self.fc2)
        hidden = self.drop(self._hidden(x, feat_size, fc1, None))
        return self.drop(linear(hidden, fc2.weight, fc2.bias))

    def derive(self):
        return scaled(self.fc1), scaled(self.fc2)

    def folded(self, x, size, weights, norm=None, residual=False):
        """The MLP of norm(x), plus x."""
        fc1, fc2 = weights
        hidden = self._hidden(x, size, fc1, norm)
        shortcut = x if residual else None
        return linear(hidden, fc2.weight, fc2.bias, residual=shortcut, packed=fc2.packed)

    def _hidden(self, x, size, fc1, norm):
        relu, act = self._hybridops_plan.facts
        hidden = linear(x, fc1.weight, fc1.bias, norm=norm, activation=relu, packed=fc1.packed)
        return depthwise(self.dwconv, hidden, size, activation=act)


class FastBlock(Fast, Block):
    @classmethod
    def unserved(cls, module, mode):
        if mode == "train":
            return PARTS
        attn, mlp = module.attn, module.mlp
        reason = first(
            (
                not_one_of("attn", attn, Attention),
                not_one_of("mlp", mlp, MlpWithDepthwiseConv),
                not_layer_norm("norm1", module.norm1, LayerNorm),
                not_layer_norm("norm2", module.norm2, LayerNorm),
                not_drop_path("drop_path1", module.drop_path1),
                not_drop_path("drop_path2", module.drop_path2),
            )
        )
        return reason or first(
            (
                in_part("attn", FastAttention.unserved(attn, mode)),
                in_part("mlp", FastMlpWithDepthwiseConv.unserved(mlp, mode)),
            )
        )

    def forward(self, x, feat_size):
        weights = self._hybridops_plan.derived(self, x)
        if weights is None:
            return Block.forward(self, x, feat_size)
        attn, mlp = weights
        x = self.attn.folded(x, feat_size, attn, self.norm1, x)
        return self.mlp.folded(x, feat_size, mlp, norm_of(self.norm2), True)

    def derive(self):
        attn, mlp = self.attn, self.mlp
        served = isinstance(attn, FastAttention) and isinstance(mlp, FastMlpWithDepthwiseConv)
        layers = (self.norm1, self.norm2, attn.q, attn.proj, mlp.fc1, mlp.fc2)
        same = one_dtype(layer.weight for layer in layers)
        return (attn.derive(), mlp.derive()) if served and same else None


class FastOverlapPatchEmbed(Fast, OverlapPatchEmbed):
    @classmethod
    def unserved(cls, module, mode):
        return not_plain_conv("proj", module.proj) or not_layer_norm("norm", module.norm, LayerNorm)

    def forward(self, x):
        plan = self._hybridops_plan
        weights = plan.derived(self, x)
        proj, norm = self.proj, self.norm
        stride, padding = proj.stride[0], proj.padding[0]
        if weights is not None:
            weight, bias, packed = weights
            tokens = patch_embed(
                x, weight, bias, stride=stride, padding=padding, norm=norm_of(norm), packed=packed
            )
        elif plan.intact():
            tokens = norm(patch_embed(x, proj.weight, proj.bias, stride=stride, padding=padding))
        else:
            return OverlapPatchEmbed.forward(self, x)
        sides = zip(x.shape[2:], proj.kernel_size, strict=True)
        return tokens.unflatten(1, tuple((n + 2 * padding - k) // stride + 1 for n, k in sides))

    def derive(self):
        same = one_dtype((self.proj.weight, self.norm.weight))
        return packed_patch(self.proj) if same else None
