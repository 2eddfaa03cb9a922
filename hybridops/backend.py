"""Which backend serves a tensor: the only module that knows about hardware.

The CPU library is chosen once, at import, from torch's own CPU capability (so `ATEN_CPU_CAPABILITY`
steers ours and torch's kernels together). Nothing is compiled and nothing is downloaded here.

A tensor on a GPU is served by Triton or by the CUDA C++ library (`_cuda.so`), whichever `GPU` below
names for the op and its size; by the other one where that is absent; and by torch's best path,
counted in `fallbacks`, where both are. Triton itself is imported by the first call that runs it.

`HYBRIDOPS_LIBRARY=/path/to/lib.so` loads that library for the CPU instead; `HYBRIDOPS_LIBRARY=none`
loads no library at all.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

_PACKAGE = Path(__file__).resolve().parent
_BACKENDS = ("cpu", "triton", "cuda", "reference")
CPU_DTYPES = (torch.float32, torch.bfloat16)
GPU_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OLDEST_GPU = 80  # compute capability 8.0: bf16, cp.async and mma.sync as our kernels use them


class Row(NamedTuple):
    """`kernel` serves calls whose size is at most `largest`, on architectures from `arch` on.

    A kernel is "triton", "cuda", or "torch": torch's own product, on purpose.

    Beyond `largest` it still serves where no other row does; beyond `limit` it cannot.
    """

    kernel: str
    largest: float = float("inf")
    arch: int = OLDEST_GPU
    limit: float = float("inf")


# Which kernel serves an op on a GPU: the first row that fits. The sizes are keys (attention), rows
# (linear), K (peg) and otherwise 0. Chosen by arithmetic: no GPU has measured them yet. A tile of
# 128 x 128 wastes 1.7x of its products at 197 tokens and 6.8x at 49, so up to about 320 keys
# CUDA C++, which holds whole heads, goes first. Gradients that are plain products are torch's
# (cuBLAS, cuDNN); docs/gpu.md has the arithmetic for the closest of them, an image's convolution.
GPU: dict[str, tuple[Row, ...]] = {
    "attention": (Row("cuda", largest=320), Row("triton")),
    "attention_backward": (Row("cuda", largest=320), Row("triton")),
    "peg": (Row("cuda", limit=16), Row("triton")),
    "peg_backward": (Row("cuda", limit=16), Row("triton")),
    "conv_stem": (Row("triton"), Row("cuda")),
    "patch_embed": (Row("triton"), Row("cuda")),
    "linear": (Row("triton"), Row("cuda")),
    "linear_backward": (Row("torch"), Row("triton"), Row("cuda")),
    "conv_backward": (Row("torch"), Row("triton"), Row("cuda")),
}


class BackendUnavailable(RuntimeError):
    """A backend asked for by name cannot serve: absent, or not for this op, dtype or device."""


def _detect_isa() -> str | None:
    # torch reports AVX512 also without bf16; our AVX-512 library needs vdpbf16ps.
    capability = torch.backends.cpu.get_cpu_capability()
    if capability.startswith("AVX512"):
        flags = _cpu_flags()
        return "avx512" if "avx512_bf16" in flags else "avx2"
    return "avx2" if capability == "AVX2" else None


def _cpu_flags() -> set[str]:
    try:
        with open("/proc/cpuinfo") as file:
            return next((set(line.split()) for line in file if line.startswith("flags")), set())
    except OSError:
        return set()


def _load() -> tuple[str | None, Path | None, str | None]:
    """(ISA, path, reason for having none)"""
    isa = _detect_isa()
    forced = os.environ.get("HYBRIDOPS_LIBRARY")
    if forced == "none":
        return None, None, "HYBRIDOPS_LIBRARY=none"
    if forced is None and isa is None:
        capability = torch.backends.cpu.get_cpu_capability()
        return None, None, f"torch's CPU capability is {capability}; ours needs AVX2 or AVX512"
    path = Path(forced) if forced else _PACKAGE / f"_cpu_{isa}.so"
    if not path.is_file():
        return None, None, f"{path.name} is not there: {_build_reason()}"
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return None, None, f"{path.name} does not load: {error}"
    return path.stem.removeprefix("_cpu_"), path, None


def _build_reason() -> str:
    try:
        reason = json.loads((_PACKAGE / "_build_info.json").read_text())["reason"]
    except (OSError, ValueError, KeyError, TypeError):
        return "the package was never built (pip install --no-build-isolation -e .)"
    return reason or "it was built, and then removed"


def _load_cuda() -> str | None:
    """Why there are no CUDA C++ kernels, or None once they are loaded."""
    path = _PACKAGE / "_cuda.so"
    if os.environ.get("HYBRIDOPS_LIBRARY") == "none":
        return "HYBRIDOPS_LIBRARY=none"
    if not path.is_file():
        return "_cuda.so was not built"
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return f"_cuda.so does not load: {error}"
    return None


ISA, _LIBRARY, _NO_LIBRARY = _load()
_NO_CUDA = _load_cuda()
CUDA_OPS: set[str] = set()  # ops that the CUDA library has: they enter themselves
_NO_TRITON = None if importlib.util.find_spec("triton") else "triton is not installed"
_forced: str | None = None
fallbacks: Counter[tuple[str, str]] = Counter()  # (op, reason) -> calls that no kernel served
served: Counter[tuple[str, str]] = Counter()  # (op, what ran) -> calls on a GPU


def library() -> Path | None:
    """The C++ library that serves CPU tensors, or None."""
    return _LIBRARY


def why_no_library() -> str | None:
    """One line why there is no C++ library, or None when there is one."""
    return _NO_LIBRARY


def available() -> tuple[str, ...]:
    """The backends that can serve something in this process."""
    served = ["cpu"] * (ISA is not None)
    if torch.cuda.is_available():
        served += ["triton"] * (_NO_TRITON is None) + ["cuda"] * (_NO_CUDA is None)
    return (*served, "reference")


def why_absent(name: str) -> str | None:
    """One line why the backend "cpu", "triton" or "cuda" cannot serve here, or None if it can."""
    if name == "cpu":
        return _NO_LIBRARY
    reason = {"triton": _NO_TRITON, "cuda": _NO_CUDA}[name]
    return reason or (None if torch.cuda.is_available() else "torch sees no GPU")


def _kernels(op: str, x: Tensor, size: float) -> tuple[tuple[str, ...], str | None]:
    """The backends with a kernel for x, the best first; or none, and why."""
    device = x.device.type
    if device not in ("cpu", "cuda"):
        return (), f"no kernel for device {device}"
    if device == "cpu" and ISA is None:
        return (), "no C++ library"
    if x.dtype not in (CPU_DTYPES if device == "cpu" else GPU_DTYPES):
        where = "CPU" if device == "cpu" else "GPU"
        return (), f"no {where} kernel for {str(x.dtype).removeprefix('torch.')}"
    if device == "cpu":
        return ("cpu",), None
    arch = OLDEST_GPU if torch.compiler.is_compiling() else _architecture(x.device.index)
    if arch < OLDEST_GPU:
        return (), f"compute capability {arch / 10} is older than {OLDEST_GPU / 10}"
    rows = [row for row in GPU[op] if size <= row.limit]
    fitting = [row for row in rows if size <= row.largest and arch >= row.arch]
    order = dict.fromkeys(row.kernel for row in (*fitting, *rows))
    names = tuple(name for name in order if _has_kernel(op, name))
    return names, None if names else f"no {' or '.join(order)} kernel: {_why_no_kernel(*order)}"


@functools.cache
def _architecture(index: int) -> int:
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor


def _has_kernel(op: str, name: str) -> bool:
    if name == "triton":
        return _NO_TRITON is None
    return name == "torch" or op in CUDA_OPS


def _why_no_kernel(*names: str) -> str:
    reasons = {"triton": _NO_TRITON, "cuda": _NO_CUDA or "_cuda.so does not have it"}
    return ", ".join(str(reasons[name]) for name in names)


def which(op: str, x: Tensor, unserved: str | None = None, size: float = 0) -> str:
    """The backend for `op` on tensors like `x`, or "reference" (counted in `fallbacks`).

    "cpu", "triton", "cuda", "torch" or "reference". `unserved` is the op's own reason for which no
    kernel can take this call, if any; `size` is what the table `GPU` compares (a door, which only
    asks whether any kernel serves, leaves it out where no row has a limit).
    Raises BackendUnavailable when `use()` forces a backend that cannot serve.
    """
    if _forced == "reference" or _exports_to_onnx():
        return "reference"
    names, reason = _kernels(op, x, size)
    reason = unserved or reason
    if reason is None and _carries_tangents():
        reason = "forward-mode differentiation"
    if _forced is not None:
        if reason or _forced not in names:
            why = reason or f"{op} on {x.device.type} is served by {' and '.join(names)}"
            raise BackendUnavailable(
                f"{op}: backend {_forced!r} was forced and cannot serve: {why}"
            )
        return _forced
    if reason is None:
        return names[0]
    if not torch.compiler.is_compiling():
        fallbacks[op, reason] += 1
    return "reference"


def _exports_to_onnx() -> bool:
    """Whether torch.onnx.export is tracing: ONNX knows none of our ops, but all of torch's."""
    if not torch.compiler.is_exporting() or "torch.onnx._internal.exporter" not in sys.modules:
        return False
    return torch.onnx.is_in_onnx_export()


def packs(weight: Tensor) -> bool:
    """Whether the CPU library has an order of its own for this weight, and serves it."""
    return (
        ISA is not None and not reference_forced() and weight.is_cpu and weight.dtype in CPU_DTYPES
    )


def is_captured() -> bool:
    """Whether a graph is made of this call: by torch.compile, torch.export or torch.jit.trace."""
    return torch.compiler.is_compiling() or torch._C._is_tracing()


def runs_at_once(x: object) -> bool:
    """Whether the CPU library serves x in a call that has nothing to record and nothing to cast.

    Such a call may go straight to the kernel, whose own checks refuse what does not fit; the door
    then says why.
    """
    return not torch.is_grad_enabled() and _is_served_as_it_is(x)


def records_at_once(x: object) -> bool:
    """The same for a call that may have a gradient to record."""
    return torch.is_grad_enabled() and _is_served_as_it_is(x)


def _is_served_as_it_is(x: object) -> bool:
    return (
        isinstance(x, Tensor)
        and x.is_cpu
        and x.dtype in CPU_DTYPES
        and ISA is not None
        and not torch.is_autocast_enabled("cpu")
        and not is_captured()
        and not reference_forced()
    )


# Around a kernel call that records nothing: skips the Python autograd kernel, 14 us a call under
# no_grad on Zen 3.
below_autograd = torch._C._AutoDispatchBelowAutograd


def reference_forced() -> bool:
    """True inside `use("reference")`: modules then run child by child, as plain torch would.

    And inside torch.autograd.forward_ad.dual_level(), whose tangents a kernel would drop.
    """
    return _forced == "reference" or _carries_tangents()


def _carries_tangents() -> bool:
    return not torch.compiler.is_compiling() and forward_ad._current_level >= 0


@contextmanager
def use(name: str) -> Iterator[None]:
    """Force "cpu", "triton", "cuda" or "reference" for the whole process while the block runs.

    Raises ValueError for an unknown name, BackendUnavailable for one that this process does not
    have.
    """
    global _forced
    if name not in _BACKENDS:
        raise ValueError(f"use: backend must be one of {', '.join(_BACKENDS)}, got {name!r}")
    if name not in available():
        raise BackendUnavailable(f"use: backend {name!r} is not available here: {why_absent(name)}")
    previous, _forced = _forced, name
    try:
        yield
    finally:
        _forced = previous
