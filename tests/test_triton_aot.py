"""Every shipped Triton configuration, compiled for sm_80 and sm_90: no spill, no TF32 unasked."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from hybridops.kernels import tuned
from hybridops.tune import search

pytest.importorskip("triton", reason="Triton is not installed")


@pytest.mark.parametrize("arch", tuned.ARCHITECTURES)
def test_every_configuration_compiles_without_spills(arch, tmp_path):
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path / "cache")}
    environment["TRITON_DEFAULT_FP_FUSION"] = "0"  # Triton 3.10's
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-m", "hybridops.tune.aot", str(arch), str(tmp_path / "rows.json")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "rows.json").read_text())

    entries = {
        (kernel, kind, largest)
        for kernel, kinds in tuned.shipped(arch).items()
        for kind, rows in kinds.items()
        for largest, _ in rows
    }
    assert {tuple(entry) for entry in found["used"]} == entries, "an entry was never compiled"

    print(f"sm_{arch}, Triton {found['triton']}: registers, shared bytes, spilled bytes")
    for row in found["rows"]:
        figures = f"{row['registers']:4} {row['shared']:7} {row['spilled']:5}"
        print(f"{row['kernel']:30} {row['call']:44} {figures}")
    bad = [row for row in found["rows"] if row["spilled"] or row["shared"] > search.SHARED[arch]]
    assert not bad, json.dumps(bad, indent=1)
    assert not [row for row in found["rows"] if row["tf32"]], "fp32 products are IEEE unless asked"
    assert found["tf32_where_allowed"]
    assert all(row["fused"] for row in found["rows"])
