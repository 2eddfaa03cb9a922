"""Peak memory of a candidate, each in a process of its own.

What counts: everything resident at the worst moment of two calls, minus what the process held
before the model was built (Python, torch, the peer's library). Allocators keep and share memory, so
candidates in one process could not be told apart.
"""

from __future__ import annotations

import gc
import importlib
import json
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

from ..optimize.explain import build
from ..optimize.offload import trim
from . import peers
from .model_task import build_model, model_task, read_size
from .result import Row
from .task import Skip, Task, threads

_CHILD = "from hybridops.bench.memory import child; child()"
_SECONDS = 600


def measure_memory(task: Task, rows: list[Row], progress=lambda share, text: None) -> None:
    """Fill in peak_mb for every row of a model's comparison that was timed."""
    for row in rows:
        if row.median_ms is None:
            continue
        progress(1.0, f"peak memory of {row.candidate}")
        size, *how = row.case.split()
        spec = {
            **{k: getattr(row, k) for k in ("name", "dtype", "mode", "batch", "threads")},
            "size": size,
            "freeze": bool(how),
            "offload": how == ["offloaded"],
            "candidate": None if row.ours else row.candidate,
        }
        row.peak_mb = _ask(spec)


def _ask(spec: dict) -> float | None:
    try:
        done = subprocess.run(
            [sys.executable, "-c", _CHILD],
            input=json.dumps(spec),
            capture_output=True,
            text=True,
            timeout=_SECONDS,
        )
        return float(json.loads(done.stdout.strip().rpartition("\n")[2])["peak_mb"])
    except (subprocess.TimeoutExpired, OSError, ValueError, KeyError):
        return None


def child() -> None:
    """Runs in the process of its own: reads what to build from stdin, prints the peak as JSON."""
    spec = json.load(sys.stdin)
    name = spec["candidate"]
    if name is not None:
        for library in (peers.peer(name).INSTALL or "").split()[2:]:
            with suppress(ImportError):
                importlib.import_module(library)
    build(spec["name"])  # without memory for weights: what a model imports is not its own
    base = _resident("VmRSS")
    with threads(spec["threads"]):
        model, size = build_model(spec["name"], read_size(spec["size"]))
        task = model_task(
            spec["name"],
            model,
            size=size,
            batch=spec["batch"],
            dtype=spec["dtype"],
            mode=spec["mode"],
            threads=spec["threads"],
            freeze=spec["freeze"],
            offload=spec["offload"],
        )
        del model
        task.set_inputs(0)
        try:
            candidate = task.ours(task) if name is None else peers.build(name, task)
        except Skip as reason:
            raise SystemExit(str(reason)) from None
        task.module = None  # type: ignore[assignment]  # candidates hold copies of their own
        with candidate.world():
            candidate.run()
            gc.collect()
            trim()
            Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
            candidate.run()
            candidate.run()
    print(json.dumps({"peak_mb": (_resident("VmHWM") - base) / 1024}))


def _resident(key: str) -> int:
    """VmRSS (now) or VmHWM (the peak) of this process, in KiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1])
    raise ValueError(f"no {key} in /proc/self/status")
