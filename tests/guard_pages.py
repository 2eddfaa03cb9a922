"""Runs one op on inputs that end, or begin, at memory that may not be touched.

    python guard_pages.py OP

Every floating-point input lies flush against a page without access. test_ops_memory.py runs this in
a process of its own, under glibc's checking allocator, which finds writes behind an output.
"""

from __future__ import annotations

import ctypes
import mmap
import sys

import check
import torch

from hybridops.bench import case as cases

PAGE = mmap.PAGESIZE
TAILS = range(1, 33)  # twice the 16 lanes of the widest vector
libc = ctypes.CDLL(None, use_errno=True)


def guarded(x: torch.Tensor, side: str) -> torch.Tensor:
    """A copy of x that ends (or starts) exactly at a page that cannot be read or written."""
    size = x.numel() * x.element_size()
    if size == 0:
        return x
    pages = -(-size // PAGE)
    memory = mmap.mmap(-1, (pages + 1) * PAGE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    wall = pages * PAGE if side == "end" else 0
    if libc.mprotect(ctypes.c_void_p(start + wall), PAGE, 0):
        raise OSError(ctypes.get_errno(), "mprotect")
    offset = pages * PAGE - size if side == "end" else PAGE
    flat = torch.frombuffer(memory, dtype=x.dtype, count=x.numel(), offset=offset)
    return flat.copy_(x.flatten()).view(x.shape)


def samples(op: str):
    if op == "linear":
        for n in TAILS:
            yield cases.Linear(f"n{n}", M=7, N=n, K=5, residual=True)
            yield cases.Linear(f"k{n}", M=5, N=3, K=n, norm="affine", activation="gelu")
            yield cases.Linear(f"m{n}", M=n, N=9, K=19)
    elif op == "peg":
        for n in TAILS:
            yield cases.Peg(f"c{n}", B=1, H=3, W=4, C=n)
            yield cases.Peg(f"w{n}", B=1, H=2, W=n, C=3, K=5)
            yield cases.Peg(f"s{n}", B=1, H=5, W=5, C=n, stride=2, residual=False, prefix=1)
            yield cases.Peg(f"wide{n}", B=1, H=2, W=8, C=n)
    elif op == "attention":
        for n in (*range(1, 18), 31, 33):
            yield cases.Attention(f"d{n}", B=1, Nq=5, D=n)
            yield cases.Attention(f"n{n}", B=1, Nq=n, Nk=n + 2, D=9, Dv=3, bias=(1, 2, n, n + 2))
            yield cases.Attention(f"t{n}", B=1, Nq=3, Nk=n, D=4, bias="table", mask="tail")
    elif op == "patch_embed":
        for n in (1, 7, 8, 9, 15, 16, 17, 25, 33):
            yield cases.PatchEmbed(f"c{n}", H=8, W=16, C=n, kernel=(8, 8), pos=3, prefix=1)
            yield cases.PatchEmbed(f"i{n}", Ci=n, H=7, W=6, C=9, kernel=(3, 3), padding=1, stride=2)
            yield cases.PatchEmbed(f"w{n}", B=1, H=4, W=4 * n, C=5, kernel=(4, 4), norm="affine")
            yield cases.PatchEmbed(f"b{n}", B=1, H=4, W=4 * n, C=5, kernel=(4, 4), uint8=True)
    else:
        for n in (1, 7, 8, 9, 15, 16, 17, 25, 33):
            two = (cases.Conv(n, activation="hardswish"), cases.Conv(3, 3, 1))
            yield cases.ConvStem(f"c{n}", H=9, W=7, layers=two)
            yield cases.ConvStem(f"i{n}", B=1, Ci=n, H=6, W=5, layers=(cases.Conv(9, 3, 1),))
            yield cases.ConvStem(f"w{n}", B=1, H=7, W=n + 2, layers=two[:1], pool=(3, 2, 1))
            yield cases.ConvStem(f"b{n}", B=1, H=7, W=n + 2, layers=two[:1], uint8=True)


def main(op: str) -> None:
    torch.set_num_threads(1)
    done = 0
    for case in samples(op):
        for dtype in (torch.float32, torch.bfloat16):
            plain = case.make_inputs(dtype)
            dy = check.make_dy(case, plain)
            expected, expected_grads = check.run(case, plain, "cpu", dy)
            for side in ("end", "start"):
                print(case, dtype, side, flush=True)  # the last line names the case that crashed
                inputs = {name: guarded(value, side) for name, value in plain.items()}
                y, grads = check.run(case, inputs, "cpu", guarded(dy, side))
                assert check.same_bits(y, expected)
                with torch.no_grad():
                    assert check.same_bits(case.call(inputs), expected)
                assert all(check.same_bits(grads[name], expected_grads[name]) for name in grads)
                done += 1
    print(f"{done} guarded calls")


if __name__ == "__main__":
    main(*sys.argv[1:])
