"""DETR: End-to-End Object Detection with Transformers (Carion et al. 2020).

A ResNet's last features are tokens of a post-norm transformer encoder; 100 learned queries read
them in a decoder, and each says what it sees and where. Positions are added to queries and keys of
every attention, never to values. Keys are the authors' without the prefixes `backbone.0.body` and
`transformer`; keys.py renames the others.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ... import backend
from ...nn import MultiheadAttention
from ...nn._derived import linear_weights
from ...nn._fusion import fused_linear, is_off, plain_linears
from ...nn.multihead_attention import attend
from ...ops import linear, mlp_layer
from .masks import AttentionMap, MaskHead
from .resnet import ResNet


class Prediction(NamedTuple):
    """What the queries of one decoder layer say.

    logits (B, queries, classes + 1), the last class meaning "nothing"; boxes (B, queries, 4),
    centre x, centre y, width, height in fractions of the unpadded image; auxiliary: the layers in
    front of the last, while training; masks (B, queries, H/4, W/4), logits, of models with a mask
    head.
    """

    logits: Tensor
    boxes: Tensor
    auxiliary: tuple[Prediction, ...] = ()
    masks: Tensor | None = None


# torch.export.save writes results by name
pytree._register_namedtuple(Prediction, serialized_type_name="hybridops.models.detr.Prediction")


def sine_positions(valid: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    """Rows and columns of a grid as sines and cosines: valid (B, h, w) bool -> (B, h*w, dim).

    Counted over valid cells, so that padding does not move an image's positions. fp32 inside: bf16
    could not tell the cells apart.
    """
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    cells = valid.to(wide)
    half = dim // 2
    step = torch.arange(half, device=valid.device).div(2, rounding_mode="floor")
    wavelength = 10000 ** (2 * step / half).to(wide)
    parts = []
    for axis in (1, 2):
        count = cells.cumsum(axis)
        last = count.narrow(axis, -1, 1)
        angle = (count / (last + 1e-6) * (2 * math.pi))[..., None] / wavelength
        parts.append(torch.stack([angle[..., 0::2].sin(), angle[..., 1::2].cos()], -1).flatten(-2))
    return torch.cat(parts, -1).flatten(1, 2).to(dtype)


class _Layer(nn.Module):
    """What encoder and decoder layers share: a perceptron, and norms behind each sum."""

    def __init__(self, dim: int, hidden: int, drop: float, norms: int) -> None:
        super().__init__()
        self.linear1 = nn.Linear(dim, hidden)
        self.dropout = nn.Dropout(drop)
        self.linear2 = nn.Linear(hidden, dim)
        for i in range(1, norms + 1):
            self.add_module(f"norm{i}", nn.LayerNorm(dim))
            self.add_module(f"dropout{i}", nn.Dropout(drop))

    def _attend(self, name: str, i: int, x: Tensor, q: Tensor, k: Tensor, v: Tensor, padding):
        """norm_i(x + dropout_i(attention))"""
        m: dict[str, Any] = self._modules
        if is_off(m[f"dropout{i}"]):
            y = attend(m[name], q, k, v, padding, residual=x)
        else:
            y = x + m[f"dropout{i}"](attend(m[name], q, k, v, padding))
        return m[f"norm{i}"](y)

    def _perceive(self, i: int, x: Tensor) -> Tensor:
        """norm_i(x + dropout_i(perceptron(x)))"""
        m: dict[str, Any] = self._modules
        return m[f"norm{i}"](self._perceptron(m, m[f"dropout{i}"], x))

    def _perceptron(self, m, last_dropout, x):
        off = is_off(m["dropout"]) and is_off(last_dropout)
        if off and backend.runs_at_once(x):
            layers = plain_linears(self, "linear1", "linear2")
            if layers is not None:
                return mlp_layer(x, *layers, activation="relu", residual=True)
        hidden = m["dropout"](fused_linear(self, "linear1", x, activation="relu"))
        if off:
            return fused_linear(self, "linear2", hidden, residual=x)
        return x + last_dropout(fused_linear(self, "linear2", hidden))


class EncoderLayer(_Layer):
    """Self-attention and perceptron: x (B, N, dim) -> the same; padding (B, N), True: left out."""

    def __init__(self, dim: int, heads: int, hidden: int, drop: float, attn_drop: float) -> None:
        super().__init__(dim, hidden, drop, norms=2)
        self.self_attn = MultiheadAttention(dim, heads, attn_drop, batch_first=True)

    def forward(self, x: Tensor, pos: Tensor, padding: Tensor | None = None) -> Tensor:
        q = x + pos
        x = self._attend("self_attn", 1, x, q, q, x, padding)
        return self._perceive(2, x)


class DecoderLayer(_Layer):
    """Self-attention of the queries x (B, Q, dim), attention to memory (B, N, dim), perceptron.

    keys: memory with its positions added.
    """

    def __init__(self, dim: int, heads: int, hidden: int, drop: float, attn_drop: float) -> None:
        super().__init__(dim, hidden, drop, norms=3)
        self.self_attn = MultiheadAttention(dim, heads, attn_drop, batch_first=True)
        self.multihead_attn = MultiheadAttention(dim, heads, attn_drop, batch_first=True)

    def forward(
        self, x: Tensor, pos: Tensor, memory: Tensor, keys: Tensor, padding: Tensor | None = None
    ) -> Tensor:
        q = x + pos
        x = self._attend("self_attn", 1, x, q, q, x, None)
        x = self._attend("multihead_attn", 2, x, x + pos, keys, memory, padding)
        return self._perceive(3, x)


class _Stack(nn.Module):
    def __init__(self, layers: list[nn.Module], norm: nn.Module | None = None) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        if norm is not None:
            self.norm = norm


class BoxHead(nn.Module):
    """Three linear layers: (..., dim) -> (..., 4) in 0 ... 1."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(dim, n) for n in (dim, dim, 4))

    def forward(self, x: Tensor) -> Tensor:
        for name, activation in (("0", "relu"), ("1", "relu"), ("2", "none")):
            x = fused_linear(self.layers, name, x, activation=activation)
        return x.sigmoid()


class Detr(nn.Module):
    """DETR: images (B, 3, H, W), normalised -> Prediction.

    depths: of the ResNet; dilated: DC5. masks: with the panoptic mask head. drop_rate and
    attn_drop_rate act while training; the latter takes attention off the fused kernel.
    """

    def __init__(
        self,
        depths: tuple[int, ...] = (3, 4, 6, 3),
        *,
        dilated: bool = False,
        num_classes: int = 91,
        num_queries: int = 100,
        dim: int = 256,
        heads: int = 8,
        hidden: int = 2048,
        layers: tuple[int, int] = (6, 6),
        masks: bool = False,
        drop_rate: float = 0.1,
        attn_drop_rate: float = 0.0,
    ) -> None:
        super().__init__()
        self.dim, self.num_classes = dim, num_classes
        self.backbone = ResNet(depths, dilated)
        self.input_proj = nn.Conv2d(self.backbone.channels[-1], dim, 1)
        shape = (dim, heads, hidden, drop_rate, attn_drop_rate)
        self.encoder = _Stack([EncoderLayer(*shape) for _ in range(layers[0])])
        self.decoder = _Stack([DecoderLayer(*shape) for _ in range(layers[1])], nn.LayerNorm(dim))
        self.query_embed = nn.Embedding(num_queries, dim)
        self.class_embed = nn.Linear(dim, num_classes + 1)
        self.bbox_embed = BoxHead(dim)
        for part in (self.encoder, self.decoder):
            for weight in part.parameters():
                if weight.ndim > 1:
                    nn.init.xavier_uniform_(weight)
        self.bbox_attention = AttentionMap(dim, heads) if masks else None
        self.mask_head = MaskHead(dim, heads, self.backbone.channels) if masks else None

    def forward(self, images: Tensor, padding_mask: Tensor | None = None) -> Prediction:
        """padding_mask (B, H, W) bool, True where an image of a batch was filled up, right and
        bottom. Raises ValueError for shapes, TypeError for a mask that is not bool.
        """
        _check(images, padding_mask)
        features = self.backbone(images)
        grid = features[-1].shape[-2:]
        valid = _valid(padding_mask, images.shape[0], grid, images.device)
        pos = sine_positions(valid, self.dim, images.dtype)
        padding = None if padding_mask is None else ~valid.flatten(1)
        source = self._tokens(features[-1])
        memory = source
        for layer in self.encoder.layers:
            memory = layer(memory, pos, padding)
        states = self._decode(memory, memory + pos, padding)
        *auxiliary, last = map(self._heads, states)
        masks = None
        if self.bbox_attention is not None and self.mask_head is not None:
            maps = self.bbox_attention(states[-1], memory, padding)
            masks = self.mask_head(source, maps, grid, features[2::-1])
        return last._replace(auxiliary=tuple(auxiliary), masks=masks)

    def _tokens(self, features: Tensor) -> Tensor:
        x = features.flatten(2).transpose(1, 2)
        w = linear_weights(self, "input_proj", self.input_proj)
        return linear(x, w.weight, w.bias, packed=w.packed)

    def _decode(self, memory: Tensor, keys: Tensor, padding: Tensor | None) -> list[Tensor]:
        """The normed queries behind every decoder layer while training, else behind the last."""
        pos = self.query_embed.weight.to(memory.dtype).expand(memory.shape[0], -1, -1)
        x = torch.zeros_like(pos)
        states = []
        for layer in self.decoder.layers:
            x = layer(x, pos, memory, keys, padding)
            states.append(x)
        return [self.decoder.norm(x) for x in (states if self.training else states[-1:])]

    def _heads(self, x: Tensor) -> Prediction:
        return Prediction(fused_linear(self, "class_embed", x), self.bbox_embed(x))


def _valid(padding_mask, batch, grid, device):
    """Which cells of the feature grid show the image: (B, h, w) bool, nearest pixel."""
    if padding_mask is None:
        return torch.ones((batch, *grid), dtype=torch.bool, device=device)
    return F.interpolate(padding_mask[None].float(), size=grid)[0] == 0


def _check(images, padding_mask):
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"Detr: images must be (B, 3, H, W), got {tuple(images.shape)}")
    if padding_mask is None:
        return
    if padding_mask.dtype != torch.bool:
        raise TypeError(f"Detr: padding_mask must be bool, got {padding_mask.dtype}")
    expected = (images.shape[0], *images.shape[2:])
    if tuple(padding_mask.shape) != expected:
        raise ValueError(f"Detr: padding_mask must be {expected}, got {tuple(padding_mask.shape)}")
