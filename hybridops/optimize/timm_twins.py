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

from ..nn._derived import derived, linear_weights, patch_weights
from ..ops import attention, linear, patch_embed, peg
from .fast import (
    Fast,
    activation_name,
    first,
    not_layer_norm,
    not_one_of,
    not_plain_conv,
    not_plain_linear,
    one_dtype,
    packed_linear,
)
from .timm_layers import FastMlp
from .timm_vit import norm_of


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
        if plan.folds(self, x):
            return self._attend(
                x,
                size,
                *linear_weights(self, "qkv", self.qkv),
                *linear_weights(self, "proj", self.proj),
            )
        if _drops(self) or not plan.intact():
            return LocallyGroupedAttn.forward(self, x, size)
        qkv, proj = self.qkv, self.proj
        return self.proj_drop(
            self._attend(x, size, qkv.weight, qkv.bias, None, proj.weight, proj.bias, None)
        )

    def _attend(self, x, size, qkv, qkv_bias, qkv_packed, proj, proj_bias, proj_packed):
        B, N, C = x.shape
        (H, W), ws = size, self.ws
        bottom, right = -H % ws, -W % ws
        if bottom or right:  # zeros join the windows as tokens, unmasked: timm's meaning
            x = F.pad(x.view(B, H, W, C), (0, 0, 0, right, 0, bottom)).view(B, -1, C)
        padded = (H + bottom, W + right)
        out = _packed_attention(
            self, linear(into_windows(x, padded, ws), qkv, qkv_bias, packed=qkv_packed)
        )
        out = from_windows(out, padded, ws)
        if bottom or right:
            out = out.view(B, *padded, C)[:, :H, :W].reshape(B, N, C)
        return linear(out, proj, proj_bias, packed=proj_packed)


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
            return reason
        if module.sr.kernel_size != module.sr.stride or module.sr.padding != (0, 0):
            return f"sr has kernel {module.sr.kernel_size} and stride {module.sr.stride}"
        return not_plain_conv("sr", module.sr) or not_layer_norm("norm", module.norm, LayerNorm)

    def forward(self, x, size):
        plan = self._hybridops_plan
        if plan.folds(self, x):
            return self._folded(x, size, None, None)
        if _drops(self) or not plan.intact():
            return GlobalSubSampleAttn.forward(self, x, size)
        q = linear(x, self.q.weight, self.q.bias)
        if self.sr is not None:
            image = x.unflatten(1, size).permute(0, 3, 1, 2)
            x = self.norm(patch_embed(image, self.sr.weight, self.sr.bias, stride=self.sr_ratio))
        kv = linear(x, self.kv.weight, self.kv.bias)
        out = self._attend(q, kv)
        return self.proj_drop(linear(out, self.proj.weight, self.proj.bias))

    def _folded(self, x, size, norm, residual):
        """proj(attend(norm(x))) + residual; norm is the block's LayerNorm, or None."""
        if self.sr is None:
            weight, bias, packed = self._qkv_weights()
            fused = None if norm is None else norm_of(norm)
            out = _packed_attention(self, linear(x, weight, bias, norm=fused, packed=packed))
        else:
            if norm is not None:  # the convolution needs it too
                x = norm(x)
            weight, bias, packed = linear_weights(self, "q", self.q)
            q = linear(x, weight, bias, packed=packed)
            weight, bias, packed = patch_weights(self, "sr", self.sr)
            image = x.unflatten(1, size).permute(0, 3, 1, 2)
            x = patch_embed(
                image, weight, bias, stride=self.sr_ratio, norm=norm_of(self.norm), packed=packed
            )
            weight, bias, packed = linear_weights(self, "kv", self.kv)
            out = self._attend(q, linear(x, weight, bias, packed=packed))
        weight, bias, packed = linear_weights(self, "proj", self.proj)
        return linear(out, weight, bias, residual=residual, packed=packed)

    def _qkv_weights(self):
        q, kv = self.q, self.kv

        def make():
            biases = [
                b if b is not None else layer.weight.new_zeros(layer.weight.shape[0])
                for layer in (q, kv)
                for b in (layer.bias,)
            ]
            return packed_linear(torch.cat([q.weight, kv.weight]), torch.cat(biases))

        return derived(self, "qkv", (q.weight, q.bias, kv.weight, kv.bias), make)

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
        attn, plan = self.attn, self._hybridops_plan
        served = isinstance(attn, (FastLocallyGroupedAttn, FastGlobalSubSampleAttn))
        if not (served and plan.folds(self, x) and self._has_one_dtype()):
            return Block.forward(self, x, size)
        if isinstance(attn, FastGlobalSubSampleAttn):
            return self._mlp(attn._folded(x, size, self.norm1, x))
        ws = attn.ws
        if size[0] % ws or size[1] % ws:  # the zeros come behind the norm, so it cannot be fused
            return self._mlp(x + attn(self.norm1(x), size))
        # the whole block stays in window order: only the two permutations touch memory
        x = into_windows(x, size, ws)
        weight, bias, packed = linear_weights(attn, "qkv", attn.qkv)
        out = _packed_attention(
            attn, linear(x, weight, bias, norm=norm_of(self.norm1), packed=packed)
        )
        weight, bias, packed = linear_weights(attn, "proj", attn.proj)
        x = linear(out, weight, bias, residual=x, packed=packed)
        return from_windows(self._mlp(x), size, ws)

    def _mlp(self, x):
        mlp = self.mlp
        weight, bias, packed = linear_weights(mlp, "fc1", mlp.fc1)
        activation = self._hybridops_plan.facts
        h = linear(x, weight, bias, norm=norm_of(self.norm2), activation=activation, packed=packed)
        weight, bias, packed = linear_weights(mlp, "fc2", mlp.fc2)
        return linear(h, weight, bias, residual=x, packed=packed)

    def _has_one_dtype(self):
        return self.norm1.weight.dtype == self.norm2.weight.dtype == self.mlp.fc1.weight.dtype


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
        proj, norm = self.proj, self.norm
        if plan.folds(self, x) and one_dtype((proj.weight, norm.weight)):
            weight, bias, packed = patch_weights(self, "proj", proj)
            tokens = patch_embed(
                x, weight, bias, stride=proj.stride[0], norm=norm_of(norm), packed=packed
            )
        elif plan.intact():
            tokens = norm(patch_embed(x, proj.weight, proj.bias, stride=proj.stride[0]))
        else:
            return PatchEmbed.forward(self, x)
        _, _, H, W = x.shape
        return tokens, (H // self.patch_size[0], W // self.patch_size[1])


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
