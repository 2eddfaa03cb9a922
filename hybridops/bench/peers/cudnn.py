"""cuDNN's convolutions at their best: channels_last weights and images, algorithms by benchmark."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ..task import Candidate, Skip, Task
from .channels_last import channels_last

SUMMARY = "torch, eager, channels_last, cuDNN's algorithms chosen by benchmark"
INSTALL = None


def build(task: Task) -> Candidate:
    if task.kind == "op" and task.name not in ("conv_stem", "patch_embed", "peg"):
        raise Skip("only where there is a convolution")
    if not (task.on_gpu or task.rehearsal):
        raise Skip("only on a GPU")
    module = task.cast_module()
    module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def call(*inputs):
        return module(*(channels_last(x) for x in inputs))

    @contextmanager
    def world() -> Iterator[None]:
        with task.world(), torch.backends.cudnn.flags(enabled=True, benchmark=True):
            yield

    return task.candidate("cudnn", module, call=call, world=world)
