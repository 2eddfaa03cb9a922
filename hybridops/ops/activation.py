"""An activation by itself, with the bits that the kernels give it where it is fused.

y = activation(x). What computes a layer now fused and now apart, as re-entrant checkpointing does,
gets the same numbers both ways; torch's own GELU, SiLU and hardswish round otherwise.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import backend
from ._contract import (
    CODES,
    activate,
    activation_backward,
    activation_code,
    check_tensor,
    differentiable,
    library,
)

# contract
library.define("activation(Tensor x, int activation) -> Tensor")


@torch.library.register_fake("hybridops::activation", lib=library)
def _(x, activation):
    return x.new_empty(x.shape)


# gradient: torch's
def _setup(ctx, inputs, output):
    x, ctx.activation = inputs
    ctx.save_for_backward(x)


def _gradient(ctx, dy):
    (x,) = ctx.saved_tensors
    return activation_backward(dy, x, ctx.activation), None


_recorded = differentiable("activation", _setup, _gradient)


# for the doors of what has an activation behind it
def follows(code: int, *inputs: Tensor | None) -> bool:
    """Whether a gradient is recorded, so that an activation had better follow its layer.

    The gradient of a fused one computes the layer again, to know what the activation was given;
    apart, that is kept, as in plain torch.
    """
    return (
        code != 0
        and torch.is_grad_enabled()
        and any(x is not None and x.requires_grad for x in inputs)
    )


def has_fused_bits(code: int, x: Tensor) -> bool:
    """Whether behind(x, code) has the bits of the fused activation.

    In half precision what is apart is rounded in between, which only ReLU does not see.
    """
    return code == CODES["relu"] or _has_kernel(x)


def behind(x: Tensor, code: int) -> Tensor:
    """activation(x), for an x that a kernel has just computed and a gradient that is recorded."""
    own = _has_kernel(x) and code != CODES["relu"]  # torch's ReLU has the same bits
    return _recorded(x, code) if own else activate(x, code)


def _has_kernel(x: Tensor) -> bool:
    return x.is_cpu and x.dtype == torch.float32


# door
def activation(x: Tensor, kind: str) -> Tensor:
    """x of any shape -> activation(x), contiguous, in x's dtype.

    kind: none, relu, gelu, gelu_tanh, silu, hardswish. fp32 and bf16 have a CPU kernel; the rest,
    and any GPU, go to torch. Raises ValueError for an unknown kind, TypeError for other dtypes.
    """
    code = activation_code("activation", kind)
    check_tensor("activation", "x", x, None)
    if x.is_cuda or backend.which("activation", x) == "reference":
        return activate(x, code)
    return _recorded(x, code)
