"""timm's Hiera: attention within units of tokens that lie apart, queries pooled between stages."""

from __future__ import annotations

from timm.models.hiera import MaskUnitAttention

from ..ops import attention, linear
from .fast import Fast, not_plain_linear, scaled
from .qkv import as_they_are, scale_of


class FastMaskUnitAttention(Fast, MaskUnitAttention):
    @classmethod
    def unserved(cls, module, mode):
        return not_plain_linear("qkv", module.qkv) or not_plain_linear("proj", module.proj)

    def forward(self, x):
        plan = self._hybridops_plan
        weights = plan.derived(self, x)
        if weights is None:
            if not plan.intact():
                return MaskUnitAttention.forward(self, x)
            weights = as_they_are(self.qkv), as_they_are(self.proj)
        qkv, proj = weights
        B, N, _ = x.shape
        units = N // (self.q_stride * self.window_size) if self.use_mask_unit_attn else 1
        projected = linear(x, qkv.weight, qkv.bias, packed=qkv.packed)
        parts = projected.view(B, -1, units, 3, self.heads, self.head_dim).transpose(1, 2)
        q, k, v = parts.flatten(0, 1).unbind(2)  # views for one image
        if self.q_stride > 1:
            q = q.unflatten(1, (self.q_stride, -1)).amax(1)
        out = attention(q, k, v, scale=scale_of(self)).flatten(2)
        out = out.unflatten(0, (B, units)).transpose(1, 2).flatten(1, 2)
        return linear(out, proj.weight, proj.bias, packed=proj.packed)

    def derive(self):
        return scaled(self.qkv), scaled(self.proj)
