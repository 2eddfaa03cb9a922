"""torch.compile with max-autotune: it times its own templates first, which takes minutes."""

from __future__ import annotations

from ..task import Candidate, Task
from . import _compiled

SUMMARY = "torch.compile with max-autotune, and freezing in inference (slow to build)"
INSTALL = None


def build(task: Task) -> Candidate:
    options = {"max_autotune": True, "freezing": not task.differentiates}
    return _compiled.build(task, "compile-max", options)
