"""`hybridops doctor`: what serves each op here, found out by calling it; what is missing."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import hybridops
from hybridops import backend, ops

_PACKAGES = (
    *("torch", "numpy", "timm", "torchvision", "transformers", "triton"),
    *("scikit-learn", "matplotlib", "pillow", "huggingface_hub", "ninja", "pybind11"),
)
_FLAGS = (
    *("avx", "avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512_bf16"),
    *("amx_tile", "amx_bf16", "asimd", "sve", "bf16"),
)
_DTYPES = (torch.float32, torch.bfloat16, torch.float64, torch.float16)
_REBUILD = "pip install --no-build-isolation -e . (in a checkout of hybridops)"

# One tiny call per op; every argument is made from `t`, which gives a tensor of that shape.
_CALLS: dict[str, Callable[[Callable[..., Tensor]], Tensor]] = {
    "attention": lambda t: ops.attention(t(1, 5, 2, 16), t(1, 7, 2, 16), t(1, 7, 2, 32)),
    "peg": lambda t: ops.peg(t(1, 13, 24), t(24, 1, 3, 3), t(24), grid=(3, 4), prefix=1),
    "patch_embed": lambda t: ops.patch_embed(t(1, 3, 8, 12), t(24, 3, 4, 4), t(24)),
    "conv_stem": lambda t: ops.conv_stem(
        t(1, 3, 9, 9), [ops.ConvLayer(t(24, 3, 3, 3), t(24), 2, 1, "hardswish")]
    ),
    "linear": lambda t: ops.linear(t(5, 24), t(40, 24), t(40), activation="gelu"),
}


def run(arguments: argparse.Namespace) -> int:
    """Exit code 0 when the C++ library serves all five ops rightly in fp32, else 1."""
    findings = examine()
    print(json.dumps(findings, indent=1) if arguments.json else _text(findings))
    return 0 if findings["fast"] else 1


def examine() -> dict:
    """Everything that doctor says, as plain data."""
    build = _build_info()
    served = {
        op: {_short(dtype): _probe(op, dtype) for dtype in _DTYPES} for op in _CALLS
    }  # really calls each op
    findings = {
        "versions": {
            "hybridops": hybridops.__version__,
            "python": platform.python_version(),
            **{name: _version(name) for name in _PACKAGES},
        },
        "cpu": {
            "name": cpu_name(),
            "cores": len(os.sched_getaffinity(0)),
            "flags": [flag for flag in _FLAGS if flag in backend._cpu_flags()],
            "torch_capability": torch.backends.cpu.get_cpu_capability(),
            "torch_threads": torch.get_num_threads(),
        },
        "library": {
            "isa": backend.ISA,
            "path": str(backend.library()) if backend.library() else None,
            "why_none": backend.why_no_library(),
        },
        "build": build,
        "host_module": importlib.util.find_spec("hybridops._host") is not None,
        "gpu": _gpus(),
        "gpu_kernels": {name: backend.why_absent(name) for name in ("triton", "cuda")},
        "ops": served,
    }
    findings["fast"] = all(row["float32"]["backend"] == "cpu" for row in served.values())
    findings["advice"] = _advice(findings)
    return findings


def cpu_name() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found[1] if found else platform.processor() or platform.machine()


def is_amd() -> bool:
    try:
        return "AuthenticAMD" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _build_info() -> dict | None:
    path = Path(hybridops.__file__).with_name("_build_info.json")
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def _gpus() -> list[str]:
    if not torch.cuda.is_available():
        return []
    return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _probe(op: str, dtype: torch.dtype) -> dict[str, str | None]:
    """Call `op`, forward and backward: {"backend": "cpu" | "reference" | "wrong", "why": …}."""
    kept = backend.fallbacks.copy()
    backend.fallbacks.clear()
    try:
        mine = _forward_and_gradients(op, dtype)
        reasons = [reason for name, reason in backend.fallbacks if name == op]
    except Exception as error:  # a broken library must be reported, whatever it raises
        return {"backend": "wrong", "why": f"{type(error).__name__}: {str(error).splitlines()[0]}"}
    finally:
        backend.fallbacks.clear()
        backend.fallbacks.update(kept)
    if reasons:
        return {"backend": "reference", "why": reasons[0]}
    with hybridops.use("reference"):
        torchs, exact = _forward_and_gradients(op, dtype), _forward_and_gradients(op, None)
    for i, (a, b, e) in enumerate(zip(mine, torchs, exact, strict=True)):
        rms = e.square().mean().sqrt()
        limit = (3 if i else 2) * (b - e).abs().max() + 4 * torch.finfo(dtype).eps * rms
        if not (a - e).abs().max() <= limit:
            what = f"gradient {i}" if i else "output"
            return {"backend": "wrong", "why": f"{what} is too far from float64"}
    return {"backend": "cpu", "why": None}


def _forward_and_gradients(op: str, dtype: torch.dtype | None) -> list[Tensor]:
    """Output and gradients in float64; dtype None computes in float64 on fp32's numbers."""
    generator = torch.Generator().manual_seed(0)
    leaves: list[Tensor] = []

    def make(*shape: int) -> Tensor:
        # Eighths below 2 are exact in every dtype, so that all dtypes compute the same thing.
        values = torch.randint(-15, 16, shape, generator=generator).double() / 8
        leaves.append(values.to(dtype or torch.float64).requires_grad_())
        return leaves[-1]

    with torch.enable_grad():
        y = _CALLS[op](make)
        gradients = torch.autograd.grad(y.sum(), leaves)
    return [t.detach().double() for t in (y, *gradients)]


def _advice(findings: dict) -> list[str]:
    """What is missing, each with the command or step that brings it."""
    lines, library, cpu = [], findings["library"], findings["cpu"]
    build = findings["build"] or {}
    forced = os.environ.get("ATEN_CPU_CAPABILITY")
    if library["isa"] is None:
        why = library["why_none"].partition(" (pip")[0]
        lines.append(f"no C++ library ({why}): {_library_remedy(findings)}")
    elif library["isa"] == "avx2" and "avx512_bf16" in cpu["flags"]:
        remedy = "unset ATEN_CPU_CAPABILITY" if forced else "unset HYBRIDOPS_LIBRARY"
        lines.append(f"this CPU has AVX-512 with bf16 and AVX2 is in use: {remedy}")
    wrong = [
        op
        for op, row in findings["ops"].items()
        if any(cell["backend"] == "wrong" for cell in row.values())
    ]
    if wrong:
        lines.append(f"the library is broken for {', '.join(wrong)}: rebuild it: {_REBUILD}")
    if not findings["host_module"]:
        why = build.get("host_reason") or "not built"
        first = "pip install pybind11, then " if "pybind11" in why else ""
        lines.append(f"no hybridops._host, which only measures ({why}): {first}{_REBUILD}")
    versions = findings["versions"]
    for purpose, names in (
        ("timm's models and the demo", ("timm", "torchvision")),
        ("transformers' models", ("transformers",)),
        ("the demo", ("scikit-learn", "matplotlib", "pillow")),
    ):
        missing = [name for name in names if versions[name] is None]
        if missing:
            names_missing = " ".join(missing)
            lines.append(f"{names_missing} missing, for {purpose}: pip install {names_missing}")
    return lines


def _library_remedy(findings: dict) -> str:
    why, build = findings["library"]["why_none"] or "", findings["build"] or {}
    if os.environ.get("HYBRIDOPS_LIBRARY"):
        return "unset HYBRIDOPS_LIBRARY"
    if "capability" in why:
        forced = os.environ.get("ATEN_CPU_CAPABILITY")
        return "unset ATEN_CPU_CAPABILITY" if forced else "this CPU is served by plain torch"
    reason = str(build.get("reason") or "")
    if "no C++ compiler" in reason:
        return f"sudo apt install g++ (or set CXX), then {_REBUILD}"
    if "ninja" in reason and "not installed" in reason:
        return f"pip install ninja, then {_REBUILD}"
    return _REBUILD


def _text(findings: dict) -> str:
    versions, cpu, library = findings["versions"], findings["cpu"], findings["library"]
    have = [f"{name} {version}" for name, version in versions.items() if version]
    absent = [name for name, version in versions.items() if not version]
    build = findings["build"]
    if build is None:
        built = "never built here"
    else:
        names = ", ".join(build.get("libraries") or ()) or "nothing"
        built = f"{names} ({build.get('compiler')}, torch {build.get('torch')})"
    loaded = f"{library['path']} ({library['isa']})" if library["path"] else library["why_none"]
    gpu = ", ".join(findings["gpu"]) or "none"
    rows = [
        ("versions", ", ".join(have)),
        ("not installed", ", ".join(absent) or "nothing missing"),
        ("CPU", f"{cpu['name']}, {cpu['cores']} cores, {cpu['torch_threads']} torch threads"),
        ("CPU flags", " ".join(cpu["flags"]) or "none that matter"),
        ("torch uses", cpu["torch_capability"]),
        ("C++ library", loaded if library["path"] else f"none: {loaded}"),
        ("built", built),
        ("host module", "present" if findings["host_module"] else "absent"),
        ("GPU", gpu),
        *((f"{name} kernels", why or "ready") for name, why in findings["gpu_kernels"].items()),
    ]
    lines = [f"{label + ':':15}{value}" for label, value in rows]
    lines += [
        "",
        "Who serves a call, forward and backward (each was made; C++ checked against float64):",
    ]
    lines.append(f"  {'':13}" + "".join(f"{_short(dtype):11}" for dtype in _DTYPES))
    reasons: dict[str, None] = {}
    for op, row in findings["ops"].items():
        lines.append(f"  {op:13}" + "".join(f"{cell['backend']:11}" for cell in row.values()))
        for name, cell in row.items():
            if cell["backend"] == "wrong":
                reasons[f"{op} {name}: {cell['why']}"] = None
            elif cell["why"]:
                reasons[f"{cell['backend']}: {cell['why']}"] = None
    lines += [f"  {reason}" for reason in reasons]
    lines += ["", *(f"to do: {line}" for line in findings["advice"] or ["nothing"])]
    return "\n".join(lines)
