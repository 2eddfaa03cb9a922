"""timm's Twins: locally grouped and subsampled attention, PEG, patch embeddings.

In inference a stage is two dispatches: its patch embedding, and all of its blocks.
"""

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
from ..ops.chain import Chain, attention_step, mlp_step
from ..ops.grid_steps import positions_step, reduced_step, windows_step
from .chained import is_apart
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
from .qkv import QkvAttention, scale_of
from .subsampled import SubsampledAttention
from .timm_block import PARTS, not_pre_norm


class FastLocallyGroupedAttn(QkvAttention, LocallyGroupedAttn):
    def forward(self, x, size):
        y = in_windows(self.attended, x, size, (self.ws, self.ws))
        return LocallyGroupedAttn.forward(self, x, size) if y is None else y


class FastGlobalSubSampleAttn(SubsampledAttention, GlobalSubSampleAttn):
    def steps(self, weights, grid, norm):
        """What folded() gives, x added, as layers of a chain; None where r does not divide."""
        q, sr, kv, proj = weights
        shape = {"heads": self.num_heads, "norm": norm_of(norm), "residual": True}
        if sr is None:
            key_dim = q.weight.shape[1] // self.num_heads
            return [attention_step(q, proj, key_dim=key_dim, scale=scale_of(self), **shape)]
        r = self.sr.stride[0]
        if sr.packed is None or grid[0] % r or grid[1] % r:
            return None
        between = {"reduction_norm": norm_of(self.norm), "scale": scale_of(self)}
        return [reduced_step(q, sr, kv, proj, grid=grid, **between, **shape)]


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

    def steps(self, weights, grid):
        """The block as layers of a chain for tokens of this grid, or None."""
        attn, (parts, fc1, fc2) = self.attn, weights
        fused = {"activation": self._hybridops_plan.facts, "norm": norm_of(self.norm2)}
        mlp = mlp_step(fc1, fc2, residual=True, **fused)
        if isinstance(attn, FastGlobalSubSampleAttn):
            mixed = attn.steps(parts, grid, self.norm1)
            return mixed and [*mixed, mlp]
        window = (attn.ws, attn.ws)
        if grid[0] % attn.ws or grid[1] % attn.ws:
            return None
        (qkv, _, proj), (heads, key_dim) = parts, attn._hybridops_plan.facts
        shape = {"heads": heads, "key_dim": key_dim, "scale": attn.score_scale()}
        return [
            windows_step(grid, window),
            attention_step(qkv, proj, norm=norm_of(self.norm1), residual=True, **shape),
            mlp,
            windows_step(grid, window, back=True),
        ]

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


_CHAINS = 32  # of eight sizes of images: each holds what its kernels read in another form


class Stages:
    """The blocks of each stage as one chain for each grid that comes: stages(i, x, grid)."""

    def __init__(self, stages):
        self._stages = stages  # of each: blocks with their weights, weight and bias of its PEG
        self._chains = {}

    def __call__(self, i, x, grid):
        """None for tokens that the chain cannot serve."""
        key = i, tuple(grid)
        if key not in self._chains:
            if len(self._chains) >= _CHAINS:
                self._chains.pop(next(iter(self._chains)))
            layers = self._layers(*key)
            self._chains[key] = layers and Chain(layers)
        chain = self._chains[key]
        return chain and chain(x)

    def _layers(self, i, grid):
        blocks, positions = self._stages[i]
        layers = []
        for j, (block, weights) in enumerate(blocks):
            steps = block.steps(weights, grid)
            if steps is None:
                return None
            layers += steps
            if j == 0:
                layers.append(positions_step(*positions, grid=grid))
        return layers


class FastTwins(Fast, Twins):
    """Between stages the tokens are a channels_last image already; Twins makes an NCHW copy."""

    overrides = "forward_features"

    @classmethod
    def bypassed(cls, module):
        return module.blocks, module.pos_block

    def forward_features(self, x):
        stages = None if is_apart() else self._hybridops_plan.derived(self, x)
        last = len(self.blocks) - 1
        for i, (embed, drop) in enumerate(zip(self.patch_embeds, self.pos_drops, strict=True)):
            x, size = embed(x)
            x = drop(x)
            mixed = None if stages is None else stages(i, x, size)
            x = self._apart(i, x, size) if mixed is None else mixed
            if i < last:
                x = x.unflatten(1, size).permute(0, 3, 1, 2)
        return self.norm(x)

    def _apart(self, i, x, size):
        for j, block in enumerate(self.blocks[i]):
            x = block(x, size)
            if j == 0:
                x = self.pos_block[i](x, size)
        return x

    def derive(self):
        stages = []
        for blocks, positions in zip(self.blocks, self.pos_block, strict=True):
            served = isinstance(positions, FastPosConv) and positions.stride == 1
            if not served or not all(isinstance(block, FastBlock) for block in blocks):
                return None
            weights = [block.derive() for block in blocks]
            if None in weights:
                return None
            conv = positions.proj[0]
            stages.append((list(zip(blocks, weights, strict=True)), (conv.weight, conv.bias)))
        return Stages(stages)
