"""Ours, an op or a model, through one back end, beside the one that the table chooses."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

from ..task import Candidate, Task


def _build(backend: str, task: Task) -> Candidate:
    from ..model_task import through as through_model
    from ..op_task import through

    return (through_model if task.kind == "model" else through)(task, backend)


def _peer(backend: str) -> SimpleNamespace:
    summary = f"ours, the back end {backend} forced"
    return SimpleNamespace(SUMMARY=summary, INSTALL=None, build=partial(_build, backend))


TRITON, CUDA = _peer("triton"), _peer("cuda")
