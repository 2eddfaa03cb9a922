"""Our own op through one of its back ends, beside the one that the table chooses."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

from ..task import Candidate, Skip, Task


def _build(backend: str, task: Task) -> Candidate:
    from ..op_task import through

    if task.kind != "op":
        raise Skip("only for ops")
    return through(task, backend)


def _peer(backend: str) -> SimpleNamespace:
    summary = f"ours, the back end {backend} forced"
    return SimpleNamespace(SUMMARY=summary, INSTALL=None, build=partial(_build, backend))


TRITON, CUDA = _peer("triton"), _peer("cuda")
