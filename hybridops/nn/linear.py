"""Linear layers with what stands around them: activation, BatchNorm behind, BatchNorm in front."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from .. import backend, ops
from ..ops._contract import ACTIVATIONS
from ._derived import Weights, linear_weights, normed_linear_weights
from ._fusion import (
    BATCH_NORMS,
    LINEARS,
    finish,
    is_off,
    is_ours,
    is_plain,
    keeps_fp32,
    norm_batch,
)


class Linear(nn.Linear):
    """nn.Linear with an activation behind it: none, relu, gelu, gelu_tanh, silu or hardswish.

    x (..., in_features) -> (..., out_features). Raises ValueError for an unknown activation.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device=None,
        dtype=None,
        *,
        activation: str = "none",
    ) -> None:
        if activation not in ACTIVATIONS:
            raise ValueError(
                f"Linear: activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}"
            )
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        if backend.reference_forced():
            return ACTIVATIONS[self.activation](F.linear(x, self.weight, self.bias))
        w = linear_weights(self, "linear", self)
        return ops.linear(x, w.weight, w.bias, activation=self.activation, packed=w.packed)

    def extra_repr(self) -> str:
        shown = super().extra_repr()
        return shown if self.activation == "none" else f"{shown}, activation={self.activation}"


class LinearNorm(nn.Module):
    """A linear layer and the BatchNorm of its output features (LeViT): one product in eval mode.

    x (..., in_features) -> (..., out_features); children `linear` and `bn`, as in timm.
    bn_weight_init: 0 lets a residual branch start as nothing.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bn_weight_init: float = 1,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        self.linear = nn.Linear(in_features, out_features, bias=False, device=device, dtype=dtype)
        self.bn = nn.BatchNorm1d(out_features, device=device, dtype=dtype)
        nn.init.constant_(self.bn.weight, bn_weight_init)

    def forward(self, x: Tensor) -> Tensor:
        return _linear_norm(self, x, "none", None)


def linear_norm(
    module: Any, x: Tensor, activation: str = "none", residual: Tensor | None = None
) -> Tensor:
    """activation(module(x)) + residual for a LinearNorm or what stands in its place."""
    if is_ours(module, LinearNorm):
        return _linear_norm(module, x, activation, residual)
    return finish(module(x), activation, residual)


def folded(module: Any) -> Weights | None:
    """A LinearNorm as one linear layer, or None where it must be called or has batch statistics."""
    if not is_ours(module, LinearNorm):
        return None
    linear, bn = module._modules["linear"], module._modules["bn"]
    if not is_plain(linear, LINEARS) or not is_plain(bn, BATCH_NORMS):
        return None
    if bn.training or bn.running_mean is None:
        return None
    return linear_weights(module, "folded", linear, bn)


def _linear_norm(module, x, activation, residual):
    linear, bn = module._modules["linear"], module._modules["bn"]
    plain = is_plain(linear, LINEARS) and is_plain(bn, BATCH_NORMS)
    if backend.reference_forced() or not plain:
        y = linear(x)
    elif bn.training or bn.running_mean is None:
        w = linear_weights(module, "product", linear)
        y = norm_batch(bn, ops.linear(x, w.weight, w.bias, packed=w.packed), activation)
        return y if residual is None else residual + y
    else:
        w = linear_weights(module, "folded", linear, bn)
        late = residual if residual is not None and keeps_fp32(x) else None
        early = residual if late is None else None
        y = ops.linear(x, w.weight, w.bias, activation=activation, residual=early, packed=w.packed)
        return y if late is None else late + y
    y = bn(y.flatten(0, -2)).view(y.shape) if y.ndim != 2 else bn(y)
    return finish(y, activation, residual)


class NormLinear(nn.Module):
    """A BatchNorm in front of a linear layer (LeViT's heads): one product in eval mode.

    x (B, in_features) -> (B, out_features); children `bn`, `drop` and `linear`, as in timm.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        std: float = 0.02,
        drop: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        self.bn = nn.BatchNorm1d(in_features, device=device, dtype=dtype)
        self.drop = nn.Dropout(drop)
        self.linear = nn.Linear(in_features, out_features, bias=bias, device=device, dtype=dtype)
        nn.init.trunc_normal_(self.linear.weight, std=std)
        if self.linear.bias is not None:
            nn.init.zeros_(self.linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        children: dict[str, Any] = self._modules
        bn, drop, linear = children["bn"], children["drop"], children["linear"]
        plain = is_plain(linear, LINEARS) and is_plain(bn, BATCH_NORMS)
        if backend.reference_forced() or not plain:
            return linear(drop(bn(x)))
        if bn.training or bn.running_mean is None or not is_off(drop):
            w = linear_weights(self, "product", linear)
            return ops.linear(drop(bn(x)), w.weight, w.bias, packed=w.packed)
        w = normed_linear_weights(self, "folded", bn, linear)
        return ops.linear(x, w.weight, w.bias, packed=w.packed)
