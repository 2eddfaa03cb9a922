"""`hybridops bench` as a command: its JSON is a contract, and so are its exit codes."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_bench_report import ENV, OURS, PEER, document

import hybridops
from hybridops import cli
from hybridops.bench import jobs, measure, op_task, regress, result, roof
from hybridops.bench.cases import CASES

QUICK = ["--min-time", "0.001", "--timeout", "0.05", "--threads", "1"]
SUITES = Path(__file__).parent.parent / "benchmarks"
SCHEMA = json.loads((Path(hybridops.__file__).parent / "bench" / "schema.json").read_text())


@pytest.fixture(autouse=True)
def fixed_roof(monkeypatch):
    levels = {level: {1: 1e4} for level in ("L1", "L2", "L3", "DRAM")}
    fixed = roof.Roof({d: {1: 1e4} for d in ("fp32", "bf16")}, levels, {"L1": 1 << 15}, "m")
    monkeypatch.setattr(measure.roofs, "roof", lambda threads, refresh=False: fixed)
    monkeypatch.setattr("hybridops.bench.environment.roof", lambda threads: fixed)


def bench(*arguments: object) -> int:
    return cli.main(["bench", *map(str, arguments)])


def valid(doc: dict) -> dict:
    jsonschema = pytest.importorskip("jsonschema")
    jsonschema.validate(doc, SCHEMA)
    return doc


# the contract


def test_a_run_writes_what_the_schema_says(tmp_path, capsys):
    out, table = tmp_path / "r.json", tmp_path / "r.csv"
    code = bench("op", "peg", "--shape", "H=4,W=4,C=8", *QUICK, "--json", out, "--csv", table)
    assert code == 0
    ours, eager = valid(json.loads(out.read_text()))["rows"]
    assert (ours["candidate"], ours["ours"], ours["speedup"]) == ("hybridops", True, None)
    assert eager["speedup"] == pytest.approx(eager["median_ms"] / ours["median_ms"])
    assert eager["repro"].startswith("hybridops bench op peg --shape H=4,W=4,C=8 --dtype fp32")
    assert "--peers eager" in eager["repro"]
    with open(table) as file:
        assert [row["candidate"] for row in csv.DictReader(file)] == ["hybridops", "eager"]
    assert "speed-up" in capsys.readouterr().out


def test_documents_of_every_kind_keep_to_the_schema():
    rows = [OURS, PEER, replace(PEER, verdict="FAILED", error=float("inf"), median_ms=None)]
    valid(document(*rows))
    valid(result.document(ENV | {"gpu": None, "roof": None}, []))


def test_the_schema_knows_every_key_and_verdict():
    row = SCHEMA["properties"]["rows"]["items"]["properties"]
    assert set(row) == set(result.Row.__dataclass_fields__)
    assert set(row["verdict"]["enum"]) == set(result.VERDICTS)
    assert SCHEMA["properties"]["schema"]["const"] == result.SCHEMA


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", "not JSON"),
        ("[]", "no schema"),
        ('{"schema": 2, "env": {}, "rows": []}', "schema 2, this version reads 1"),
        ('{"schema": 1, "env": {}, "rows": {}}', "rows a list"),
        ('{"schema": 1, "env": {}, "rows": [3]}', "row 0 is not an object"),
        ('{"schema": 1, "env": {}, "rows": [{}]}', "row 0 has no kind"),
    ],
)
def test_other_files_are_refused_in_one_line(tmp_path, capsys, text, match):
    path = tmp_path / "r.json"
    path.write_text(text)
    assert bench("report", path, "-o", tmp_path / "r.html") == 2
    error = capsys.readouterr().err
    assert match in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(("key", "value"), [("verdict", "GOOD"), ("batch", "1"), ("ours", 1)])
def test_rows_of_other_types_are_refused(tmp_path, key, value):
    doc = document(OURS)
    doc["rows"][0][key] = value
    path = tmp_path / "r.json"
    path.write_text(json.dumps(doc))
    with pytest.raises(result.BadResult, match=key):
        result.load(path)


# exit codes


def test_a_wrong_kernel_is_exit_code_1(monkeypatch, capsys):
    monkeypatch.setattr(op_task._Ours, "forward", lambda self, x: torch.zeros_like(x))
    assert bench("op", "peg", "--shape", "H=4,W=4,C=8", *QUICK) == 1
    out = capsys.readouterr().out
    assert "FAILED" in out
    assert "FAST" not in out


@pytest.mark.parametrize(
    "arguments",
    [
        ["op", "nothing"],
        ["op", "peg", "--dtype", "int4"],
        ["op", "peg", "--threads", "0"],
        ["op", "peg", "--peers", "nobody"],
        ["op", "peg", "--layout", "spiral"],
        ["op", "peg", "--backend", "abacus"],
        ["op", "peg", "--max-noise", "lots"],
        ["op", "peg", "--timeout", "-1"],
        ["op", "peg", "--json", "/no/such/folder/r.json"],
        ["op", "peg", "--baseline", "never_saved"],
        ["op", "peg", "--save", "../up"],
        ["model", "timm:no_such_model"],
        ["model", "hf:no_such_model"],
        ["model", "hf:bert"],
        ["model", "hybridops:cpvt_tiny", "--metric", "beauty"],
        ["model", "hybridops:cpvt_tiny", "--size", "64x"],
        ["model", "hybridops:cpvt_tiny", "--size", "0x64"],
        ["run", "/no/such/suite.toml"],
        ["compare", "a.json", "b.json"],
        ["report", "a.json"],
    ],
)
def test_what_cannot_be_served_is_exit_code_2_and_one_line(arguments, capsys):
    assert bench(*arguments) == 2
    *progress, last = capsys.readouterr().err.splitlines()
    assert last.startswith("hybridops")
    assert all(line.startswith("[1/1] ") for line in progress)


def files(tmp_path, *documents: dict) -> list[Path]:
    paths = [tmp_path / f"{n}.json" for n in range(len(documents))]
    for path, doc in zip(paths, documents, strict=True):
        result.write_json(doc, path)
    return paths


SLOWER = replace(PEER, speedup=1.6, speedup_low=1.55, speedup_high=1.65)


def test_a_regression_is_exit_code_2(tmp_path, capsys):
    base, new = files(tmp_path, document(OURS, PEER), document(OURS, SLOWER))
    assert bench("compare", base, new) == 0
    assert bench("compare", base, new, "--fail-on", "slow>5%") == 2
    assert "SLOWER  +12.5%" in capsys.readouterr().out
    assert bench("compare", base, new, "--fail-on", "slow>20%") == 0
    assert bench("compare", new, base, "--fail-on", "slow>5%") == 0
    assert bench("compare", base, new, "--fail-on", "fast>5%") == 2
    assert "slow>5%" in capsys.readouterr().err


def test_a_row_that_is_gone_is_a_regression(tmp_path, capsys):
    other = replace(OURS, name="other")
    base, new = files(tmp_path, document(OURS, PEER, other), document(OURS, PEER))
    assert bench("compare", base, new, "--fail-on", "slow>5%") == 2
    assert "MISSING" in capsys.readouterr().out


def test_other_machines_are_named(tmp_path, capsys):
    base, new = files(tmp_path, document(OURS, PEER), document(OURS, PEER, machine="another"))
    assert bench("compare", base, new) == 0
    assert "different machines" in capsys.readouterr().err


def test_noise_is_no_regression():
    wide = replace(PEER, speedup=1.6, speedup_low=1.4, speedup_high=1.75)
    (change,) = regress.changes([OURS, PEER], [OURS, wide])
    assert (change.verdict, change.clear) == ("SAME", False)


def test_without_a_common_peer_times_decide():
    slow = replace(OURS, median_ms=9.0, p20_ms=8.8, p80_ms=9.2)
    (change,) = regress.changes([OURS], [slow])
    assert (change.verdict, change.against) == ("SLOWER", "time")


def test_save_and_baseline(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    once = ["op", "peg", "--shape", "H=4,W=4,C=8", *QUICK]
    assert bench(*once, "--save", "main", "--quiet") == 0
    assert (tmp_path / ".benchmarks" / "hybridops" / "main.json").is_file()
    assert capsys.readouterr().out == ""
    assert bench(*once, "--baseline", "main") in (0, 2)  # noise may be anything here
    assert "peg H=4,W=4,C=8" in capsys.readouterr().out


def test_an_interrupted_run_keeps_what_it_has(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    real, calls = jobs.measure, []

    def measure_once(*arguments, **options):
        calls.append(1)
        if len(calls) > 1:
            raise KeyboardInterrupt
        return real(*arguments, **options)

    monkeypatch.setattr(jobs, "measure", measure_once)
    shapes = ["--shape", "H=4,W=4,C=8", "--shape", "H=5,W=4,C=8"]
    code = bench("op", "peg", *shapes, *QUICK, "--json", "r.json", "--save", "main")
    assert code == 130
    assert len(result.load(Path("r.json"))["rows"]) == 2
    assert not Path(".benchmarks").exists()
    assert "interrupted" in capsys.readouterr().err


# lists, suites


def test_list_names_everything(capsys):
    assert bench("list") == 0
    out = capsys.readouterr().out
    for words in ("attention", "levit_stage1", "openvino", "compile-freezing"):
        assert words in out


@pytest.mark.skipif(sys.version_info < (3, 11), reason="suites need tomllib")
@pytest.mark.parametrize("path", sorted(SUITES.glob("*.toml")), ids=lambda path: path.name)
def test_committed_suites_ask_for_what_exists(path):
    planned = jobs.suite_jobs(path, rehearsal=path.name == "gpu.toml")
    assert len(planned) >= 5
    assert len({job.key for job in planned}) == len(planned)


@pytest.mark.skipif(sys.version_info < (3, 11), reason="suites need tomllib")
@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("[[op]\n", "is not TOML"),
        ("", "asks for nothing"),
        ("[[ops]]\nname='peg'", "unknown tables ops"),
        ("[[op]]\nshape='x'", "number 1 has no name"),
        ("[[model]]\nname=['levit_128s']", "number 1: name must be a string, got"),
        ("[[op]]\nname='peg'\ncolour='red'", "unknown key 'colour'"),
        ("[[op]]\nname='peg'\nshape='x'", "no shape 'x' of peg"),
        ("[[model]]\nname='hybridops:cpvt_tiny'\nsize=[true]", "size: must be"),
        (
            "[[model]]\nname='hybridops:cpvt_tiny'\nsize='8by8'",
            "or HxW such as 800x1066, got '8by8'",
        ),
    ],
)
def test_suites_that_cannot_be_served(tmp_path, text, match):
    path = tmp_path / "suite.toml"
    path.write_text(text)
    with pytest.raises(jobs.BadSuite, match=match):
        jobs.suite_jobs(path)


# what the bridge to pytest-benchmark stands on


def test_checked_gives_a_candidate_that_is_right(best_backend):
    for peer in (None, "eager"):
        candidate, finding = measure.checked(op_task.op_task(CASES["peg"][0]), peer)
        assert finding.status == "OK"
        assert candidate.name == (peer or "hybridops")


def test_checked_refuses_a_wrong_kernel(monkeypatch):
    monkeypatch.setattr(op_task._Ours, "forward", lambda self, x: torch.zeros_like(x))
    with pytest.raises(measure.Wrong, match="FAILED: hybridops: the result is off"):
        measure.checked(op_task.op_task(CASES["peg"][0], backend="reference"))


def test_the_bridge_fails_a_wrong_kernel_and_times_a_right_one(tmp_path):
    pytest.importorskip("pytest_benchmark")
    (tmp_path / "test_wrong.py").write_text(
        f"import sys; sys.path.insert(0, {str(SUITES)!r})\n"
        "from test_suites import measure\n"
        "from hybridops.bench import jobs, op_task\n"
        "JOB = jobs.op_jobs('peg', shape=['H=4,W=4,C=8'], threads=[1])[0]\n"
        "def test_right(benchmark): measure(JOB, 'eager', benchmark)\n"
        "def test_wrong(benchmark, monkeypatch):\n"
        "    monkeypatch.setattr(op_task._Ours, 'forward', lambda self, x: x * 0)\n"
        "    measure(JOB, None, benchmark)\n"
    )
    # pytest-benchmark times nothing where it sees a worker of pytest-xdist, which this may be.
    clean = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "--benchmark-json", "b.json"]
        + ["--benchmark-max-time=0.01", "--benchmark-min-rounds=1", "test_wrong.py"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=clean | {"PYTHONPATH": str(SUITES.parent)},
    )
    assert "1 failed, 1 passed" in done.stdout, done.stdout + done.stderr
    found = json.loads((tmp_path / "b.json").read_text())["benchmarks"]
    assert [b["name"] for b in found] == ["test_right"]
