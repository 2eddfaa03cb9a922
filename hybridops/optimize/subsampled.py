"""Attention of all tokens to a subsampled grid of them: what Twins and PVTv2 have in common."""

from __future__ import annotations

import torch
from timm.layers.norm import LayerNorm

from ..ops import attention, linear, patch_embed
from .fast import (
    Fast,
    first,
    norm_of,
    not_layer_norm,
    not_plain_conv,
    not_plain_linear,
    packed_linear,
    packed_patch,
    scaled,
)
from .qkv import dropout_in_training, drops, scale_of


class SubsampledAttention(Fast):
    """Base of the rules for q of all tokens, k and v of the patches that `sr` makes of them."""

    @classmethod
    def unserved(cls, module, mode):
        reason = first(
            (
                dropout_in_training(module, mode),
                not_plain_linear("q", module.q),
                not_plain_linear("kv", module.kv),
                not_plain_linear("proj", module.proj),
            )
        )
        if reason or module.sr is None:
            return reason or _mixed_biases(module)
        if module.sr.kernel_size != module.sr.stride or module.sr.padding != (0, 0):
            return f"sr has kernel {module.sr.kernel_size} and stride {module.sr.stride}"
        return not_plain_conv("sr", module.sr) or not_layer_norm("norm", module.norm, LayerNorm)

    def forward(self, x, size):
        plan = self._hybridops_plan
        weights = plan.derived(self, x)
        if weights is not None:
            return self.folded(x, size, weights, None, None)
        if drops(self) or not plan.intact():
            return self.replaces.forward(self, x, size)
        q = linear(x, self.q.weight, self.q.bias)
        if self.sr is not None:
            image = self.image(x, size)
            weight, bias, stride = self.sr.weight, self.sr.bias, self.sr.stride[0]
            x = self.behind(self.norm(patch_embed(image, weight, bias, stride=stride)))
        kv = linear(x, self.kv.weight, self.kv.bias)
        out = self._attend(q, kv)
        return self.proj_drop(linear(out, self.proj.weight, self.proj.bias))

    def derive(self):
        if self.sr is None:
            return self._merged(), None, None, scaled(self.proj)
        return scaled(self.q), packed_patch(self.sr), scaled(self.kv), scaled(self.proj)

    # what PVTv2's linear form does otherwise
    def image(self, x, size):
        """What `sr` sees of the tokens x."""
        return x.unflatten(1, size).permute(0, 3, 1, 2)

    def behind(self, x):
        """What follows `sr` and its norm."""
        return x

    def _merged(self):
        """q and kv as one product: without subsampling both read the same tokens."""
        q, kv = self.q, self.kv
        bias = None if q.bias is None else torch.cat([q.bias, kv.bias])
        return packed_linear(torch.cat([q.weight, kv.weight]), bias)

    def folded(self, x, size, weights, norm, residual):
        """proj(attend(norm(x))) + residual; norm is the block's LayerNorm, or None."""
        (weight, bias, packed), sr, kv, proj = weights
        if sr is None:
            fused = None if norm is None else norm_of(norm)
            qkv = linear(x, weight, bias, norm=fused, packed=packed)
            out = self._attend(*qkv.split([x.shape[2], 2 * x.shape[2]], dim=2))
        else:
            if norm is not None:  # the convolution needs it too
                x = norm(x)
            q = linear(x, weight, bias, packed=packed)
            image, fused, stride = self.image(x, size), norm_of(self.norm), self.sr.stride[0]
            x = patch_embed(image, sr.weight, sr.bias, stride=stride, norm=fused, packed=sr.packed)
            out = self._attend(q, linear(self.behind(x), kv.weight, kv.bias, packed=kv.packed))
        return linear(out, proj.weight, proj.bias, residual=residual, packed=proj.packed)

    def _attend(self, q, kv):
        B, N, C = q.shape
        q = q.view(B, N, self.num_heads, -1)
        k, v = kv.view(B, kv.shape[1], 2, self.num_heads, -1).unbind(2)
        return attention(q, k, v, scale=scale_of(self)).view(B, N, C)


def _mixed_biases(module):
    if (module.q.bias is None) != (module.kv.bias is None):
        return "only one of q and kv has a bias"
    return None
