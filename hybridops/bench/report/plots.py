"""The report's sections with pictures: speed-up, latency, roofline, error, changes."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence

from .. import regress, roof
from ..result import WRONG, Row, in_pixels
from ..table import figures
from . import chart
from .chart import Lane, Log
from .page import Run, case_title, colours, e, empty, grid, many, panel_title, row_title, short

_SIZE = re.compile(r",B=(\d+)$|^B=(\d+),|,B=(\d+)(?=,)")


def speed(runs: Sequence[Run]) -> str:
    panels: dict[str, list[Lane]] = {}
    rows = [row for run in runs for row in run.rows if row.speedup]
    for run in runs:
        for compared in run.comparisons:
            peers = [row for row in compared if row.speedup]
            if not peers:
                continue
            lanes = panels.setdefault(panel_title(run, peers[0]), [])
            lanes.append(Lane(case_title(peers[0])))
            lanes += map(_bar, peers)
    if not panels:
        return empty("No row has a speed-up: nothing was timed beside a peer.")
    sure = [row for row in rows if row.verdict != "AMBIGUOUS"]
    ends = [v for row in sure for v in (row.speedup_low, row.speedup_high) if v]
    axis = Log.around([1.0, *ends, *(row.speedup or 1.0 for row in rows)], 1.1, 1.6)
    axis = Log(max(axis.low, 1e-2), min(axis.high, 1e3))
    key = colours(("FAST", "faster"), ("SAME", "the same"), ("SLOW", "slower"))
    key += colours(("AMBIGUOUS", "not sure enough to say"))
    drawn = [
        (title, _spread(lanes), chart.lanes(_fold(lanes), axis, "×", f"Speed-up: {title}"))
        for title, lanes in panels.items()
    ]
    return (
        "<p>The peer's time over ours, on a logarithmic axis; the thin line is the 95 % interval "
        "from rounds in which both ran, or from how several processes differ.</p>"
        f'<ul class="legend">{key}</ul><br>' + grid(drawn, sum(map(len, panels.values())))
    )


def _bar(row: Row) -> Lane:
    interval = f"{row.speedup_low or 0:.2f}–{row.speedup_high or 0:.2f}"
    return Lane(
        row.candidate,
        row.speedup,
        row.speedup_low,
        row.speedup_high,
        row.verdict,
        f"{row.speedup:.2f}×",
        interval,
    )


def _fold(lanes: list[Lane]) -> list[Lane]:
    """Where every case has the same one peer, its name needs no line of its own."""
    if len({lane.label for lane in lanes if lane.value is not None}) > 1:
        return lanes
    folded = []
    for head, lane in zip(lanes, lanes[1:], strict=False):
        if head.value is None and lane.value is not None:
            folded.append(lane)
            lane.label = head.label
    return folded if 2 * len(folded) == len(lanes) else lanes


def _spread(lanes: Sequence[Lane]) -> str:
    values = [lane.value for lane in lanes if lane.value]
    peers = list(dict.fromkeys(lane.label for lane in lanes if lane.value))
    against = f"against {', '.join(map(short, peers[:5]))}" + ", …" * (len(peers) > 5)
    return f"{against}: {min(values):.2f}× to {max(values):.2f}×"


# latency


def latency(runs: Sequence[Run]) -> str:
    found: dict[tuple[str, str], dict[str, list[chart.Point]]] = {}
    for run in runs:
        for row in run.rows:
            if row.median_ms and row.p20_ms and row.p80_ms and row.verdict not in WRONG:
                times = (row.median_ms, row.p20_ms, row.p80_ms)
                for across, rest, size in _sizes(row):
                    title = f"{panel_title(run, row)} · {rest}"
                    series = found.setdefault((title, across), {})
                    series.setdefault(row.candidate, []).append((size, *times))
    panels = [
        (title, "", chart.latency(series, f"Latency: {title}", across))
        for (title, across), series in found.items()
        if len({p[0] for points in series.values() for p in points}) > 1
    ]
    if not panels:
        return empty("Every case has one size. Several, such as --batch 1,4,16, are drawn here.")
    about = "<p>Medians, with the band from the 20th to the 80th percentile of the rounds.</p>"
    return about + grid(panels)


def _sizes(row: Row) -> Iterable[tuple[str, str, float]]:
    """The axes along which a row may stand in a series: (axis, what is fixed, where it stands)."""
    if row.kind == "model" and row.batch:
        yield "images in the batch", in_pixels(row.case, " × "), row.batch
        if row.case.isdigit() and int(row.case):
            yield "image size", f"batch {row.batch}", int(row.case)
    elif row.batch:
        yield "images in the batch", _SIZE.sub("", row.case), row.batch


# roofline


def roofline(runs: Sequence[Run]) -> str:
    panels: dict[tuple, list[tuple[str, float, float, str]]] = {}
    for i, run in enumerate(runs):
        for row in run.rows:
            if row.gflops and row.intensity and row.verdict not in WRONG:
                share = f", {row.percent_of_roof:.0f} % of the roof" if row.percent_of_roof else ""
                tip = f"{row_title(row)}, {row.candidate}: {figures(row.gflops)} GFLOP/s{share}"
                panels.setdefault((i, f"{row.kind}s", row.dtype, row.threads), []).append(
                    (row.candidate, row.intensity, row.gflops, tip)
                )
    if not panels:
        return empty("No row has a count of operations: nothing to hold against the roof.")
    drawn, known = [], True
    for (i, kind, dtype, threads), points in panels.items():
        ours = {row.candidate for row in runs[i].rows if row.ours}
        points.sort(key=lambda p: p[0] not in ours)  # the colour of ours is for the first one
        peak, speeds = _ceilings(runs[i].env, dtype, threads)
        known &= peak is not None
        name = " · ".join(filter(None, [kind, dtype, many(threads, "thread"), runs[i].name]))
        drawn.append((name, "", chart.roofline(points, peak, speeds, f"Roofline: {name}")))
    lacks = "" if known else " Where no roof is drawn, none was measured for that dtype."
    return (
        "<p>Work per second against work per byte. The lines are this machine's own, measured: "
        "bandwidth of each cache and of memory, and the peak of the arithmetic. Bytes are the "
        f"algorithm's least, once each.{lacks}</p>" + grid(drawn)
    )


def _ceilings(env: dict, dtype: str, threads: int) -> tuple[float | None, dict[str, float]]:
    try:
        known = roof.Roof.from_json(env.get("roof"))
    except (ValueError, TypeError):
        return None, {}
    speeds = {level: rates.get(threads) for level, rates in known.bandwidth.items()}
    peak = known.flops.get(dtype, {}).get(threads)
    return peak, {level: speed for level, speed in speeds.items() if speed}


# error


def error(runs: Sequence[Run]) -> str:
    found: dict[str, dict[str, Lane]] = {}
    ratios = [2.0]
    for run in runs:
        for row in run.rows:
            missed = row.verdict == "FAILED" and row.error_ratio is None and row.error is None
            if row.error_ratio is None and not (missed and row.ours):
                continue
            label = f"{row.mode} {row.dtype}" + f", {run.name}" * bool(run.name)
            lane = found.setdefault(row.name, {}).setdefault(label, Lane(label))
            ratio = math.inf if row.error_ratio is None else row.error_ratio
            ratios += [ratio] if 0 < ratio < math.inf else []
            kind = "wrong" if row.verdict == "FAILED" else "c0" if row.ours else "c1 peer"
            shown = f"{ratio:.2f}" if ratio < math.inf else "not finite"
            tip = f"{row_title(row)}, {row.candidate}: {shown} × torch's error"
            lane.dots.append((ratio, f"point {kind}", tip))
            if row.ours and row.error_limit:
                lane.limit = row.error_limit
    if not found:
        return empty("No row was checked.")
    lanes = [lane for name, by in found.items() for lane in (Lane(name), *by.values())]
    for lane in lanes:
        lane.dots.sort(key=lambda d: "peer" not in d[1])
        mine = [d[0] for d in lane.dots if "peer" not in d[1]]
        lane.text = f"≤ {max(mine):.2f}" if mine and max(mine) < math.inf else ""
    axis = Log.around([0.5, 3.2, *ratios], 1.15)
    axis = Log(max(axis.low, 0.02), min(axis.high, 200.0))
    key = '<li><i class="key c0"></i>ours</li><li><i class="key hollow c1"></i>peers</li>'
    key += '<li><i class="key line"></i>the limit for ours: 2×, with gradients 3×</li>'
    picture = chart.lanes(lanes, axis, "×", "Error over torch's own", mark=None)
    return (
        "<p>The largest error against float64, over the error that torch eager makes in the same "
        "dtype on the same input. One dot per case; at the right, the worst of ours.</p>"
        f'<ul class="legend">{key}</ul><br><div class="panel">{picture}</div>'
    )


# changes


def changes(runs: Sequence[Run]) -> str:
    machines: dict[str, list[Run]] = {}
    for i, run in enumerate(runs):
        machines.setdefault(run.env.get("machine") or f"unknown {i}", []).append(run)
    pairs = [(found[0], found[-1]) for found in machines.values() if found[1:]]
    if not pairs:
        return empty("The runs are from different machines; times cannot be held together.")
    bodies = []
    for base, new in pairs:
        found = sorted(regress.changes(base.rows, new.rows), key=lambda c: -c.factor)
        title = f"{new.name} against {base.name}"
        if not found:
            bodies.append((title, "", empty("No timed row of ours in common.")))
            continue
        named: dict[str, list[Lane]] = {}
        for c in found:
            lane = Lane(
                f"{case_title(c.new)}, {c.new.mode} {c.new.dtype}", 1 / c.factor, kind=c.verdict
            )
            lane.text = f"{100 * (1 / c.factor - 1):+.1f} %"
            lane.detail = "" if c.clear else "in the noise"
            named.setdefault(c.new.name, [Lane(c.new.name)]).append(lane)
        lanes = [lane for group in named.values() for lane in group]
        axis = Log.around([1.0, *(1 / c.factor for c in found)], 1.1, 1.6)
        counts = {v: sum(c.verdict == v for c in found) for v in ("SLOWER", "FASTER", "SAME")}
        said = ", ".join(f"{n} {v.lower()}" for v, n in counts.items() if n)
        lost = regress.missing(base.rows, new.rows)
        gone = "".join(f"<p>Not timed any more: {e(row_title(row))}</p>" for row in lost[:20])
        bodies.append(
            (title, said, chart.lanes(lanes, axis, "×", f"Changes: {title}", kind="wide") + gone)
        )
    key = colours(("FASTER", "faster"), ("SLOWER", "slower"), ("SAME", "the same"))
    return (
        "<p>How fast ours is in the later run, over the earlier one of the same machine. Where "
        "both runs timed a peer, the machine's own change is taken out. Slower or faster means by "
        f'more than 5 %, with intervals that do not overlap.</p><ul class="legend">{key}</ul><br>'
        + grid(bodies)
    )
