"""The steps of a ResNet's body, trained and in inference: conv, norm, activation and residual.

In inference a step is one convolution (BatchNorm folded in), or a convolution and one pass of
GroupNorm, activation and residual. While they learn, the modules are called one by one; a frozen
norm is a fixed scale and shift, so it is folded then too: the gradient passes the fold.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import backend
from ..ops.conv1x1 import GroupNorm
from ._derived import in_graph
from ._fusion import CONVS, finish, folds, is_plain
from .conv import StdConv2dSame, conv_of, same_padding

Pair = int | tuple[int, int]


class FrozenBatchNorm2d(nn.Module):
    """BatchNorm2d whose statistics, weight and bias are constants: x (B, C, H, W) -> the same."""

    eps = 1e-5

    def __init__(self, num_features: int, device=None, dtype=None) -> None:
        super().__init__()
        where = {"device": device, "dtype": dtype}
        for name, value in (("weight", 1), ("bias", 0), ("running_mean", 0), ("running_var", 1)):
            self.register_buffer(name, torch.full((num_features,), float(value), **where))

    def forward(self, x: Tensor) -> Tensor:
        b: dict[str, Any] = self._buffers
        scale = b["weight"] * (b["running_var"] + self.eps).rsqrt()
        shift = b["bias"] - b["running_mean"] * scale
        return x * scale[:, None, None] + shift[:, None, None]


_FROZEN = {FrozenBatchNorm2d}
_GROUP_NORMS = {nn.GroupNorm}
_CONVS = {*CONVS, StdConv2dSame}


def conv_norm(
    conv: Any,
    norm: Any,
    x: Tensor,
    activation: str = "none",
    residual: Tensor | None = None,
    overwrite: bool = False,
) -> Tensor:
    """activation(norm(conv(x)) + residual) for two modules, norm may be None: (B, C, H', W').

    overwrite: the result may lie in the residual's memory.
    """
    if not backend.reference_forced() and is_plain(conv, _CONVS):
        if norm is None or is_plain(norm, _FROZEN) or (folds(norm) and not _learn(conv, norm)):
            return conv_of(conv, "conv", conv, norm)(x, activation, residual, overwrite)
        if is_plain(norm, _GROUP_NORMS) and not in_graph(conv.weight):
            return conv_of(conv, "conv", conv).normed(x, norm_of(norm), activation, residual)
    y = conv(x) if norm is None else norm(conv(x))
    return finish(y if residual is None else y + residual, activation)


def norm_of(norm: Any) -> GroupNorm:
    """An nn.GroupNorm as the ops take it."""
    return norm.num_groups, norm.weight, norm.bias, norm.eps


def _learn(*modules: nn.Module) -> bool:
    """Whether these get gradients. Through a fold, a norm's would be six times as inexact."""
    parameters = (p for module in modules for p in module._parameters.values())
    return torch.is_grad_enabled() and any(p is not None and p.requires_grad for p in parameters)


def max_pool_same(x: Tensor, kernel: Pair = 3, stride: Pair = 2) -> Tensor:
    """TensorFlow's SAME max-pooling: x (B, C, H, W) -> (B, C, ceil(H / stride), ceil(W / stride)).

    SAME never pads fewer behind than in front: what is missing there is ceil_mode's to cut off.
    """
    sides = zip(x.shape[2:], _pair(kernel), _pair(stride), strict=True)
    before = [same_padding(*side, 1)[0] for side in sides]
    return F.max_pool2d(x, kernel, stride, before, ceil_mode=True)


def _pair(n: Pair) -> tuple[int, int]:
    return (n, n) if isinstance(n, int) else n
