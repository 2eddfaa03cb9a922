"""GroupNorm with what follows it in a ResNet, for inference: activation(group_norm(x) + residual).

x (B, C, H, W), its C channels in `groups` normalised per image, then weight and bias per channel:

    y = activation((x - mean) / sqrt(var + eps) * weight + bias + residual)

The kernel reads and writes channels_last. Over a ResNet's ten shapes at batch 1, ReLU included,
torch's own takes 1.5 times as long in fp32 and twice as long in bf16 (2 cores of a Zen 4), and its
residual is one more pass. While gradients are recorded, and on a GPU, this is plain torch.
"""

from __future__ import annotations

from contextlib import suppress

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import backend
from ._contract import (
    ACTIVATIONS,
    CODES,
    REFUSALS,
    activation_code,
    check_eps,
    check_int,
    check_one_device,
    check_shape,
    check_tensor,
    is_autocast_on,
    library,
)


# meaning
def group_norm_reference(
    x: Tensor,
    groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    activation: str,
    residual: Tensor | None,
) -> Tensor:
    learns = any(v is not None and v.requires_grad for v in (weight, bias))
    if learns and torch.is_grad_enabled() and not x.requires_grad:
        x = x.contiguous()  # torch 2.13's backward without dx crashes on a channels_last image
    y = F.group_norm(x, groups, weight, bias, eps)
    return ACTIVATIONS[activation](y if residual is None else y + residual)


# contract: the kernel's result is (B, H, W, C)
_ARGS = "int groups, Tensor? weight, Tensor? bias, float eps, int activation, Tensor? residual"
library.define(f"group_norm(Tensor x, {_ARGS}) -> Tensor")
library.define(f"group_norm_(Tensor(a!) x, {_ARGS}) -> ()")


@torch.library.register_fake("hybridops::group_norm", lib=library)
def _(x, *args):
    check_one_device("group_norm", x, *args)
    B, C, H, W = x.shape
    return x.new_empty((B, H, W, C))


@torch.library.register_fake("hybridops::group_norm_", lib=library)
def _(x, *args):
    check_one_device("group_norm_", x, *args)


_group_norm = torch.ops.hybridops.group_norm.default
_group_norm_in_place = torch.ops.hybridops.group_norm_.default


# door
def group_norm(
    x: Tensor,
    groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    activation: str = "none",
    residual: Tensor | None = None,
    overwrite: bool = False,
) -> Tensor:
    """x (B, C, H, W) -> like x, in channels_last wherever the kernel serves.

    weight and bias (C,), residual like x. overwrite: the result may lie in x's memory. Raises
    ValueError for shapes, groups and activations that do not fit, TypeError for dtypes.
    """
    if backend.runs_at_once(x) and x.ndim == 4:
        with suppress(*REFUSALS), backend.below_autograd():
            code = CODES[activation]
            image = x.contiguous(memory_format=torch.channels_last)
            if residual is not None:
                residual = residual.contiguous(memory_format=torch.channels_last)
            if overwrite:
                _group_norm_in_place(image, groups, weight, bias, eps, code, residual)
                return image
            y = _group_norm(image, groups, weight, bias, eps, code, residual)
            return y.permute(0, 3, 1, 2)
    check_tensor("group_norm", "x", x, 4)
    like = None if _mixed(x) else x
    check_group_norm("group_norm", x.shape[1], groups, weight, bias, eps, like)
    activation_code("group_norm", activation)
    if residual is not None:
        check_tensor("group_norm", "residual", residual, 4, like)
        check_shape("group_norm", "residual", residual, tuple(x.shape))
    if x.is_cuda:  # torch's own serves there on purpose, whatever is forced
        if not torch.compiler.is_compiling():
            backend.served["group_norm", "torch"] += 1
    elif not torch.is_grad_enabled():
        backend.which("group_norm", x)  # counts the call, or raises where the kernel was forced
    return group_norm_reference(x, groups, weight, bias, eps, activation, residual)


def check_group_norm(op, channels, groups, weight, bias, eps, like):
    """Checks what normalises that many channels; like: a tensor of their dtype, None for any."""
    check_int(op, "groups", groups, 1)
    if channels % groups:
        raise ValueError(f"{op}: {channels} channels do not make {groups} groups")
    for name, vector in (("weight", weight), ("bias", bias)):
        if vector is not None:
            check_tensor(op, f"{name} of the norm", vector, 1, like)
            check_shape(op, f"{name} of the norm", vector, (channels,))
    check_eps(op, "eps", eps)


def _mixed(x):
    """Autocast brings fp32 parameters to images in its own dtype; torch sorts that out."""
    return is_autocast_on(x)
