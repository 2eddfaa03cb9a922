"""The peers that ours is measured against, one small file each.

A peer's file has SUMMARY, INSTALL (the pip line, or None where it is always there) and
`build(task) -> Candidate`, which raises Skip where it cannot take part. To add one: write that
file and name it in PEERS, or `register(name, module)` from outside.
"""

from __future__ import annotations

import importlib
import importlib.util
from types import ModuleType
from typing import Any

from ..task import Candidate, Skip, Task

# name on the command line -> file here, or an object in it
PEERS: dict[str, str | ModuleType] = {
    "eager": "eager",
    "sdpa": "sdpa",
    "sdpa-flash": "sdpa_forced.FLASH",
    "sdpa-efficient": "sdpa_forced.EFFICIENT",
    "sdpa-cudnn": "sdpa_forced.CUDNN",
    "sdpa-math": "sdpa_forced.MATH",
    "flex": "flex",
    "cudnn": "cudnn",
    "ours-triton": "forced.TRITON",
    "ours-cuda": "forced.CUDA",
    "ours-graph": "ours.GRAPH",
    "ours-compile": "ours.COMPILE",
    "channels_last": "channels_last",
    "autocast": "autocast",
    "eager-mkl512": "mkl512",
    "compile": "compile_default",
    "compile-freezing": "compile_freezing",
    "compile-max": "compile_max",
    "compile-max-graph": "compile_max_graph",
    "onnxruntime": "onnx_runtime",
    "openvino": "open_vino",
    "products": "products",
}

ON_CPU = ("eager-mkl512", "onnxruntime", "openvino", "products")  # they know no other device


def register(name: str, module: ModuleType) -> None:
    """Make a peer of your own known: anything with SUMMARY, INSTALL and build(task)."""
    PEERS[name] = module


def peer(name: str) -> Any:
    """The peer's file, or what stands for one. Raises ValueError for a name that is not known."""
    if name not in PEERS:
        raise ValueError(f"unknown peer {name!r}; there are {', '.join(PEERS)}")
    found = PEERS[name]
    if not isinstance(found, str):
        return found
    file, _, part = found.partition(".")
    module = importlib.import_module(f".{file}", __name__)
    return getattr(module, part) if part else module


def absent(name: str) -> str | None:
    """The pip line that would bring the peer here, or None when it is here."""
    install = peer(name).INSTALL
    if install is None or all(importlib.util.find_spec(part) for part in install.split()[2:]):
        return None
    return install


def build(name: str, task: Task) -> Candidate:
    """The candidate that peer makes of the task. Raises Skip with the reason where it cannot."""
    if line := absent(name):
        raise Skip(f"not installed: {line}")
    if name in ON_CPU and task.on_gpu:
        raise Skip("on a CPU only")
    return peer(name).build(task)
