"""A GPU in name only: torch's fake tensors on the device "cuda", on a machine without one.

A model runs on them at its real size with all of Python that would run on a GPU, and without any
arithmetic. What shows: which ops are called, tensors that lie on two devices, and whatever asks a
tensor for its value, which on a GPU would wait for it (fake tensors have none, and raise).
"""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import subprocess
import tempfile
import warnings
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from hybridops import backend

# A torch built without CUDA has nothing that sets the current device of such a tensor.
GUARD = """
#include <c10/core/impl/DeviceGuardImplInterface.h>
namespace c10::impl {
C10_REGISTER_GUARD_IMPL(CUDA, NoOpDeviceGuardImpl<DeviceType::CUDA>)
}
"""


@functools.cache
def load_guard() -> None:
    if torch.backends.cuda.is_built():
        return
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    torchs = Path(torch.__file__).parent
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder, "guard.cpp"), Path(folder, "guard.so")
        source.write_text(GUARD)
        flags = ["-std=c++20", "-fPIC", "-shared", f"-I{torchs / 'include'}"]
        where = [str(source), "-o", str(library), f"-L{torchs / 'lib'}", "-lc10"]
        built = subprocess.run([*compiler.split(), *flags, *where], capture_output=True, text=True)
        assert built.returncode == 0, built.stderr
        torch.ops.load_library(str(library))


class Calls(TorchDispatchMode):
    """Counts the ops that run, views apart; refuses what leaves the GPU or comes to it."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        leaves = pytree.tree_leaves((args, kwargs, result))
        devices = {x.device.type for x in leaves if isinstance(x, Tensor) and x.ndim}
        assert devices <= {"cuda"}, f"{function} on {', '.join(sorted(devices))}"
        if not function.is_view:
            self.counts[str(function).removesuffix(".default")] += 1
        return result


@contextlib.contextmanager
def present():
    """Tensors on "cuda" can be made, and the ops take such a GPU for one of compute capability 9.0
    with every kernel of ours."""
    load_guard()
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        # how derived weights are known to be fresh; here all of them lie at 0
        warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")
        patch.setattr(backend, "_architecture", lambda index: 90)
        patch.setattr(backend, "CUDA_OPS", set(backend.GPU))
        with FakeTensorMode():
            yield


def moved(model: nn.Module) -> nn.Module:
    """The model, made on the meta device, with fake parameters on the GPU in its place."""
    kept = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        return model._apply(
            lambda t: torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="cuda")
        )
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(kept)
