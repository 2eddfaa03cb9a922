"""torch eager with weights and images in channels_last memory format."""

from __future__ import annotations

import torch

from ..task import Candidate, Skip, Task

SUMMARY = "torch, eager, weights and images in channels_last"
INSTALL = None


def build(task: Task) -> Candidate:
    if not any(x.ndim == 4 and x.shape[1] <= 4 for x in task.inputs):
        raise Skip("only where an image comes in")
    module = task.cast_module()
    module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def call(*inputs):  # the reordering is part of the work unless the image came that way
        return module(*(channels_last(x) for x in inputs))

    return task.candidate("channels_last", module, call=call, world=task.world)


def channels_last(x):
    return x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x
