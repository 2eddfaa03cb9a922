"""conv_backward and linear_backward of the CPU: every geometry, and every way of sharing them out.

Judged as any gradient is: against float64, by torch's own error in the same dtype.
"""

import pytest
import torch
from check import accurate, same_bits

from hybridops.ops import _by_torch

#          B, Ci, H, W, Co, (Kh, Kw), stride, (top, left, bottom, right)
CONVS = [
    (2, 16, 13, 12, 24, (3, 3), 2, (1, 1, 1, 1)),
    (2, 9, 11, 13, 7, (3, 3), 1, (1, 1, 1, 1)),
    (1, 5, 9, 8, 6, (3, 5), 3, (0, 2, 1, 1)),
    (2, 4, 10, 7, 5, (1, 1), 2, (0, 0, 0, 0)),  # pixels that no patch holds
    (2, 4, 9, 9, 5, (2, 2), 5, (1, 0, 1, 0)),
    (2, 3, 12, 8, 10, (4, 4), 4, (0, 0, 0, 0)),  # patches side by side
    (2, 3, 13, 10, 10, (4, 4), 4, (0, 0, 0, 0)),  # pixels left over
    (2, 3, 12, 8, 10, (4, 4), 4, (2, 0, 2, 4)),  # the last patch holds nothing but padding
    (1, 6, 8, 9, 5, (8, 3), 3, (3, 0, 4, 0)),
    (1, 2, 5, 5, 3, (1, 1), 1, (2, 3, 2, 1)),  # dz's first rows and columns lie in the padding
    (1, 3, 4, 4, 3, (3, 3), 7, (2, 2, 2, 2)),  # a stride larger than the image
    (1, 2, 6, 6, 3, (7, 7), 2, (3, 3, 3, 3)),
    (1, 24, 70, 66, 40, (3, 3), 2, (1, 1, 1, 1)),  # several bands of dz, several parts of the rows
    (3, 1, 40, 38, 1, (5, 5), 1, (2, 2, 2, 2)),
    (2, 40, 9, 9, 230, (3, 3), 1, (1, 1, 1, 1)),  # a gradient of 82,800 numbers, K > N
    (0, 3, 8, 8, 5, (3, 3), 2, (1, 1, 1, 1)),
    (2, 0, 8, 8, 5, (3, 3), 2, (1, 1, 1, 1)),
    (2, 3, 8, 8, 0, (3, 3), 2, (1, 1, 1, 1)),
]
#          M, K, N
LINEARS = [
    (3000, 37, 50),  # parts of the rows
    (1025, 64, 96),
    (700, 410, 170),  # shared out by x's columns
    (700, 170, 410),  # by dz's
    (129, 257, 260),
    (5, 300, 300),
]


def conv(shape, dtype=torch.float32):
    B, Ci, H, W, Co, (Kh, Kw), stride, (top, left, bottom, right) = shape
    Ho, Wo = (H + top + bottom - Kh) // stride + 1, (W + left + right - Kw) // stride + 1
    image, weight = torch.randn(B, Ci, H, W), torch.randn(Co, Ci, Kh, Kw)
    return torch.randn(B, Ho * Wo, Co).to(dtype), image.to(dtype), weight.to(dtype)


def conv_gradients(op, tensors, shape, needs_dimage=True):
    return op(*tensors, shape[6], list(shape[7]), needs_dimage)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=("float32", "bfloat16"))
@pytest.mark.parametrize("shape", CONVS, ids=str)
def test_conv_backward_is_as_right_as_torch(shape, dtype, cpu_library, nan_filled):
    tensors = conv(shape, dtype)
    ours = conv_gradients(torch.ops.hybridops.conv_backward, tensors, shape)
    torchs = conv_gradients(_by_torch.conv_backward, tensors, shape)
    exact = conv_gradients(_by_torch.conv_backward, [t.double() for t in tensors], shape)
    for name, *three in zip(("dimage", "dweight", "dbias"), ours, torchs, exact, strict=True):
        accurate(*three, f"{name} {shape}", factor=3)
    without = conv_gradients(torch.ops.hybridops.conv_backward, tensors, shape, False)
    assert without[0].numel() == 0
    assert all(map(same_bits, without[1:], ours[1:]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=("float32", "bfloat16"))
@pytest.mark.parametrize("shape", LINEARS, ids=str)
def test_linear_backward_is_as_right_as_torch(shape, dtype, cpu_library, nan_filled):
    M, K, N = shape
    tensors = [torch.randn(s).to(dtype) for s in ((M, N), (M, K), (N, K))]
    ours = torch.ops.hybridops.linear_backward(*tensors)
    torchs = _by_torch.linear_backward(*tensors)
    exact = _by_torch.linear_backward(*[t.double() for t in tensors])
    for name, *three in zip(("dx", "dweight", "dbias"), ours, torchs, exact, strict=True):
        accurate(*three, f"{name} {shape}", factor=3)


@pytest.mark.parametrize("shape", [CONVS[12], CONVS[14], *LINEARS[:4]], ids=str)
def test_threads_change_no_bit(shape, cpu_library):
    if len(shape) == 3:
        M, K, N = shape
        tensors = [torch.randn(s) for s in ((M, N), (M, K), (N, K))]
    else:
        tensors = conv(shape)
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3, 8):
            torch.set_num_threads(count)
            if len(shape) == 3:
                found.append(torch.ops.hybridops.linear_backward(*tensors))
            else:
                op = torch.ops.hybridops.conv_backward
                found.append(conv_gradients(op, tensors, shape))
    finally:
        torch.set_num_threads(threads)
    assert all(all(map(same_bits, found[0], other)) for other in found[1:])
