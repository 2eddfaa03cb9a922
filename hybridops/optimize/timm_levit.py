"""timm's LeViT: BatchNorm in the weights, Hardswish in the kernels, the bias spread out once.

In inference a block is two dispatches. In training the layers keep their BatchNorm modules, and the
attention reads its bias through the index, so that the table gets its gradient. The conv variants
(`use_conv`) are served in inference only, as tokens: between channels_last images those are views.
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
    LinearNorm,
    NormLinear,
    Stem8,
    Stem16,
)
from torch import nn

from ..nn._derived import fold_behind, fold_in_front, in_graph
from ..ops import (
    ConvLayer,
    attention,
    attention_layer,
    conv_stem,
    linear,
    mlp_layer,
    pack_conv,
)
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
        x = linear(x, self.linear.weight, self.linear.bias)
        return self.bn(x.flatten(0, 1)).reshape_as(x)

    def derive(self):
        return batch_normed(self.linear, self.bn)


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


class FastConvNorm(Fast, ConvNorm):
    @classmethod
    def unserved(cls, module, mode):
        if mode == "train":
            return "training keeps the convolution as it is"
        return not_plain_conv("linear", module.linear) or not_foldable_norm(
            "bn", module.bn, nn.BatchNorm2d
        )

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
    weight, bias = fold_behind(conv.weight, conv.bias, layer.bn)
    packed = None if in_graph(weight) else pack_conv(weight)
    return ConvLayer(weight, bias, conv.stride[0], conv.padding[0], activation, packed)


class _Stem(Fast):
    @classmethod
    def unserved(cls, module, mode):
        if mode == "train":
            return "training keeps the convolutions as they are"
        for name, child in module.named_children():
            if name.startswith("conv"):
                reason = not_one_of(name, child, ConvNorm) or FastConvNorm.unserved(child, mode)
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
        if layers is None:
            return nn.Sequential.forward(self, x)
        return conv_stem(x, layers, layout="image")

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


def _product(layer):
    """A LinearNorm, or a ConvNorm of one pixel, as weights on tokens."""
    if isinstance(layer, LinearNorm):
        return batch_normed(layer.linear, layer.bn)
    conv = layer.linear
    return packed_linear(*fold_behind(conv.weight.flatten(1), conv.bias, layer.bn))


def _tokens(x):
    """The conv variants' images as tokens; tokens as they are."""
    return tokens_of(x) if x.ndim == 4 else x


def _on_tokens(layer, x):
    return image_of(layer(tokens_of(x)), x) if x.ndim == 4 else layer(x)


def _halved(x, stride):
    """The grid of every stride-th row and column of an image."""
    return tuple((side - 1) // stride + 1 for side in x.shape[2:])


class FastAttention(Fast, Attention):
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
        plan = self._hybridops_plan
        weights = plan.derived(self, x)
        if weights is not None:
            return _on_tokens(lambda tokens: self._folded(tokens, weights, False), x)
        if self.use_conv or not plan.intact():
            return Attention.forward(self, x)
        out = self._attend(self.qkv(x), self.attention_biases, self.attention_bias_idxs)
        return self.proj.ln(out)

    def derive(self):
        bias = self.attention_biases[:, self.attention_bias_idxs][None]  # spread out, once
        return _product(self.qkv), bias, _product(self.proj.ln)

    def _folded(self, x, weights, residual):
        qkv, scores, proj = weights
        return attention_layer(
            x,
            qkv,
            proj,
            heads=self.num_heads,
            key_dim=self.key_dim,
            scale=self.scale,
            interleaved=True,
            bias=scores,
            activation=self._hybridops_plan.facts,
            residual=residual,
        )

    def _attend(self, qkv, bias, index):
        B, N, _ = qkv.shape
        qkv = qkv.view(B, N, self.num_heads, -1)
        q, k, v = qkv.split([self.key_dim, self.key_dim, self.val_dim], 3)
        activation = self._hybridops_plan.facts
        out = attention(
            q, k, v, bias=bias, bias_index=index, scale=self.scale, activation=activation
        )
        return out.view(B, N, self.val_attn_dim)


class FastAttentionDownsample(Fast, AttentionDownsample):
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
        plan = self._hybridops_plan
        weights = plan.derived(self, x)
        if weights is not None:
            y = self._folded(x, weights)
            return image_of(y, x, _halved(x, self.stride)) if x.ndim == 4 else y
        if self.use_conv or not plan.intact():
            return AttentionDownsample.forward(self, x)
        out = self._attend(self.q(x), self.kv(x), self.attention_biases, self.attention_bias_idxs)
        return self.proj.ln(out)

    def derive(self):
        layers = (self.kv, self.q.ln, self.proj.ln)
        kv, q, proj = map(_product, layers)
        return kv, q, self.attention_biases[:, self.attention_bias_idxs][None], proj

    def _folded(self, x, weights):
        (weight, bias, packed), q, scores, proj = weights
        kv = linear(_tokens(x), weight, bias, packed=packed)
        q = linear(_tokens(self.q.down(x)), q.weight, q.bias, packed=q.packed)
        out = self._attend(q, kv, scores, None)
        return linear(out, proj.weight, proj.bias, packed=proj.packed)

    def _attend(self, q, kv, bias, index):
        B, Nq, _ = q.shape
        k, v = kv.view(B, kv.shape[1], self.num_heads, -1).split([self.key_dim, self.val_dim], 3)
        q = q.view(B, Nq, self.num_heads, self.key_dim)
        activation = self._hybridops_plan.facts
        out = attention(
            q, k, v, bias=bias, bias_index=index, scale=self.scale, activation=activation
        )
        return out.view(B, Nq, self.val_attn_dim)


class FastLevitMlp(Fast, LevitMlp):
    @classmethod
    def unserved(cls, module, mode):
        if mode == "train":
            if isinstance(module.ln1, ConvNorm):
                return USE_CONV
            return "training keeps the norms between the products; ln1 and ln2 are served"
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
        weights = self._hybridops_plan.derived(self, x)
        if weights is None:
            return LevitMlp.forward(self, x)
        return _on_tokens(lambda tokens: self._folded(tokens, weights, False), x)

    def derive(self):
        return _product(self.ln1), _product(self.ln2)

    def _folded(self, x, weights, residual):
        activation = self._hybridops_plan.facts
        return mlp_layer(x, *weights, activation=activation, residual=residual)


def _not_drop_path(name, module):
    return not_one_of(name, module, nn.Identity, DropPath)


class FastLevitBlock(Fast, LevitBlock):
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

    def forward(self, x):
        weights = self._hybridops_plan.derived(self, x)
        if weights is None:
            return LevitBlock.forward(self, x)
        attn, mlp = weights

        def folded(tokens):
            return self.mlp._folded(self.attn._folded(tokens, attn, True), mlp, True)

        return _on_tokens(folded, x)

    def derive(self):
        attn, mlp = self.attn, self.mlp
        served = isinstance(attn, FastAttention) and isinstance(mlp, FastLevitMlp)
        return (attn.derive(), mlp.derive()) if served else None


class FastLevitDownsample(Fast, LevitDownsample):
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

    def forward(self, x):
        weights = self._hybridops_plan.derived(self, x)
        if weights is None:
            return LevitDownsample.forward(self, x)
        attn, mlp = weights
        y = self.mlp._folded(self.attn_downsample._folded(x, attn), mlp, True)
        return image_of(y, x, _halved(x, self.attn_downsample.stride)) if x.ndim == 4 else y

    def derive(self):
        attn, mlp = self.attn_downsample, self.mlp
        served = isinstance(attn, FastAttentionDownsample) and isinstance(mlp, FastLevitMlp)
        return (attn.derive(), mlp.derive()) if served else None


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
        weights = self._hybridops_plan.derived(self, x) if averages else None
        if weights is None:
            return LevitDistilled.forward_head(self, x, pre_logits)
        return linear(_tokens(x).mean(1), weights.weight, weights.bias, packed=weights.packed)

    def derive(self):
        return averaged_heads((self.head, self.head_dist))
