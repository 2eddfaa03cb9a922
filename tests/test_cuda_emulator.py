"""The emulated GPU itself: it passes a right kernel and names the fault of every broken one."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from pathlib import Path

import pytest

EMULATION = Path(__file__).resolve().parent / "emulation"
FLAGS = [
    "-std=c++20",
    "-O1",
    "-Wno-unknown-pragmas",
    "-mavx2",
    "-mfma",
    "-mf16c",
    "-DHYBRIDOPS_EMULATE",
]

# fault -> what the emulation must say of it
FAULTS = {
    "barrier": "read before anything wrote it",
    "overwrite": "race: .* no barrier between",
    "rewrite": "race: .* written by thread",
    "fragment": "wrong result",
    "transposed": "wrong result",
    "tail": "global write of 4 bytes at byte 68 of an array of 68",
    "misaligned": "global read of 8 bytes is not aligned",
    "wait": "touched while copy_async writes it",
    "wait_group": "touched while copy_async writes it",
    "copy_barrier": "read before anything wrote it|race",
    "lost_copy": "read before anything wrote it",
    "unwritten": "read before anything wrote it",
    "shared_end": "shared write of 4 bytes at byte 256 of an array of 256",
    "warp_order": "read before anything wrote it|race",
    "divergent": "a block_barrier that not all threads reach",
    "early_return": "a block_barrier that not all threads reach",
    "shuffle": "lanes at different warp instructions",
    "unrounded_tf32": "a tf32 operand that round_tf32 did not make",
    "budget": "bytes of shared memory taken, the launch asked for",
}


@pytest.fixture(scope="module")
def faults(tmp_path_factory) -> Path:
    """The program of broken kernels, built here."""
    if platform.machine() != "x86_64":
        pytest.skip("the emulation switches fibers in x86-64 assembly")
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    program = tmp_path_factory.mktemp("emulation") / "faults"
    sources = ["-x", "c++", str(EMULATION / "faults.cu"), str(EMULATION / "simt.cpp")]
    command = [*compiler.split(), *FLAGS, f"-I{EMULATION}", *sources, "-o", str(program)]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    return program


def run(program: Path, *arguments: str) -> tuple[int, str]:
    done = subprocess.run([program, *arguments], capture_output=True, text=True, timeout=60)
    return done.returncode, done.stdout.strip()


def test_the_right_kernel_passes(faults):
    assert run(faults, "none") == (0, "right")


@pytest.mark.parametrize("fault", FAULTS)
def test_a_broken_kernel_fails_and_says_why(faults, fault):
    code, said = run(faults, fault)
    assert code == 1
    assert re.search(FAULTS[fault], said), said


def test_every_fault_of_the_program_is_tested(faults):
    assert run(faults)[1].split() == ["none", *FAULTS]
