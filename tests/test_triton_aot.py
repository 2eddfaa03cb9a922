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
AOT = Path(__file__).with_name("aot.py")
SHARED = {80: 163 * 1024, 90: 227 * 1024}  # bytes that one program may have


@pytest.mark.parametrize("arch", tuned.ARCHITECTURES)
def test_every_configuration_compiles_without_spills(arch, tmp_path):
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path / "cache")}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, str(AOT), str(arch), str(tmp_path / "rows.json")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "rows.json").read_text())

    entries = {
        (kernel, kind, largest)
        for kernel, kinds in tuned.table(arch).items()
        if kernel != "source"
        for kind, rows in kinds.items()
        for largest, _ in rows
    }
    assert {tuple(entry) for entry in found["used"]} == entries, "an entry was never compiled"

    print(f"sm_{arch}, Triton {found['triton']}: registers, shared bytes, spilled bytes")
    for row in found["rows"]:
        figures = f"{row['registers']:4} {row['shared']:7} {row['spilled']:5}"
        print(f"{row['kernel']:30} {row['call']:44} {figures}")
    bad = [row for row in found["rows"] if row["spilled"] or row["shared"] > SHARED[arch]]
    assert not bad, json.dumps(bad, indent=1)
