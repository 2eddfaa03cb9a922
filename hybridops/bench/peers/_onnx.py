"""The task's module as ONNX, exported once for all peers that read it."""

from __future__ import annotations

import io
import logging
import warnings
from contextlib import redirect_stderr, redirect_stdout
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from ..task import Skip, Task

OPSET = 18
_exports: WeakKeyDictionary[nn.Module, dict[tuple, bytes]] = WeakKeyDictionary()


def export(task: Task) -> bytes:
    """The fp32 module, in eval mode and plain torch, as the bytes of an ONNX file of fixed shape.

    Raises Skip where torch's exporters cannot.
    """
    if task.differentiates:
        raise Skip("inference only")
    done = _exports.setdefault(task.module, {})  # one model serves tasks of several batches
    shapes = tuple(x.shape for x in task.inputs)
    if shapes not in done:
        done[shapes] = _export(task)
    return done[shapes]


def fp32_inputs(task: Task) -> list[torch.Tensor]:
    return [x.detach().float() if x.is_floating_point() else x for x in task.inputs]


def _export(task: Task) -> bytes:
    inputs = tuple(x.clone() for x in fp32_inputs(task))
    reasons = []
    for dynamo in (True, False):  # the old exporter takes some models that the new one does not
        buffer = io.BytesIO()
        try:
            with warnings.catch_warnings(), torch.no_grad(), task.world():
                warnings.simplefilter("ignore")
                with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
                    _run(task.module, inputs, buffer, dynamo)
            return buffer.getvalue()
        except Exception as error:  # each exporter fails in its own ways
            lines = str(error).strip().splitlines() or [type(error).__name__]
            reasons.append(lines[0][:200])
    raise Skip(f"torch.onnx.export failed: {reasons[0]}")


def _run(module: nn.Module, inputs: tuple, buffer: io.BytesIO, dynamo: bool) -> None:
    names = [f"input{i}" for i in range(len(inputs))]
    level = logging.getLogger().level
    logging.disable(logging.WARNING)
    try:
        if dynamo:
            options: dict = {"dynamo": True, "verbose": False}
            program: Any = torch.onnx.export(
                module, inputs, input_names=names, opset_version=OPSET, **options
            )
            program.save(buffer)
        else:
            old: Any = buffer
            torch.onnx.export(
                module, inputs, old, input_names=names, opset_version=OPSET, dynamo=False
            )
    finally:
        logging.disable(logging.NOTSET)
        logging.getLogger().setLevel(level)
