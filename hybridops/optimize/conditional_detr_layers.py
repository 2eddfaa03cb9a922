"""Decoders of Conditional DETR and DAB-DETR: products of their own for content and positions.

Self-attention adds the two; cross-attention puts them side by side, so that queries and keys are
twice as wide as values.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..ops.layer import Weights
from .fast import scaled
from .transformers_block import joined, masked_attention, product

OWN = ("q_content_proj", "k_content_proj", "v_proj", "q_pos_proj", "k_pos_proj", "o_proj")
CROSS = (*OWN, "q_pos_sine_proj")


class Own(NamedTuple):
    content: Weights  # q, k and v of the tokens
    places: Weights  # q and k of their positions
    o: Weights


class Cross(NamedTuple):
    q: Weights
    kv: Weights
    q_places: Weights | None
    k_places: Weights
    q_sine: Weights
    o: Weights


def own(q: Any, k: Any, v: Any, q_places: Any, k_places: Any, o: Any) -> Own:
    return Own(joined(q, k, v), joined(q_places, k_places), scaled(o))


def cross(q: Any, k: Any, v: Any, q_places: Any, k_places: Any, o: Any, q_sine: Any) -> Cross:
    moved = None if q_places is None else scaled(q_places)
    return Cross(scaled(q), joined(k, v), moved, scaled(k_places), scaled(q_sine), scaled(o))


def attend_own(
    w: Own,
    heads: int,
    scale: float,
    x: Tensor,
    positions: Tensor,
    mask: Tensor | None,
    residual: Tensor | None = None,
) -> Tensor:
    """residual + self-attention of tokens x (B, N, C) at positions (B, N, C)."""
    content, places = product(x, w.content), product(positions, w.places)
    qk, v = content.split([places.shape[2], content.shape[2] - places.shape[2]], 2)
    q, k = (qk + places).chunk(2, 2)
    q, k, v = (t.unflatten(2, (heads, -1)) for t in (q, k, v))
    return product(masked_attention(q, k, v, mask, scale), w.o, residual=residual)


def attend_cross(
    w: Cross,
    heads: int,
    scale: float,
    x: Tensor,
    memory: tuple[Tensor, Tensor],
    sine: Tensor,
    positions: Tensor | None,
    mask: Tensor | None,
    residual: Tensor | None = None,
) -> Tensor:
    """residual + attention of x to memory: the encoder's tokens and their positions.

    positions: of x, added to its content, and the memory's to its own; None: neither.
    """
    q, k_places = product(x, w.q), product(memory[1], w.k_places)
    k, v = product(memory[0], w.kv).chunk(2, 2)
    if positions is not None:
        assert w.q_places is not None
        q, k = product(positions, w.q_places, residual=q), k + k_places
    parts = (q, product(sine, w.q_sine), k, k_places, v)
    q, sine, k, k_places, v = (t.unflatten(2, (heads, -1)) for t in parts)
    wide, keys = torch.cat([q, sine], 3), torch.cat([k, k_places], 3)
    return product(masked_attention(wide, keys, v, mask, scale), w.o, residual=residual)
