"""LeViT: a Vision Transformer in ConvNet's Clothing for Faster Inference (Graham et al. 2021).

Four strided convolutions, then three stages of attention with a bias per relative offset and
two-layer perceptrons, BatchNorm behind every product, a strided attention between the stages. Two
heads, one for distillation. State dicts carry timm's keys; weights.py renames the others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from .. import backend
from ..nn import ConvStem, DropPath, LinearNorm, NormLinear
from ..nn import RelPosAttention as Attention
from ..nn import RelPosAttentionDownsample as AttentionDownsample
from ..nn._fusion import activation_name, is_off, is_ours
from ..nn.linear import folded, linear_norm
from ..nn.rel_pos_attention import rel_pos_attention
from ..ops import mlp_layer


def _drop_path(p: float) -> nn.Module:
    return DropPath(p) if p > 0 else nn.Identity()


class LevitMlp(nn.Module):
    """Two LinearNorms with a Hardswish between: x (B, N, features) -> the same shape."""

    def __init__(self, features: int, hidden_features: int, drop: float = 0.0) -> None:
        super().__init__()
        self.ln1 = LinearNorm(features, hidden_features)
        self.act = nn.Hardswish()
        self.drop = nn.Dropout(drop)
        self.ln2 = LinearNorm(hidden_features, features, bn_weight_init=0)

    def forward(self, x: Tensor) -> Tensor:
        return levit_mlp(self, x)


def levit_mlp(module: Any, x: Tensor, residual: Tensor | None = None) -> Tensor:
    """module(x) + residual for a LevitMlp."""
    m = module._modules
    name = activation_name(m["act"])
    if name is not None and backend.runs_at_once(x) and is_off(m["drop"]):
        up, down = folded(m["ln1"]), folded(m["ln2"])
        if up is not None and down is not None and (residual is None or residual is x):
            return mlp_layer(x, up, down, activation=name, residual=residual is not None)
    x = linear_norm(m["ln1"], x, name or "none")
    if name is None:
        x = m["act"](x)
    if not is_off(m["drop"]):
        x = m["drop"](x)
    return linear_norm(m["ln2"], x, residual=residual)


def _plus_mlp(x, mlp, drop_path):
    """x + drop_path(mlp(x))"""
    if is_off(drop_path) and is_ours(mlp, LevitMlp):
        return levit_mlp(mlp, x, x)
    return x + drop_path(mlp(x))


class LevitBlock(nn.Module):
    """x + attention(x), then x + perceptron(x)."""

    def __init__(
        self,
        dim: int,
        key_dim: int,
        num_heads: int,
        attn_ratio: float,
        mlp_ratio: float,
        resolution: tuple[int, int],
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.attn = Attention(dim, key_dim, num_heads, attn_ratio, resolution)
        self.drop_path1 = _drop_path(drop_path)
        self.mlp = LevitMlp(dim, int(dim * mlp_ratio))
        self.drop_path2 = _drop_path(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        m: dict[str, Any] = self._modules
        attn, drop_path = m["attn"], m["drop_path1"]
        if is_off(drop_path) and is_ours(attn, Attention):
            x = rel_pos_attention(attn, x, x)
        else:
            x = x + drop_path(attn(x))
        return _plus_mlp(x, m["mlp"], m["drop_path2"])


class LevitDownsample(nn.Module):
    """Strided attention without a residual, then x + perceptron(x)."""

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        key_dim: int,
        num_heads: int,
        attn_ratio: float,
        mlp_ratio: float,
        resolution: tuple[int, int],
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.attn_downsample = AttentionDownsample(
            in_dim, out_dim, key_dim, num_heads, attn_ratio, 2, resolution
        )
        self.mlp = LevitMlp(out_dim, int(out_dim * mlp_ratio))
        self.drop_path = _drop_path(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        m: dict[str, Any] = self._modules
        return _plus_mlp(m["attn_downsample"](x), m["mlp"], m["drop_path"])


class LevitStage(nn.Module):
    """Blocks of one resolution; downsampling in front of them in all stages but the first."""

    def __init__(self, downsample: nn.Module, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.downsample = downsample
        self.blocks = nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(self.downsample(x))


class Levit(nn.Module):
    """LeViT: images (B, in_chans, height, width) of exactly `img_size` -> logits (B, num_classes).

    img_size: a multiple of 16, one number or (height, width). distilled adds the second head: at
    evaluation the two are averaged, and so they are while training, but for
    `distilled_training = True`, which gives (logits, distillation logits).
    Raises ValueError for images of another size.
    """

    def __init__(
        self,
        embed_dim: Sequence[int] = (256, 384, 512),
        key_dim: int = 32,
        num_heads: Sequence[int] = (4, 6, 8),
        depth: Sequence[int] = (4, 4, 4),
        *,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        distilled: bool = True,
        attn_ratio: float = 2.0,
        mlp_ratio: float = 2.0,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
        if height < 16 or width < 16 or height % 16 or width % 16:
            raise ValueError(f"Levit: img_size must be a multiple of 16, got {img_size}")
        self.img_size = (height, width)
        self.in_chans = in_chans
        self.num_classes = num_classes
        self.embed_dim = tuple(embed_dim)
        self.depth = tuple(depth)
        self.num_features = embed_dim[-1]
        self.stem = ConvStem(in_chans, [embed_dim[0] // 8 << i for i in range(4)])
        size = (height // 16, width // 16)
        stages, before = [], embed_dim[0]
        for i, dim in enumerate(embed_dim):
            downsample: nn.Module = nn.Identity()
            if i > 0:
                heads = before // key_dim
                downsample = LevitDownsample(
                    before, dim, key_dim, heads, 4.0, 2.0, size, drop_path_rate
                )
                size = ((size[0] + 1) // 2, (size[1] + 1) // 2)
            shape = (dim, key_dim, num_heads[i], attn_ratio, mlp_ratio, size, drop_path_rate)
            stages.append(LevitStage(downsample, [LevitBlock(*shape) for _ in range(depth[i])]))
            before = dim
        self.stages = nn.Sequential(*stages)
        self.head = NormLinear(self.num_features, num_classes, drop=drop_rate)
        self.head_dist = (
            NormLinear(self.num_features, num_classes, drop=drop_rate) if distilled else None
        )
        self.distilled_training = False

    def forward_features(self, x: Tensor) -> Tensor:
        """images -> tokens of the last stage (B, N, embed_dim[-1])"""
        if x.ndim != 4 or tuple(x.shape[1:]) != (self.in_chans, *self.img_size):
            raise ValueError(
                f"Levit: images must be (B, {self.in_chans}, {self.img_size[0]}, "
                f"{self.img_size[1]}), got {tuple(x.shape)}"
            )
        return self.stages(self.stem(x))

    def forward_head(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        x = x.mean(1)
        y = self.head(x)
        if self.head_dist is None:
            return y
        dist = self.head_dist(x)
        if self.distilled_training and self.training:
            return y, dist
        return (y + dist) / 2

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        return self.forward_head(self.forward_features(x))


CONFIGS: dict[str, dict[str, Any]] = {
    "levit_128s": {
        "embed_dim": (128, 256, 384),
        "key_dim": 16,
        "num_heads": (4, 6, 8),
        "depth": (2, 3, 4),
    },
    "levit_128": {"embed_dim": (128, 256, 384), "key_dim": 16, "num_heads": (4, 8, 12)},
    "levit_192": {"embed_dim": (192, 288, 384), "num_heads": (3, 5, 6)},
    "levit_256": {"embed_dim": (256, 384, 512), "num_heads": (4, 6, 8)},
    "levit_384": {
        "embed_dim": (384, 512, 768),
        "num_heads": (6, 9, 12),
        "drop_path_rate": 0.1,
    },
}
MODELS: dict[str, Callable[..., nn.Module]] = {
    name: partial(Levit, **config) for name, config in CONFIGS.items()
}

_OFFICIAL = "https://dl.fbaipublicfiles.com/LeViT/LeViT-{}.pth"
PRETRAINED = {
    "levit_128s": _OFFICIAL.format("128S-96703c44"),
    "levit_128": _OFFICIAL.format("128-b88c2750"),
    "levit_192": _OFFICIAL.format("192-92712e41"),
    "levit_256": _OFFICIAL.format("256-13b5763e"),
    "levit_384": _OFFICIAL.format("384-9bdaf2e2"),
}
