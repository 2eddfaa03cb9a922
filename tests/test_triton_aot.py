"""Every shipped Triton configuration, compiled for sm_80 and sm_90: no spill, within the limits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hybridops.kernels import tuned

pytest.importorskip("triton", reason="Triton is not installed")
TESTS = Path(__file__).parent
SHARED = {80: 163 * 1024, 90: 227 * 1024}  # bytes that one program may have


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> dict[int, dict]:
    """What tests/aot.py found, by architecture; the two compile side by side, without a cache."""
    folder = tmp_path_factory.mktemp("aot")
    environment = os.environ | {"TRITON_CACHE_DIR": str(folder / "cache")}
    environment.pop("TRITON_INTERPRET", None)
    started = {}
    for arch in tuned.ARCHITECTURES:
        command = [sys.executable, TESTS / "aot.py", str(arch), folder / f"{arch}.json"]
        started[arch] = subprocess.Popen(
            command, env=environment, stderr=subprocess.PIPE, text=True
        )
    for process in started.values():
        _, errors = process.communicate()
        assert process.returncode == 0, errors[-3000:]
    return {arch: json.loads((folder / f"{arch}.json").read_text()) for arch in started}


@pytest.mark.parametrize("arch", tuned.ARCHITECTURES)
def test_every_entry_of_the_tuning_table_is_compiled(arch, compiled):
    entries = {
        (kernel, kind, largest)
        for kernel, kinds in tuned.table(arch).items()
        if kernel != "source"
        for kind, rows in kinds.items()
        for largest, _ in rows
    }
    assert {tuple(entry) for entry in compiled[arch]["used"]} == entries


@pytest.mark.parametrize("arch", tuned.ARCHITECTURES)
def test_no_kernel_spills_or_passes_a_limit(arch, compiled):
    rows = compiled[arch]["rows"]
    print(f"sm_{arch}, Triton {compiled[arch]['triton']}: registers, shared, spilled")
    for row in rows:
        figures = f"{row['registers']:4} {row['shared']:7} {row['spilled']:5}"
        print(f"{row['kernel']:30} {row['call']:44} {figures}")
    assert len(rows) > 40
    bad = [row for row in rows if row["spilled"] or row["shared"] > SHARED[arch]]
    assert not bad, json.dumps(bad, indent=1)
