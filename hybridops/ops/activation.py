"""An activation by itself, with the bits that the kernels give it where it is fused.

y = activation(x). What computes a layer now fused and now apart, as re-entrant checkpointing does,
gets the same numbers both ways; torch's own GELU, SiLU and hardswish round otherwise.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import backend
from ._contract import (
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
