"""torch eager in mixed precision: fp32 parameters under torch.autocast."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ..task import Candidate, Skip, Task

SUMMARY = "torch, eager, fp32 parameters under autocast"
INSTALL = None


def build(task: Task) -> Candidate:
    if task.dtype not in ("bf16", "fp16"):
        raise Skip(f"autocast is for bf16 and fp16, this is {task.dtype}")
    if task.differentiates:
        raise Skip("in training every candidate runs under autocast")
    inputs = [x.float() if x.is_floating_point() else x for x in task.inputs]
    call = _fed(task.module, task.inputs, inputs)

    @contextmanager
    def world() -> Iterator[None]:
        with task.world(), torch.autocast(task.inputs[0].device.type, task.torch_dtype):
            yield

    return task.candidate("autocast", task.module, call=call, world=world, inputs=task.inputs)


def _fed(module, held, inputs):
    """The module on fp32 copies that follow the task's inputs when a new draw changes them."""
    seen = [x._version for x in held]

    def call(*fresh):
        for i, x in enumerate(fresh):
            if x._version != seen[i]:
                inputs[i].copy_(x)
                seen[i] = x._version
        return module(*inputs)

    return call
