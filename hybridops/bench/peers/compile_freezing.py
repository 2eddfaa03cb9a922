"""torch.compile with freezing: weights are constants, norms are folded. Inference only."""

from __future__ import annotations

from ..task import Candidate, Skip, Task
from . import _compiled

SUMMARY = "torch.compile with freezing (inference)"
INSTALL = None


def build(task: Task) -> Candidate:
    if task.differentiates:
        raise Skip("freezing is for inference")
    return _compiled.build(task, "compile-freezing", {"freezing": True})
