"""timm's LeViT: BatchNorm in the weights, Hardswish in the kernels, the bias spread out once.

In inference all stages are one dispatch. In training the layers keep their BatchNorm modules, and
the attention reads its bias through the index, so that the table gets its gradient. The conv
variants (`use_conv`) are served in inference only, block by block, as tokens: of channels_last
images those are views.
"""

from __future__ import annotations

import torch
from timm.layers import DropPath
from timm.models.levit import (
    Attention,
    AttentionDownsample,
    ConvNorm,
    Downsample,
    LevitBlock,
    LevitDistilled,
    LevitDownsample,
    LevitMlp,
    LevitStage,
    LinearNorm,
    NormLinear,
    Stem8,
    Stem16,
)
from torch import nn

from ..nn._derived import fold_behind, fold_in_front, packed_weights
from ..nn._fusion import norm_batch
from ..nn.conv_stem import conv_norm
from ..ops import ConvLayer, attention, conv_stem, linear, pack_conv
from .chained import Chained, Container, layers_of, not_chained
from .fast import (
    Fast,
    activation_name,
    batch_normed,
    first,
    not_activation,
    not_foldable_norm,
    not_one_of,
    not_plain_conv,
    not_plain_linear,
    not_pointwise,
    original_class,
    packed_linear,
)
from .grid import image_of, tokens_of
from .levit_layers import attention_layers, mlp_layers, subsample_layers
from .ours import averaged_heads

USE_CONV = "use_conv: training keeps its 1 x 1 convolutions as they are"


class FastLinearNorm(Fast, LinearNorm):
    @classmethod
    def unserved(cls, module, mode):
        return not_plain_linear("linear", module.linear) or not_foldable_norm(
            "bn", module.bn, nn.BatchNorm1d
        )

    def forward(self, x):
        plan = self._hybridops_plan
        weights = plan.derived(self, x)
        if weights is not None:
            return linear(x, weights.weight, weights.bias, packed=weights.packed)
        if not plan.intact():
            return LinearNorm.forward(self, x)
        return _normed(self, x)

    def derive(self):
        return batch_normed(self.linear, self.bn)


def _normed(module, x, activation="none"):
    """activation(module(x)) for a LinearNorm that trains."""
    return norm_batch(module.bn, linear(x, module.linear.weight, module.linear.bias), activation)


class FastNormLinear(Fast, NormLinear):
    @classmethod
    def unserved(cls, module, mode):
        return not_plain_linear("linear", module.linear) or not_foldable_norm(
            "bn", module.bn, nn.BatchNorm1d
        )

    def forward(self, x):
        plan = self._hybridops_plan
        weights = plan.derived(self, x) if x.ndim == 2 else None
        if weights is not None:
            return linear(x, weights.weight, weights.bias, packed=weights.packed)
        if not plan.intact():
            return NormLinear.forward(self, x)
        return linear(self.drop(self.bn(x)), self.linear.weight, self.linear.bias)

    def derive(self):
        return packed_linear(*fold_in_front(self.linear.weight, self.linear.bias, self.bn))


def not_conv_norm(module):
    return not_plain_conv("linear", module.linear) or not_foldable_norm(
        "bn", module.bn, nn.BatchNorm2d
    )


class FastConvNorm(Fast, ConvNorm):
    @classmethod
    def unserved(cls, module, mode):
        if mode == "train":
            return "training keeps the convolution as it is, but in a stem"
        return not_conv_norm(module)

    def forward(self, x):
        plan = self._hybridops_plan
        layer = plan.derived(self, x)
        if layer is None:
            return ConvNorm.forward(self, x)
        y = conv_stem(x, [layer], layout="image")
        channels_last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
        return y if channels_last else y.contiguous()  # callers view the result in eager's layout

    def derive(self):
        return conv_layer(self, "none")


def conv_layer(layer, activation):
    """A ConvNorm and the activation behind it, for conv_stem."""
    conv = layer.linear
    w = packed_weights(*fold_behind(conv.weight, conv.bias, layer.bn), pack_conv)
    return ConvLayer(w.weight, w.bias, conv.stride[0], conv.padding[0], activation, w.packed)


class _Stem(Fast):
    @classmethod
    def unserved(cls, module, mode):
        for name, child in module.named_children():
            if name.startswith("conv"):
                reason = not_one_of(name, child, ConvNorm) or not_conv_norm(child)
            else:
                reason = not_activation(name, child)
            if reason:
                return reason if reason.startswith(name) else f"{name}: {reason}"
        return None

    @classmethod
    def facts(cls, module):
        """(name of the convolution, activation behind it), in order."""
        names = [name for name, _ in module.named_children()]
        behind = {
            conv: act for conv, act in zip(names, names[1:], strict=False) if act.startswith("act")
        }
        children = dict(module.named_children())
        return tuple(
            (name, activation_name(children[behind[name]]) if name in behind else "none")
            for name in names
            if name.startswith("conv")
        )

    def forward(self, x):
        layers = self._hybridops_plan.derived(self, x)
        if layers is not None:
            return conv_stem(x, layers, layout="image")
        plan = self._hybridops_plan
        parts = [(self._modules[name], activation) for name, activation in plan.facts]
        if not plan.intact() or not all(part.bn.training for part, _ in parts):
            return nn.Sequential.forward(self, x)
        for part, activation in parts:
            x = conv_norm(part, x, activation)
        return x

    def derive(self):
        facts = self._hybridops_plan.facts
        return [conv_layer(self._modules[name], activation) for name, activation in facts]


class FastStem8(_Stem, Stem8):
    pass


class FastStem16(_Stem, Stem16):
    pass


def _not_product(name, module, mode):
    """Why this is not a linear layer and its norm, or a 1 x 1 convolution and its norm."""
    reason = not_one_of(name, module, LinearNorm, ConvNorm)
    if reason:
        return reason
    if original_class(module) is LinearNorm:
        reason = FastLinearNorm.unserved(module, mode)
    elif mode == "train":
        return USE_CONV
    else:
        reason = not_pointwise("linear", module.linear) or FastConvNorm.unserved(module, mode)
    return reason and f"{name}: {reason}"


def _tokens(x):
    """The conv variants' images as tokens; tokens as they are."""
    return tokens_of(x) if x.ndim == 4 else x


class _OnTokens(Chained):
    """A chain that the conv variants run by itself, on the tokens of their images."""

    @classmethod
    def links(cls, module):
        return not any(isinstance(part, ConvNorm) for part in module.modules())

    def _chained(self, x):
        """The chain's result, None where this call has none."""
        chain = self._hybridops_plan.derived(self, x)
        if chain is None:
            return None
        y = chain(_tokens(x))
        return y if x.ndim == 3 else image_of(y, x, self._grid(x))

    def _grid(self, x):
        return x.shape[2:]

    def forward(self, x):
        y = self._chained(x)
        return self.replaces.forward(self, x) if y is None else y


def _halved(x, stride):
    """The grid of every stride-th row and column of an image."""
    return tuple((side - 1) // stride + 1 for side in x.shape[2:])


class FastAttention(_OnTokens, Attention):
    @classmethod
    def unserved(cls, module, mode):
        return first(
            (
                _not_product("qkv", module.qkv, mode),
                _not_product("proj.ln", module.proj.ln, mode),
                not_activation("proj.act", module.proj.act),
            )
        )

    @classmethod
    def facts(cls, module):
        return activation_name(module.proj.act)

    def forward(self, x):
        y = self._chained(x)
        if y is not None:
            return y
        if self.use_conv or not self._hybridops_plan.intact():
            return Attention.forward(self, x)
        qkv = self.qkv(x).view(*x.shape[:2], self.num_heads, -1)
        q, k, v = qkv.split([self.key_dim, self.key_dim, self.val_dim], 3)
        return self.proj.ln(_attend(self, q, k, v))

    def layers(self, residual=False):
        return attention_layers(self, self._hybridops_plan.facts, residual)


def _attend(attn, q, k, v):
    """Attention and the activation behind it, with the bias read out of its table."""
    out = attention(
        q,
        k,
        v,
        bias=attn.attention_biases,
        bias_index=attn.attention_bias_idxs,
        scale=attn.scale,
        activation=attn._hybridops_plan.facts,
    )
    return out.view(*q.shape[:2], attn.val_attn_dim)


class FastAttentionDownsample(_OnTokens, AttentionDownsample):
    @classmethod
    def unserved(cls, module, mode):
        return first(
            (
                _not_product("kv", module.kv, mode),
                not_one_of("q.down", module.q.down, Downsample, nn.AvgPool2d),
                _not_product("q.ln", module.q.ln, mode),
                _not_product("proj.ln", module.proj.ln, mode),
                not_activation("proj.act", module.proj.act),
            )
        )

    @classmethod
    def facts(cls, module):
        return activation_name(module.proj.act)

    def forward(self, x):
        y = self._chained(x)
        if y is not None:
            return y
        if self.use_conv or not self._hybridops_plan.intact():
            return AttentionDownsample.forward(self, x)
        kv = self.kv(x).view(*x.shape[:2], self.num_heads, -1)
        k, v = kv.split([self.key_dim, self.val_dim], 3)
        q = self.q(x).view(x.shape[0], -1, self.num_heads, self.key_dim)
        return self.proj.ln(_attend(self, q, k, v))

    def _grid(self, x):
        return _halved(x, self.stride)

    def layers(self):
        return subsample_layers(self, self._hybridops_plan.facts)


class FastLevitMlp(_OnTokens, LevitMlp):
    @classmethod
    def unserved(cls, module, mode):
        if mode == "train" and isinstance(module.ln1, ConvNorm):
            return USE_CONV
        return first(
            (
                _not_product("ln1", module.ln1, mode),
                _not_product("ln2", module.ln2, mode),
                not_activation("act", module.act),
            )
        )

    @classmethod
    def facts(cls, module):
        return activation_name(module.act)

    def forward(self, x):
        y = self._chained(x)
        if y is not None:
            return y
        if isinstance(self.ln1, ConvNorm) or not self._hybridops_plan.intact():
            return LevitMlp.forward(self, x)
        x = _normed(self.ln1, x, self._hybridops_plan.facts)
        return _normed(self.ln2, self.drop(x))

    def layers(self, residual=False):
        return mlp_layers(self, self._hybridops_plan.facts, residual)


def _not_drop_path(name, module):
    return not_one_of(name, module, nn.Identity, DropPath)


class FastLevitBlock(_OnTokens, LevitBlock):
    @classmethod
    def unserved(cls, module, mode):
        if mode == "train":
            return "training keeps the block as it is; its parts are served"
        return first(
            (
                _not_drop_path("drop_path1", module.drop_path1),
                _not_drop_path("drop_path2", module.drop_path2),
                _unserved_part("attn", module.attn, FastAttention),
                _unserved_part("mlp", module.mlp, FastLevitMlp),
            )
        )

    def layers(self):
        attn, mlp = self.attn, self.mlp
        served = isinstance(attn, FastAttention) and isinstance(mlp, FastLevitMlp)
        return attn.layers(residual=True) + mlp.layers(residual=True) if served else None


class FastLevitDownsample(_OnTokens, LevitDownsample):
    @classmethod
    def unserved(cls, module, mode):
        if mode == "train":
            return "training keeps the block as it is; its parts are served"
        return first(
            (
                _not_drop_path("drop_path", module.drop_path),
                _unserved_part("attn_downsample", module.attn_downsample, FastAttentionDownsample),
                _unserved_part("mlp", module.mlp, FastLevitMlp),
            )
        )

    def _grid(self, x):
        return _halved(x, self.attn_downsample.stride)

    def layers(self):
        mlp, attn = self.mlp, self.attn_downsample
        served = isinstance(mlp, FastLevitMlp) and isinstance(attn, FastAttentionDownsample)
        attn = attn.layers() if served else None
        served = attn is not None
        return attn + mlp.layers(residual=True) if served else None


class FastLevitStage(Container, LevitStage):
    @classmethod
    def unserved(cls, module, mode):
        if mode == "train":
            return "training keeps the blocks as they are; their parts are served"
        parts = module.named_children()
        return first(not_chained(name, part, mode) for name, part in parts)

    def layers(self):
        return layers_of(self.downsample, self.blocks)


def _unserved_part(name, module, rule):
    reason = not_one_of(name, module, rule.replaces) or rule.unserved(module, "inference")
    return reason and f"{name}: {reason}"


class FastLevitDistilled(Fast, LevitDistilled):
    """The two heads averaged at inference, (a + b) / 2, are one linear layer."""

    overrides = "forward_head"

    @classmethod
    def unserved(cls, module, mode):
        if mode == "train":
            return "training keeps the two heads apart; each is served"
        return first(
            (
                _unserved_part("head", module.head, FastNormLinear),
                _unserved_part("head_dist", module.head_dist, FastNormLinear),
            )
        )

    @classmethod
    def bypassed(cls, module):
        return module.head, module.head_dist

    def forward_head(self, x, pre_logits=False):
        averages = not pre_logits and self.global_pool == "avg"
        chain = self._hybridops_plan.derived(self, x) if averages else None
        if chain is None:
            return LevitDistilled.forward_head(self, x, pre_logits)
        return chain(_tokens(x)).squeeze(1)

    def derive(self):
        return averaged_heads((self.head, self.head_dist))
