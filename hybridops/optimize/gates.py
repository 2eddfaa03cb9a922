"""Wake up a model for verification: no gate near zero, no faint product, fitting statistics.

A random-initialised LeViT multiplies every branch by a BatchNorm weight of zero: whatever its
attention computes, the output is the same, so comparing outputs proves nothing. Attention whose
scores are all near zero hides its queries too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

SEED = 0
NEAR_ZERO = 1e-3  # CaiT's LayerScale starts at 1e-5; trained gates are far above
FAINT = 0.5  # a product that shrinks its input more than this is scaled to keep its size


@torch.no_grad()
def randomise_gates(model: nn.Module, seed: int) -> None:
    """Give every near-zero gate, bias and table of `model` (in place) values of ordinary size."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            # BatchNorm weights always: their zeros are often mixed with trained ones
            gate = parameter.ndim == 1 and name in ("weight", "gamma")
            if gate and isinstance(module, _BatchNorm):
                parameter.copy_(_uniform(parameter, generator, 0.5, 1.5))
            elif parameter.numel() and parameter.abs().max() < NEAR_ZERO:
                low, high = (0.5, 1.5) if gate else (-1.0, 1.0)
                parameter.copy_(_uniform(parameter, generator, low, high))
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            gain = module.weight.flatten(1).square().sum(1).mean().sqrt()
            if 0 < gain < FAINT:
                module.weight.div_(gain)
        if isinstance(module, _BatchNorm) and module.bias is not None:
            module.bias.copy_(_uniform(module.bias, generator, -0.5, 0.5))
        weight = _frozen_weight(module)
        if weight is not None and weight.abs().max() < NEAR_ZERO:
            # small: its statistics stay as they are, and a body of such branches must not blow up
            weight.copy_(_uniform(weight, generator, 0.1, 0.3))


def _frozen_weight(module: nn.Module) -> Tensor | None:
    """That of a BatchNorm all of which are buffers, as DETR's backbones have it."""
    whole = {"weight", "bias", "running_mean", "running_var"} <= module._buffers.keys()
    return module._buffers["weight"] if whole else None


@torch.no_grad()
def fit_statistics(model: nn.Module, args: tuple[Any, ...], seed: int, **kwargs: Any) -> None:
    """Run `model` once, giving each BatchNorm statistics near those of its input."""
    generator = torch.Generator().manual_seed(seed)
    handles = [
        module.register_forward_pre_hook(lambda module, args: _fit(module, args[0], generator))
        for module in model.modules()
        if isinstance(module, _BatchNorm) and module.running_mean is not None
    ]
    try:
        model(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()


def _fit(norm: Any, x: Tensor, generator: torch.Generator) -> None:
    channels = x.float().transpose(0, 1).flatten(1)
    mean, var = channels.mean(1), channels.var(1, correction=0)
    if channels.shape[1] <= 8:  # too few values for a channel of its own: all channels share
        mean, var = torch.zeros_like(mean), channels.square().mean().expand_as(mean)
    std = var.clamp_min(1e-6).sqrt()
    norm.running_mean.copy_(mean + _uniform(mean, generator, -0.2, 0.2) * std)
    norm.running_var.copy_((std * _uniform(std, generator, 0.8, 1.25)).square())


@torch.no_grad()
def make_live(net: nn.Module, *args: Any) -> None:
    """Replace an initialisation by one in which every branch counts, in place, always the same.

    A fresh model hides errors: gates, biases and bias tables start at zero. `randomise_gates` wakes
    them. Residual gates then stay below 0.3, and BatchNorm divides by the mean square of what it
    sees of `args`, or rounding errors would grow a thousandfold on their way through LeViT: no
    trained network is that chaotic.
    """
    norms = [m for m in net.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]
    gates = [m.weight for m in norms if m.weight is not None and not m.weight.any()]
    randomise_gates(net, SEED)
    for gate in gates:
        gate.mul_(0.2)
    net.eval()
    hooks = [norm.register_forward_pre_hook(_take_statistics) for norm in norms]
    if hooks:
        net(*args)
    for hook in hooks:
        hook.remove()
    net.train()  # drops what eval mode may have cached (LeViT's attention biases)
    net.eval()


def _take_statistics(norm: Any, inputs: tuple[Tensor, ...]) -> None:
    channels = inputs[0].transpose(0, 1).flatten(1)
    square = channels.square().mean(1)
    norm.running_mean.copy_(0.1 * channels.mean(1))
    norm.running_var.copy_(square.clamp_min(square.mean() / 4))


def _uniform(like: Tensor, generator: torch.Generator, low: float, high: float) -> Tensor:
    values = torch.rand(like.shape, generator=generator) * (high - low) + low
    return values.to(like.device, like.dtype)
