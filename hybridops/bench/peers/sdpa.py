"""torch's scaled_dot_product_attention where an op of ours has attention."""

from __future__ import annotations

from functools import partial

from ..plain import plain_torch
from ..task import Candidate, Skip, Task

SUMMARY = "torch, eager, attention through scaled_dot_product_attention"
INSTALL = None


def build(task: Task) -> Candidate:
    if (task.kind, task.name) != ("op", "attention"):
        raise Skip("only for the op attention; a model decides for itself whether it uses SDPA")
    return task.candidate("sdpa", task.cast_module(), world=partial(plain_torch, "always"))
