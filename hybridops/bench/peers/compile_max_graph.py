"""torch.compile as far as it goes on a GPU: max-autotune, channels_last, inside CUDA graphs."""

from __future__ import annotations

import torch
from torch import nn

from ..task import Candidate, Skip, Task
from . import _compiled
from .channels_last import channels_last

SUMMARY = "torch.compile with max-autotune, channels_last, CUDA graphs (slow to build)"
INSTALL = None


class _ChannelsLast(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, *inputs):
        return self.module(*(channels_last(x) for x in inputs))


def build(task: Task) -> Candidate:
    if not (task.on_gpu or task.rehearsal):
        raise Skip("only on a GPU")
    options = {"max_autotune": True, "triton.cudagraphs": True, "freezing": not task.differentiates}
    module = _ChannelsLast(task.cast_module())
    return _compiled.build(task, "compile-max-graph", options, module)
