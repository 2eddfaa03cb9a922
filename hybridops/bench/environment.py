"""Where a run took place: everything that a reader needs to believe or repeat its figures."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import subprocess
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

import hybridops

from .. import backend
from .roof import gpu_roof, machine_id, roof

_VARIABLES = (
    *("ATEN_CPU_CAPABILITY", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "OMP_WAIT_POLICY"),
    *("GOMP_SPINCOUNT", "GOMP_CPU_AFFINITY", "KMP_AFFINITY", "LD_PRELOAD", "HYBRIDOPS_LIBRARY"),
    *("MALLOC_CONF", "THP_MEM_ALLOC_ENABLE", "MKL_ENABLE_INSTRUCTIONS", "CUDA_VISIBLE_DEVICES"),
)
_PEERS = ("timm", "transformers", "torchvision", "triton", "onnxruntime", "openvino", "onnx")


def environment(
    threads: tuple[int, ...] = (), *, seed: int = 0, on_gpu: bool = False
) -> dict[str, Any]:
    """The env object of a document, with the roof for these thread counts, or the GPU's (as far as
    measured)."""
    commit, dirty = _git()
    measured = gpu_roof() if on_gpu else None
    for count in () if on_gpu else threads:
        measured = roof(count)
    return {
        "hybridops": hybridops.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "git": commit,
        "dirty": dirty,
        "cpu": cpu_name(),
        "machine": machine_id(),
        "isa": backend.ISA,
        "torch_isa": torch.backends.cpu.get_cpu_capability(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "governor": _read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
        "load": round(os.getloadavg()[0], 2),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "seed": seed,
        "peers": {name: v for name in _PEERS if (v := _version(name))},
        "variables": {name: os.environ[name] for name in _VARIABLES if name in os.environ},
        "roof": measured.as_json() if measured else None,
    }


def cpu_name() -> str:
    """The CPU's own name where it tells one, else what the system calls it."""
    try:
        host = importlib.import_module("hybridops._host")
        if brand := host.cpu_features()["brand"]:
            return str(brand)
    except ImportError:
        pass
    for line in (_read("/proc/cpuinfo") or "").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _git() -> tuple[str | None, bool | None]:
    """Commit and whether the tree differs from it, when we run from a checkout."""
    root = Path(hybridops.__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None, None
    try:
        head, status = (
            subprocess.run(
                ["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=10
            )
            for arguments in (("rev-parse", "--short=10", "HEAD"), ("status", "--porcelain"))
        )
    except (OSError, subprocess.TimeoutExpired):
        return None, None
    if head.returncode or status.returncode:
        return None, None
    return head.stdout.strip(), bool(status.stdout.strip())


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _read(path: str) -> str | None:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return None
