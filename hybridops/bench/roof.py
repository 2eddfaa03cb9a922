"""The measured roof of this machine, and the least time that it leaves for a piece of work.

    time >= max(flop / peak, sum over levels of bytes / bandwidth)

Peaks are measured, not looked up: multiply-adds on the widest instruction set that the CPU has,
whatever torch is told to use, and loads and stores in buffers that fit each cache level. Other
work on the machine only ever lowers a measurement, so the maximum over all of them is kept, in
$XDG_CACHE_HOME/hybridops (or ~/.cache/hybridops), one file per machine.
"""

from __future__ import annotations

import datetime
import functools
import hashlib
import importlib
import json
import os
import platform
import re
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp64": torch.float64,
}
LEVELS = ("L1", "L2", "L3", "DRAM")  # from the core outwards

_PROBE = "1"  # part of every id: another number forgets what older probes measured
_FLOPS_SECONDS, _CACHE_SECONDS, _DRAM_SECONDS = 0.2, 0.12, 0.2  # of each turn and kind
_MOST_TURNS = 3  # two at least, because a machine is busy for a while; more when it is
_MOST_FILE = 1 << 16

Rates = dict[str, dict[int, float]]
Progress = Callable[[str], None]


@dataclass
class Roof:
    """GFLOP/s by dtype and GB/s by level, each by the number of threads (1 for a GPU).

    cache_bytes are the sizes of L1 and L2 for one thread and of all L3 together.
    """

    flops: Rates = field(default_factory=dict)
    bandwidth: Rates = field(default_factory=dict)
    cache_bytes: dict[str, int] = field(default_factory=dict)
    machine: str = ""
    date: str = ""

    def as_json(self) -> dict[str, Any]:
        """Plain data for json.dumps; thread counts become strings, as JSON has it."""
        plain = asdict(self)
        for name in ("flops", "bandwidth"):
            plain[name] = {
                key: {str(n): rate for n, rate in sorted(rates.items())}
                for key, rates in plain[name].items()
            }
        return plain

    @classmethod
    def from_json(cls, plain: object) -> Roof:
        """Raises ValueError for anything but what as_json gives."""

        if not isinstance(plain, dict):
            raise ValueError("not a roof: no object")
        sizes, machine, date = (plain.get(key) for key in ("cache_bytes", "machine", "date"))
        if not (isinstance(sizes, dict) and set(sizes) <= set(LEVELS[:-1])):
            raise ValueError("not a roof: cache_bytes")
        if not all(_is_positive(n) and isinstance(n, int) for n in sizes.values()):
            raise ValueError("not a roof: cache_bytes")
        if not (isinstance(machine, str) and isinstance(date, str)):
            raise ValueError("not a roof: machine, date")
        if date:
            datetime.date.fromisoformat(date)
        flops = _rates_from_json(plain.get("flops"), tuple(DTYPES))
        bandwidth = _rates_from_json(plain.get("bandwidth"), LEVELS)
        return cls(flops, bandwidth, sizes, machine, date)

    def merged(self, other: Roof) -> Roof:
        """Whatever either has, the larger where both have it.

        Raises ValueError for the roofs of two machines.
        """
        if self.machine != other.machine:
            raise ValueError(f"merged: of {self.machine!r}, got the roof of {other.machine!r}")

        def larger(a: Rates, b: Rates) -> Rates:
            return {key: _larger(a.get(key, {}), b.get(key, {})) for key in {**a, **b}}

        return Roof(
            larger(self.flops, other.flops),
            larger(self.bandwidth, other.bandwidth),
            _larger(self.cache_bytes, other.cache_bytes),
            self.machine,
            max(self.date, other.date),
        )


class Bound(NamedTuple):
    """The least time, and what sets it: "compute", or the outermost level that is used."""

    seconds: float
    limit: str


def bound(
    roof: Roof, *, flop: float, bytes_moved: float, dtype: str, threads: int, cache: str
) -> Bound | None:
    """The least time in which `threads` can do `flop` operations on `bytes_moved` distinct bytes.

    With cache="warm" as much as L1 holds comes from L1, as much of the rest as L2 holds from L2,
    and so on; the part that would lie in a cache of unknown speed takes no time, which is still a
    lower bound. With cache="cold" all of it comes from DRAM. None where the roof lacks the peak,
    or the DRAM that is needed. Raises ValueError for another cache and for negative work.
    """
    if cache not in ("warm", "cold"):
        raise ValueError(f"cache must be warm or cold, got {cache!r}")
    if not (flop >= 0 and bytes_moved >= 0):
        raise ValueError(f"flop and bytes_moved must be at least 0, got {flop} and {bytes_moved}")
    compute = memory = 0.0
    if flop:
        peak = _rate(roof.flops.get(dtype, {}), threads)
        if peak is None:
            return None
        compute = flop / (peak * 1e9)
    speeds = [_rate(roof.bandwidth.get(level, {}), threads) for level in LEVELS]
    left, outermost = bytes_moved, LEVELS[0]
    for i, level in enumerate(LEVELS):
        part = left
        if level != "DRAM":
            each = threads if level in ("L1", "L2") else 1
            part = min(left, roof.cache_bytes.get(level, 0) * each if cache == "warm" else 0)
        if not part:
            continue
        if speeds[i] is not None:  # no level is slower than those further out
            memory += part / (max(s for s in speeds[i:] if s is not None) * 1e9)
        elif level == "DRAM":
            return None
        left, outermost = left - part, level
    if not (compute or memory) and (flop or bytes_moved):
        return None
    return Bound(compute, "compute") if compute >= memory else Bound(memory, outermost)


def roof(threads: int, *, refresh: bool = False, progress: Progress | None = None) -> Roof:
    """The roof of this CPU: what is known of it, after measuring what lacks for `threads`.

    Up to 6 seconds where something lacks or with refresh, which measures again and keeps the
    maximum. While other work holds the cores the result is too low, and it is not written down.
    Empty without hybridops._host; `why_no_roof` says why. Raises ValueError for threads outside
    [1, 1024].
    """
    if not 1 <= threads <= 1024:
        raise ValueError(f"threads must be in [1, 1024], got {threads}")
    machine = machine_id()
    host, _ = _host()
    if host is None:
        return Roof(machine=machine)
    path = _cache_file(machine)
    sizes, l3_count = host.cache_bytes(), _l3_count()
    shown = {k: n * l3_count if k == "L3" else n for k, n in sizes.items() if k in LEVELS}
    found = Roof(cache_bytes=shown, machine=machine)
    if known := _read(path, machine):
        found = known.merged(found)
    lacking = [
        level
        for level in LEVELS
        if (level in sizes or level == "DRAM")
        and (refresh or threads not in found.bandwidth.get(level, {}))
    ]
    if refresh or any(threads not in found.flops.get(dtype, {}) for dtype in DTYPES):
        lacking.insert(0, "FLOP/s")
    fair = False
    for turn in range(_MOST_TURNS if lacking else 0):
        begin, cpu = time.perf_counter(), time.process_time()
        for what in lacking:
            if progress is not None:
                progress(f"measuring the roof with {threads} thread{'s'[: threads > 1]}: {what}")
            new = Roof(machine=machine, date=datetime.date.today().isoformat())
            if what == "FLOP/s":
                new.flops = {k: {threads: rate} for k, rate in _flops(host, threads).items()}
            elif rate := _bandwidth(host, threads, what, sizes, l3_count):
                new.bandwidth = {what: {threads: rate}}
            found = found.merged(new)
        wall, cpu = time.perf_counter() - begin, time.process_time() - cpu
        fair |= _had_its_cores(threads, cpu, wall)
        if fair and turn:
            break
    return _keep(path, found) if lacking and fair else found


def gpu_roof(
    device: torch.device | str = "cuda",
    *,
    refresh: bool = False,
    progress: Progress | None = None,
) -> Roof:
    """The roof of a GPU as torch's own copies, sums and matrix products reach it, threads = 1.

    fp32 is the better of plain and TF32 products. L2 has its size but no speed: calls that stay
    in it are too short to be timed from torch. Empty without a GPU. Written without a GPU at hand:
    nothing here has run on one.
    """
    if not torch.cuda.is_available():
        return Roof()
    device = torch.device(device)
    facts: Any = torch.cuda.get_device_properties(device)
    machine = _hashed("gpu", facts.name, str(getattr(facts, "uuid", "")))
    path = _cache_file(machine)
    known = _read(path, machine)
    if known and not refresh and known.flops and known.bandwidth:
        return known
    l2 = getattr(facts, "L2_cache_size", 0)
    large = min(max(1 << 29, 16 * l2), torch.cuda.mem_get_info(device)[0] // 4)

    def least_seconds(run: Callable[[], object]) -> float:
        with torch.cuda.device(device):
            return _least_gpu_seconds(run)

    flops, dram = _torch_rates(device, 8192, large, least_seconds, progress or (lambda text: None))
    new = Roof(
        {dtype: {1: rate} for dtype, rate in flops.items()},
        {"DRAM": {1: dram}} if dram else {},
        {"L2": l2} if l2 else {},
        machine,
        datetime.date.today().isoformat(),
    )
    return _keep(path, known.merged(new) if known else new)


def why_no_roof() -> str | None:
    """Why `roof` is empty here, in one line, or None where it can measure."""
    return _host()[1]


def machine_id() -> str:
    """16 hex digits that tell this machine and its number of usable cores; nothing in clear."""
    try:
        cpu = Path("/proc/cpuinfo").read_text()
    except OSError:
        cpu = ""
    brand, flags = (
        found[1] if (found := re.search(rf"^{name}\s*:\s*(.*)$", cpu, re.MULTILINE)) else ""
        for name in ("model name", "flags")
    )
    try:
        name = Path("/etc/machine-id").read_text().strip()
    except OSError:
        name = ""
    cores = str(len(os.sched_getaffinity(0)))
    return _hashed("cpu", brand or platform.machine(), flags, name, platform.node(), cores)


def _hashed(*facts: str) -> str:
    text = "\0".join(("hybridops roof", _PROBE, *facts))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _is_positive(x: object) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool) and 0 < x < 1e12


def _rates_from_json(plain: Any, keys: tuple[str, ...]) -> Rates:
    if not (isinstance(plain, dict) and set(plain) <= set(keys)):
        raise ValueError(f"not a roof: rates by {', '.join(keys)}")
    for rates in plain.values():
        if not (isinstance(rates, dict) and all(map(_is_positive, rates.values()))):
            raise ValueError("not a roof: rates by thread count")
        if not all(re.fullmatch("[1-9][0-9]{0,3}", n) for n in rates):
            raise ValueError("not a roof: thread counts")
    return {key: {int(n): float(x) for n, x in rates.items()} for key, rates in plain.items()}


def _larger(a: dict, b: dict) -> dict:
    return {key: max(d[key] for d in (a, b) if key in d) for key in {**a, **b}}


def _rate(rates: dict[int, float], threads: int) -> float | None:
    """What was measured; at least what fewer threads reached, since the rest can rest."""
    if threads not in rates:
        return None
    return max(rate for n, rate in rates.items() if n <= threads)


def _host() -> tuple[Any, str | None]:
    """hybridops._host, or None and why."""
    try:
        host = importlib.import_module("hybridops._host")
    except ImportError as error:
        why = _build_reason() or str(error)
        return None, f"no hybridops._host, which measures ({why})"
    if not hasattr(host, "cache_bytes"):
        return None, "hybridops._host is from an older build: build it again"
    return host, None


def _build_reason() -> str | None:
    try:
        text = Path(__file__).parent.with_name("_build_info.json").read_text()
        return json.loads(text)["host_reason"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _had_its_cores(threads: int, cpu: float, wall: float) -> bool:
    """Whether nobody else ran for long: `cpu` seconds of this process in `wall` seconds."""
    return cpu >= 0.8 * wall * min(threads, len(os.sched_getaffinity(0))) or wall < 0.05


def _flops(host: Any, threads: int) -> dict[str, float]:
    """GFLOP/s by dtype; empty on a CPU without any of the instruction sets."""

    def peak(isa: str, dtype: str = "fp32") -> float:
        try:
            return host.peak_flops(isa, _FLOPS_SECONDS, threads, dtype)
        except RuntimeError:  # the CPU has not got it, or the system does not lend it
            return 0.0

    has = host.cpu_features()
    fp32 = max(peak("avx2"), peak("avx512"))
    amx = peak("amx", "bf16")
    fp16 = fp32
    if has.get("avx512fp16"):
        fp16 = 2 * fp32  # an estimate: twice the lanes
    if has.get("amx_fp16"):
        fp16 = max(fp16, amx)  # an estimate: tiles of the same shape
    bf16 = max(fp32, peak("avx512", "bf16"), amx)
    found = {"fp32": fp32, "bf16": bf16, "fp16": fp16, "fp64": fp32 / 2}
    return {dtype: rate for dtype, rate in found.items() if rate}


def _bandwidth(
    host: Any, threads: int, level: str, sizes: dict[str, int], l3_count: int
) -> float | None:
    """GB/s of all threads in buffers that fit the level and, by far, no inner one."""
    l2, l3 = sizes.get("L2", 0), sizes.get("L3", 0)
    if level == "DRAM":
        try:
            free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        except (OSError, ValueError):
            free = 1 << 30
        total = min(max(8 * l3 * min(threads, l3_count), 1 << 27), 1 << 32, free // 2)
        each, kinds, seconds = max(total // threads, 2 * l2), ("read", "stream"), _DRAM_SECONDS
    else:
        each, kinds, seconds = sizes[level] // 2, ("read", "triad"), _CACHE_SECONDS
        if level == "L1":
            each += each // 2  # the more there is in a loop, the less its ends cost
        if level == "L3":
            each = max(min(l3 * l3_count // threads, l3) // 2, l2 * 3 // 2)
    best = 0.0
    for kind in kinds:
        # The CPU or the memory may not suffice; what did work is a measurement all the same.
        with suppress(RuntimeError, MemoryError, ValueError):
            best = max(best, host.bandwidth(each, seconds, threads, kind))
    return best or None


def _l3_count() -> int:
    """How many L3 caches the usable cores have between them; what cpuid cannot say."""
    shares = set()
    for cpu in os.sched_getaffinity(0):
        cache = Path(f"/sys/devices/system/cpu/cpu{cpu}/cache/index3/shared_cpu_list")
        with suppress(OSError):
            shares.add(cache.read_text())
    return max(1, len(shares))


def _cache_file(machine: str) -> Path | None:
    named = Path(os.environ.get("XDG_CACHE_HOME") or ".")
    if not named.is_absolute():  # as the XDG specification has it
        try:
            named = Path.home() / ".cache"
        except RuntimeError:  # no home
            return None
    return named / "hybridops" / f"roof-{machine}.json"


def _read(path: Path | None, machine: str) -> Roof | None:
    """What the file holds, if it is ours alone to write and makes sense; else None."""
    if path is None:
        return None
    try:
        file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(file, "rb") as opened:
            facts = os.fstat(file)
            ours = facts.st_uid == os.geteuid() and not facts.st_mode & 0o022
            if not (ours and stat.S_ISREG(facts.st_mode) and facts.st_size <= _MOST_FILE):
                return None
            found = Roof.from_json(json.loads(opened.read(_MOST_FILE)))
    except (OSError, ValueError, RecursionError):
        return None
    return found if found.machine == machine else None


def _keep(path: Path | None, found: Roof) -> Roof:
    """`found` and what other processes have written meanwhile; written, where that is possible."""
    if path is None:
        return found
    if latest := _read(path, found.machine):
        found = latest.merged(found)
    fresh = None
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        file, fresh = tempfile.mkstemp(prefix=f".{path.stem}-", dir=path.parent)  # mode 0600
        with open(file, "w") as opened:
            json.dump(found.as_json(), opened, indent=1)
        os.replace(fresh, path)
    except OSError:
        if fresh is not None:
            with suppress(OSError):
                os.unlink(fresh)
    return found


def _torch_rates(
    device: torch.device,
    side: int,
    large: int,
    least_seconds: Callable[[Callable[[], object]], float],
    progress: Progress,
) -> tuple[dict[str, float], float | None]:
    """GFLOP/s of products of `side` squared by dtype, GB/s of copies and sums of `large` bytes."""
    flops: dict[str, float] = {}
    dram: float | None = None
    for name, dtype in DTYPES.items():
        progress(f"measuring the roof of {device}: {name}")
        for tf32 in (False, True) if name == "fp32" else (False,):
            with suppress(RuntimeError), _tf32(tf32):  # no such product, or not enough memory
                a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
                out = torch.empty_like(a)
                seconds = least_seconds(functools.partial(torch.mm, a, b, out=out))
                flops[name] = max(flops.get(name, 0.0), 2 * side**3 / seconds / 1e9)
    progress(f"measuring the roof of {device}: DRAM")
    with suppress(RuntimeError):
        source = torch.ones(large // 4, device=device)
        target = torch.empty_like(source)
        copy = 2 * large / least_seconds(lambda: target.copy_(source))
        dram = max(copy, large / least_seconds(source.sum)) / 1e9
    return flops, dram


@contextmanager
def _tf32(allowed: bool) -> Iterator[None]:
    settings: Any = torch.backends.cuda.matmul
    before = settings.fp32_precision
    settings.fp32_precision = "tf32" if allowed else "ieee"
    try:
        yield
    finally:
        settings.fp32_precision = before


def _least_gpu_seconds(run: Callable[[], object], seconds: float = 0.3, calls: int = 4) -> float:
    """The least time of a call on the current GPU, over groups that hide what a launch costs."""
    run()
    torch.cuda.synchronize()
    least, end = float("inf"), time.perf_counter() + seconds
    while True:
        begin, done = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(calls):
            run()
        done.record()
        done.synchronize()
        least = min(least, begin.elapsed_time(done) / 1e3 / calls)
        if time.perf_counter() > end:
            return least
