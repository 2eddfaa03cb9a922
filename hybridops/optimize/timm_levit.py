"""timm's LeViT: BatchNorm in the weights, Hardswish in the kernels, the bias spread out once.

In inference a block is five kernels. In training the layers keep their BatchNorm modules, and the
attention reads its bias through the index, so that the table gets its gradient.
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

from ..nn._derived import (
    conv_weights,
    derived,
    fold_in_front,
    linear_weights,
    normed_linear_weights,
)
from ..ops import ConvLayer, attention, conv_stem, linear
from .fast import (
    Fast,
    activation_name,
    first,
    norm_sources,
    not_activation,
    not_foldable_norm,
    not_one_of,
    not_plain_conv,
    not_plain_linear,
    packed_linear,
)

USE_CONV = "use_conv: its NCHW products have no kernel"


class FastLinearNorm(Fast, LinearNorm):
    @classmethod
    def unserved(cls, module, mode):
        return not_plain_linear("linear", module.linear) or not_foldable_norm(
            "bn", module.bn, nn.BatchNorm1d
        )

    def forward(self, x):
        plan = self._hybridops_plan
        if plan.folds(self, x):
            weight, bias, packed = linear_weights(self, "linear", self.linear, self.bn)
            return linear(x, weight, bias, packed=packed)
        if not plan.intact():
            return LinearNorm.forward(self, x)
        x = linear(x, self.linear.weight, self.linear.bias)
        return self.bn(x.flatten(0, 1)).reshape_as(x)


class FastNormLinear(Fast, NormLinear):
    @classmethod
    def unserved(cls, module, mode):
        return not_plain_linear("linear", module.linear) or not_foldable_norm(
            "bn", module.bn, nn.BatchNorm1d
        )

    def forward(self, x):
        plan = self._hybridops_plan
        if x.ndim == 2 and plan.folds(self, x):
            weight, bias, packed = normed_linear_weights(self, "linear", self.bn, self.linear)
            return linear(x, weight, bias, packed=packed)
        if not plan.intact():
            return NormLinear.forward(self, x)
        return linear(self.drop(self.bn(x)), self.linear.weight, self.linear.bias)


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
        if not plan.folds(self, x):
            return ConvNorm.forward(self, x)
        y = conv_stem(x, [conv_layer(self, "none")], layout="image")
        channels_last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
        return y if channels_last else y.contiguous()  # callers view the result in eager's layout


def conv_layer(layer, activation):
    """A ConvNorm and the activation behind it, for conv_stem."""
    weight, bias, packed = conv_weights(layer, "conv", layer.linear, layer.bn)
    return ConvLayer(
        weight, bias, layer.linear.stride[0], layer.linear.padding[0], activation, packed
    )


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
        plan = self._hybridops_plan
        if not plan.folds(self, x):
            return nn.Sequential.forward(self, x)
        modules = self._modules
        return conv_stem(x, [conv_layer(modules[n], act) for n, act in plan.facts], layout="image")


class FastStem8(_Stem, Stem8):
    pass


class FastStem16(_Stem, Stem16):
    pass


def _not_linear_norm(name, module):
    reason = not_one_of(name, module, LinearNorm)
    if reason:
        return reason
    reason = FastLinearNorm.unserved(module, "inference")
    return reason and f"{name}: {reason}"


def _bias(attn):
    """The bias (H, Nq, Nk), spread from the table once per change of it."""
    table, index = attn.attention_biases, attn.attention_bias_idxs
    return derived(attn, "bias", (table, index), lambda: table[:, index])


class FastAttention(Fast, Attention):
    @classmethod
    def unserved(cls, module, mode):
        if module.use_conv:
            return USE_CONV
        return first(
            (
                _not_linear_norm("qkv", module.qkv),
                _not_linear_norm("proj.ln", module.proj.ln),
                not_activation("proj.act", module.proj.act),
            )
        )

    @classmethod
    def facts(cls, module):
        return activation_name(module.proj.act)

    def forward(self, x):
        plan = self._hybridops_plan
        if plan.folds(self, x):
            return self._folded(x, None)
        if not plan.intact():
            return Attention.forward(self, x)
        out = self._attend(self.qkv(x), self.attention_biases, self.attention_bias_idxs)
        return self.proj.ln(out)

    def _folded(self, x, residual):
        qkv = self.qkv
        weight, bias, packed = linear_weights(self, "qkv", qkv.linear, qkv.bn)
        out = self._attend(linear(x, weight, bias, packed=packed), _bias(self), None)
        last = self.proj.ln
        weight, bias, packed = linear_weights(self, "proj", last.linear, last.bn)
        return linear(out, weight, bias, residual=residual, packed=packed)

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
        if module.use_conv:
            return USE_CONV
        return first(
            (
                _not_linear_norm("kv", module.kv),
                not_one_of("q.down", module.q.down, Downsample),
                _not_linear_norm("q.ln", module.q.ln),
                _not_linear_norm("proj.ln", module.proj.ln),
                not_activation("proj.act", module.proj.act),
            )
        )

    @classmethod
    def facts(cls, module):
        return activation_name(module.proj.act)

    def forward(self, x):
        plan = self._hybridops_plan
        if plan.folds(self, x):
            return self._folded(x)
        if not plan.intact():
            return AttentionDownsample.forward(self, x)
        out = self._attend(self.q(x), self.kv(x), self.attention_biases, self.attention_bias_idxs)
        return self.proj.ln(out)

    def _folded(self, x):
        kv, q, last = self.kv, self.q.ln, self.proj.ln
        weight, bias, packed = linear_weights(self, "kv", kv.linear, kv.bn)
        keys = linear(x, weight, bias, packed=packed)
        weight, bias, packed = linear_weights(self, "q", q.linear, q.bn)
        queries = linear(self.q.down(x), weight, bias, packed=packed)
        out = self._attend(queries, keys, _bias(self), None)
        weight, bias, packed = linear_weights(self, "proj", last.linear, last.bn)
        return linear(out, weight, bias, packed=packed)

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
        if isinstance(module.ln1, ConvNorm):
            return USE_CONV
        if mode == "train":
            return "training keeps the norms between the products; ln1 and ln2 are served"
        return first(
            (
                _not_linear_norm("ln1", module.ln1),
                _not_linear_norm("ln2", module.ln2),
                not_activation("act", module.act),
            )
        )

    @classmethod
    def facts(cls, module):
        return activation_name(module.act)

    def forward(self, x):
        if self._hybridops_plan.folds(self, x):
            return self._folded(x, None)
        return LevitMlp.forward(self, x)

    def _folded(self, x, residual):
        ln1, ln2 = self.ln1, self.ln2
        weight, bias, packed = linear_weights(self, "ln1", ln1.linear, ln1.bn)
        h = linear(x, weight, bias, activation=self._hybridops_plan.facts, packed=packed)
        weight, bias, packed = linear_weights(self, "ln2", ln2.linear, ln2.bn)
        return linear(h, weight, bias, residual=residual, packed=packed)


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
        plan = self._hybridops_plan
        attn, mlp = self.attn, self.mlp
        if not (
            isinstance(attn, FastAttention)
            and isinstance(mlp, FastLevitMlp)
            and plan.folds(self, x)
        ):
            return LevitBlock.forward(self, x)
        x = attn._folded(x, x)
        return mlp._folded(x, x)


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
        plan = self._hybridops_plan
        attn, mlp = self.attn_downsample, self.mlp
        served = isinstance(attn, FastAttentionDownsample) and isinstance(mlp, FastLevitMlp)
        if not (served and plan.folds(self, x)):
            return LevitDownsample.forward(self, x)
        x = attn._folded(x)
        return mlp._folded(x, x)


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
        if module.use_conv:
            return USE_CONV
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
        if pre_logits or not self._hybridops_plan.folds(self, x) or self.global_pool != "avg":
            return LevitDistilled.forward_head(self, x, pre_logits)
        weight, bias, packed = self._averaged()
        return linear(x.mean(1), weight, bias, packed=packed)

    def _averaged(self):
        a, b = self.head, self.head_dist
        tensors = [t for h in (a, b) for t in (h.linear.weight, h.linear.bias, *norm_sources(h.bn))]

        def make():
            one = fold_in_front(a.linear.weight, a.linear.bias, a.bn)
            two = fold_in_front(b.linear.weight, b.linear.bias, b.bn)
            return packed_linear(*((p + q) / 2 for p, q in zip(one, two, strict=True)))

        return derived(self, "head", tensors, make)
