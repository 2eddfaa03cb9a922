"""Our model once more: replayed as a CUDA graph, and compiled by torch behind optimize()."""

from __future__ import annotations

from types import SimpleNamespace

from ..task import Candidate, Skip, Task
from . import _compiled


def _graph(task: Task) -> Candidate:
    from ..model_task import captured, optimized

    if task.kind != "model":
        raise Skip("only for models")
    return captured(task, optimized(task))


def _compile(task: Task) -> Candidate:
    from ..model_task import optimized

    if task.kind != "model":
        raise Skip("only for models")
    return _compiled.build(task, "ours-compile", None, optimized(task))


GRAPH = SimpleNamespace(SUMMARY="ours, a model in a CUDA graph", INSTALL=None, build=_graph)
COMPILE = SimpleNamespace(SUMMARY="ours, torch.compile'd behind it", INSTALL=None, build=_compile)
