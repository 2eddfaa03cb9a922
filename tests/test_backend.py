"""Which backend serves: chosen once at import, forced by name, every fallback counted."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

import hybridops
from hybridops import BackendUnavailable, backend, ops


def in_fresh_process(code: str, **environment: str) -> dict:
    """What `code` printed as JSON in a process of its own."""
    keep = {k: v for k, v in os.environ.items() if k not in ("HYBRIDOPS_LIBRARY", *environment)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=keep | environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


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


def test_packing_belongs_to_the_library():
    packed = ops.pack_linear(torch.ones(5, 7))
    assert (packed is None) == (backend.ISA is None)
    assert ops.pack_linear(torch.ones(5, 7, dtype=torch.float64)) is None
    assert ops.pack_conv(torch.ones(5, 7, 1, 1, device="meta")) is None
