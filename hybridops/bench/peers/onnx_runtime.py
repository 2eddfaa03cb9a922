"""ONNX Runtime on the exported graph, as many threads as everyone."""

from __future__ import annotations

from functools import partial

from ..task import Candidate, Skip, Task, tensors
from . import _onnx

SUMMARY = "ONNX Runtime, CPU provider, all graph optimisations"
INSTALL = "pip install onnxruntime onnx onnxscript"


def build(task: Task) -> Candidate:
    if task.dtype != "fp32":
        raise Skip(f"no {task.dtype} kernels for x86-64 CPUs")
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = task.threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(
        _onnx.export(task), options, providers=["CPUExecutionProvider"]
    )
    # numpy views: a new draw into the task's inputs arrives here too
    names = [node.name for node in session.get_inputs()]
    feeds = {n: x.numpy() for n, x in zip(names, task.inputs, strict=True)}
    run = partial(session.run, None, feeds)
    return Candidate("onnxruntime", "onnxruntime", run, lambda: tensors(run()))
