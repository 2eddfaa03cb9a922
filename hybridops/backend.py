"""Which backend serves a tensor: the only module that knows about hardware.

The CPU library is chosen once, at import, from torch's own CPU capability (so `ATEN_CPU_CAPABILITY`
steers ours and torch's kernels together). Nothing is compiled and nothing is downloaded here.

`HYBRIDOPS_LIBRARY=/path/to/lib.so` loads that library instead; `HYBRIDOPS_LIBRARY=none` loads none.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

_PACKAGE = Path(__file__).resolve().parent
_BACKENDS = ("cpu", "triton", "cuda", "reference")
CPU_DTYPES = (torch.float32, torch.bfloat16)


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


ISA, _LIBRARY, _NO_LIBRARY = _load()
_forced: str | None = None
fallbacks: Counter[tuple[str, str]] = Counter()  # (op, reason) -> calls that the reference served


def library() -> Path | None:
    """The C++ library that serves CPU tensors, or None."""
    return _LIBRARY


def why_no_library() -> str | None:
    """One line why there is no C++ library, or None when there is one."""
    return _NO_LIBRARY


def available() -> tuple[str, ...]:
    """The backends that can serve something in this process."""
    return ("cpu", "reference") if ISA else ("reference",)


def _why_not_cpu(x: Tensor) -> str | None:
    if x.device.type != "cpu":
        return f"no kernel for device {x.device.type}"
    if ISA is None:
        return "no C++ library"
    if x.dtype not in CPU_DTYPES:
        return f"no CPU kernel for {str(x.dtype).removeprefix('torch.')}"
    return None


def which(op: str, x: Tensor, unserved: str | None = None) -> str:
    """The backend for `op` on tensors like `x`: "cpu" or "reference" (counted in `fallbacks`).

    `unserved` is the op's own reason for which its kernel cannot take this call, if any.
    Raises BackendUnavailable when `use()` forces a backend that cannot serve.
    """
    if _forced == "reference":
        return "reference"
    reason = unserved or _why_not_cpu(x)
    if _forced is not None and (_forced != "cpu" or reason):
        raise BackendUnavailable(
            f"{op}: backend {_forced!r} was forced and cannot serve: {reason or 'not built'}"
        )
    if reason is None:
        return "cpu"
    if not torch.compiler.is_compiling():
        fallbacks[op, reason] += 1
    return "reference"


def runs_at_once(x: object) -> bool:
    """Whether the CPU library serves x in a call that has nothing to record and nothing to cast.

    Such a call may go straight to the kernel, whose own checks refuse what does not fit; the door
    then says why.
    """
    return (
        isinstance(x, Tensor)
        and x.is_cpu
        and x.dtype in CPU_DTYPES
        and ISA is not None
        and _forced != "reference"
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
    )


# Around a kernel call that records nothing: skips the Python autograd kernel, 14 us a call under
# no_grad on Zen 3.
below_autograd = torch._C._AutoDispatchBelowAutograd


def reference_forced() -> bool:
    """True inside `use("reference")`: modules then run child by child, as plain torch would."""
    return _forced == "reference"


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
        raise BackendUnavailable(
            f"use: backend {name!r} is not available here: {_NO_LIBRARY or 'not built'}"
        )
    previous, _forced = _forced, name
    try:
        yield
    finally:
        _forced = previous
