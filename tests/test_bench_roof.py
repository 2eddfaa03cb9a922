"""The roof: what the probes measure, what the cache file may be, what `bound` makes of it."""

from __future__ import annotations

import json
import os
import stat
import sys
import time

import pytest
import torch

from hybridops.bench import roof as file
from hybridops.bench.roof import Bound, Roof, bound


class FakeHost:
    """Counts its calls; thread n reaches n times what one does."""

    def __init__(self, **features: bool):
        self.features, self.calls, self.scale = features, [], 1.0

    def cpu_features(self):
        return self.features

    def cache_bytes(self):
        return {"L1": 1 << 15, "L2": 1 << 19, "L3": 1 << 25}

    def peak_flops(self, isa, seconds, threads, dtype):
        self.calls.append((isa, threads, dtype))
        if isa != "avx2" and not self.features.get(isa):
            raise RuntimeError(f"this CPU has no {isa}")
        rate = {("avx2", "fp32"): 100, ("avx512", "fp32"): 200, ("avx512", "bf16"): 400}
        return self.scale * threads * rate.get((isa, dtype), 2000)

    def bandwidth(self, size, seconds, threads, kind):
        self.calls.append((size, threads, kind))
        speed = 200 if size <= 1 << 15 else 100 if size <= 1 << 19 else 50
        return self.scale * threads * (speed if size <= 1 << 25 else 20)


@pytest.fixture
def host(monkeypatch, tmp_path) -> FakeHost:
    fake = FakeHost()
    monkeypatch.setitem(sys.modules, "hybridops._host", fake)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(file, "_l3_count", lambda: 1)
    return fake


@pytest.fixture
def cache_file(host, tmp_path):
    file.roof(1)
    (found,) = (tmp_path / "cache" / "hybridops").iterdir()
    host.calls.clear()
    return found


@pytest.fixture(scope="module")
def probe():
    return pytest.importorskip("hybridops._host", reason="hybridops._host was not built")


# the probes themselves


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (("sse", 0.01), "isa"),
        (("avx2", 0.01, 1, "fp8"), "dtype"),
        (("avx2", 0.01, 1, "bf16"), "no products of bf16 in avx2"),
        (("amx", 0.01), "no products of fp32 in amx"),
        (("avx2", 0.01, 0), "threads"),
        (("avx2", 0.01, 1025), "threads"),
        (("avx2", 0.0), "seconds"),
        (("avx2", float("nan")), "seconds"),
    ],
)
def test_peak_flops_refuses(probe, arguments, what):
    with pytest.raises(ValueError, match=what):
        probe.peak_flops(*arguments)


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        ((511,), "bytes"),
        ((-1,), "bytes"),
        ((1 << 36, 0.01, 2), "bytes"),
        ((1 << 16, 0.01, 0), "threads"),
        ((1 << 16, 61.0), "seconds"),
        ((1 << 16, 0.01, 1, "write"), "kind"),
    ],
)
def test_bandwidth_refuses(probe, arguments, what):
    with pytest.raises(ValueError, match=what):
        probe.bandwidth(*arguments)


@pytest.mark.parametrize(("isa", "needed"), [("avx512", "avx512bf16"), ("amx", "amx_bf16")])
def test_bf16_peak_is_measured_or_refused(probe, isa, needed):
    if probe.cpu_features()[needed]:
        assert 1 < probe.peak_flops(isa, 0.02, 1, "bf16") < 20000
    else:
        with pytest.raises(RuntimeError, match=f"no {isa} for bf16"):
            probe.peak_flops(isa, 0.02, 1, "bf16")


def test_two_threads_do_at_least_what_one_does(probe):
    if not probe.cpu_features()["fma"]:
        pytest.skip("no AVX2 with FMA")
    one, two = (max(probe.peak_flops("avx2", 0.05, n) for _ in range(3)) for n in (1, 2))
    assert two > 0.5 * one  # on an idle machine with two cores twice as much; tests share theirs
    assert two < 6 * one


def test_more_threads_than_cores_do_no_more_than_the_cores(probe):
    """Threads that take turns on a core must not each be counted as if they had it alone."""
    if not probe.cpu_features()["fma"]:
        pytest.skip("no AVX2 with FMA")
    cores = len(os.sched_getaffinity(0))
    one = max(probe.peak_flops("avx2", 0.05, 1) for _ in range(3))
    assert probe.peak_flops("avx2", 0.1, 4 * cores) < 2 * cores * one


def test_inner_caches_are_faster(probe):
    sizes = probe.cache_bytes()
    if not {"L1", "L2"} <= set(sizes):
        pytest.skip("cpuid says nothing of caches")
    assert sizes["L1"] < sizes["L2"]
    l1, dram = (
        max(probe.bandwidth(n, 0.05, 1, "read") for _ in range(3))
        for n in (sizes["L1"] // 2, max(1 << 26, 2 * sizes.get("L3", 0)))
    )
    assert l1 > 1.2 * dram  # about eight times on an idle machine


@pytest.mark.parametrize("kind", ["read", "triad", "stream"])
@pytest.mark.parametrize("size", [512, 1000, 1 << 16, (1 << 22) + 77])
def test_every_kind_and_size_measures(probe, kind, size):
    if kind != "read" and not probe.cpu_features()["avx2"]:
        pytest.skip("no AVX2")
    assert 0.05 < probe.bandwidth(size, 0.01, 2, kind) < 20000


# roof(): what is measured when


def test_measures_once_then_reads(host, cache_file):
    again = file.roof(1)
    assert host.calls == []
    assert again.flops == {
        "fp32": {1: 100.0},
        "bf16": {1: 100.0},
        "fp16": {1: 100.0},
        "fp64": {1: 50.0},
    }
    assert again.bandwidth == {"L1": {1: 200}, "L2": {1: 100}, "L3": {1: 50}, "DRAM": {1: 20}}
    two = file.roof(2)
    assert two.flops["fp32"] == {1: 100.0, 2: 200.0}
    assert {call[1] for call in host.calls} == {2}
    assert file.roof(1) == two


def test_measures_only_what_lacks(host, cache_file):
    plain = json.loads(cache_file.read_text())
    del plain["bandwidth"]["L2"]
    cache_file.write_text(json.dumps(plain))
    assert file.roof(1).bandwidth["L2"] == {1: 100.0}
    assert {call[0] for call in host.calls} == {1 << 18}


def test_refresh_keeps_the_larger(host, cache_file):
    host.scale = 0.5
    assert file.roof(1, refresh=True).flops["fp32"] == {1: 100.0}
    host.scale, told = 2.0, []
    assert file.roof(1, refresh=True, progress=told.append).flops["fp32"] == {1: 200.0}
    assert file.roof(1).bandwidth["DRAM"] == {1: 40.0}
    assert any("DRAM" in text for text in told)


def test_what_a_busy_machine_measures_is_not_written_down(host, cache_file, monkeypatch):
    before, host.scale = cache_file.read_bytes(), 2.0
    monkeypatch.setattr(file, "_had_its_cores", lambda *arguments: False)
    assert file.roof(1, refresh=True).flops["fp32"] == {1: 200.0}
    assert file.roof(2).flops["fp32"] == {1: 100.0, 2: 400.0}
    assert cache_file.read_bytes() == before


def test_fair_share_of_the_cores():
    cores = len(os.sched_getaffinity(0))
    assert file._had_its_cores(1, 0.95, 1.0)
    assert not file._had_its_cores(1, 0.5, 1.0)
    assert file._had_its_cores(4 * cores, 0.9 * cores, 1.0)
    assert not file._had_its_cores(cores, 0.6 * cores, 1.0)


@pytest.mark.parametrize(
    ("features", "fp32", "bf16", "fp16"),
    [
        ({}, 100, 100, 100),
        ({"avx512": True}, 200, 400, 200),
        ({"avx512": True, "avx512fp16": True}, 200, 400, 400),
        ({"avx512": True, "avx512fp16": True, "amx": True}, 200, 2000, 400),
        ({"avx512": True, "amx": True, "amx_fp16": True}, 200, 2000, 2000),
    ],
)
def test_peak_of_each_dtype(host, features, fp32, bf16, fp16):
    host.features = features
    found = {dtype: rates[1] for dtype, rates in file.roof(1).flops.items()}
    assert found == {"fp32": fp32, "bf16": bf16, "fp16": fp16, "fp64": fp32 / 2}


@pytest.mark.parametrize("threads", [0, -1, 1025])
def test_thread_count_is_checked(host, threads):
    with pytest.raises(ValueError, match="threads"):
        file.roof(threads)


def test_without_the_host_module_it_is_empty_and_says_why(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setitem(sys.modules, "hybridops._host", None)
    empty = file.roof(2)
    assert (empty.flops, empty.bandwidth, list(tmp_path.iterdir())) == ({}, {}, [])
    assert "hybridops._host" in (file.why_no_roof() or "")
    assert bound(empty, flop=1, bytes_moved=1, dtype="fp32", threads=2, cache="warm") is None
    monkeypatch.setitem(sys.modules, "hybridops._host", object())  # built before there was a roof
    assert "older build" in (file.why_no_roof() or "")
    assert file.roof(2).flops == {}


def test_measured_here_in_time(probe, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for name in ("_FLOPS_SECONDS", "_CACHE_SECONDS", "_DRAM_SECONDS"):
        monkeypatch.setattr(file, name, 0.01)
    start = time.perf_counter()
    found = file.roof(1)
    assert time.perf_counter() - start < 10  # seconds, mostly fresh pages for DRAM
    assert file.why_no_roof() is None
    assert 0.5 < found.bandwidth["DRAM"][1] < 20000
    if probe.cpu_features()["fma"]:
        assert set(found.flops) == set(file.DTYPES)
        assert 0 < found.flops["fp64"][1] < found.flops["fp32"][1] <= found.flops["bf16"][1]


# the cache file


def test_file_and_folder_are_private(cache_file):
    assert stat.S_IMODE(cache_file.stat().st_mode) == 0o600
    assert stat.S_IMODE(cache_file.parent.stat().st_mode) == 0o700
    assert list(cache_file.parent.iterdir()) == [cache_file]
    text = cache_file.read_text()
    assert os.uname().nodename not in text
    assert cache_file.name == f"roof-{file.machine_id()}.json"


HOSTILE = {
    "empty": "",
    "truncated": '{"flops": {"fp32": {"1": 1',
    "binary": b"\xff\xfe\x00",
    "deep": "[" * 60000,
    "list": "[]",
    "no keys": "{}",
    "huge": "9" * 70000,
}
WRONG = {
    "string rate": {"flops": {"fp32": {"1": "9"}}},
    "bool rate": {"flops": {"fp32": {"1": True}}},
    "nan": {"flops": {"fp32": {"1": float("nan")}}},
    "infinite": {"bandwidth": {"L1": {"1": float("inf")}}},
    "negative": {"bandwidth": {"L1": {"1": -1.0}}},
    "huge number": {"bandwidth": {"L1": {"1": 10**400}}},
    "rates not by threads": {"flops": {"fp32": 3.0}},
    "thread count": {"flops": {"fp32": {"one": 3.0}}},
    "no threads": {"flops": {"fp32": {"0": 3.0}}},
    "dtype": {"flops": {"fp8": {"1": 3.0}}},
    "level": {"bandwidth": {"L4": {"1": 3.0}}},
    "flops list": {"flops": []},
    "size": {"cache_bytes": {"L1": 1.5}},
    "date": {"date": "yesterday"},
    "machine": {"machine": "another"},
    "machine type": {"machine": 3},
}


@pytest.mark.parametrize("name", [*HOSTILE, *WRONG])
def test_a_file_that_makes_no_sense_is_measured_again(host, cache_file, name):
    good = cache_file.read_text()
    if name in WRONG:
        content = json.dumps(json.loads(good) | WRONG[name]).encode()
    else:
        content = HOSTILE[name] if name == "binary" else HOSTILE[name].encode()
    cache_file.write_bytes(content)
    assert file.roof(1).flops["fp32"] == {1: 100.0}
    assert host.calls
    assert cache_file.read_text() == good


@pytest.mark.parametrize("mode", [0o620, 0o602, 0o666])
def test_a_file_that_others_may_write_is_ignored(host, cache_file, mode):
    cache_file.write_text(cache_file.read_text().replace("100.0", "1e9"))
    cache_file.chmod(mode)
    assert file.roof(1).flops["fp32"] == {1: 100.0}
    assert stat.S_IMODE(cache_file.stat().st_mode) == 0o600


def test_a_file_of_another_user_is_ignored(host, cache_file, monkeypatch):
    other = os.geteuid() + 1
    monkeypatch.setattr(os, "geteuid", lambda: other)
    assert file.roof(1).flops["fp32"] == {1: 100.0}
    assert host.calls


def test_a_link_is_neither_read_nor_written_through(host, cache_file, tmp_path):
    target = tmp_path / "elsewhere.json"
    cache_file.rename(target)
    cache_file.symlink_to(target)
    before = target.read_bytes()
    file.roof(2)
    assert {call[1] for call in host.calls} == {2}
    assert not cache_file.is_symlink()
    assert target.read_bytes() == before
    assert "1" not in json.loads(cache_file.read_text())["flops"]["fp32"]


@pytest.mark.parametrize("what", ["folder", "pipe"])
def test_a_file_that_is_none_is_no_crash(host, cache_file, what):
    cache_file.unlink()
    cache_file.mkdir() if what == "folder" else os.mkfifo(cache_file)
    assert file.roof(1).flops["fp32"] == {1: 100.0}
    assert list(cache_file.parent.iterdir()) == [cache_file]  # nothing half written stays


def test_goes_on_where_nothing_can_be_written(host, tmp_path, monkeypatch):
    (tmp_path / "plain").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "plain"))
    assert file.roof(1).flops["fp32"] == {1: 100.0}


def test_relative_cache_home_is_ignored(host, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path))
    file.roof(1)
    assert (tmp_path / ".cache" / "hybridops").is_dir()


def test_what_another_process_wrote_meanwhile_stays(host, cache_file):
    later = Roof({"fp32": {8: 800.0}}, machine=file.machine_id())
    cache_file.write_text(json.dumps(later.as_json()))
    mine = Roof({"fp32": {1: 100.0}}, machine=file.machine_id())
    assert file._keep(cache_file, mine).flops == {"fp32": {1: 100.0, 8: 800.0}}


# Roof and bound


def test_json_round_trip():
    found = Roof({"fp32": {1: 1.5, 16: 20.0}}, {"DRAM": {2: 3.0}}, {"L1": 4}, "m", "2026-01-02")
    assert Roof.from_json(json.loads(json.dumps(found.as_json()))) == found
    assert Roof.from_json(Roof().as_json()) == Roof()


def test_merged_takes_the_larger_of_each():
    a = Roof({"fp32": {1: 1.0, 2: 5.0}}, {"L1": {1: 3.0}}, {"L1": 4}, "m", "2026-01-02")
    b = Roof({"fp32": {1: 2.0}, "bf16": {1: 1.0}}, {"L2": {1: 1.0}}, {"L2": 9}, "m", "2026-01-01")
    both = Roof(
        {"fp32": {1: 2.0, 2: 5.0}, "bf16": {1: 1.0}},
        {"L1": {1: 3.0}, "L2": {1: 1.0}},
        {"L1": 4, "L2": 9},
        "m",
        "2026-01-02",
    )
    assert a.merged(b) == b.merged(a) == both
    with pytest.raises(ValueError, match="machine|roof of"):
        a.merged(Roof(machine="another"))


ROOF = Roof(
    flops={"fp32": {1: 100.0, 2: 200.0}},
    bandwidth={
        "L1": {1: 200.0, 2: 400.0},
        "L2": {1: 100.0, 2: 200.0},
        "L3": {1: 50.0, 2: 80.0},
        "DRAM": {1: 20.0, 2: 32.0},
    },
    cache_bytes={"L1": 10_000, "L2": 100_000, "L3": 1_000_000},
)
US = 1e-6


@pytest.mark.parametrize(
    ("flop", "size", "threads", "cache", "seconds", "limit"),
    [
        (1e6, 0, 1, "warm", 10 * US, "compute"),
        (1e6, 0, 2, "cold", 5 * US, "compute"),
        (0, 8_000, 1, "warm", 0.04 * US, "L1"),
        (0, 20_000, 2, "warm", 0.05 * US, "L1"),  # two L1
        (0, 11_000, 1, "warm", 0.05 * US + 0.01 * US, "L2"),  # 10k from L1, 1k from L2
        (0, 210_000, 1, "warm", 0.05 * US + US + 2 * US, "L3"),
        (0, 210_000, 2, "warm", 0.05 * US + 0.95 * US, "L2"),  # 20k and 190k
        (0, 2_110_000, 1, "warm", 0.05 * US + US + 20 * US + 50 * US, "DRAM"),
        (0, 8_000, 1, "cold", 0.4 * US, "DRAM"),
        (1e6, 210_000, 1, "warm", 10 * US, "compute"),
        (1e5, 210_000, 1, "warm", 3.05 * US, "L3"),
        (0, 0, 1, "warm", 0.0, "compute"),
    ],
)
def test_bound_by_hand(flop, size, threads, cache, seconds, limit):
    got = bound(ROOF, flop=flop, bytes_moved=size, dtype="fp32", threads=threads, cache=cache)
    assert got == Bound(pytest.approx(seconds), limit)


def test_bound_lacks():
    def of(roof=ROOF, flop=1e6, size=100, dtype="fp32", threads=1, cache="warm"):
        return bound(roof, flop=flop, bytes_moved=size, dtype=dtype, threads=threads, cache=cache)

    assert of(dtype="bf16") is None
    assert of(threads=4) is None
    assert of(Roof(ROOF.flops), cache="cold") is None
    assert of(Roof(bandwidth=ROOF.bandwidth)) is None
    # a cache of unknown speed costs nothing, the rest comes from DRAM
    gpu = Roof(ROOF.flops, {"DRAM": {1: 20.0}}, {"L2": 50_000})
    assert of(gpu, flop=0, size=70_000) == Bound(pytest.approx(US), "DRAM")
    assert of(gpu, size=40_000) == Bound(pytest.approx(10 * US), "compute")
    assert of(gpu, flop=0, size=40_000) is None


def test_bound_trusts_no_measurement_below_what_must_be_possible():
    noisy = Roof(
        {"fp32": {1: 100.0, 2: 60.0}},
        {"L1": {1: 200.0, 2: 9.0}, "DRAM": {1: 20.0, 2: 10.0}},
        {"L1": 10_000},
    )
    assert bound(noisy, flop=1e6, bytes_moved=0, dtype="fp32", threads=2, cache="warm") == Bound(
        pytest.approx(10 * US), "compute"
    )
    slow_l1 = Roof(ROOF.flops, {"L1": {1: 9.0}, "DRAM": {1: 20.0}}, {"L1": 10_000})
    assert bound(slow_l1, flop=0, bytes_moved=8000, dtype="fp32", threads=1, cache="warm") == Bound(
        pytest.approx(0.4 * US), "L1"
    )


@pytest.mark.parametrize(
    "wrong", [{"cache": "hot"}, {"flop": -1}, {"bytes_moved": -1}, {"flop": float("nan")}]
)
def test_bound_refuses(wrong):
    arguments = {"flop": 1, "bytes_moved": 1, "dtype": "fp32", "threads": 1, "cache": "warm"}
    with pytest.raises(ValueError, match="cache must be|must be at least"):
        bound(ROOF, **(arguments | wrong))


# the part for GPUs, as far as a CPU can run it


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_gpu_roof_without_a_gpu_is_empty():
    assert file.gpu_roof() == Roof()


def test_torch_rates_count_right():
    precision = torch.backends.cuda.matmul.fp32_precision
    calls = []

    def least_seconds(run):
        calls.append(run())
        return 1e-3

    flops, dram = file._torch_rates(torch.device("cpu"), 16, 4096, least_seconds, calls.append)
    assert flops == dict.fromkeys(file.DTYPES, pytest.approx(2 * 16**3 / 1e-3 / 1e9))
    assert dram == pytest.approx(2 * 4096 / 1e-3 / 1e9)
    assert torch.backends.cuda.matmul.fp32_precision == precision
