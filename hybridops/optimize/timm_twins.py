"""timm's Twins: locally grouped and subsampled attention, PEG, patch embeddings."""

from __future__ import annotations

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

from ..nn.peg import position_encoding
from ..ops import mlp_layer, patch_embed
from .fast import (
    Fast,
    activation_name,
    norm_of,
    not_layer_norm,
    not_one_of,
    not_plain_conv,
    one_dtype,
    packed_patch,
    scaled,
)
from .grid import from_windows, in_windows, into_windows
from .qkv import QkvAttention
from .subsampled import SubsampledAttention
from .timm_block import PARTS, not_pre_norm


class FastLocallyGroupedAttn(QkvAttention, LocallyGroupedAttn):
    def forward(self, x, size):
        y = in_windows(self.attended, x, size, (self.ws, self.ws))
        return LocallyGroupedAttn.forward(self, x, size) if y is None else y


class FastGlobalSubSampleAttn(SubsampledAttention, GlobalSubSampleAttn):
    pass


class FastBlock(Fast, Block):
    @classmethod
    def unserved(cls, module, mode):
        if mode == "train":
            return PARTS
        rules = (FastLocallyGroupedAttn, FastGlobalSubSampleAttn)
        return not_pre_norm(module, {rule.replaces: rule for rule in rules})

    @classmethod
    def facts(cls, module):
        return activation_name(module.mlp.act)

    def forward(self, x, size):
        weights = self._hybridops_plan.derived(self, x)
        if weights is None:
            return Block.forward(self, x, size)
        attn, (parts, fc1, fc2) = self.attn, weights
        if isinstance(attn, FastGlobalSubSampleAttn):
            return self._mlp(attn.folded(x, size, parts, self.norm1, x), fc1, fc2)
        window = (attn.ws, attn.ws)
        if size[0] % attn.ws or size[1] % attn.ws:  # zeros come behind the norm: it is not fused
            normed = self.norm1(x)
            mixed = in_windows(lambda tokens: attn.folded(tokens, parts), normed, size, window)
            return self._mlp(x + mixed, fc1, fc2)
        # the whole block stays in window order: only the two permutations touch memory
        x = into_windows(x, size, window)
        x = attn.folded(x, parts, norm=norm_of(self.norm1), residual=True)
        return from_windows(self._mlp(x, fc1, fc2), size, window)

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
        return position_encoding(
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
