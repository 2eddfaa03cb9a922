"""timm's Twins: locally grouped and subsampled attention, PEG, patch embeddings."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from timm.layers.mlp import Mlp
from timm.layers.norm import LayerNorm
from timm.models.twins import (
    Block,
    GlobalSubSampleAttn,
    LocallyGroupedAttn,
    PatchEmbed,
    PosConv,
    Twins,
)
from torch import nn

from ..nn._derived import Weights
from ..ops import attention, attention_layer, linear, mlp_layer, patch_embed, peg
from .fast import (
    Fast,
    activation_name,
    first,
    norm_of,
    not_layer_norm,
    not_one_of,
    not_plain_conv,
    not_plain_linear,
    one_dtype,
    packed_linear,
    packed_patch,
    scaled,
)
from .timm_layers import FastMlp


def _dropout_in_training(module, mode):
    if mode == "train" and module.attn_drop.p > 0:
        return f"attention dropout {module.attn_drop.p} in training"
    return not_one_of("attn_drop", module.attn_drop, nn.Dropout)


def _drops(module):
    return module.attn_drop.training and module.attn_drop.p > 0


def into_windows(x, size, ws):
    """Tokens (B, H*W, C) -> (windows, ws*ws, C); H and W are multiples of ws."""
    B, _, C = x.shape
    H, W = size
    x = x.reshape(B, H // ws, ws, W // ws, ws, C).transpose(2, 3)
    return x.reshape(-1, ws * ws, C)


def from_windows(x, size, ws):
    """The inverse of into_windows."""
    C, (H, W) = x.shape[2], size
    x = x.reshape(-1, H // ws, W // ws, ws, ws, C).transpose(2, 3)
    return x.reshape(-1, H * W, C)


def _packed_attention(attn, qkv):
    """qkv (B, N, 3*C) -> (B, N, C)"""
    B, N, C3 = qkv.shape
    q, k, v = qkv.view(B, N, 3, attn.num_heads, -1).unbind(2)
    return attention(q, k, v, scale=None if attn.fused_attn else attn.scale).view(B, N, C3 // 3)


class FastLocallyGroupedAttn(Fast, LocallyGroupedAttn):
    @classmethod
    def unserved(cls, module, mode):
        return first(
            (
                _dropout_in_training(module, mode),
                not_plain_linear("qkv", module.qkv),
                not_plain_linear("proj", module.proj),
            )
        )

    def forward(self, x, size):
        plan = self._hybridops_plan
        weights = plan.derived(self, x)
        if weights is not None:
            return self._attend(x, size, *weights)
        if _drops(self) or not plan.intact():
            return LocallyGroupedAttn.forward(self, x, size)
        qkv, proj = (Weights(layer.weight, layer.bias, None) for layer in (self.qkv, self.proj))
        return self.proj_drop(self._attend(x, size, qkv, proj))

    def derive(self):
        return scaled(self.qkv), scaled(self.proj)

    def _attend(self, x, size, qkv, proj):
        B, N, C = x.shape
        (H, W), ws = size, self.ws
        bottom, right = -H % ws, -W % ws
        if bottom or right:  # zeros join the windows as tokens, unmasked: timm's meaning
            x = F.pad(x.view(B, H, W, C), (0, 0, 0, right, 0, bottom)).view(B, -1, C)
        padded = (H + bottom, W + right)
        x = into_windows(x, padded, ws)
        out = _packed_attention(self, linear(x, qkv.weight, qkv.bias, packed=qkv.packed))
        out = from_windows(out, padded, ws)
        if bottom or right:
            out = out.view(B, *padded, C)[:, :H, :W].reshape(B, N, C)
        return linear(out, proj.weight, proj.bias, packed=proj.packed)


def _mixed_biases(module):
    if (module.q.bias is None) != (module.kv.bias is None):
        return "only one of q and kv has a bias"
    return None


class FastGlobalSubSampleAttn(Fast, GlobalSubSampleAttn):
    @classmethod
    def unserved(cls, module, mode):
        reason = first(
            (
                _dropout_in_training(module, mode),
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
            return self._folded(x, size, weights, None, None)
        if _drops(self) or not plan.intact():
            return GlobalSubSampleAttn.forward(self, x, size)
        q = linear(x, self.q.weight, self.q.bias)
        if self.sr is not None:
            image = x.unflatten(1, size).permute(0, 3, 1, 2)
            x = self.norm(patch_embed(image, self.sr.weight, self.sr.bias, stride=self.sr_ratio))
        kv = linear(x, self.kv.weight, self.kv.bias)
        out = self._attend(q, kv)
        return self.proj_drop(linear(out, self.proj.weight, self.proj.bias))

    def derive(self):
        if self.sr is None:
            return self._merged(), None, None, scaled(self.proj)
        return scaled(self.q), packed_patch(self.sr), scaled(self.kv), scaled(self.proj)

    def _merged(self):
        """q and kv as one product: without subsampling both read the same tokens."""
        q, kv = self.q, self.kv
        bias = None if q.bias is None else torch.cat([q.bias, kv.bias])
        return packed_linear(torch.cat([q.weight, kv.weight]), bias)

    def _folded(self, x, size, weights, norm, residual):
        """proj(attend(norm(x))) + residual; norm is the block's LayerNorm, or None."""
        (weight, bias, packed), sr, kv, proj = weights
        if sr is None:
            fused = None if norm is None else norm_of(norm)
            out = _packed_attention(self, linear(x, weight, bias, norm=fused, packed=packed))
        else:
            if norm is not None:  # the convolution needs it too
                x = norm(x)
            q = linear(x, weight, bias, packed=packed)
            image = x.unflatten(1, size).permute(0, 3, 1, 2)
            fused, ratio = norm_of(self.norm), self.sr_ratio
            x = patch_embed(image, sr.weight, sr.bias, stride=ratio, norm=fused, packed=sr.packed)
            out = self._attend(q, linear(x, kv.weight, kv.bias, packed=kv.packed))
        return linear(out, proj.weight, proj.bias, residual=residual, packed=proj.packed)

    def _attend(self, q, kv):
        B, N, C = q.shape
        q = q.view(B, N, self.num_heads, -1)
        k, v = kv.view(B, kv.shape[1], 2, self.num_heads, -1).unbind(2)
        return attention(q, k, v, scale=None if self.fused_attn else self.scale).view(B, N, C)


class FastBlock(Fast, Block):
    @classmethod
    def unserved(cls, module, mode):
        if mode == "train":
            return "training keeps the block as it is; attn and mlp are served"
        attn, mlp = module.attn, module.mlp
        reason = first(
            (
                not_one_of("attn", attn, LocallyGroupedAttn, GlobalSubSampleAttn),
                not_one_of("mlp", mlp, Mlp),
                not_layer_norm("norm1", module.norm1, LayerNorm),
                not_layer_norm("norm2", module.norm2, LayerNorm),
                not_one_of("drop_path1", module.drop_path1, nn.Identity, DropPath),
                not_one_of("drop_path2", module.drop_path2, nn.Identity, DropPath),
            )
        )
        if reason:
            return reason
        local = isinstance(attn, LocallyGroupedAttn)
        rule = FastLocallyGroupedAttn if local else FastGlobalSubSampleAttn
        reason = rule.unserved(attn, mode)
        if reason:
            return f"attn: {reason}"
        reason = FastMlp.unserved(mlp, mode)
        if reason:
            return f"mlp: {reason}"
        return None if type(mlp.norm) is nn.Identity else "a norm inside mlp; the parts are served"

    @classmethod
    def facts(cls, module):
        return activation_name(module.mlp.act)

    def forward(self, x, size):
        weights = self._hybridops_plan.derived(self, x)
        if weights is None:
            return Block.forward(self, x, size)
        attn, (parts, fc1, fc2) = self.attn, weights
        if isinstance(attn, FastGlobalSubSampleAttn):
            return self._mlp(attn._folded(x, size, parts, self.norm1, x), fc1, fc2)
        ws = attn.ws
        if size[0] % ws or size[1] % ws:  # the zeros come behind the norm, so it cannot be fused
            return self._mlp(x + attn._attend(self.norm1(x), size, *parts), fc1, fc2)
        # the whole block stays in window order: only the two permutations touch memory
        x = into_windows(x, size, ws)
        x = attention_layer(
            x,
            *parts,
            heads=attn.num_heads,
            key_dim=x.shape[2] // attn.num_heads,
            scale=None if attn.fused_attn else attn.scale,
            norm=norm_of(self.norm1),
            residual=True,
        )
        return from_windows(self._mlp(x, fc1, fc2), size, ws)

    def derive(self):
        attn, mlp, norms = self.attn, self.mlp, (self.norm1, self.norm2)
        served = isinstance(attn, (FastLocallyGroupedAttn, FastGlobalSubSampleAttn))
        if not served or not one_dtype(layer.weight for layer in (*norms, attn.proj, mlp.fc1)):
            return None
        return attn.derive(), scaled(mlp.fc1), scaled(mlp.fc2)

    def _mlp(self, x, fc1, fc2):
        norm, activation = norm_of(self.norm2), self._hybridops_plan.facts
        return mlp_layer(x, fc1, fc2, norm=norm, activation=activation, residual=True)


class FastPosConv(Fast, PosConv):
    @classmethod
    def unserved(cls, module, mode):
        if len(module.proj) != 1:
            return f"proj holds {len(module.proj)} layers"
        conv = module.proj[0]
        reason = not_one_of("proj.0", conv, nn.Conv2d)
        if reason:
            return reason
        if not conv.groups == conv.in_channels == conv.out_channels:
            return "proj.0 is not depthwise"
        return None

    def forward(self, x, size):
        if not self._hybridops_plan.intact():
            return PosConv.forward(self, x, size)
        conv = self.proj[0]
        stride = self.stride
        return peg(
            x,
            conv.weight,
            conv.bias,
            grid=tuple(size),
            stride=stride,
            padding=1,
            residual=stride == 1,
        )


class FastPatchEmbed(Fast, PatchEmbed):
    @classmethod
    def unserved(cls, module, mode):
        proj = module.proj
        reason = not_plain_conv("proj", proj) or not_layer_norm("norm", module.norm, LayerNorm)
        if reason:
            return reason
        if proj.kernel_size != proj.stride or proj.padding != (0, 0):
            geometry = proj.kernel_size, proj.stride, proj.padding
            return "proj has kernel {}, stride {} and padding {}".format(*geometry)
        return None

    def forward(self, x):
        plan = self._hybridops_plan
        weights = plan.derived(self, x)
        proj, norm = self.proj, self.norm
        if weights is not None:
            weight, bias, packed = weights
            fused, stride = norm_of(norm), proj.stride[0]
            tokens = patch_embed(x, weight, bias, stride=stride, norm=fused, packed=packed)
        elif plan.intact():
            tokens = norm(patch_embed(x, proj.weight, proj.bias, stride=proj.stride[0]))
        else:
            return PatchEmbed.forward(self, x)
        _, _, H, W = x.shape
        return tokens, (H // self.patch_size[0], W // self.patch_size[1])

    def derive(self):
        same = self.proj.weight.dtype == self.norm.weight.dtype
        return packed_patch(self.proj) if same else None


class FastTwins(Fast, Twins):
    """Between stages the tokens are a channels_last image already; Twins makes an NCHW copy."""

    overrides = "forward_features"

    @classmethod
    def bypassed(cls, module):
        return ()

    def forward_features(self, x):
        last = len(self.blocks) - 1
        stages = zip(self.patch_embeds, self.pos_drops, self.blocks, self.pos_block, strict=True)
        for i, (embed, drop, blocks, pos_block) in enumerate(stages):
            x, size = embed(x)
            x = drop(x)
            for j, block in enumerate(blocks):
                x = block(x, size)
                if j == 0:
                    x = pos_block(x, size)
            if i < last:
                x = x.unflatten(1, size).permute(0, 3, 1, 2)
        return self.norm(x)
