"""The HTML report: complete, well formed, fetches nothing, and text from files stays text."""

from __future__ import annotations

import html.parser
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from hybridops import cli
from hybridops.bench import result
from hybridops.bench.report import report_html, write_report
from hybridops.bench.report.chart import Log
from hybridops.bench.result import Row

ROOF = {
    "flops": {"fp32": {"2": 236.0}},
    "bandwidth": {"L1": {"2": 548.0}, "L2": {"2": 234.0}, "DRAM": {"2": 50.9}},
    "cache_bytes": {"L1": 32768, "L2": 1048576},
    "machine": "m",
    "date": "2026-11-24",
}
ENV = {
    "hybridops": "0.1.0",
    "torch": "2.13.0",
    "python": "3.11.7",
    "cpu": "A CPU",
    "cores": 2,
    "machine": "m",
    "date": "2026-11-24T20:00:00+00:00",
    "seed": 0,
    "peers": {},
    "variables": {},
    "isa": "avx2",
    "torch_isa": "AVX2",
    "load": 0.1,
    "roof": ROOF,
}
OURS = Row(
    kind="model",
    name="timm:levit_128s",
    case="224",
    dtype="fp32",
    mode="infer",
    batch=1,
    threads=2,
    backend="cpu",
    candidate="hybridops",
    ours=True,
    verdict="OK",
    repro="hybridops bench model timm:levit_128s --batch 1",
    median_ms=7.0,
    p20_ms=6.5,
    p80_ms=8.0,
    gflops=88.0,
    intensity=18.0,
    percent_of_roof=37.0,
    limit="compute",
    error=4e-6,
    error_ratio=0.8,
    error_limit=2.0,
)
PEER = replace(
    OURS,
    candidate="eager",
    ours=False,
    backend="torch",
    verdict="FAST",
    repro="hybridops bench model timm:levit_128s --batch 1 --peers eager",
    median_ms=12.6,
    gflops=48.9,
    error_ratio=1.0,
    error_limit=None,
    speedup=1.8,
    speedup_low=1.7,
    speedup_high=1.9,
)


def document(*rows: Row, **env) -> dict:
    return result.document(ENV | env, rows)


class Page(html.parser.HTMLParser):
    """Every tag is closed in order; elements and their attributes are kept."""

    VOID = ("meta", "br", "img", "link", "input")

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict]] = []
        self.words: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.words.append(data)

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.tags)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def test_every_row_and_the_line_that_repeats_it():
    page = Page(report_html([document(OURS, PEER)]))
    for words in ("A CPU", "1.80×", "1.70–1.90", "FAST", "37 %", "timm:levit_128s · infer · fp32"):
        assert words in page.text
    code = re.findall(r"<code>(.*?)</code>", report_html([document(OURS, PEER)]))
    lines = [re.sub(r"<.*?>", "", line) for line in code]
    assert lines == [OURS.repro, PEER.repro]


def test_it_fetches_nothing_and_runs_nothing():
    text = report_html([document(OURS, PEER)])
    page = Page(text)
    assert page.count("script") == page.count("img") == page.count("link") == 0
    assert "url(" not in text
    assert "@import" not in text
    policy = [a["content"] for tag, a in page.tags if a.get("http-equiv")]
    assert policy == ["default-src 'none'; style-src 'unsafe-inline'"]
    for _, attributes in page.tags:
        assert not [name for name in attributes if name.startswith("on") or name == "src"]
        assert attributes.get("href", "#").startswith("#")


def test_every_picture_says_what_it_shows():
    text = report_html([document(OURS, PEER)])
    pictures = re.findall(r'<svg[^>]*role="img".*?</desc>', text, re.S)
    assert len(pictures) >= 3
    for picture in pictures:
        assert re.search(r"<title id=\"t\d+\">.+</title><desc id=\"d\d+\">.+</desc>", picture)
    for tag, attributes in Page(text).tags:
        assert tag != "th" or "scope" in attributes


HOSTILE = "</style></title><script>alert(1)</script>\"'><img src=x onerror=alert(2)>"


@pytest.mark.parametrize("key", ["name", "case", "dtype", "candidate", "reason", "repro", "layout"])
def test_text_from_files_stays_text(key):
    rows = [replace(OURS, **{key: HOSTILE}), replace(PEER, **{key: HOSTILE})]
    page = Page(report_html([document(*rows)]))
    assert page.count("script") == page.count("img") == 0
    assert not any("onerror" in attributes for _, attributes in page.tags)


def test_text_of_the_environment_stays_text():
    env = {"cpu": HOSTILE, "peers": {HOSTILE: HOSTILE}, "variables": {"A": HOSTILE}, "git": HOSTILE}
    page = Page(report_html([document(OURS, **env), document(OURS, **env)], [HOSTILE, HOSTILE]))
    assert page.count("script") == page.count("img") == 0


def test_wrong_rows_come_first():
    wrong = replace(OURS, verdict="FAILED", reason="the result is off", median_ms=None)
    page = Page(report_html([document(wrong)]))
    assert page.text.index("the result is off") < page.text.index("At a glance")
    assert "No row has a speed-up" in page.text


@pytest.mark.parametrize(
    "doc",
    [document(), document(OURS), document(OURS, PEER, roof=None), document(PEER, roof={"a": 1})],
)
def test_what_lacks_is_said(doc):
    page = Page(report_html([doc]))
    assert "Every case has one size" in page.text
    assert "nan" not in page.text.lower().split()


def test_several_batches_are_a_line():
    rows = [
        replace(row, batch=n, **{key: getattr(row, key) * n for key in TIMES})
        for n in (1, 4, 16)
        for row in (OURS, PEER)
    ]
    text = report_html([document(*rows)])
    assert "images in the batch" in text
    assert text.count('<polygon class="band') == 2


TIMES = ("median_ms", "p20_ms", "p80_ms")


def test_two_runs_of_one_machine_are_compared():
    slower = replace(PEER, speedup=1.2, speedup_low=1.15, speedup_high=1.25)
    docs = [document(OURS, PEER), document(OURS, slower)]
    page = Page(report_html(docs, ["old.json", "new.json"]))
    assert "new.json against old.json" in page.text
    assert "1 slower" in page.text or "-33.3 %" in page.text
    docs[1]["env"] = ENV | {"machine": "another"}
    assert "different machines" in Page(report_html(docs)).text


def test_parts_of_one_run_are_one():
    other = [replace(row, name="timm:levit_256") for row in (OURS, PEER)]
    page = Page(report_html([document(OURS, PEER), document(*other)], ["a.json", "b.json"]))
    assert "Changes" not in page.text
    assert "a.json" not in page.text
    assert page.text.count("The measured roof") == 1


def test_thousands_of_rows_start_closed():
    rows = [replace(row, case=str(n)) for n in range(1, 1000) for row in (OURS, PEER)]
    page = Page(report_html([document(*rows)]))
    panels = [attributes for tag, attributes in page.tags if tag == "details"]
    assert panels
    assert not any("open" in attributes for attributes in panels)
    assert "999 OK, 999 FAST" in page.text


def test_a_report_is_written_whole_or_not_at_all(tmp_path):
    good, bad, out = tmp_path / "good.json", tmp_path / "bad.json", tmp_path / "report.html"
    result.write_json(document(OURS, PEER), good)
    bad.write_text("{")
    with pytest.raises(result.BadResult, match="not JSON"):
        write_report([good, bad], out)
    assert not out.exists()
    assert cli.main(["bench", "report", str(good), "-o", str(out)]) == 0
    assert out.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "bad.json",
        "good.json",
        "report.html",
    ]


@pytest.mark.parametrize(
    ("low", "high"), [(0.9, 1.1), (0.5, 7), (1e-3, 1e4), (3, 3.2), (1e-12, 1e12), (80, 950)]
)
def test_axes_have_few_ticks(low, high):
    axis = Log(low, high)
    ticks = axis.ticks(6)
    assert len(ticks) <= 6
    assert ticks == sorted(set(ticks))
    assert all(low <= tick <= high for tick in ticks)
    assert axis.share(low) == 0
    assert axis.share(high) == 1
    assert axis.share(low * 0.5) == 0


def test_an_axis_around_nothing():
    assert Log.around([]).high > Log.around([]).low > 0
    assert Log.around([0.0, float("inf"), 2.0]).low < 2 < Log.around([2.0]).high


def test_files_from_before_device_and_job_are_read(tmp_path):
    kept = Path(__file__).parents[1] / "benchmarks/results/cpu/models.json"
    doc = json.loads(kept.read_text())
    for row in doc["rows"]:
        del row["device"], row["job"]
    old = tmp_path / "old.json"
    old.write_text(json.dumps(doc))
    assert {row["device"] for row in result.load(old)["rows"]} == {"cpu"}
