"""The CUDA kernels on the emulated GPU: every case, the same error rule, forward and backward.

build/_cuda_emulated.so holds the sources of csrc/cuda, built for the host against tests/emulation;
it registers hybridops_cuda::<op> for CPU tensors. Here those ops stand behind the public ones, so a
case runs through the door, the kernel and the gradient as it would on a GPU.
"""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import check
import pytest
import torch
from cases import CASES

from hybridops import backend

ROOT = Path(__file__).resolve().parent.parent
LIBRARY = ROOT / "build" / "_cuda_emulated.so"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SERVED = {"peg": ("peg", "peg_backward"), "attention": ("attention", "attention_backward")}
pytestmark = pytest.mark.usefixtures("nan_filled", "emulated")


@pytest.fixture(scope="module")
def library() -> None:
    """hybridops_cuda::<op> for CPU tensors, built first where that is possible."""
    if not LIBRARY.exists():
        compiler = any(shutil.which(name) for name in ("g++", "clang++", "c++"))
        if not compiler or importlib.util.find_spec("ninja") is None:
            pytest.skip("needs a C++ compiler and ninja")
        build = [sys.executable, "setup.py", "--quiet", "build_cuda_emulated"]
        built = subprocess.run(build, cwd=ROOT, capture_output=True, text=True)
        assert built.returncode == 0, built.stdout[-4000:]
    for op in (name for ops in SERVED.values() for name in ops):
        if not hasattr(torch.ops.hybridops_cuda, op):
            schema = str(getattr(torch.ops.hybridops, op).default._schema)
            torch.library.define(f"hybridops_cuda::{op}", schema.removeprefix(f"hybridops::{op}"))
    torch.ops.load_library(str(LIBRARY))


@pytest.fixture
def emulated(library, monkeypatch):
    """The public ops on CPU tensors run the CUDA kernels while a test runs."""
    if backend.ISA is None:
        pytest.skip("the door hands CPU tensors to a kernel only where there is a CPU library")
    override = torch.library.Library("hybridops", "IMPL")
    for ops in SERVED.values():
        for op in ops:
            kernel = getattr(torch.ops.hybridops_cuda, op).default
            override.impl(op, kernel, "CPU", allow_override=True)
    monkeypatch.setattr(backend, "CPU_DTYPES", tuple(DTYPES))
    yield
    override._destroy()


def work(case) -> int:
    """Multiplications of a forward: the emulation does about 20 million a second."""
    t = case.make_inputs(torch.float32)
    if case.op == "peg":
        return t["x"].numel() * case.K**2
    q, v = t.get("q", t.get("qkv")), t.get("v", t.get("qkv"))
    return q.numel() * (case.Nk or case.Nq) + v.numel() * case.Nq


def served(op: str):
    return [case for case in CASES[op] if not case.unserved and work(case) < 3e6]


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("case", [case for op in SERVED for case in served(op)], ids=str)
def test_matches(case, dtype):
    check.outputs_and_gradients(case, dtype, "cpu")
