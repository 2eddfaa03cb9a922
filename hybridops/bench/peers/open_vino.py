"""OpenVINO on the exported graph, at the precision asked for: left alone it picks bf16 itself."""

from __future__ import annotations

import torch

from ..task import Candidate, Skip, Task
from . import _onnx

SUMMARY = "OpenVINO, CPU, latency hint, precision pinned"
INSTALL = "pip install openvino onnx onnxscript"


def build(task: Task) -> Candidate:
    if task.dtype not in ("fp32", "bf16"):
        raise Skip(f"{task.dtype} is not compared with OpenVINO")
    import openvino

    core = openvino.Core()
    if task.dtype == "bf16" and "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        raise Skip("OpenVINO has no bf16 on this CPU: it would compute in fp32")
    precision = "bf16" if task.dtype == "bf16" else "f32"
    compiled = core.compile_model(
        core.read_model(_onnx.export(task)),
        "CPU",
        {
            "INFERENCE_NUM_THREADS": task.threads,
            "NUM_STREAMS": 1,
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": precision,
        },
    )
    request = compiled.create_infer_request()
    # Shared with the task where it is fp32 too; a bf16 task's draws are copied when they change.
    feeds = _onnx.fp32_inputs(task)
    arrays = [x.numpy() for x in feeds]

    def run():
        return request.infer(arrays, share_inputs=True, share_outputs=True)

    def outcome() -> list[torch.Tensor]:
        for held, x in zip(feeds, task.inputs, strict=True):
            if held is not x:
                held.copy_(x)
        found = run()
        return [torch.from_numpy(found[i].copy()) for i in range(len(compiled.outputs))]

    return Candidate("openvino", "openvino", run, outcome)
