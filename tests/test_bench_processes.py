"""A run of several processes: its intervals tell what another run would show."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from test_bench_cli import SCHEMA, bench
from test_bench_report import OURS, PEER, document

from hybridops.bench import processes, result, stats
from hybridops.bench.report import write_report
from hybridops.bench.table import table


def peers(*speedups: float, **changed) -> list[list[result.Row]]:
    """What so many processes found of one comparison."""
    return [[OURS, replace(PEER, speedup=s, **changed)] for s in speedups]


def test_an_interval_over_processes_holds_what_the_rounds_of_one_cannot_know():
    random = np.random.default_rng(0)
    held = held_by_one = 0
    for seed in range(200):
        found = []
        for state in 1 + 0.05 * random.standard_normal(4):  # what differs between processes
            a = 2 * state * (1 + 0.02 * random.standard_normal(40))
            b = 1 + 0.02 * random.standard_normal(40)
            found.append(stats.ratio(list(a), list(b), seed=seed))
        one, all_ = found[0], stats.over_processes([ratio.value for ratio in found])
        held += all_.low <= 2 <= all_.high
        held_by_one += one.low <= 2 <= one.high
    assert held >= 0.9 * 200
    assert held_by_one <= 0.5 * 200


@pytest.mark.parametrize("rounds", [3, 5, stats.FEW, stats.FEW + 6])
def test_an_interval_of_few_rounds_holds_the_true_ratio(rounds):
    random = np.random.default_rng(1)
    held = 0
    for seed in range(200):
        a, b = 1 + 0.05 * random.standard_normal((2, rounds))
        found = stats.ratio(list(2 * a), list(b), seed=seed)
        held += found.low <= 2 <= found.high
    assert held >= 0.9 * 200


def test_one_value_says_nothing_of_how_sure_it_is(tmp_path):
    found = stats.ratio([3.0], [2.0])
    assert found == (1.5, 0.0, float("inf"))
    assert stats.verdict(found, 0.02) == "AMBIGUOUS"
    path = tmp_path / "r.json"
    unsure = replace(PEER, speedup=1.5, speedup_low=0.0, speedup_high=float("inf"))
    result.write_json(document(OURS, replace(unsure, verdict="AMBIGUOUS")), path)
    write_report([path], tmp_path / "r.html")
    assert "1.50×" in (tmp_path / "r.html").read_text()


def test_no_ratios_are_refused():
    with pytest.raises(ValueError, match="at least one ratio"):
        stats.over_processes([])


def test_ratios_are_averaged_and_their_spread_is_the_interval(tmp_path):
    ours, peer = processes.combined(peers(1.2, 1.5, 1.3, n=7), 0.02)
    logs = np.log([1.2, 1.5, 1.3])
    half = 4.303 * logs.std(ddof=1) / 3**0.5
    assert peer.speedup == pytest.approx(np.exp(logs.mean()))
    assert (peer.speedup_low, peer.speedup_high) == pytest.approx(
        (np.exp(logs.mean() - half), np.exp(logs.mean() + half))
    )
    assert (peer.processes, peer.n, peer.verdict) == (3, 21, "AMBIGUOUS")
    assert peer.repro == f"{PEER.repro} --processes 3"
    assert ours.speedup is None
    assert table([ours, peer]).count("3 processes") == 1
    result.write_json(document(ours, peer), tmp_path / "r.json")
    write_report([tmp_path / "r.json"], tmp_path / "r.html")
    assert "3 processes" in (tmp_path / "r.html").read_text()


def test_times_are_medians_and_of_errors_the_worst_counts():
    found = [
        [replace(OURS, median_ms=ms, min_ms=least, error_ratio=error, repeats=error < 1.3)]
        for ms, least, error in ((3.0, 2.9, 0.8), (1.0, 0.7, 1.4), (2.0, 1.1, 0.9))
    ]
    (ours,) = processes.combined(found, 0.02)
    assert (ours.median_ms, ours.min_ms, ours.error_ratio) == (2.0, 0.7, 1.4)
    assert ours.repeats is False


def test_what_was_wrong_in_one_process_is_wrong():
    good, wrong = peers(1.2, 1.3)
    wrong[1] = replace(wrong[1], verdict="FAILED", reason="x", speedup=None, median_ms=None)
    _, peer = processes.combined([good, wrong], 0.02)
    assert (peer.verdict, peer.reason, peer.speedup) == ("FAILED", "x", None)


def test_where_ours_was_wrong_in_one_process_no_ratio_is_claimed():
    good, wrong = peers(1.2, 1.3)
    wrong[:] = [replace(OURS, verdict="INVALID"), replace(PEER, verdict="OK", speedup=None)]
    ours, peer = processes.combined([good, wrong], 0.02)
    assert (ours.verdict, peer.verdict, peer.speedup) == ("INVALID", "OK", None)


def test_a_crowd_makes_no_verdict():
    found = peers(1.50, 1.51, 1.52, others_cpu=64.0)
    assert processes.combined(found, 0.02)[1].verdict == "AMBIGUOUS"
    found = peers(1.50, 1.51, 1.52, others_cpu=0.0)
    assert processes.combined(found, 0.02)[1].verdict == "FAST"


def test_the_interval_of_several_runs_is_that_of_all_their_processes(tmp_path, monkeypatch, capsys):
    path = Path(__file__).parent.parent / "benchmarks" / "tables.py"
    spec = importlib.util.spec_from_file_location("tables", path)
    assert spec
    assert spec.loader
    tables = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tables)
    found = (1.1, 1.2, 1.35), (1.2, 1.25, 1.4)
    rows = [processes.combined(peers(*run), 0.02)[1] for run in found]
    assert tables.over_all(rows) == pytest.approx(stats.over_processes([*found[0], *found[1]]))
    with pytest.raises(ValueError, match="several processes"):
        tables.over_all([PEER])
    result.write_json(document(OURS, PEER), tmp_path / "one.json")
    monkeypatch.setattr("sys.argv", ["tables.py", str(tmp_path / "one.json")])
    with pytest.raises(SystemExit):
        tables.main()
    assert "of one process" in capsys.readouterr().err


SMALL = ["op", "peg", "--shape", "H=4,W=4,C=8", "--threads", "1", "--min-time", "0.001"]


def test_two_processes_make_one_run(tmp_path, capfd):
    out = tmp_path / "r.json"
    assert bench(*SMALL, "--timeout", "0.2", "--processes", "2", "--json", out) == 0
    doc = json.loads(out.read_text())
    pytest.importorskip("jsonschema").validate(doc, SCHEMA)
    assert [row["processes"] for row in doc["rows"]] == [2, 2]
    shown = capfd.readouterr()
    assert shown.out.count("speed-up") == 1
    assert "2 processes" in shown.out
    assert "process 2 of 2" in shown.err


def test_a_process_that_ends_without_rows_is_one_line(monkeypatch, capfd):
    monkeypatch.setattr(processes, "_CHILD", "raise SystemExit(7)")
    assert bench(*SMALL, "--processes", "2", "--quiet") == 2
    assert capfd.readouterr().err == "hybridops: process 1 ended with exit code 7\n"


@pytest.mark.parametrize(
    "more", [["--resume", "--json", "r.json"], ["--stop-after", "3"], ["--dry-run"]]
)
def test_what_processes_do_not_go_with_is_refused(more, capsys):
    assert bench(*SMALL, "--processes", "2", *more) == 2
    assert "--processes goes with none of" in capsys.readouterr().err
    assert bench(*SMALL, "--processes", "1,2") == 2
    assert bench(*SMALL, "--processes", "0") == 2
