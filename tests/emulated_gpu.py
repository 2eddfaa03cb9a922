"""The CUDA kernels on CPU tensors, on the emulated GPU: what proves them without a GPU.

build/_cuda_emulated.so holds the sources of csrc/cuda, built for the host against tests/emulation;
it registers hybridops_cuda::<op> for CPU tensors. `serving()` puts those behind the public ops for
as long as it lasts, so that a call runs through the door, the kernel and the gradient as it would
on a GPU.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch

from hybridops import backend

ROOT = Path(__file__).resolve().parent.parent
LIBRARY = ROOT / "build" / "_cuda_emulated.so"
SERVED = {
    "peg": ("peg", "peg_backward"),
    "attention": ("attention", "attention_backward"),
    "linear": ("linear", "linear_backward"),
    "patch_embed": ("patch_embed", "conv_backward"),
    "conv_stem": ("conv_stem", "conv_backward"),
}


@functools.cache
def load() -> None:
    """hybridops_cuda::<op> for CPU tensors, built first where that is possible."""
    if not LIBRARY.exists():
        compiler = any(shutil.which(name) for name in ("g++", "clang++", "c++"))
        if not compiler or importlib.util.find_spec("ninja") is None:
            pytest.skip("needs a C++ compiler and ninja")
        build = [sys.executable, "setup.py", "--quiet", "build_cuda_emulated"]
        built = subprocess.run(build, cwd=ROOT, capture_output=True, text=True)
        assert built.returncode == 0, built.stdout[-4000:]
    for op in (name for names in SERVED.values() for name in names):
        if not hasattr(torch.ops.hybridops_cuda, op):
            schema = str(getattr(torch.ops.hybridops, op).default._schema)
            torch.library.define(f"hybridops_cuda::{op}", schema.removeprefix(f"hybridops::{op}"))
    torch.ops.load_library(str(LIBRARY))


@contextlib.contextmanager
def serving():
    """CPU tensors are served by the CUDA kernels, inside `hybridops.use("cpu")` and without."""
    load()
    if backend.ISA is None:
        pytest.skip("the door hands CPU tensors to a kernel only where there is a CPU library")
    override = torch.library.Library("hybridops", "IMPL")
    for op in {name for names in SERVED.values() for name in names}:
        kernel = counted(op, getattr(torch.ops.hybridops_cuda, op).default)
        override.impl(op, kernel, "CPU", allow_override=True)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backend, "CPU_DTYPES", tuple(backend.GPU_DTYPES))
        patch.setattr(backend, "packs", lambda weight: False)  # nothing is packed on a GPU
        for name in ("runs_at_once", "records_at_once"):
            patch.setattr(backend, name, lambda x: False)  # nor do tensors on a GPU
        activation = import_module("hybridops.ops.activation")
        patch.setattr(activation, "_has_kernel", lambda x: False)  # which is the CPU's alone
        yield
    override._destroy()


def counted(op, kernel):
    """The kernel, counted as the op's CUDA key counts it."""

    def serve(*args):
        backend.served[op, "cuda"] += 1
        return kernel(*args)

    return serve
