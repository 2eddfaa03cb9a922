"""Attention layers of one form: a product for q, k and v, attention with a bias, a product.

Most of timm's families have a class of their own for it. They differ in the order of the product's
rows, in where the bias of the scores comes from, and in what is done to q and k in between: a rule
says just that.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..nn._derived import Weights
from ..ops import attention, attention_layer, linear
from .fast import (
    Fast,
    first,
    not_one_of,
    not_plain_linear,
    not_pointwise,
    packed_linear,
    scaled,
)


def dropout_in_training(module: Any, mode: str) -> str | None:
    """Why an attention's dropout stands in the way."""
    drop = getattr(module, "attn_drop", None)
    if drop is None:
        return None
    if mode == "train" and drop.p > 0:
        return f"attention dropout {drop.p} in training"
    return not_one_of("attn_drop", drop, nn.Dropout)


def drops(module: Any) -> bool:
    """Whether this call drops attention weights."""
    drop = getattr(module, "attn_drop", None)
    return drop is not None and drop.training and drop.p > 0


def scale_of(module: Any) -> float | None:
    """torch's fused attention takes no scale from timm, so neither do we."""
    return None if getattr(module, "fused_attn", False) else module.scale


def as_they_are(linear: Any) -> Weights:
    """An nn.Linear's parameters, unpacked: what trains."""
    return Weights(linear.weight, linear.bias, None)


def pointwise(conv: Any) -> Weights:
    """A 1 x 1 convolution's parameters as those of a product, unpacked."""
    return Weights(conv.weight.flatten(1), conv.bias, None)


def not_pointwise_attention(module: Any, mode: str) -> str | None:
    """Why an attention of images, whose products are 1 x 1 convolutions, cannot be served."""
    return first(
        (
            dropout_in_training(module, mode),
            not_pointwise("qkv", module.qkv),
            not_pointwise("proj", module.proj),
        )
    )


def split_bias(module: Any) -> Weights:
    """A qkv product whose bias is kept in three parts (k's is a buffer, zero): unpacked."""
    if module.q_bias is None:
        return as_they_are(module.qkv)
    bias = torch.cat([module.q_bias, module.k_bias, module.v_bias])
    return Weights(module.qkv.weight, bias, None)


def tiled(bias: Tensor | None, images: int) -> Tensor | None:
    """bias (E, heads, N, N) as it is; in a trace, where E divides the images, E of them for all.

    Outside a trace the images are taken E at a time, without a copy. A loop over them would be
    unrolled in a graph, which then served no other batch; and so would len() be its number.
    """
    if bias is None or bias.shape[0] == 1 or not torch.compiler.is_compiling():
        return bias
    return bias.repeat(images // bias.shape[0], 1, 1, 1)


class QkvAttention(Fast):
    """Base of the rules for proj(attention(qkv(x)))."""

    interleaved: ClassVar[bool] = False  # qkv's rows are q, k, v head by head
    changes_qk: ClassVar[bool] = False  # changed() does something

    @classmethod
    def unserved(cls, module, mode):
        return first(
            (
                dropout_in_training(module, mode),
                not_plain_linear("qkv", module.qkv),
                not_plain_linear("proj", module.proj),
            )
        )

    @classmethod
    def facts(cls, module):
        """(heads, features of a key)"""
        heads = module.num_heads
        return heads, getattr(module, "key_dim", None) or module.qkv.weight.shape[0] // 3 // heads

    # what a rule says of its class
    def products(self: Any) -> tuple[Weights, Weights]:
        """qkv and proj, unpacked."""
        return as_they_are(self.qkv), as_they_are(self.proj)

    def score_bias(self) -> tuple[Tensor | None, Tensor | None]:
        """(None, None), a dense bias (1, heads, N, N) and None, or a table and its index."""
        return None, None

    def changed(self, q: Tensor, k: Tensor, *how: Any) -> tuple[Tensor, Tensor]:
        """q and k (B, N, heads, key_dim) on their way into the scores."""
        return q, k

    def between(self, out: Tensor) -> Tensor:
        """What stands between attention and proj."""
        return out

    def score_scale(self) -> float | None:
        return scale_of(self)

    # what they have in common
    def forward(self, x):
        y = self.attended(x)
        return self.replaces.forward(self, x) if y is None else y

    def derive(self, gamma=None):
        """(qkv, dense bias, proj with the LayerScale behind it)"""
        qkv, proj = self.products()
        bias, index = self.score_bias()
        if index is not None:
            bias = bias[:, index][None]  # spread out, once
        return packed_linear(qkv.weight, qkv.bias), bias, scaled(proj, gamma)

    def attended(self, x, extra=None, how=()):
        """The layer for tokens x (B, N, C), or None where the original has to run.

        extra: added to the scores, (E, 1 or heads, N, N), E a divisor of B; image b takes row b % E
        (Swin's masks). how: for changed().
        """
        plan = self._hybridops_plan
        weights = plan.derived(self, x)
        if weights is not None:
            return self.folded(x, weights, extra, how=how)
        if drops(self) or not plan.intact():
            return None
        qkv, proj = self.products()
        bias, index = self.score_bias()
        if extra is not None:
            if index is not None:
                bias, index = bias[:, index][None], None
            bias = extra if bias is None else bias + extra
        out = self._mixed(linear(x, qkv.weight, qkv.bias), bias, index, how)
        y = linear(out, proj.weight, proj.bias)
        drop = self._modules.get("proj_drop")
        return y if drop is None else drop(y)

    def folded(self, x, weights, extra=None, norm=None, residual=False, how=()):
        """What attended() gives in inference: proj(attention(qkv(norm(x)))) + x."""
        qkv, bias, proj = weights
        if extra is not None:
            bias = extra if bias is None else bias + extra
        bias = tiled(bias, x.shape[0])
        if not self.changes_qk and (
            bias is None or bias.shape[0] == 1 or bias.shape[0] == x.shape[0]
        ):
            heads, key_dim = self._hybridops_plan.facts
            return attention_layer(
                x,
                qkv,
                proj,
                heads=heads,
                key_dim=key_dim,
                scale=self.score_scale(),
                interleaved=self.interleaved,
                norm=norm,
                bias=bias,
                residual=residual,
            )
        projected = linear(x, qkv.weight, qkv.bias, norm=norm, packed=qkv.packed)
        out = self._mixed(projected, bias, None, how)
        return linear(
            out, proj.weight, proj.bias, residual=x if residual else None, packed=proj.packed
        )

    def _mixed(self, qkv, bias, index, how):
        """Packed qkv (B, N, features) -> (B, N, heads * Dv)"""
        B, N, _ = qkv.shape
        heads, key_dim = self._hybridops_plan.facts
        if self.interleaved:
            parts = qkv.view(B, N, heads, -1)
            q, k, v = parts.split([key_dim, key_dim, parts.shape[3] - 2 * key_dim], dim=3)
        else:
            q, k, v = qkv.view(B, N, 3, heads, key_dim).unbind(2)
        q, k = self.changed(q, k, *how)
        bias = bias if index is not None else tiled(bias, B)
        scale, rows = self.score_scale(), 0 if bias is None or index is not None else bias.shape[0]
        if rows == 0 or rows == 1 or rows == B:  # not "in": a trace sees no symbols there
            out = attention(q, k, v, bias=bias, bias_index=index, scale=scale)
        else:  # the same rows for every image: no copy of them for each
            images = zip(*(t.split(rows) for t in (q, k, v)), strict=True)
            out = torch.cat([attention(*image, bias=bias, scale=scale) for image in images])
        return self.between(out.flatten(2))
