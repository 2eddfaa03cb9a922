"""No kernel reads or writes outside its tensors: inputs against pages that fault, checked heap."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from cases import CASES

HERE = Path(__file__).parent


def run_guarded(*arguments: str) -> subprocess.CompletedProcess:
    # MALLOC_CHECK_=3 ends the process when a block that is freed was written behind.
    checked = {"LD_PRELOAD": "libc_malloc_debug.so.0", "MALLOC_CHECK_": "3"}
    command = [sys.executable, *arguments]
    return subprocess.run(
        command, env=os.environ | checked, cwd=HERE, capture_output=True, text=True, timeout=300
    )


@pytest.mark.parametrize("op", CASES)
def test_no_access_beyond_the_tensors(op, cpu_library):
    done = run_guarded("guard_pages.py", op)
    last = done.stdout.strip().splitlines()[-1:]
    assert done.returncode == 0, f"exit {done.returncode} in {last}: {done.stderr[-2000:]}"
    assert last[0].endswith("guarded calls")


@pytest.mark.parametrize("side", ["end", "start"])
def test_the_guard_itself_faults(side):
    """The control: one element beyond a guarded tensor kills the process."""
    step = {"end": "x.numel()", "start": "-1"}[side]
    done = run_guarded(
        "-c",
        "import ctypes, torch, guard_pages\n"
        f"x = guard_pages.guarded(torch.ones(1000), {side!r})\n"
        f"print(ctypes.c_float.from_address(x.data_ptr() + 4 * ({step})).value)",
    )
    assert done.returncode == -signal.SIGSEGV


def test_the_checked_heap_notices():
    """The control: one byte behind an empty tensor ends the process when the tensor is freed."""
    done = run_guarded(
        "-c",
        "import ctypes, torch\n"
        "x = torch.empty(1001)\n"
        "behind = ctypes.c_ubyte.from_address(x.data_ptr() + 4 * 1001)\n"
        "behind.value ^= 255\n"  # any fixed value is, now and then, the byte that stands there
        "del x",
    )
    if "cannot be preloaded" in done.stderr:
        pytest.skip("glibc's libc_malloc_debug is not installed")
    assert done.returncode == -signal.SIGABRT
