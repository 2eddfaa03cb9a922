"""Triton's kernels on CPU tensors, through Triton's interpreter: what proves them without a GPU.

conftest.py sets TRITON_INTERPRET=1 before anything imports Triton. `serving()` registers, for as
long as it lasts, the very functions that serve an op's CUDA key under its CPU key, so that the
public ops, their checks and their gradients run as they would on a GPU.
"""

from __future__ import annotations

import contextlib
import functools
import warnings
from importlib import import_module

import numpy as np
import pytest
import torch

from hybridops import backend, ops  # noqa: F401  (the ops register themselves)
from hybridops.ops._contract import ON_GPU


@functools.cache
def _mend_loops() -> None:
    """numpy 2.4 takes no array of one element for a number; Triton 3.6 has such as loops' ends."""
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patch_and_mend(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch_and_mend


@functools.cache
def _mend_bfloat16() -> None:
    """bf16 as a GPU has it. The interpreter (3.6 to 3.9) holds it as uint16, multiplies those in
    a product, and truncates where it narrows fp32."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    cast = InterpreterBuilder.cast_impl

    def widen(bits):
        return (bits.astype(np.uint32) << 16).view(np.float32)

    def narrow(x):
        bits = np.ascontiguousarray(x).view(np.uint32)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return np.where(np.isnan(x), 0x7FC0, rounded).astype(np.uint16)

    def cast_impl(self, src, dst_type):
        old, new = src.dtype.scalar, dst_type.scalar
        if old == new or tl.bfloat16 not in (old, new):
            return cast(self, src, dst_type)
        x = widen(src.data) if old == tl.bfloat16 else src.data.astype(np.float32)
        if new == tl.bfloat16:
            return TensorHandle(narrow(x), new)
        return cast(self, TensorHandle(x, tl.float32), dst_type)

    def create_fp_to_fp(self, src, dst_type, rounding_mode):
        return cast_impl(self, src, dst_type)

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        a, b = (
            widen(x.data) if x.dtype.scalar == tl.bfloat16 else x.data.astype(np.float32)
            for x in (a, b)
        )
        return TensorHandle(np.matmul(a, b) + d.data, d.dtype.scalar)

    for name in ("si_to_fp", "ui_to_fp", "fp_to_si", "fp_to_ui", "fp_ext", "fp_trunc"):
        setattr(InterpreterBuilder, f"create_{name}", cast_impl)
    InterpreterBuilder.cast_impl = cast_impl
    InterpreterBuilder.create_fp_to_fp = create_fp_to_fp
    InterpreterBuilder.create_dot = create_dot


@contextlib.contextmanager
def serving():
    """CPU tensors are served by Triton; `hybridops.use("triton")` and "reference" both work."""
    pytest.importorskip("triton", reason="Triton is not installed")
    from hybridops.kernels import tuned

    _mend_loops()
    _mend_bfloat16()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backend, "available", lambda: ("triton", "reference"))
        patch.setattr(backend, "_kernels", _kernels)
        for name in ("runs_at_once", "records_at_once"):
            patch.setattr(backend, name, lambda x: False)  # nor do tensors on a GPU
        activation = import_module("hybridops.ops.activation")
        patch.setattr(activation, "_has_kernel", lambda x: False)  # which is the CPU's alone
        patch.setattr(backend, "ISA", None)  # nothing is packed
        patch.setattr(tuned, "TARGET_PROGRAMS", 16)  # each costs the interpreter a millisecond
        with (
            warnings.catch_warnings(),
            torch.library._scoped_library("hybridops", "IMPL") as library,
        ):
            warnings.filterwarnings("ignore", "Warning only once for all operators")
            for name, serve in ON_GPU.items():
                library.impl(name, serve, "CPU", allow_override=True)
            yield


def _kernels(op, x, size):
    if x.dtype not in backend.GPU_DTYPES:
        return (), f"no GPU kernel for {str(x.dtype).removeprefix('torch.')}"
    return ("triton",), None
