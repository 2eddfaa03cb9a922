"""torch as it runs when nothing is done to it: what every ratio of errors is measured against."""

from __future__ import annotations

from ..task import Candidate, Task

SUMMARY = "torch, eager"
INSTALL = None


def build(task: Task) -> Candidate:
    return task.candidate("eager", task.cast_module(), world=task.world)
