"""CPVT: Conditional Positional Encodings for Vision Transformers (Chu et al. 2021), Algorithm 1.

A DeiT without position embeddings: a PEG (depthwise convolution on the token grid) behind the first
block, or behind several, tells the tokens where they are. So any image size works without
retraining. There is neither official code nor weights; keys follow timm's ViT and the paper's
`pos_block` and `pos`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import product

import torch
from torch import Tensor, nn

from ..nn import PEG, Block, PatchEmbed
from .classifier import Classifier, init_linear


class Cpvt(Classifier):
    """CPVT: images (B, in_chans, H, W) of any size from one patch up -> logits (B, num_classes).

    peg_positions: the blocks behind which a PEG stands, counted from 0. global_pool: "token" (a
    class token) or "avg" (none, the mean of the tokens: CPVT-GAP). num_classes=0 leaves out the
    head. Pixels that fill no whole patch, right and bottom, are ignored.
    """

    def __init__(
        self,
        embed_dim: int = 192,
        num_heads: int = 3,
        depth: int = 12,
        *,
        peg_positions: Sequence[int] = (0,),
        peg_kernel: int = 3,
        global_pool: str = "token",
        patch_size: int = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        mlp_ratio: float = 4.0,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        if global_pool not in ("token", "avg"):
            raise ValueError(f"Cpvt: global_pool must be 'token' or 'avg', got {global_pool!r}")
        positions = tuple(peg_positions)
        if len(set(positions)) != len(positions) or not all(0 <= p < depth for p in positions):
            raise ValueError(
                f"Cpvt: peg_positions must be different blocks of 0 ... {depth - 1}, "
                f"got {peg_positions}"
            )
        self.in_chans = in_chans
        self.num_classes = num_classes
        self.embed_dim = self.num_features = embed_dim
        self.num_prefix_tokens = 1 if global_pool == "token" else 0
        self.patch_embed = PatchEmbed(None, patch_size, in_chans, embed_dim)
        self.cls_token = None
        if self.num_prefix_tokens:
            self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        norm_layer = partial(nn.LayerNorm, eps=1e-6)
        self.blocks = nn.ModuleList(
            Block(
                embed_dim,
                num_heads,
                mlp_ratio,
                qkv_bias=True,
                proj_drop=drop_rate,
                attn_drop=attn_drop_rate,
                drop_path=drop_path_rate * i / max(depth - 1, 1),
                norm_layer=norm_layer,
            )
            for i in range(depth)
        )
        self.pos_block = nn.ModuleList(PEG(embed_dim, peg_kernel) for _ in positions)
        # (which PEG, block in front of it), in the order in which they run
        self._pegs = sorted(enumerate(positions), key=lambda peg: peg[1])
        self.norm = norm_layer(embed_dim)
        self.head = nn.Linear(embed_dim, num_classes) if num_classes else nn.Identity()
        self.apply(init_linear)
        if self.cls_token is not None:
            nn.init.trunc_normal_(self.cls_token, std=0.02)

    def _embed(self, x):
        if x.ndim != 4 or x.shape[1] != self.in_chans:
            raise ValueError(
                f"Cpvt: images must be (B, {self.in_chans}, H, W), got {tuple(x.shape)}"
            )
        grid = self.patch_embed.dynamic_feat_size(x.shape[2:])
        if grid[0] < 1 or grid[1] < 1:
            raise ValueError(
                f"Cpvt: images must hold one {self.patch_embed.patch_size} patch at least, "
                f"got {tuple(x.shape)}"
            )
        return self.patch_embed(x, prefix=self.cls_token), grid

    def _tokens(self, x: Tensor, count: int) -> Tensor:
        """The first `count` blocks, each with the PEG behind it."""
        x, grid = self._embed(x)
        run, done = self._run(x), 0
        for i, block in self._pegs:
            if block >= count:
                break
            x = self.pos_block[i](run(x, done, block + 1), grid, self.num_prefix_tokens)
            done = block + 1
        return run(x, done, count)


SIZES = {
    "cpvt_tiny": {"embed_dim": 192, "num_heads": 3},
    "cpvt_small": {"embed_dim": 384, "num_heads": 6},
    "cpvt_base": {"embed_dim": 768, "num_heads": 12},
}


def _variants() -> dict[str, Callable[..., nn.Module]]:
    """cpvt_tiny: one PEG, class token; _gap: no class token; _peg5: PEGs behind blocks 0 ... 4."""
    models: dict[str, Callable[..., nn.Module]] = {}
    for (name, size), gap, peg5 in product(SIZES.items(), (False, True), (False, True)):
        pool = "avg" if gap else "token"
        positions = tuple(range(5)) if peg5 else (0,)
        make = partial(Cpvt, **size, global_pool=pool, peg_positions=positions)
        models[name + "_gap" * gap + "_peg5" * peg5] = make
    return models


MODELS = _variants()
