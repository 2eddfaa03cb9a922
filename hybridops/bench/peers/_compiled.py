"""What the torch.compile peers share: fresh caches, and no silent fall back to eager."""

from __future__ import annotations

import shutil

import torch
from torch import nn

from ..task import Candidate, Skip, Task


def build(
    task: Task, name: str, options: dict | None = None, module: nn.Module | None = None
) -> Candidate:
    """The task's module, or another one in its place, compiled with Inductor's options."""
    if not any(shutil.which(cxx) for cxx in ("g++", "clang++", "c++")):
        raise Skip("torch.compile needs a C++ compiler for its CPU code")
    import torch._dynamo.config as dynamo

    # Past the limit dynamo quietly runs eager code: rows "compile" that never were compiled. A
    # model class compiled for several batches, dtypes and options reaches the default of 8.
    dynamo.recompile_limit = max(dynamo.recompile_limit, 256)
    dynamo.fail_on_recompile_limit_hit = True
    module = task.cast_module() if module is None else module
    if task.rehearsal:  # traced all the same; generating code is what takes the time
        compiled = torch.compile(module, dynamic=False, backend="aot_eager")
    else:
        compiled = torch.compile(module, dynamic=False, options=options)
    return task.candidate(name, module, call=compiled, world=task.world)
