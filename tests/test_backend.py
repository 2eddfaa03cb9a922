"""Which backend serves: chosen once at import, forced by name, every fallback counted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import suppress

import pytest
import torch

import hybridops
from hybridops import BackendUnavailable, backend, ops
from hybridops.ops._contract import ON_GPU


def in_fresh_process(code: str, **environment: str) -> dict:
    """What `code` printed as JSON in a process of its own."""
    keep = {k: v for k, v in os.environ.items() if k not in ("HYBRIDOPS_LIBRARY", *environment)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=keep | environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


NAMESPACES = ("hybridops", "hybridops_cuda")
STATE = """
import json, torch
from hybridops import backend, ops
cpu = torch.backends.cpu
y = ops.linear(torch.ones(2, 8), torch.ones(4, 8))
print(json.dumps({"isa": backend.ISA, "available": backend.available(), "sum": y.sum().item(),
                  "library": backend.library() and backend.library().name,
                  "why": backend.why_no_library(), "capability": cpu.get_cpu_capability(),
                  "fallbacks": [[*key, n] for key, n in backend.fallbacks.items()]}))
"""


def test_without_a_library_the_reference_serves_and_says_so():
    state = in_fresh_process(STATE, HYBRIDOPS_LIBRARY="none")
    assert state["isa"] is None
    assert state["library"] is None
    assert state["available"] == ["reference"]
    assert state["why"] == "HYBRIDOPS_LIBRARY=none"
    assert state["fallbacks"] == [["linear", "no C++ library", 1]]
    assert state["sum"] == 64


def test_a_library_that_is_not_there_is_named(tmp_path):
    state = in_fresh_process(STATE, HYBRIDOPS_LIBRARY=str(tmp_path / "_cpu_other.so"))
    assert state["isa"] is None
    assert "_cpu_other.so is not there" in state["why"]


def test_a_library_that_does_not_load_is_named(tmp_path):
    (tmp_path / "_cpu_broken.so").write_bytes(b"not a library")
    state = in_fresh_process(STATE, HYBRIDOPS_LIBRARY=str(tmp_path / "_cpu_broken.so"))
    assert state["isa"] is None
    assert "_cpu_broken.so does not load" in state["why"]


def test_torchs_capability_picks_the_library(cpu_library):
    state = in_fresh_process(STATE, ATEN_CPU_CAPABILITY="avx2")
    assert state["isa"] == "avx2"
    assert state["library"] == "_cpu_avx2.so"
    assert state["capability"] == "AVX2"
    assert state["fallbacks"] == []
    assert state["sum"] == 64


def test_a_narrower_cpu_gets_the_reference():
    state = in_fresh_process(STATE, ATEN_CPU_CAPABILITY="default")
    assert state["isa"] is None
    assert "needs AVX2" in state["why"]
    assert state["fallbacks"] == [["linear", "no C++ library", 1]]


def test_use_refuses_unknown_and_absent_backends():
    with (
        pytest.raises(ValueError, match="cpu, triton, cuda, reference, got 'gpu'"),
        hybridops.use("gpu"),
    ):
        pass
    for name in {"cpu", "triton", "cuda"} - {*backend.available()}:
        with (
            pytest.raises(BackendUnavailable, match=f"'{name}' is not available"),
            hybridops.use(name),
        ):
            pass


def test_use_nests_and_ends_even_after_an_error():
    x = torch.ones(2, 8)
    usual = backend.which("linear", x)
    with hybridops.use("reference"):
        assert backend.which("linear", x) == "reference"
        for name in backend.available():
            with hybridops.use(name):
                assert backend.which("linear", x) == name
            assert backend.which("linear", x) == "reference"
        with pytest.raises(ZeroDivisionError), hybridops.use("reference"):
            1 / 0  # noqa: B018
        assert backend.which("linear", x) == "reference"
    assert backend.which("linear", x) == usual


def test_a_forced_backend_that_cannot_serve_raises(cpu_library):
    weight = torch.ones(4, 8, dtype=torch.float64)
    with hybridops.use("cpu"), pytest.raises(BackendUnavailable, match="linear.*'cpu'.*float64"):
        ops.linear(weight, weight)
    meta = weight.float().to("meta")
    with hybridops.use("cpu"), pytest.raises(BackendUnavailable, match="device meta"):
        ops.linear(meta, meta)


def test_fallbacks_count_calls_by_op_and_reason():
    reason = "no CPU kernel for float16" if backend.ISA else "no C++ library"
    x = torch.ones(2, 8, dtype=torch.float16)
    before = backend.fallbacks["linear", reason]
    for _ in range(3):
        ops.linear(x, x)
    assert backend.fallbacks["linear", reason] == before + 3
    with hybridops.use("reference"):  # asked for by name, so no fallback
        ops.linear(x, x)
    assert backend.fallbacks["linear", reason] == before + 3


class OnGPU:
    """What `which` looks at of a tensor."""

    def __init__(self, dtype=torch.bfloat16):
        self.dtype, self.device = dtype, torch.device("cuda", 0)


@pytest.fixture
def gpu(monkeypatch):
    """Pretends to a GPU; gpu(arch, *kernels) says which, and what was built for it."""

    def pretend(arch, *kernels):
        monkeypatch.setattr(backend, "_architecture", lambda index: arch)
        monkeypatch.setattr(backend, "_has_kernel", lambda op, name: name in kernels)
        monkeypatch.setattr(backend, "available", lambda: (*kernels, "reference"))

    return pretend


def test_the_table_chooses_between_triton_and_cuda_by_size(gpu):
    gpu(90, "triton", "cuda")
    assert backend.which("attention", OnGPU(), size=320) == "cuda"
    assert backend.which("attention", OnGPU(), size=321) == "triton"
    with hybridops.use("triton"):
        assert backend.which("attention", OnGPU(), size=49) == "triton"


def test_the_table_chooses_torchs_products_for_gradients_unless_one_is_forced(gpu):
    gpu(90, "triton", "cuda", "torch")
    for op in ("linear_backward", "conv_backward"):
        assert backend.which(op, OnGPU()) == "torch"
        for name in ("triton", "cuda"):
            with hybridops.use(name):
                assert backend.which(op, OnGPU()) == name


def test_rows_of_newer_architectures_do_not_serve_older_ones(gpu, monkeypatch):
    rows = (backend.Row("cuda", arch=90), backend.Row("triton"))
    monkeypatch.setitem(backend.GPU, "peg", rows)
    gpu(89, "triton", "cuda")
    assert backend.which("peg", OnGPU()) == "triton"
    gpu(90, "triton", "cuda")
    assert backend.which("peg", OnGPU()) == "cuda"


@pytest.mark.parametrize("alone", ["triton", "cuda"])
def test_one_gpu_backend_serves_where_the_other_is_absent(gpu, alone):
    gpu(80, alone)
    for op, rows in backend.GPU.items():
        for row in rows:
            for size in (1, min(10_000, row.limit)):
                if row.kernel == alone:
                    assert backend.which(op, OnGPU(), size=size) == alone


def test_a_call_beyond_a_kernels_limit_goes_to_the_other_one(gpu):
    gpu(90, "triton", "cuda")
    assert backend.which("peg", OnGPU(), size=16) == "cuda"
    assert backend.which("peg", OnGPU(), size=17) == "triton"
    with (
        hybridops.use("cuda"),
        pytest.raises(BackendUnavailable, match="on cuda is served by triton"),
    ):
        backend.which("peg", OnGPU(), size=17)
    gpu(90, "cuda")
    assert backend.which("peg", OnGPU(), size=17) == "reference"


def test_ops_without_a_cuda_kernel_are_never_sent_there(monkeypatch):
    """The table read with the library that csrc/cuda makes: it registers what it has."""
    monkeypatch.setattr(backend, "_architecture", lambda index: 90)
    monkeypatch.setattr(backend, "CUDA_OPS", {"attention", "peg", "linear"})
    monkeypatch.setattr(backend, "_NO_TRITON", None)
    for op in ("conv_stem", "patch_embed", "peg_backward"):
        assert backend.which(op, OnGPU()) == "triton"
    monkeypatch.setattr(backend, "_NO_TRITON", "triton is not installed")
    for op in ("conv_stem", "patch_embed", "peg_backward"):
        assert backend.which(op, OnGPU()) == "reference"


@pytest.mark.parametrize("op", ["linear_backward", "conv_backward"])
def test_gradients_by_torch_need_neither_triton_nor_the_cuda_library(op):
    assert backend.Row("torch") in backend.GPU[op]
    dy, x = torch.randn(3, 2), torch.randn(3, 5)
    if op == "linear_backward":
        arguments = (dy, x, torch.randn(2, 5))
    else:
        arguments = (torch.randn(1, 4, 2), torch.randn(1, 3, 2, 2), torch.randn(2, 3, 1, 1))
        arguments += (1, [0] * 4, True)
    ours = getattr(torch.ops.hybridops, op)(*arguments) if backend.ISA else None
    served = backend.served.total()
    found = ON_GPU[op](*arguments)
    assert backend.served.total() == served + 1
    for a, b in zip(found, ours or found, strict=True):
        torch.testing.assert_close(a, b)


def test_gradients_run_where_they_are_sent_and_are_counted_there(monkeypatch):
    arguments = torch.randn(3, 2), torch.randn(3, 5), torch.randn(2, 5)
    before = backend.served.copy()
    for name in ("cuda", "triton", "torch", "reference"):
        monkeypatch.setattr(backend, "which", lambda op, x, size, name=name: name)
        with suppress(NotImplementedError, AttributeError, RuntimeError):  # not for CPU tensors
            ON_GPU["linear_backward"](*arguments)
    assert backend.served - before == {
        ("linear_backward", "cuda"): 1,
        ("linear_backward", "triton"): 1,
        ("linear_backward", "cuBLAS"): 2,
    }


def test_a_gpu_without_kernels_is_counted_and_forcing_one_raises(gpu):
    gpu(80)
    before = backend.fallbacks.copy()
    assert backend.which("peg", OnGPU()) == "reference"
    ((op, reason),) = backend.fallbacks - before
    assert (op, reason.startswith("no cuda or triton kernel")) == ("peg", True)
    gpu(80, "triton")
    assert backend.which("peg", OnGPU(torch.float64)) == "reference"
    with hybridops.use("triton"), pytest.raises(BackendUnavailable, match="no GPU kernel for floa"):
        backend.which("peg", OnGPU(torch.float64))
    with hybridops.use("triton"), pytest.raises(BackendUnavailable, match="on cpu is served by"):
        backend.which("peg", torch.ones(1))


def test_a_gpu_before_ampere_is_not_served(gpu):
    gpu(75, "triton", "cuda")
    reason = "compute capability 7.5 is older than 8.0"
    before = backend.fallbacks["peg", reason]
    assert backend.which("peg", OnGPU()) == "reference"
    assert backend.fallbacks["peg", reason] == before + 1


def test_every_op_has_one_contract_for_both_gpu_backends():
    for op in backend.GPU:
        ours, twin = (getattr(getattr(torch.ops, ns), op).default for ns in NAMESPACES)
        assert str(ours._schema).partition("::")[2] == str(twin._schema).partition("::")[2]
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"hybridops::{op}", "CUDA")


def test_packing_belongs_to_the_library():
    packed = ops.pack_linear(torch.ones(5, 7))
    assert (packed is None) == (backend.ISA is None)
    assert ops.pack_linear(torch.ones(5, 7, dtype=torch.float64)) is None
    assert ops.pack_conv(torch.ones(5, 7, 1, 1, device="meta")) is None
