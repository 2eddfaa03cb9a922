"""timm's layers shared by its vision transformers: Attention, Mlp, PatchEmbed."""

from __future__ import annotations

import torch.nn.functional as F
from timm.layers.attention import Attention
from timm.layers.format import Format
from timm.layers.mlp import Mlp
from timm.layers.norm import LayerNorm
from timm.layers.patch_embed import PatchEmbed
from timm.layers.trace_utils import _assert
from torch import nn

from ..ops import attention, linear, mlp_layer, patch_embed
from .fast import (
    Fast,
    activation_name,
    fall_back,
    first,
    norm_of,
    not_activation,
    not_layer_norm,
    not_one_of,
    not_plain_conv,
    not_plain_linear,
    packed_patch,
    scaled,
)


def attend(attn, qkv):
    """timm's Attention between its two projections: packed qkv (B, N, 3*H*D) -> (B, N, H*D)."""
    B, N, _ = qkv.shape
    q, k, v = qkv.view(B, N, 3, attn.num_heads, attn.head_dim).unbind(2)
    if type(attn.q_norm) is not nn.Identity:
        q, k = attn.q_norm(q), attn.k_norm(k)
    # torch's fused attention takes no scale from timm, so neither do we
    out = attention(q, k, v, scale=None if attn.fused_attn else attn.scale)
    return out.view(B, N, attn.attn_dim)


class FastAttention(Fast, Attention):
    invisible = ("k_norm.bias",)  # the same for all keys: softmax cancels it

    @classmethod
    def unserved(cls, module, mode):
        if module.gate is not None:
            return "gated"
        if mode == "train" and module.attn_drop.p > 0:
            return f"attention dropout {module.attn_drop.p} in training"
        return first(
            (
                not_plain_linear("qkv", module.qkv),
                not_plain_linear("proj", module.proj),
                not_one_of("attn_drop", module.attn_drop, nn.Dropout),
            )
        )

    def forward(self, x, attn_mask=None, is_causal=False):
        plan = self._hybridops_plan
        if attn_mask is not None or is_causal:
            fall_back("timm Attention", "mask")
            return Attention.forward(self, x, attn_mask, is_causal)
        weights = plan.derived(self, x)
        if weights is not None:
            (weight, bias, packed), proj = weights
            out = attend(self, linear(x, weight, bias, packed=packed))
            if type(self.norm) is not nn.Identity:
                out = self.norm(out)
            return linear(out, proj.weight, proj.bias, packed=proj.packed)
        if (self.attn_drop.training and self.attn_drop.p > 0) or not plan.intact():
            return Attention.forward(self, x)
        out = self.norm(attend(self, linear(x, self.qkv.weight, self.qkv.bias)))
        return self.proj_drop(linear(out, self.proj.weight, self.proj.bias))

    def derive(self):
        return scaled(self.qkv), scaled(self.proj)


class FastMlp(Fast, Mlp):
    @classmethod
    def unserved(cls, module, mode):
        return first(
            (
                not_plain_linear("fc1", module.fc1),
                not_plain_linear("fc2", module.fc2),
                not_activation("act", module.act),
            )
        )

    @classmethod
    def facts(cls, module):
        return activation_name(module.act)

    def forward(self, x):
        plan = self._hybridops_plan
        weights = plan.derived(self, x)
        if weights is not None:
            fc1, fc2 = weights
            if type(self.norm) is nn.Identity:
                return mlp_layer(x, fc1, fc2, activation=plan.facts)
            h = linear(x, fc1.weight, fc1.bias, activation=plan.facts, packed=fc1.packed)
            return linear(self.norm(h), fc2.weight, fc2.bias, packed=fc2.packed)
        if not plan.intact():
            return Mlp.forward(self, x)
        h = linear(x, self.fc1.weight, self.fc1.bias, activation=plan.facts)
        h = self.norm(self.drop1(h))
        return self.drop2(linear(h, self.fc2.weight, self.fc2.bias))

    def derive(self):
        return scaled(self.fc1), scaled(self.fc2)


class FastPatchEmbed(Fast, PatchEmbed):
    @classmethod
    def unserved(cls, module, mode):
        proj = module.proj
        reason = not_plain_conv("proj", proj)
        if reason:
            return reason
        if proj.kernel_size != proj.stride or proj.padding != (0, 0):
            geometry = proj.kernel_size, proj.stride, proj.padding
            return "proj has kernel {}, stride {} and padding {}".format(*geometry)
        if not module.flatten and module.output_fmt != Format.NHWC:
            return f"output format {module.output_fmt.value}; the kernel writes tokens"
        if type(module.norm) is nn.Identity:
            return None
        return not_layer_norm("norm", module.norm, LayerNorm)

    def forward(self, x):
        plan = self._hybridops_plan
        weights = plan.derived(self, x)
        if weights is None and not plan.intact():
            return PatchEmbed.forward(self, x)
        x = self._checked(x)
        proj, norm = self.proj, self.norm
        if weights is None:
            tokens = norm(patch_embed(x, proj.weight, proj.bias, stride=proj.stride[0]))
        else:
            weight, bias, packed, fused = weights
            tokens = patch_embed(x, weight, bias, stride=proj.stride[0], norm=fused, packed=packed)
            if fused is None:
                tokens = norm(tokens)
        if self.flatten:
            return tokens
        ph, pw = self.patch_size
        return tokens.unflatten(1, (x.shape[2] // ph, x.shape[3] // pw))

    def derive(self):
        proj, norm = self.proj, self.norm
        fuses = type(norm) is not nn.Identity and norm.weight.dtype == proj.weight.dtype
        return *packed_patch(proj), norm_of(norm) if fuses else None

    def _checked(self, x):
        """x with the size checks and the padding of PatchEmbed.forward."""
        _, _, H, W = x.shape
        ph, pw = self.patch_size
        if self.img_size is not None:
            want_h, want_w = self.img_size
            if self.strict_img_size:
                _assert(want_h == H, f"Input height ({H}) doesn't match model ({want_h}).")
                _assert(want_w == W, f"Input width ({W}) doesn't match model ({want_w}).")
            elif not self.dynamic_img_pad:
                _assert(
                    H % ph == 0, f"Input height ({H}) should be divisible by patch size ({ph})."
                )
                _assert(W % pw == 0, f"Input width ({W}) should be divisible by patch size ({pw}).")
        if self.dynamic_img_pad:
            x = F.pad(x, (0, (pw - W % pw) % pw, 0, (ph - H % ph) % ph))
        return x
