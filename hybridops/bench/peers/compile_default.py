"""torch.compile with its defaults."""

from __future__ import annotations

from ..task import Candidate, Task
from . import _compiled

SUMMARY = "torch.compile, defaults"
INSTALL = None


def build(task: Task) -> Candidate:
    return _compiled.build(task, "compile")
