"""Builds the CPU libraries and the optional host module with ninja, or says why not.

What is built, into hybridops/:
    _cpu_avx2.so, _cpu_avx512.so   csrc/simd/*.cpp once per ISA, plus csrc/cpu/*.cpp compiled once;
                                   LibTorch stable ABI: no Python symbols, any torch from 2.11 on
    _cuda.so                       csrc/cuda/*.cu by nvcc, the same ABI; loads beside a CPU torch
    _host.<python tag>.so          csrc/host, pybind11; everything works without it
    _build_info.json               what was built or why not; `python -m hybridops doctor` reads it

Without torch, a compiler or ninja, or when a compile fails, the package installs as pure Python.
`build_ext --strict` fails instead. `build_emulated512` builds build/_cpu_emulated512.so for tests,
`build_cuda_emulated` build/_cuda_emulated.so: csrc/cuda on the emulated GPU of tests/emulation.

CXX names the compiler, MAX_JOBS caps the parallel jobs. HYBRIDOPS_CUDA=1 builds _cuda.so, 0 does
not, and auto (the default) does where there is an nvcc and the installed torch is for its CUDA.
HYBRIDOPS_CUDA_ARCHS, such as "80 90", names the GPUs that it holds machine code for, of all that
it can; the others compile its PTX when they first load it.
"""

import fcntl
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Command, Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
NATIVE = (
    ROOT / "build" / "native"
)  # not pip's build_temp, which is thrown away: rebuilds are incremental

COMMON = "-O3 -std=c++20 -fPIC -fno-math-errno -fno-trapping-math -Wall -Wextra -fvisibility=hidden"
HARDEN = "-fstack-protector-strong -U_FORTIFY_SOURCE -D_FORTIFY_SOURCE=2"
LINK = "-shared -Wl,-z,relro,-z,now -Wl,--as-needed"
STABLE = "-DTORCH_TARGET_VERSION=0x020b000000000000"  # torch 2.11
AVX2 = "-mavx2 -mfma -mf16c"
AVX512 = "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512bf16 -mfma -mf16c"
ISA = {
    "avx2": f"{AVX2} -DHYBRIDOPS_ISA_AVX2",
    "avx512": f"{AVX512} -DHYBRIDOPS_ISA_AVX512",
    # 16 lanes on AVX2, for tests: -O1 compiles in a third of the time
    "emulated512": f"{AVX2} -O1 -Wno-psabi -DHYBRIDOPS_ISA_AVX512 -DHYBRIDOPS_EMULATE",
}
SHIPPED = ("avx2", "avx512")
# One intermediate code for all: sm_80 instructions are all that the kernels use, and the code
# generator takes as long as the assembler. PTX for what comes after.
NVCC = (
    "-std=c++20 -O3 -Xcompiler -fPIC,-fvisibility=hidden,-fstack-protector-strong "
    "-gencode arch=compute_80,code=[{},compute_80] --resource-usage"
)
CUDA_ARCHS = ("80", "86", "89", "90")
EMULATED_CUDA = f"{AVX2} -O2 -Wno-unknown-pragmas -DHYBRIDOPS_EMULATE"
HOST = "_host" + sysconfig.get_config_var("EXT_SUFFIX")


class Unbuildable(Exception):
    """Why there are no compiled libraries, in one line."""


def find_compiler() -> tuple[str, str]:
    """The command, and a name such as "gcc 12.2.0"."""
    named = os.environ.get("CXX")
    command = named or next((c for c in ("g++", "clang++", "c++") if shutil.which(c)), None)
    if command is None:
        raise Unbuildable("no C++ compiler found (looked for g++, clang++, c++; CXX names another)")
    try:
        ask = [*shlex.split(command), "--version"]
        banner = subprocess.run(ask, capture_output=True, text=True, check=True).stdout
        ask[-1:] = ["-dumpfullversion", "-dumpversion"]
        version = subprocess.run(ask, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        raise Unbuildable(f"the C++ compiler does not run: {command}") from None
    return command, f"{'clang' if 'clang' in banner else 'gcc'} {version}"


def find_torch() -> tuple[Path, str]:
    """Its folder and version; torch itself is never imported, so the build stays quick."""
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        raise Unbuildable(
            "torch is not in the build environment (use: pip install --no-build-isolation)"
        )
    version = importlib.metadata.version("torch")
    if tuple(int(n) for n in version.split(".")[:2]) < (2, 11):
        raise Unbuildable(f"torch {version} is too old to build against (2.11 or newer is needed)")
    return Path(spec.submodule_search_locations[0]), version


def find_ninja() -> list[str]:
    if importlib.util.find_spec("ninja"):
        return [sys.executable, "-m", "ninja"]
    if found := shutil.which("ninja"):
        return [found]
    raise Unbuildable("ninja is not installed (pip install ninja)")


def find_nvcc(torch: Path) -> Path:
    """The nvcc that builds _cuda.so; Unbuildable says why there is to be none."""
    wanted = os.environ.get("HYBRIDOPS_CUDA", "auto")
    if wanted not in ("auto", "1", "0"):
        raise Unbuildable(f"HYBRIDOPS_CUDA must be auto, 1 or 0, got {wanted!r}")
    if wanted == "0":
        raise Unbuildable("HYBRIDOPS_CUDA=0")
    home = os.environ.get("CUDA_HOME")
    found = shutil.which(str(Path(home, "bin/nvcc")) if home else "nvcc")
    if found is None:
        raise Unbuildable(f"no nvcc {'under CUDA_HOME' if home else 'on the PATH'}")
    text = subprocess.run([found, "--version"], capture_output=True, text=True).stdout
    nvcc = re.search(r"release (\d+)\.", text)
    ours = re.search(r"^cuda[^=]*= '(\d+)\.", (torch / "version.py").read_text(), re.MULTILINE)
    if wanted == "auto" and ours is None:
        raise Unbuildable("the installed torch has no CUDA (HYBRIDOPS_CUDA=1 builds anyway)")
    if wanted == "auto" and (nvcc is None or nvcc[1] != ours[1]):
        raise Unbuildable(f"nvcc is for CUDA {nvcc and nvcc[1]}, the installed torch for {ours[1]}")
    return Path(found)


def cuda_archs() -> str:
    """As nvcc lists them; Unbuildable for any that the kernels were not written for."""
    wanted = os.environ.get("HYBRIDOPS_CUDA_ARCHS", " ".join(CUDA_ARCHS)).split()
    if not wanted or not set(wanted) <= set(CUDA_ARCHS):
        some = f"HYBRIDOPS_CUDA_ARCHS must be some of {' '.join(CUDA_ARCHS)}"
        raise Unbuildable(f"{some}, got {' '.join(wanted)!r}")
    return ",".join(f"sm_{arch}" for arch in sorted(set(wanted)))


def cuda_folder(nvcc: Path) -> Path:
    """The toolkit's folder; nvcc itself knows it best, as it may be a link or a script."""
    asked = subprocess.run([nvcc, "--dryrun", "x.cu"], capture_output=True, text=True).stderr
    return Path(re.search(r"^#\$ TOP=(.*)$", asked, re.MULTILINE)[1]).resolve()


def ninja_file(
    flavours: tuple[str, ...], cxx: str, torch: Path, pybind11: str | None, nvcc: Path | None
) -> str:
    """One compile edge per (source, flavour), one link edge per library."""

    def path(p) -> str:
        return str(p).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")

    def quoted(p) -> str:
        return shlex.quote(str(p)).replace("$", "$$")

    def system(folder) -> str:  # no path of the building machine ends up in a library
        return f"-isystem {quoted(folder)} -ffile-prefix-map={quoted(f'{folder}/')}="

    common = f"{COMMON} {HARDEN} -I{quoted(ROOT / 'csrc')} -ffile-prefix-map={quoted(f'{ROOT}/')}="
    lines = [
        f"cxx = {cxx.replace('$', '$$')}",
        "rule compile",
        "  command = $cxx $flags -MD -MF $out.d -c $in -o $out",  # MD, not MMD: sees a new torch
        "  depfile = $out.d",
        "  deps = gcc",
        "rule nvcc",
        f"  command = {nvcc} $flags -MD -MF $out.d -c $in -o $out > $out.log 2>&1"
        " || (cat $out.log; exit 1)",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = $cxx {LINK} $in -o $out $libs",
    ]

    def compile(sources: list[Path], folder: str, flags: str, rule: str = "compile") -> list[str]:
        objects = []
        for source in sources:
            objects.append(f"{folder}/{source.stem}.o")
            lines.append(f"build {objects[-1]}: {rule} {path(source)}\n  flags = {flags}")
        return objects

    stable = f"{STABLE} {system(torch / 'include')}"
    torch_cpu = f"-Wl,--no-undefined -L{quoted(torch / 'lib')} -ltorch_cpu"
    # what takes longest first, or at the end one core compiles it alone
    cuda_sources = sorted((ROOT / "csrc/cuda").glob("*.cu"), key=lambda p: -p.stat().st_size)
    if nvcc:
        include = f"-isystem {quoted(torch / 'include')}"
        prefixes = "".join(
            f" -Xcompiler -ffile-prefix-map={quoted(f'{folder}/')}="
            for folder in (torch / "include", ROOT)
        )
        flags = f"{NVCC.format(cuda_archs())} {STABLE} {include}{prefixes}"
        objects = compile(cuda_sources, "cuda", flags, "nvcc")
        libs = f"{torch_cpu} -L{quoted(cuda_folder(nvcc) / 'lib64')} -lcudart_static -ldl -lrt"
        lines.append(f"build _cuda.so: link {' '.join(objects)}\n  libs = {libs} -lpthread")
    emulation = f"{common} {EMULATED_CUDA} -I{quoted(ROOT / 'tests/emulation')}"
    objects = compile(cuda_sources, "cuda_emulated", f"{emulation} {stable} -x c++")
    objects += compile(sorted((ROOT / "tests/emulation").glob("*.cpp")), "cuda_emulated", emulation)
    lines.append(f"build _cuda_emulated.so: link {' '.join(objects)}\n  libs = {torch_cpu}")
    cpu = compile(sorted((ROOT / "csrc/cpu").glob("*.cpp")), "cpu", f"{common} {stable}")
    for flavour in flavours:
        simd = sorted((ROOT / "csrc/simd").glob("*.cpp"))
        objects = compile(simd, flavour, f"{common} {ISA[flavour]}") + cpu
        lines.append(f"build _cpu_{flavour}.so: link {' '.join(objects)}\n  libs = {torch_cpu}")
    if pybind11:
        python = sysconfig.get_paths()["include"]
        flags = f"{common} {system(pybind11)} {system(python)}"
        # Python's own symbols come from the interpreter, so they stay undefined here.
        host = compile(sorted((ROOT / "csrc/host").glob("*.cpp")), "host", flags)
        lines.append(f"build {HOST}: link {' '.join(host)}\n  libs =")
    return "\n".join(lines) + "\n"


def run_ninja(targets: list[str], folder: Path, ninja_text: str) -> dict[str, str]:
    """Builds the targets; the failed ones come back with the first error line of each."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two installs of one tree wait for each other
        (folder / "build.ninja").write_text(ninja_text)
        jobs = os.environ.get("MAX_JOBS") or str(len(os.sched_getaffinity(0)))
        command = [*find_ninja(), "-C", str(folder), "-j", jobs, "-k", "0"]
        done = subprocess.run([*command, *targets], capture_output=True, text=True)
        (folder / "build.log").write_text(done.stdout + done.stderr)
        failed = {}
        for target in targets if done.returncode else ():  # what did build is up to date by now
            again = subprocess.run([*command, target], capture_output=True, text=True)
            if again.returncode:
                text = (again.stdout + again.stderr).splitlines()
                first = next((t for t in text if "error:" in t or "undefined reference" in t), None)
                failed[target] = (first or (text or ["ninja failed"])[-1]).strip()
    return failed


def build_native(
    flavours: tuple[str, ...],
    folder: Path,
    with_host: bool = False,
    with_cuda: bool = False,
    emulated_cuda: bool = False,
) -> dict:
    """The content of _build_info.json, after building what can be built into `folder`."""
    info = {"compiled": False, "reason": None, "torch": None, "compiler": None, "libraries": []}
    info |= {"host": False, "host_reason": None, "cuda": False, "cuda_reason": None}
    try:
        if platform.system() != "Linux" or platform.machine() != "x86_64":
            where = f"{platform.system()} on {platform.machine()}"
            raise Unbuildable(f"there are CPU kernels for Linux on x86_64 only, this is {where}")
        torch, info["torch"] = find_torch()
        compiler, info["compiler"] = find_compiler()
        find_ninja()
        if not list((ROOT / "csrc/cpu").glob("*.cpp")):
            flavours = ()
        pybind11 = None
        if with_host and importlib.util.find_spec("pybind11"):
            import pybind11 as module

            pybind11 = module.get_include()
        nvcc = None
        try:
            if with_cuda:
                cuda_archs()
                nvcc = find_nvcc(torch)
        except Unbuildable as error:
            info["cuda_reason"] = str(error)
        targets = [f"_cpu_{flavour}.so" for flavour in flavours] + [HOST] * bool(pybind11)
        targets += ["_cuda.so"] * bool(nvcc) + ["_cuda_emulated.so"] * emulated_cuda
        text = ninja_file(flavours, compiler, torch, pybind11, nvcc)
        failed = run_ninja(targets, folder, text) if targets else {}
    except Unbuildable as error:
        info["reason"] = info["host_reason"] = info["cuda_reason"] = str(error)
        return info
    info["libraries"] = [t for t in targets if t not in failed and t != HOST]
    info["compiled"] = bool(info["libraries"])
    info["cuda"] = "_cuda.so" in info["libraries"]
    info["cuda_reason"] = failed.get("_cuda.so", info["cuda_reason"])
    info["host"] = HOST in targets and HOST not in failed
    info["host_reason"] = failed.pop(HOST, None if pybind11 else "pybind11 is not installed")
    if failed:
        why = "; ".join(dict.fromkeys(failed.values()))
        info["reason"] = f"{' and '.join(failed)} failed: {why} (all of it: {folder / 'build.log'})"
    elif not targets:
        info["reason"] = "there are no C++ sources in csrc/cpu"
    return info


def place(source: Path, destination: Path) -> None:
    """A new file under the old name: a process that has the old library mapped keeps it."""
    destination.parent.mkdir(parents=True, exist_ok=True)
    fresh = destination.with_name(destination.name + f".{os.getpid()}")
    shutil.copy2(source, fresh)
    os.replace(fresh, destination)


class BuildPy(build_py):
    def run(self):
        if not self.editable_mode:  # a module deleted since the last build must not be installed
            shutil.rmtree(Path(self.build_lib) / "hybridops", ignore_errors=True)
        super().run()


class BuildExt(build_ext):
    user_options = [*build_ext.user_options, ("strict", None, "fail when a library does not build")]
    boolean_options = [*build_ext.boolean_options, "strict"]

    def initialize_options(self):
        super().initialize_options()
        self.strict = False
        self.info = None

    def finalize_options(self):
        self.native = Path(self.build_temp).resolve() if self.build_temp else NATIVE
        super().finalize_options()

    def run(self):
        self.info = info = build_native(SHIPPED, self.native, with_host=True, with_cuda=True)
        package = (
            ROOT / "hybridops" if self.inplace else Path(self.build_lib).resolve() / "hybridops"
        )
        package.mkdir(parents=True, exist_ok=True)
        names = info["libraries"] + [HOST] * info["host"]
        for old in [
            *package.glob("_cpu_*.so"),
            package / "_cuda.so",
            package / HOST,
        ]:  # what failed now must not stay
            if old.name not in names:
                old.unlink(missing_ok=True)
        for name in names:
            place(self.native / name, package / name)
        (package / "_build_info.json").write_text(json.dumps(info, indent=1) + "\n")
        self.outputs = [str(package / name) for name in [*names, "_build_info.json"]]
        if info["reason"]:
            kept = " and ".join(info["libraries"]) or "pure Python"
            print(f"hybridops: installing {kept}: {info['reason']}", flush=True)
        if os.environ.get("HYBRIDOPS_CUDA") == "1" and not info["cuda"]:
            raise SystemExit(f"hybridops: HYBRIDOPS_CUDA=1: no _cuda.so: {info['cuda_reason']}")
        if self.strict and (info["reason"] or not info["host"]):
            log = self.native / "build.log"
            print(log.read_text() if log.exists() else "", info["host_reason"] or "", sep="\n")
            raise SystemExit("hybridops: --strict: not everything was built")

    def get_outputs(self):
        return [] if self.inplace or self.info is None else self.outputs

    def get_output_mapping(self):
        return {}


class BuildForTests(Command):
    """A test-only library, into build/."""

    user_options = []
    flavours: tuple[str, ...] = ()
    emulated_cuda = False

    def initialize_options(self):
        pass

    def finalize_options(self):
        pass

    def run(self):
        name = "_cuda_emulated.so" if self.emulated_cuda else f"_cpu_{self.flavours[0]}.so"
        folder = NATIVE.with_name(f"native-{Path(name).stem.partition('_')[2]}")
        info = build_native(self.flavours, folder, emulated_cuda=self.emulated_cuda)
        if info["reason"]:
            log = folder / "build.log"
            print(log.read_text() if log.exists() else "")
            raise SystemExit(f"hybridops: no {name}: {info['reason']}")
        place(folder / name, ROOT / "build" / name)


class BuildEmulated512(BuildForTests):
    """The 16-lane code on AVX2: load it with HYBRIDOPS_LIBRARY=build/_cpu_emulated512.so."""

    description = "build the test-only library build/_cpu_emulated512.so"
    flavours = ("emulated512",)


class BuildCudaEmulated(BuildForTests):
    """The CUDA kernels on the emulated GPU: tests/test_cuda_emulated.py loads them."""

    description = "build the test-only library build/_cuda_emulated.so"
    emulated_cuda = True


class BdistWheel(bdist_wheel):
    """The narrowest honest tag: only _host depends on the Python version, nothing built is pure."""

    def run(self):
        self.run_command("build")
        info = self.get_finalized_command("build_ext").info
        if not info["compiled"] and not info["host"]:
            self.distribution.ext_modules = []
            self.root_is_pure = True
        super().run()

    def get_tag(self):
        python, abi, plat = super().get_tag()
        info = self.get_finalized_command("build_ext").info
        if info and info["compiled"] and not info["host"]:
            return "py3", "none", plat
        return python, abi, plat


packages = find_packages(ROOT, include=["hybridops", "hybridops.*"])
if (ROOT / "hybridops/kernels").is_dir():  # the symlink to kernels/; a real folder in an sdist
    packages.append("hybridops.kernels")

setup(
    packages=packages,
    # Names the platform-dependent part; BuildExt.run builds it and the CPU libraries.
    ext_modules=[Extension("hybridops._host", ["csrc/host/probe.cpp"], optional=True)],
    cmdclass={
        "build_py": BuildPy,
        "build_ext": BuildExt,
        "build_emulated512": BuildEmulated512,
        "build_cuda_emulated": BuildCudaEmulated,
        "bdist_wheel": BdistWheel,
    },
)
