"""The other instruction set on this machine: the op tests again, in a process of their own.

The 16-lane sources also build with their vectors emulated on AVX2, so a machine without AVX-512
proves them too; a machine with it proves the AVX2 library. Needs a compiler for the first.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TESTS = ["tests/test_ops.py", "tests/test_ops_layouts.py", "tests/test_cpu_backward.py"]
# every case in both dtypes, the layout matrix where inputs or gradient have gaps, and gradients
SELECTION = (
    "(test_matches and cpu) or test_views or (test_layout and sliced and transposed) "
    "or backward_is_as_right"
)


def run_op_tests(**environment: str) -> str:
    command = [sys.executable, "-m", "pytest", *TESTS, "-k", SELECTION, "-p", "no:cacheprovider"]
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST_", "HYBRIDOPS_"))}
    threads = {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=ROOT, env=clean | threads | environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert "skipped" not in done.stdout.splitlines()[-1], done.stdout[-1000:]
    return done.stdout


@pytest.mark.slow
def test_sixteen_lanes_emulated():
    if not (ROOT / "setup.py").is_file() or importlib.util.find_spec("ninja") is None:
        pytest.skip("needs a source tree and ninja")
    if not any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "clang++", "c++")):
        pytest.skip("no C++ compiler")
    build = [sys.executable, "setup.py", "--quiet", "build_emulated512"]
    built = subprocess.run(build, cwd=ROOT, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout[-4000:]
    library = ROOT / "build" / "_cpu_emulated512.so"
    assert "C++ library emulated512" in run_op_tests(HYBRIDOPS_LIBRARY=str(library))


@pytest.mark.slow
def test_the_narrow_library_where_the_wide_one_is_usual(cpu_library):
    if cpu_library != "avx512":
        pytest.skip(f"the library here is {cpu_library}: the other tests prove it")
    assert "C++ library avx2" in run_op_tests(ATEN_CPU_CAPABILITY="avx2")
