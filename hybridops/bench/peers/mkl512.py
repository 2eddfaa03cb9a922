"""torch eager with MKL's AVX-512 kernels on an AMD CPU: what a tuned fp32 product would do there.

MKL's vendor check keeps AMD CPUs on AVX2 kernels. Whoever may lawfully override that check (their
MKL licence decides, not we) can name a library that does so in HYBRIDOPS_MKL512_PRELOAD; a process
with that library preloaded then runs this peer and reports times and answers.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from ..task import Candidate, Skip, Task, threads

SUMMARY = "torch eager, a library of yours preloaded that lets MKL use AVX-512 on AMD"
INSTALL = None
VARIABLE = "HYBRIDOPS_MKL512_PRELOAD"
_CHILD = "from hybridops.bench.peers.mkl512 import child; child()"


def build(task: Task) -> Candidate:
    flags = _cpuinfo()
    if "AuthenticAMD" not in flags:
        raise Skip("only on AMD: elsewhere MKL takes its AVX-512 kernels by itself")
    if "avx512f" not in flags:
        raise Skip("this CPU has no AVX-512")
    library = os.environ.get(VARIABLE)
    if not library:
        raise Skip(f"{VARIABLE} names no library (docs/bench.md says what it would have to do)")
    if not Path(library).is_file():
        raise Skip(f"{VARIABLE}: no file {library}")
    return preloaded(task, library)


def preloaded(task: Task, library: str) -> Candidate:
    """The eager candidate in a process that has `library` preloaded."""
    worker = _Worker(task, library)
    return Candidate("eager-mkl512", "torch", worker.run, worker.outcome, timer=worker.time)


class _Worker:
    """Talks to the process: one line asks, one line answers; tensors go through files."""

    def __init__(self, task: Task, library: str):
        self.task = task
        self.folder = tempfile.TemporaryDirectory(prefix="hybridops-")
        self._store("task", {"module": task.module, "inputs": task.inputs, **_plain(task)})
        before = os.environ.get("LD_PRELOAD", "")
        self.process = subprocess.Popen(
            [sys.executable, "-c", _CHILD, self.folder.name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "LD_PRELOAD": " ".join(filter(None, [library, before]))},
        )
        self._ask("ready")

    def time(self, calls: int) -> float:
        return float(self._ask(f"time {calls}"))

    def run(self) -> None:
        self._ask("time 1")

    def outcome(self) -> list[torch.Tensor]:
        self._store("inputs", self.task.inputs)
        self._ask("outcome")
        return torch.load(Path(self.folder.name) / "results", weights_only=True)

    def _store(self, name: str, what: Any) -> None:
        torch.save(what, Path(self.folder.name) / name)

    def _ask(self, line: str) -> str:
        to, back = self.process.stdin, self.process.stdout
        try:
            to.write(line + "\n")  # type: ignore[union-attr]
            to.flush()  # type: ignore[union-attr]
            answer = back.readline()  # type: ignore[union-attr]
        except BrokenPipeError:
            answer = ""
        if not answer:
            raise RuntimeError("the process with the preloaded library died")
        return answer

    def __del__(self) -> None:
        process = getattr(self, "process", None)
        if process is not None:
            process.kill()
            process.wait()


def _plain(task: Task) -> dict:
    keys = ("kind", "name", "case", "dtype", "mode", "threads", "seed")
    native = task.world is not Task.world  # our own modules need plain torch around them
    return {key: getattr(task, key) for key in keys} | {"native": native}


def child() -> None:
    """Runs in the process with the preload. The file is one that our own parent has just written,
    in a directory of its own, so unpickling it runs nobody else's code."""
    from ..clock import Wall
    from ..plain import plain_torch
    from . import eager

    folder = Path(sys.argv[1])
    stored = torch.load(folder / "task", weights_only=False)
    inputs, native = stored.pop("inputs"), stored.pop("native")
    task = Task(**stored, draw=lambda seed: inputs, ours=eager.build)
    if native:
        task.world = plain_torch
    task.inputs = inputs
    candidate = eager.build(task)
    with threads(task.threads):
        for line in sys.stdin:
            word, *rest = line.split()
            answer: object = "ok"
            if word == "time":
                with candidate.world():
                    answer = Wall().time(candidate.run, int(rest[0]))
            elif word == "outcome":
                for held, x in zip(task.inputs, torch.load(folder / "inputs"), strict=True):
                    held.copy_(x)
                torch.save(candidate.outcome(), folder / "results")
            print(answer, flush=True)


def _cpuinfo() -> str:
    try:
        return Path("/proc/cpuinfo").read_text()
    except OSError:
        return ""
