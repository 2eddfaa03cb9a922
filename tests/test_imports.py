"""`import hybridops` in a fresh process: without optional packages or libraries, and quietly."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import hybridops
from hybridops import backend

OPTIONAL = ("triton", "timm", "torchvision", "transformers", "PIL")
PACKAGE = Path(hybridops.__file__).resolve().parent


def run(code: str, **env: str) -> str:
    clean = {
        k: v for k, v in os.environ.items() if k not in ("HYBRIDOPS_LIBRARY", "ATEN_CPU_CAPABILITY")
    }
    done = subprocess.run(
        [sys.executable, "-c", code], env=clean | env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


SMALL_CALL = """
import torch
x, weight = torch.randn(1, 1 + 4 * 3, 8), torch.randn(8, 1, 3, 3)
y = hybridops.ops.peg(x, weight, grid=(4, 3), prefix=1)
assert y.shape == x.shape and y.isfinite().all()
"""


@pytest.mark.parametrize("blocked", [*((name,) for name in OPTIONAL), OPTIONAL], ids="+".join)
def test_imports_without(blocked):
    run(
        f"import sys\nfor name in {blocked}: sys.modules[name] = None\nimport hybridops{SMALL_CALL}"
    )


def test_imports_without_libraries():
    code = "import hybridops; from hybridops import backend\n"
    code += "assert backend.ISA is None and backend.library() is None\n"
    code += "assert backend.which('peg', backend.torch.zeros(1)) == 'reference'\n"
    assert run(code + SMALL_CALL + "print(backend.why_no_library())", HYBRIDOPS_LIBRARY="none")


def test_says_which_library_is_missing(tmp_path):
    missing = tmp_path / "_cpu_avx2.so"
    code = "import hybridops; print(hybridops.backend.why_no_library())"
    assert missing.name in run(code, HYBRIDOPS_LIBRARY=str(missing))


def test_import_loads_nothing_optional_and_starts_nothing():
    # A process started, or Inductor loaded, would be a compile. torch goes first: it is not ours.
    code = f"""
import sys, torch, numpy
before, started = set(sys.modules), []
events = ("subprocess.Popen", "os.system", "os.exec", "os.fork", "os.posix_spawn", "socket.connect")
sys.addaudithook(lambda event, args: started.append(event) if event in events else None)
import hybridops
new = {{name.partition(".")[0] for name in set(sys.modules) - before}}
assert not new & set({OPTIONAL}), new
assert not [n for n in set(sys.modules) - before if n.startswith("torch._inductor")]
assert not started, started
"""
    run(code)


SHOW = """
from hybridops import backend
print(backend.ISA, backend.library(), backend.why_no_library(), sep="|")
"""


def test_default_capability_selects_the_reference():
    isa, library, why = run(SHOW, ATEN_CPU_CAPABILITY="default").split("|")
    assert (isa, library) == ("None", "None")
    assert why != "None"


@pytest.mark.skipif(not (PACKAGE / "_cpu_avx2.so").exists(), reason="_cpu_avx2.so was not built")
@pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"), reason="this CPU has no AVX2"
)
def test_avx2_capability_selects_avx2():
    isa, library, why = run(SHOW, ATEN_CPU_CAPABILITY="avx2").split("|")
    assert (isa, Path(library).name, why) == ("avx2", "_cpu_avx2.so", "None")


def test_library_and_isa_agree():
    assert (
        (backend.ISA is None)
        == (backend.library() is None)
        == (backend.why_no_library() is not None)
    )


def test_ops_are_registered_for_gpus_without_importing_triton():
    code = """
import sys, hybridops, torch
for op in hybridops.backend.GPU:
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"hybridops::{op}", "CUDA"), op
assert not [name for name in sys.modules if name.startswith(("triton", "hybridops.kernels"))]
"""
    run(code)
