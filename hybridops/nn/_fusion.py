"""When one op may stand in for several modules, and when the modules must be called themselves.

An op replaces the call of a child module only if that call is nothing but the child's arithmetic:
its own class (not a LoRA or quantised stand-in, not parametrized) and no hooks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from .. import backend, ops
from ..ops._contract import ACTIVATIONS as ACTIVATE
from ..ops._contract import is_autocast_on
from ._derived import Weights, linear_weights

LINEARS = {nn.Linear, NonDynamicallyQuantizableLinear}
CONVS = {nn.Conv2d}
SEQUENTIALS = {nn.Sequential}
BATCH_NORMS = {nn.BatchNorm1d, nn.BatchNorm2d, nn.SyncBatchNorm}
OWN_BATCH = {nn.BatchNorm1d, nn.BatchNorm2d}  # whose statistics are this process' batch alone
LAYER_NORMS = {nn.LayerNorm}  # a rule adds here the classes that it knows to mean the same
ACTIVATIONS = {
    nn.Identity: "none",
    nn.ReLU: "relu",
    nn.GELU: "gelu",
    nn.SiLU: "silu",
    nn.Hardswish: "hardswish",
}


def is_hooked(module: Any) -> bool:
    """Whether somebody watches or changes what goes in and out of this very module."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


def is_ours(module: Any, cls: type[nn.Module]) -> bool:
    """Whether calling `module` is nothing but cls.forward: then its parent may fuse across it."""
    own = type(module)  # or a class that optimize() put in its place, which means the same
    same = own.forward is cls.forward or getattr(own, "replaces", None) is cls
    return same and not is_hooked(module)


def is_plain(module: nn.Module | None, classes) -> bool:
    return type(module) in classes and not is_hooked(module)


def folds(norm: Any) -> bool:
    """Whether this BatchNorm is a fixed scale and shift in this call."""
    return is_plain(norm, BATCH_NORMS) and not norm.training and norm.running_mean is not None


def activation_name(module: Any) -> str | None:
    """The op's word for an activation module, or None where the module must be called."""
    name = ACTIVATIONS.get(type(module))
    if name is None or is_hooked(module):
        return None
    if name == "gelu" and module.approximate == "tanh":
        return "gelu_tanh"
    return name


def is_off(module: nn.Module | None) -> bool:
    """A dropout or stochastic depth that changes nothing in this call."""
    if module is None or type(module) is nn.Identity:
        return True
    if is_hooked(module):
        return False
    p = module.p if type(module) is nn.Dropout else getattr(module, "drop_prob", None)
    return p is not None and (p == 0 or not module.training)


def norm_args(norm: Any, x: Tensor) -> tuple[Tensor, Tensor | None, float] | None:
    """A LayerNorm over the last dimension as ops.linear takes it, or None if it must be called."""
    if not is_plain(norm, LAYER_NORMS) or norm.weight is None or norm.weight.dtype != x.dtype:
        return None
    return (norm.weight, norm.bias, norm.eps) if len(norm.normalized_shape) == 1 else None


def keeps_fp32(x: Tensor) -> bool:
    """Autocast: torch computes LayerNorm and the residual stream in fp32, so they stay apart."""
    return is_autocast_on(x)


def plain_linears(owner: nn.Module, *names: str) -> list[Weights] | None:
    """The weights of these children, or None unless all may be computed without being called."""
    layers: list[Any] = [owner._modules[name] for name in names]
    if not all(is_plain(layer, LINEARS) for layer in layers):
        return None
    return [linear_weights(owner, *named) for named in zip(names, layers, strict=True)]


def fused_linear(
    owner: nn.Module,
    name: str,
    x: Tensor,
    *,
    norm: nn.Module | None = None,
    activation: str = "none",
    residual: Tensor | None = None,
) -> Tensor:
    """activation(linear(norm(x))) + residual, linear being owner's child `name`: one op if it may.

    Inside `use("reference")` the child is called, as plain torch would.
    """
    linear: Any = owner._modules[name]
    if backend.reference_forced() or not is_plain(linear, LINEARS):
        y = linear(x if norm is None else norm(x))
        return finish(y, activation, residual)
    affine = None
    if norm is not None:
        affine = None if keeps_fp32(x) else norm_args(norm, x)
        if affine is None:
            x = norm(x)
    w = linear_weights(owner, name, linear)
    if residual is not None and keeps_fp32(x):
        y = ops.linear(x, w.weight, w.bias, norm=affine, activation=activation, packed=w.packed)
        return residual + y
    return ops.linear(
        x,
        w.weight,
        w.bias,
        norm=affine,
        activation=activation,
        residual=residual,
        packed=w.packed,
    )


def norm_batch(norm: Any, x: Tensor, activation: str = "none") -> Tensor:
    """activation(norm(x)), norm a BatchNorm over the last dimension of tokens x (..., C).

    With the batch's own statistics that is one op; the running ones move as torch moves them.
    """
    if not takes_statistics(norm, x):
        return finish(norm(x.flatten(0, -2)).view(x.shape), activation)
    y, mean, var = ops.batch_norm(x, norm.weight, norm.bias, norm.eps, activation=activation)
    if norm.training and norm.track_running_stats and norm.running_mean is not None:
        with torch.no_grad():
            factor = norm.momentum
            if norm.num_batches_tracked is not None:
                norm.num_batches_tracked.add_(1)
                factor = 1 / float(norm.num_batches_tracked) if factor is None else factor
            rows = x.shape[:-1].numel()
            unbiased = var * (rows / (rows - 1))
            norm.running_mean.lerp_(mean.to(norm.running_mean.dtype), factor or 0.0)
            norm.running_var.lerp_(unbiased.to(norm.running_var.dtype), factor or 0.0)
    return y


def takes_statistics(norm: Any, x: Tensor) -> bool:
    """Whether ops.batch_norm stands for this call of a BatchNorm."""
    if not is_plain(norm, OWN_BATCH) or not (norm.training or norm.running_mean is None):
        return False
    if not x.is_cpu or x.dtype not in backend.CPU_DTYPES or x.shape[:-1].numel() < 2:
        return False
    if backend.ISA is None or backend.reference_forced():
        return False
    return norm.weight is None or norm.weight.dtype in (x.dtype, torch.float32)


def finish(y: Tensor, activation: str = "none", residual: Tensor | None = None) -> Tensor:
    """activation(y) + residual in plain torch."""
    if activation != "none":
        y = ACTIVATE[activation](y)
    return y if residual is None else residual + y
