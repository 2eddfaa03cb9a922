"""The CUDA sources under nvcc: they compile, no kernel spills, and the library loads without a GPU.

Needs nvcc, not a GPU. Registers, shared memory and spills of every kernel are printed, and written
to build/cuda_resources.json.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted((ROOT / "csrc/cuda").glob("*.cu"))
pytestmark = pytest.mark.skipif(
    shutil.which("nvcc") is None or not SOURCES, reason="needs nvcc and a source tree"
)
KERNEL = re.compile(
    r"Compiling entry function '(?P<name>\w+)' for '(?P<architecture>\w+)'.*?"
    r"(?P<spilled>\d+) bytes spill stores.*?Used (?P<registers>\d+) registers"
    r"(?:.*?(?P<shared>\d+) bytes smem)?[^\n]*",
    re.DOTALL,
)


def resources(log: str) -> dict[tuple[str, str], dict[str, int]]:
    """(architecture, kernel) -> registers, spilled bytes and static shared memory, from ptxas."""
    found = {}
    for one in log.split("ptxas info    : Compiling")[1:]:
        match = KERNEL.search("ptxas info    : Compiling" + one)
        name = re.sub(r"^.*?_cu_\w{8}_\d+", "", match["name"])
        numbers = {n: int(match[n] or 0) for n in ("registers", "spilled", "shared")}
        found[match["architecture"], name] = numbers
    return found


def assert_lean(found: dict, architectures: list[str]) -> None:
    for (architecture, name), numbers in sorted(found.items(), key=lambda x: x[1]["registers"]):
        print(architecture, *(f"{v:4} {k}" for k, v in numbers.items()), name)
    assert {architecture for architecture, _ in found} == {f"sm_{arch}" for arch in architectures}
    assert len(found) >= 10 * len(architectures)
    spilling = {kernel: n for kernel, n in found.items() if n["spilled"]}
    assert not spilling, spilling


OPS = ["attention", "attention_backward", "peg", "peg_backward", "linear", "linear_backward"]
OPS += ["conv_stem", "patch_embed", "conv_backward"]
LOADS = """
import sys, torch
import hybridops
torch.ops.load_library(sys.argv[1])
for op in sys.argv[2:]:
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"hybridops_cuda::{op}", "CUDA"), op
x = torch.randn(1, 12, 8)
try:
    torch.ops.hybridops_cuda.peg(x, torch.randn(8, 1, 3, 3), None, 4, 3, 0, 1, 1, True, 0, False)
except NotImplementedError as error:
    print("refused:", str(error).splitlines()[0])
"""


# sm_86 and sm_89 have sm_80's instructions and registers: two of four are half of the minutes.
@pytest.mark.parametrize("archs", ["80 90", pytest.param("80 86 89 90", marks=pytest.mark.wide)])
def test_the_library_builds_without_spills_and_loads_without_a_gpu(archs, tmp_path):
    """Beside what `make build` left: only _cuda.so is new, minutes on two cores."""
    build = [sys.executable, "setup.py", "--quiet", "build_ext", "--strict"]
    built = subprocess.run(
        [*build, "--build-lib", str(tmp_path)],
        cwd=ROOT,
        env=os.environ | {"HYBRIDOPS_CUDA": "1", "HYBRIDOPS_CUDA_ARCHS": archs},
        capture_output=True,
        text=True,
    )
    assert built.returncode == 0, built.stdout[-3000:] + built.stderr[-1000:]
    found = {}
    for source in SOURCES:
        log = (ROOT / f"build/native/cuda/{source.stem}.o.log").read_text()
        assert "warning" not in log, log[-3000:]
        found |= resources(log)
    named = {f"{architecture} {name}": numbers for (architecture, name), numbers in found.items()}
    (ROOT / "build/cuda_resources.json").write_text(json.dumps(named, indent=1, sort_keys=True))
    assert_lean(found, archs.split())
    library = tmp_path / "hybridops/_cuda.so"
    listed = subprocess.run(["nm", "-Du", library], capture_output=True, text=True, check=True)
    symbols = [line.split()[-1] for line in listed.stdout.splitlines()]
    assert [s for s in symbols if re.match(r"_ZNK?(2at|3c10|5torch)|_?Py[A-Z_]|cuda", s)] == []
    assert str(ROOT).encode() not in library.read_bytes()
    command = [sys.executable, "-c", LOADS, library, *OPS]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert torch.cuda.is_available() or run.stdout.startswith("refused: Could not run")


def test_it_is_built_only_where_torch_has_cuda(tmp_path):
    build = [sys.executable, "setup.py", "--quiet", "build_ext", "--build-lib", str(tmp_path)]
    environment = {"HYBRIDOPS_CUDA": "perhaps", "CXX": os.environ.get("CXX", "g++")}
    subprocess.run(
        build, cwd=ROOT, env=os.environ | environment, check=True, capture_output=True, text=True
    )
    info = json.loads((tmp_path / "hybridops/_build_info.json").read_text())
    assert info["cuda_reason"] == "HYBRIDOPS_CUDA must be auto, 1 or 0, got 'perhaps'"
    environment["HYBRIDOPS_CUDA_ARCHS"] = "90 42"
    subprocess.run(build, cwd=ROOT, env=os.environ | environment, check=True, capture_output=True)
    info = json.loads((tmp_path / "hybridops/_build_info.json").read_text())
    assert info["cuda_reason"].endswith("some of 80 86 89 90, got '90 42'")
    assert info["compiled"]
    del environment["HYBRIDOPS_CUDA_ARCHS"]
    if torch.version.cuda is None:
        environment["HYBRIDOPS_CUDA"] = "auto"
        subprocess.run(build, cwd=ROOT, env=os.environ | environment, check=True)
        info = json.loads((tmp_path / "hybridops/_build_info.json").read_text())
        assert not info["cuda"]
        assert "the installed torch has no CUDA" in info["cuda_reason"]
