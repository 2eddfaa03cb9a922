"""hybridops tune: what the compiler allows, the search, the tables that it writes."""

from __future__ import annotations

import json
import re

import interpreter
import pytest

from hybridops import cli
from hybridops.tune import search

pytest.importorskip("triton", reason="Triton is not installed")
from hybridops.kernels import tuned

START = {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 4, "num_stages": 2}
ENTRY = ("peg_forward", "float32", 3)


def seconds(config):
    """Fastest at 128 x 32 with 8 warps and 3 stages."""
    best = {"BLOCK_M": 128, "BLOCK_N": 32, "num_warps": 8, "num_stages": 3}
    return 1e-6 * (10 + sum(abs(n - config[key]) / n for key, n in best.items()))


def test_the_search_walks_to_the_fastest_and_runs_nothing_that_is_refused():
    ran = []

    def timed(config):
        ran.append(config)
        return seconds(config)

    def wide(config):
        return "too wide" if config["BLOCK_M"] > 64 else None

    def wrong(config):
        return "wrong" if config["num_stages"] == 3 else None

    found = search.search(START, lambda c: None, lambda c: None, timed)
    assert found.config == {"BLOCK_M": 128, "BLOCK_N": 32, "num_warps": 8, "num_stages": 3}
    assert found.seconds < found.before == seconds(START)
    assert len(ran) == found.tried == len({tuple(c.items()) for c in ran}), "one was timed twice"

    ran.clear()
    found = search.search(START, wide, wrong, timed)
    assert found.config == {"BLOCK_M": 64, "BLOCK_N": 32, "num_warps": 8, "num_stages": 2}
    assert found.rejected
    assert not any(c["BLOCK_M"] > 64 or c["num_stages"] == 3 for c in ran)


def test_noise_below_two_percent_changes_nothing():
    found = search.search(
        START, lambda c: None, lambda c: None, lambda c: 1.0 if c == START else 0.99
    )
    assert found.config == START


def test_a_table_whose_own_entry_is_refused_is_told():
    with pytest.raises(ValueError, match="begin with is refused: spills"):
        search.search(START, lambda c: "spills", lambda c: None, seconds)


def test_steps_stay_within_the_limits():
    low = {"BLOCK_M": 16, "num_warps": 1, "num_stages": 1}
    assert list(search.neighbours(low)) == [
        {**low, "BLOCK_M": 32},
        {**low, "num_warps": 2},
        {**low, "num_stages": 2},
    ]


@pytest.mark.parametrize(
    ("needs", "why"),
    [
        ({"registers": 255, "shared": 227 * 1024, "spilled": 0}, None),
        ({"registers": 255, "shared": 227 * 1024 + 1, "spilled": 0}, "shared memory"),
        ({"registers": 255, "shared": 0, "spilled": 8}, "8 bytes spilled"),
        ({"error": "OutOfResources"}, "OutOfResources"),
    ],
)
def test_what_is_refused(needs, why):
    found = search.refused(needs, 90)
    assert found is why if why is None else why in found


def test_a_dry_run_says_what_each_configuration_needs(capsys):
    assert cli.main(["tune", "--dry-run", "--arch", "sm_90", "--only", "peg_dweight/half/*"]) == 0
    head, first, *others = capsys.readouterr().out.splitlines()
    assert head == "sm_90 peg_dweight/half/1024"
    assert "allowed (the table's)" in first
    assert "registers" in first
    assert len(others) >= 5
    assert all("allowed" in line or "refused" in line for line in others)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--arch", "sm_70", "--dry-run"], "there are tables for sm_80, sm_90"),
        (["--arch", "sm_90"], "torch sees no GPU"),
        ([], "torch sees no GPU"),
        (["--arch", "sm_90", "--dry-run", "--only", "nothing"], "no entry matches 'nothing'"),
    ],
)
def test_what_cannot_be_served(arguments, words, capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert cli.main(["tune", *arguments]) == 2
    assert words in capsys.readouterr().err


class OneEntry:
    """Stands for the compiling process."""

    arch = 80
    entries = {ENTRY: 0}

    def __init__(self, arch):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def needs(self, entry, config):
        return {"registers": 1, "shared": 1, "spilled": 8 * (config["num_warps"] > 4)}


def test_an_entry_is_tuned_written_and_not_tuned_again(tmp_path, monkeypatch, capsys):
    """In the interpreter; the clock prefers large blocks, and 64 channels come out wrong."""
    import torch

    from hybridops.bench.case import Peg
    from hybridops.tune import gpu, work

    small = Peg("tune", B=1, H=3, W=3, C=40, prefix=1), torch.float32
    monkeypatch.setattr(work, "case", lambda call, batch=1: small)
    monkeypatch.setattr(search, "Compiler", OneEntry)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "a GPU")
    monkeypatch.setattr(gpu, "LAUNCHES", 1)
    monkeypatch.setattr(search, "_BLOCK", (32, 64))  # each costs the interpreter a second
    monkeypatch.setattr(search, "_LIMITS", {"num_warps": (4, 8), "num_stages": (1, 1)})
    usual, trials = gpu.Trial, []

    def trial(entry, call):
        def clock(launch):
            launch()
            config = trials[-1].config
            return 1.0 / config["BLOCK_M"] / config["BLOCK_C"]

        trials.append(Recorded(entry, call, "cpu", 1, clock))
        return trials[-1]

    class Recorded(usual):
        def seconds(self, config):
            self.config = config
            return super().seconds(config)

        def right(self, config):
            return "wrong" if config["BLOCK_C"] == 64 else super().right(config)

    monkeypatch.setattr(gpu, "Trial", trial)
    out = tmp_path / "tuned_sm80.json"
    run = ["tune", "--arch", "sm_80", "--only", "/".join(map(str, ENTRY)), "--out", str(out)]
    with interpreter.serving():
        assert cli.main(run) == 0
        said = capsys.readouterr()
        assert "wrong" in said.err
        assert "spilled" in said.err
        kernel, kind, width = ENTRY
        written = json.loads(out.read_text())
        best = dict(written[kernel][kind])[width]
        assert best == {"BLOCK_M": 64, "BLOCK_C": 32, "num_warps": 4, "num_stages": 1}
        assert written["source"].startswith("hybridops tune on a GPU")
        assert cli.main(run) == 0
        assert len(trials) == 1, "it was tuned again"
        monkeypatch.setattr(tuned, "__file__", str(tmp_path / "tuned.py"))  # --out to our own file
        assert dict(tuned.shipped(80)[kernel][kind])[width] == best
        assert cli.main(run) == 0
        assert len(trials) == 1, "it was tuned again"
    assert cli.main(["tune", "--dry-run", *run[1:-2]]) == 0


def test_a_users_own_table_goes_first_while_the_kernels_are_the_same(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    shipped = tuned.shipped(90)
    notes = {"source": "tune", "kernels": tuned.fingerprint(), "done": {"peg_dx/half/3": {"us": 1}}}
    better = notes | json.loads(json.dumps(shipped))  # as tune writes it
    better["peg_dx"]["half"][0][1]["BLOCK_M"] = 128
    path = tuned.users_own(90)
    path.parent.mkdir()

    def table(content):
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        tuned.table.cache_clear()
        return tuned.table(90)

    try:
        assert table(better)["peg_dx"]["half"][0][1]["BLOCK_M"] == 128
        assert table(better | {"kernels": "others"}) == shipped
        for key, value in (("BLOCK_M", "many"), ("BLOCKS", 1)):
            better["peg_dx"]["half"][0][1][key] = value
            with pytest.warns(UserWarning, match="is not read: ValueError: peg_dx, half, 3"):
                assert table(better) == shipped
        for broken in ("{ cut sho", [], better | {"peg_dx": 1}):
            with pytest.warns(UserWarning, match=re.escape(f"your own table {path} is not read")):
                assert table(broken) == shipped
        path.unlink()
        tuned.table.cache_clear()
        assert tuned.table(90) == shipped
    finally:
        tuned.table.cache_clear()
