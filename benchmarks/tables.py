"""The tables of docs/performance.md, from the results of several runs of one suite:

    python benchmarks/tables.py benchmarks/results/cpu/targets_avx2_processes*.json

Each run is one of several processes (`hybridops bench run SUITE.toml --processes 3 --json FILE`). A
ratio is that over the processes of all runs, with its 95 % interval (Student's, of logarithms);
behind it stand the runs' own. Two runs agree on a ratio where their intervals overlap.
"""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from hybridops.bench import stats
from hybridops.bench.result import Row, load, rows_of
from hybridops.bench.table import figures

# What was asked for: how many times as long the better of ONNX Runtime and OpenVINO takes
ASKED = {
    **dict.fromkeys(("timm:levit_128s", "timm:levit_256"), 1.2),
    **dict.fromkeys(
        ("hybridops:cpvt_tiny", "timm:deit_tiny_patch16_224", "timm:twins_pcpvt_small"), 1.15
    ),
    "timm:vit_small_r26_s32_224": 1.1,
    **dict.fromkeys(
        ("timm:vit_base_r50_s16_224", "hf:DetrForObjectDetection", "torchvision:resnet50"), 1.0
    ),
}
NAMES = {
    "eager": "eager",
    "sdpa": "SDPA",
    "onnxruntime": "ONNX Runtime",
    "openvino": "OpenVINO",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("results", type=Path, nargs="+", metavar="RESULT.json")
    paths = parser.parse_args().results
    runs = [_comparisons(rows_of(load(path))) for path in paths]
    for path, run in zip(paths, runs, strict=True):
        if len(run) != len(runs[0]):
            parser.error(f"{path} has {len(run)} comparisons, {paths[0]} {len(runs[0])}")
        if not all(rows["hybridops"].median_ms for rows in run):
            parser.error(f"{path}: ours was not timed in every comparison")
        if any(row.processes < 2 for rows in run for row in rows.values()):
            parser.error(f"{path} is of one process; it takes a run with --processes 2 or more")
    comparisons = list(zip(*runs, strict=True))
    peers = [p for p in NAMES if any(p in run for runs in comparisons for run in runs)]
    print(_table(comparisons, peers))
    pairs = [_agree(c, p) for c in comparisons for p in (*peers, "products")]
    print(f"\n{sum(a for a, _ in pairs)} of {sum(n for _, n in pairs)} pairs of ratios agree")


Comparison = dict[str, Row]  # by candidate


def _comparisons(rows: Sequence[Row]) -> list[Comparison]:
    groups = itertools.groupby(rows, lambda row: (row.job, row.key()))
    return [{row.candidate: row for row in group} for _, group in groups]


def _table(comparisons: Sequence[tuple[Comparison, ...]], peers: Sequence[str]) -> str:
    whole = any("products" in run for runs in comparisons for run in runs)
    head = ["model", "batch", "ours, ms"] if whole else ["op, shape", "ours, us", "at its best"]
    head += ["error", *(f"over {NAMES[p]}" for p in peers)]
    head += ["products, of our time", "asked of the better", "leaves all else"] * whole
    head += ["intervals agree"]
    lines = [head, ["---"] * len(head)]
    for runs in comparisons:
        ours = [run["hybridops"] for run in runs]
        first = ours[0]
        error = f"{max(row.error_ratio or 0 for row in ours):.2f}"
        medians = [row.median_ms * (1 if whole else 1e3) for row in ours]
        if whole:
            cells = [first.name.partition(":")[2], str(first.batch), _each(medians), error]
        else:
            shares = [row.percent_of_roof * row.median_ms / row.min_ms for row in ours]
            cells = [f"{first.name} {first.case}", _each(medians), f"{max(shares):.0f} %", error]
        cells += [_ratio(runs, peer) for peer in peers]
        if whole:
            cells += [_ratio(runs, "products", "{:.0%}"), *_verdict(runs, ASKED[first.name])]
        agree, pairs = map(sum, zip(*(_agree(runs, p) for p in (*peers, "products")), strict=True))
        lines.append([*cells, f"{agree} of {pairs}"])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _each(values: Sequence[float]) -> str:
    return " / ".join(map(figures, values))


def _ratio(runs: Sequence[Comparison], peer: str, form: str = "{:.2f}") -> str:
    found = [run[peer].speedup for run in runs if peer in run and run[peer].speedup]
    if len(found) < len(runs):
        return ""
    whole = over_all([run[peer] for run in runs])
    low, value, high = (form.format(x) for x in (whole.low, whole.value, whole.high))
    return f"{value} [{low}, {high}] ({' / '.join(map(form.format, found))})"


def over_all(rows: Sequence[Row]) -> stats.Ratio:
    """One ratio's interval over the processes of all runs, of which each row holds a mean and, in
    its interval, how they differ. Raises ValueError for rows of one process."""
    logs: list[float] = []
    squares = 0.0
    for row in rows:
        if row.processes < 2 or not (row.speedup and row.speedup_high):
            raise ValueError(f"{row.job}: needs the ratio of several processes")
        sd = math.log(row.speedup_high / row.speedup) / stats.student(row.processes)
        squares += (row.processes - 1) * sd**2
        logs += [math.log(row.speedup)] * row.processes
    mean, n = fmean(logs), len(logs)
    squares += sum((x - mean) ** 2 for x in logs)
    factor = math.exp(stats.student(n) * math.sqrt(squares / (n - 1)))
    return stats.Ratio(math.exp(mean), math.exp(mean) / factor, math.exp(mean) * factor)


def _verdict(runs: Sequence[Comparison], asked: float) -> tuple[str, str]:
    """Whether the better peer takes as many times as long, over all processes; and the share of
    the time asked for that products alone would leave."""
    found = [over_all([run[peer] for run in runs]) for peer in ("onnxruntime", "openvino")]
    better = min(found, key=lambda ratio: ratio.value)
    met, sure = better.value >= asked, better.low >= asked or better.high < asked
    verdict = f"{asked}: {'met' if met else 'missed'}" + ", not beyond doubt" * (not sure)
    products = over_all([run["products"] for run in runs]).value
    return verdict, f"{1 - products * asked / better.value:.0%}"


def _agree(runs: Sequence[Comparison], peer: str) -> tuple[int, int]:
    """Pairs of runs whose intervals overlap, and pairs."""
    rows = [run[peer] for run in runs if peer in run and run[peer].speedup]
    pairs = list(itertools.combinations(rows, 2))
    overlap = [
        (a.speedup_low or 0) <= (b.speedup_high or math.inf)
        and (b.speedup_low or 0) <= (a.speedup_high or math.inf)
        for a, b in pairs
    ]
    return sum(overlap), len(pairs)


if __name__ == "__main__":
    main()
