"""Hybrid ViT: a convolutional body in front of a vision transformer (Dosovitskiy et al. 2021).

The body's features, projected, are the tokens; then a ViT as ever: class token, learned positions,
pre-norm blocks. R50+ViT-B/16 and R+ViT-Ti/16 are the paper's and Steiner et al.'s (2021).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ... import backend, ops
from ...nn import Block
from ...nn._derived import patch_weights
from ...nn._fusion import CONVS, is_plain
from ...nn.block import NORM
from ...nn.patch_embed import with_prefix
from ..classifier import Classifier, init_linear

Grid = tuple[int, int]


class HybridEmbed(nn.Module):
    """Images to tokens through a body: (B, in_chans, H, W) -> (B, h*w, embed_dim), (h, w) = grid().

    projects=False: the body's features are the tokens.
    """

    def __init__(
        self, backbone: Any, embed_dim: int, patch_size: int = 1, projects: bool = True
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.patch_size = patch_size
        self.proj = None
        if projects:
            self.proj = nn.Conv2d(backbone.channels, embed_dim, patch_size, patch_size)

    def grid(self, height: int, width: int) -> Grid:
        """(rows, columns) of tokens for an image of that size."""
        rows, columns = self.backbone.grid(height, width)
        return rows // self.patch_size, columns // self.patch_size

    def forward(self, x: Tensor) -> Tensor:
        x, proj = self.backbone(x), self.proj
        if is_plain(proj, CONVS) and not backend.reference_forced():
            # oneDNN adds up an output's products one by one: four times the error at 64 x 8 x 8
            w = patch_weights(self, "proj", proj)
            return ops.patch_embed(x, w.weight, w.bias, stride=self.patch_size, packed=w.packed)
        y = x if proj is None else proj(x)
        return y.flatten(2).transpose(1, 2)


class HybridVit(Classifier):
    """Hybrid ViT: images (B, in_chans, H, W) of any size -> logits (B, num_classes).

    backbone: makes the body, backbone(in_chans=...); backbones.py has them. img_size: the size
    whose grid of tokens the position embedding has; for other images it is interpolated.
    patch_size: of the projection, in cells of the body's features. class_position: whether the
    class token has a position too. num_classes=0 leaves out the head. What fills no whole patch,
    right and bottom, is ignored.

    Raises ValueError for images of other channels, or without one whole patch.
    """

    def __init__(
        self,
        backbone: Callable[..., nn.Module],
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        *,
        img_size: int | Grid = 224,
        patch_size: int = 1,
        projects: bool = True,
        class_position: bool = True,
        in_chans: int = 3,
        num_classes: int = 1000,
        mlp_ratio: float = 4.0,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        self.in_chans = in_chans
        self.num_classes = num_classes
        self.embed_dim = self.num_features = embed_dim
        self.class_position = class_position
        self.patch_embed = HybridEmbed(backbone(in_chans=in_chans), embed_dim, patch_size, projects)
        size = (img_size, img_size) if isinstance(img_size, int) else img_size
        self.grid = self.patch_embed.grid(*size)
        if min(self.grid) < 1:
            raise ValueError(f"HybridVit: img_size {img_size} holds no whole patch")
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        count = self.grid[0] * self.grid[1] + class_position
        self.pos_embed = nn.Parameter(torch.zeros(1, count, embed_dim))
        self.blocks = nn.ModuleList(
            Block(
                embed_dim,
                num_heads,
                mlp_ratio,
                qkv_bias=True,
                proj_drop=drop_rate,
                attn_drop=attn_drop_rate,
                drop_path=drop_path_rate * i / max(depth - 1, 1),
            )
            for i in range(depth)
        )
        self.norm = NORM(embed_dim)
        self.head = nn.Linear(embed_dim, num_classes) if num_classes else nn.Identity()
        self.apply(init_linear)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        nn.init.normal_(self.cls_token, std=1e-6)

    def _tokens(self, x: Tensor, count: int) -> Tensor:
        if x.ndim != 4 or x.shape[1] != self.in_chans:
            raise ValueError(
                f"HybridVit: images must be (B, {self.in_chans}, H, W), got {tuple(x.shape)}"
            )
        grid = self.patch_embed.grid(x.shape[2], x.shape[3])
        if min(grid) < 1:
            raise ValueError(
                f"HybridVit: images must hold one whole patch at least, got {tuple(x.shape)}"
            )
        positions = resize_positions(self.pos_embed, self.grid, grid)
        x = with_prefix(self.patch_embed(x), positions, self.cls_token)
        return self._run(x)(x, 0, count)


def resize_positions(positions: Tensor, old: Grid, new: Grid) -> Tensor:
    """A position embedding (1, prefix + h*w, C) of grid `old` for grid `new`: bicubic, antialiased.

    Prefix tokens keep theirs. At least fp32 inside, as timm's.
    """
    if old == new:
        return positions
    prefix = positions.shape[1] - old[0] * old[1]
    image = positions[:, prefix:].unflatten(1, old).permute(0, 3, 1, 2)
    wide = image if image.dtype == torch.float64 else image.float()
    wide = F.interpolate(wide, new, mode="bicubic", antialias=True)
    tokens = wide.to(positions.dtype).flatten(2).transpose(1, 2)
    return torch.cat([positions[:, :prefix], tokens], dim=1)
