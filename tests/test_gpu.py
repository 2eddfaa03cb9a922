"""On a GPU, by `make gpu`: every case on both back ends, repeats, streams, graphs, large tensors.

Skipped where torch sees no GPU. What needs none of a GPU's own (streams, graphs, memory) also runs
on CPU tensors in the interpreter, so that this file is known to work before a machine is rented.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import check
import interpreter
import pytest
import torch
from cases import CASES, all_cases, find
from torch.utils._python_dispatch import TorchDispatchMode

import hybridops
from hybridops import BackendUnavailable, backend, ops

HAS_GPU = torch.cuda.is_available()
on_gpu = pytest.mark.skipif(not HAS_GPU, reason="torch sees no GPU")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
REPEATED = {
    "attention": "attention-mask_and_table",
    "linear": "linear-everything",
    "peg": "peg-k5",
    "patch_embed": "patch_embed-pos_all",
    "conv_stem": "conv_stem-odd_channels",
}
GRADIENT = {op: f"{op}_backward" for op in CASES}
GRADIENT |= {"patch_embed": "conv_backward", "conv_stem": "conv_backward"}


def skip_unless_served(case, dtype, backend_name: str) -> None:
    """Skips a case that the forced backend has no kernel for, with that reason."""
    try:
        check.run(case, on_device(case.make_inputs(dtype), "cuda"), backend_name)
    except BackendUnavailable as reason:
        pytest.skip(str(reason))


def repeats(name: str, backend_name: str, device: str, times: int) -> None:
    """Output and gradients of `times` runs have the same bits."""
    case = find(name)
    inputs = on_device(case.make_inputs(torch.float32), device)
    dy = check.make_dy(case, inputs)
    y, gradients = check.run(case, inputs, backend_name, dy)
    for _ in range(times):
        again, gradients_again = check.run(case, inputs, backend_name, dy)
        assert check.same_bits(again, y)
        assert all(check.same_bits(gradients_again[n], gradients[n]) for n in gradients)


def on_device(inputs, device):
    return {name: value.to(device) for name, value in inputs.items()}


@on_gpu
@pytest.mark.parametrize("case", [c for c in all_cases() if not c.unserved], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches(case, dtype, gpu_backend, nan_filled, torchs_fp32):
    skip_unless_served(case, dtype, gpu_backend)
    before = backend.served[GRADIENT[case.op], gpu_backend]
    check.outputs_and_gradients(case, dtype, gpu_backend, device="cuda")
    assert backend.served[GRADIENT[case.op], gpu_backend] > before, "its gradient was another's"


@on_gpu
@pytest.mark.parametrize("case", [case for op in CASES for case in CASES[op][:4]], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_the_table_chooses_matches(case, dtype, nan_filled, torchs_fp32):
    """Nothing forced: forward and backward may be served by different kernels, or by torch."""
    check.outputs_and_gradients(case, dtype, "auto", device="cuda")


@on_gpu
@pytest.mark.parametrize("op", CASES)
def test_opcheck(op, gpu_backend):
    """torch's own check of schema, fake and autograd, on what the door hands to the op."""
    case = find(REPEATED[op])
    skip_unless_served(case, torch.float32, gpu_backend)
    opcheck(case, gpu_backend, "cuda")


def opcheck(case, backend_name: str, device: str) -> None:
    inputs = on_device(case.make_inputs(torch.float32), device)
    for t in inputs.values():
        t.requires_grad_(t.is_floating_point())
    calls = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function.namespace == "hybridops":
                calls.append((function, args))
            return function(*args, **(kwargs or {}))

    with hybridops.use(backend_name):
        with Record(), torch.no_grad():
            case.call(inputs)
        assert calls, f"{case}: no op of ours was called"
        for function, args in calls:
            torch.library.opcheck(function, args)


@on_gpu
def test_compute_sanitizer_finds_nothing():
    """The small cases once more in a process that compute-sanitizer watches."""
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        pytest.skip("compute-sanitizer is not on the PATH")
    command = [sanitizer, "--tool", "memcheck", "--error-exitcode", "99", "--target-processes"]
    command += ["all", sys.executable, "-m", "pytest", "-q", "-k", "opcheck", __file__]
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    except subprocess.TimeoutExpired:
        pytest.skip("compute-sanitizer took more than 120 s")
    if "Device not supported" in done.stdout:
        pytest.skip("compute-sanitizer does not support this device")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]


@on_gpu
@pytest.mark.parametrize("op", CASES)
def test_repeats_bit_for_bit(op, gpu_backend):
    skip_unless_served(find(REPEATED[op]), torch.float32, gpu_backend)
    repeats(REPEATED[op], gpu_backend, "cuda", 250)


def test_the_checks_themselves_run_without_a_gpu():
    pytest.importorskip("triton", reason="Triton is not installed")
    if HAS_GPU:
        pytest.skip("there is a GPU: they run there")
    with interpreter.serving():
        for name in REPEATED.values():
            repeats(name, "triton", "cpu", 1)
        opcheck(find("peg-c8"), "triton", "cpu")


@on_gpu
@pytest.mark.parametrize("op", CASES)
def test_runs_on_the_current_stream(op, gpu_backend):
    """Behind a sleep on a side stream: work put on another stream would read the old values."""
    case = find(REPEATED[op])
    skip_unless_served(case, torch.float32, gpu_backend)
    inputs = on_device(case.make_inputs(torch.float32), "cuda")
    expected, _ = check.run(case, inputs, gpu_backend)
    late = {n: torch.zeros_like(t) for n, t in inputs.items()}
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        for name, value in inputs.items():
            late[name].copy_(value)
        y, _ = check.run(case, late, gpu_backend)
    stream.synchronize()
    assert check.same_bits(y, expected)


@on_gpu
@pytest.mark.parametrize("op", CASES)
def test_a_captured_graph_follows_new_data(op, gpu_backend):
    case = find(REPEATED[op])
    skip_unless_served(case, torch.float32, gpu_backend)
    inputs = on_device(case.make_inputs(torch.float32), "cuda")
    fresh = on_device(case.make_inputs(torch.float32, seed=1), "cuda")
    expected, _ = check.run(case, fresh, gpu_backend)  # also compiles what is to be captured
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        y, _ = check.run(case, inputs, gpu_backend)
    for name, value in fresh.items():
        inputs[name].copy_(value)
    graph.replay()
    torch.cuda.synchronize()
    assert check.same_bits(y, expected)


def large_calls():
    """Per op: a call on the first n images of an input with more than 2^31 elements."""
    half = {"device": "cuda", "dtype": torch.bfloat16}
    tokens = torch.randn(2731, 4096, 192, **half)
    q = tokens.view(2731, 4096, 3, 64)
    taps, matrix = torch.randn(192, 1, 3, 3, **half), torch.randn(64, 192, **half)
    image = tokens.view(-1)[: 3567 * 3 * 448 * 448].view(3567, 3, 448, 448)
    square, patch = torch.randn(32, 3, 3, 3, **half), torch.randn(192, 3, 16, 16, **half)
    short = q[:, :64]  # 64 keys: the offsets are what is tested
    yield "attention", lambda n: ops.attention(q[-n:], short[-n:], short[-n:])
    yield "peg", lambda n: ops.peg(tokens[-n:], taps, grid=(64, 64))
    yield "linear", lambda n: ops.linear(tokens[-n:], matrix)
    yield "patch_embed", lambda n: ops.patch_embed(image[-n:], patch)
    yield "conv_stem", lambda n: ops.conv_stem(image[-n:], [ops.ConvLayer(square, stride=4)])


@on_gpu
def test_more_than_2_31_elements(gpu_backend):
    """The last image of a large call is what a call on that image alone gives."""
    if torch.cuda.get_device_properties(0).total_memory < 60 << 30:
        pytest.skip("needs 60 GiB")
    with torch.no_grad(), hybridops.use(gpu_backend):
        for op, call in large_calls():
            try:
                call(1)
            except BackendUnavailable:  # that this backend lacks the op is told by test_matches
                continue
            last = call(2731 if op in ("attention", "peg", "linear") else 3567)[-1:]
            torch.testing.assert_close(last, call(1), msg=lambda text, op=op: f"{op}: {text}")
