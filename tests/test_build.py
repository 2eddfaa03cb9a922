"""What the build leaves behind: ABI and hardening of the libraries; builds without a compiler."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import hybridops

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = Path(hybridops.__file__).resolve().parent
LIBRARIES = sorted(PACKAGE.glob("_c*.so")) + sorted((ROOT / "build").glob("_c*.so"))

needs_binutils = pytest.mark.skipif(
    not all(shutil.which(tool) for tool in ("nm", "readelf", "objdump")), reason="no binutils"
)


def each_library():
    if LIBRARIES:
        return pytest.mark.parametrize("library", LIBRARIES, ids=lambda path: path.name)
    nothing = pytest.param(None, marks=pytest.mark.skip(reason="no library was built"))
    return pytest.mark.parametrize("library", [nothing])


def output(*command) -> str:
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, check=True)
    return done.stdout


@needs_binutils
@each_library()
def test_library_uses_the_stable_abi_only(library):
    symbols = [
        line.split()[-1] for line in output("nm", "-D", "--undefined-only", library).splitlines()
    ]
    unstable = re.compile(r"_ZNK?2at|_ZNK?3c10|_ZNK?5torch|_?Py[A-Z_]")
    assert [s for s in symbols if unstable.match(s)] == []
    assert any(s.startswith(("aoti_torch_", "torch_")) for s in symbols), "registers nothing"


@needs_binutils
@each_library()
def test_library_brings_no_second_thread_pool_and_no_machine_path(library):
    dynamic = output("readelf", "-d", library)
    needed = re.findall(r"NEEDED.*\[(.+?)\]", dynamic)
    assert "libtorch_cpu.so" in needed
    assert [n for n in needed if re.match(r"lib(gomp|omp|iomp5|python|torch_python|c10)", n)] == []
    assert "RPATH" not in dynamic
    assert "RUNPATH" not in dynamic
    assert "BIND_NOW" in dynamic
    assert "GNU_RELRO" in output("readelf", "-lW", library)
    assert str(ROOT).encode() not in library.read_bytes()


@needs_binutils
@each_library()
def test_no_wide_instruction_in_a_narrow_library(library):
    if library.stem == "_cpu_avx512":
        pytest.skip("the wide one")
    assert "%zmm" not in output("objdump", "-d", "--no-show-raw-insn", library)


@pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="not in a source tree")
@pytest.mark.parametrize("compiler", ["false", "no-such-compiler"])
def test_without_a_compiler_the_build_is_pure_python(tmp_path, compiler):
    command = [sys.executable, "setup.py", "--quiet", "build_ext"]
    command += ["--build-lib", str(tmp_path / "lib"), "--build-temp", str(tmp_path / "native")]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"CXX": compiler}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("hybridops:") == 1
    info = json.loads((tmp_path / "lib/hybridops/_build_info.json").read_text())
    assert not info["compiled"]
    assert info["libraries"] == []
    assert compiler in info["reason"]
    assert info["reason"] in done.stdout
    assert list(tmp_path.rglob("*.so")) == []


def test_host_module_measures():
    host = pytest.importorskip("hybridops._host", reason="hybridops._host was not built")
    features = host.cpu_features()
    assert isinstance(features["brand"], str)
    for isa, needed in (("avx2", "fma"), ("avx512", "avx512f")):
        if features[isa if isa in features else needed]:
            # the upper bound catches a loop that the compiler computed away
            assert 1 < host.peak_flops(isa, 0.02) < 2000
        else:
            with pytest.raises(RuntimeError, match=f"no {isa}"):
                host.peak_flops(isa, 0.02)
    assert 0.1 < host.bandwidth(1 << 16, 0.02) < 5000
    with pytest.raises(ValueError, match="isa"):
        host.peak_flops("sse", 0.02)
    with pytest.raises(ValueError, match="bytes"):
        host.bandwidth(0, 0.02)
