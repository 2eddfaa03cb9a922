"""The activations of hybridops.ops, on a tile in registers; the codes are the ops' own."""

import triton
import triton.language as tl


@triton.jit
def activate(x, CODE: tl.constexpr):
    """x fp32; CODE: 0 none, 1 relu, 2 gelu, 3 gelu_tanh, 4 silu, 5 hardswish. NaN stays NaN."""
    if CODE == 1:
        x = tl.where(x < 0, 0.0, x)
    elif CODE == 2:
        x = 0.5 * x * (1.0 + tl.math.erf(x * 0.7071067811865476))
    elif CODE == 3:
        inner = 0.7978845608028654 * (x + 0.044715 * x * x * x)
        x = x * tl.sigmoid(2.0 * inner)  # 0.5 * (1 + tanh(y)) is sigmoid(2 y)
    elif CODE == 4:
        x = x * tl.sigmoid(x)
    elif CODE == 5:
        x = x * (tl.where(x < -3.0, 0.0, tl.where(x > 3.0, 6.0, x + 3.0)) / 6.0)
    return x
