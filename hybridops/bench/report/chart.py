"""The report's pictures, as inline SVG that needs no script.

Widths are percentages and heights pixels, without a viewBox: a picture fills a desktop or a phone
and its text stays as large as the page's. Colours are the style sheet's (report.css), by class.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from html import escape
from itertools import count

from ..table import figures

LANE, AXIS = 22, 26  # pixels: one line of text, the figures under an axis
_MULTIPLES = (
    (1.0,),
    (1.0, 3.0),
    (1.0, 2.0, 5.0),
    (1.0, 1.5, 2.0, 3.0, 5.0, 7.0),
    (1.0, 1.1, 1.25, 1.5, 1.75, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 8.0, 9.0),
)
_ids = count(1)


@dataclass(frozen=True)
class Log:
    """A logarithmic axis from low to high."""

    low: float
    high: float

    @classmethod
    def around(cls, values: Iterable[float], pad: float = 1.15, least: float = 1.5) -> Log:
        """Room for all values, `pad` at both ends; high over low is at least `least`."""
        kept = [v for v in values if 0 < v < math.inf]
        low, high = (min(kept) / pad, max(kept) * pad) if kept else (1.0, 1.0)
        widen = math.sqrt(max(1.0, least * low / high))
        return cls(low / widen, high * widen)

    def share(self, value: float) -> float:
        """Where value lies, from 0 (low) to 1 (high); what lies outside is put on the edge."""
        if value <= self.low:
            return 0.0
        if value >= self.high:
            return 1.0
        return math.log(value / self.low) / math.log(self.high / self.low)

    def ticks(self, most: int = 6) -> list[float]:
        """Round numbers inside: as many as there can be up to `most`."""
        decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        best = [10.0**d for d in decades if self.low <= 10.0**d <= self.high]
        best = best[:: math.ceil(len(best) / most) or 1]
        for multiples in _MULTIPLES:
            found = [m * 10.0**d for d in decades for m in multiples]
            found = [v for v in found if self.low <= v <= self.high]
            if len(best) < len(found) <= most:
                best = found
        return best


@dataclass
class Lane:
    """One line of a bar or dot chart. value None: a heading."""

    label: str
    value: float | None = None
    low: float | None = None
    high: float | None = None
    kind: str = ""  # the class that colours it
    text: str = ""  # beside it, at the right
    detail: str = ""  # the same, dropped where there is little room
    dots: list[tuple[float, str, str]] = field(default_factory=list)  # (value, classes, tooltip)
    limit: float | None = None


def percent(share: float) -> str:
    return f"{100 * share:.2f}%".replace(".00%", "%")


def number(x: float) -> str:
    """An axis figure: 0.5, 20, 1500, 20k, 3M."""
    for unit, size in (("M", 1e6), ("k", 1e3)):
        if x >= 10 * size or (unit == "M" and x >= size):
            return f"{x / size:g}{unit}"
    return f"{x:.3g}"


def svg(body: Iterable[str], height: float, title: str, desc: str, kind: str = "") -> str:
    """The picture with what a screen reader says of it."""
    n = next(_ids)
    return (
        f'<svg class="{kind}" role="img" width="100%" height="{height:g}" '
        f'aria-labelledby="t{n} d{n}"><title id="t{n}">{escape(title)}</title>'
        f'<desc id="d{n}">{escape(desc)}</desc>{"".join(body)}</svg>'
    )


def text(x: str, y: float, words: str, kind: str = "tick", anchor: str = "middle") -> str:
    return f'<text class="{kind}" x="{x}" y="{y:g}" text-anchor="{anchor}">{escape(words)}</text>'


def line(x1: str, y1: float, x2: str, y2: float, kind: str) -> str:
    return f'<line class="{kind}" x1="{x1}" y1="{y1:g}" x2="{x2}" y2="{y2:g}"/>'


def dot(x: str, y: float, kind: str, tip: str, r: float = 4) -> str:
    return f'<circle class="{kind}" cx="{x}" cy="{y:g}" r="{r:g}">{_tip(tip)}</circle>'


def _tip(words: str) -> str:
    return f"<title>{escape(words)}</title>"


def lanes(
    rows: Sequence[Lane],
    axis: Log,
    unit: str,
    title: str,
    mark: float | None = 1.0,
    kind: str = "",
) -> str:
    """Labels, a picture of bars from `mark` or of dots, and figures: three columns of one grid."""
    height = LANE * len(rows)
    body = []
    for tick in axis.ticks(5):
        x = percent(axis.share(tick))
        body.append(line(x, 0, x, height, "grid"))
        body.append(text(x, height + 17, number(tick) + unit))
    cells = []
    for i, row in enumerate(rows):
        top, middle = LANE * i, LANE * (i + 0.5)
        place = f'style="grid-row:{i + 1}"'
        if row.value is None and not row.dots:
            cells.append(f'<b class="head" {place} title="{escape(row.label)}">')
            cells.append(f"{escape(row.label)}</b>")
            continue
        cells.append(f'<span class="label" {place} title="{escape(row.label)}">')
        cells.append(f"{escape(row.label)}</span>")
        if row.limit is not None:
            x = percent(axis.share(row.limit))
            body.append(line(x, top, x, top + LANE, "limit"))
        for value, kind, tip in row.dots:
            body.append(dot(percent(axis.share(value)), middle, kind, tip))
        if row.value is not None:
            body += _bar(row, axis, middle, 1.0 if mark is None else mark)
        if row.text:
            detail = f" <i>{escape(row.detail)}</i>" if row.detail else ""
            cells.append(f'<span class="value" {place}>{escape(row.text)}{detail}</span>')
    if mark is not None:
        x = percent(axis.share(mark))
        body.append(line(x, 0, x, height, "mark"))
    heads = {i for i, row in enumerate(rows) if row.value is None and not row.dots}
    said = "; ".join(
        f"{row.label} {row.text} {row.detail}".rstrip()
        for i, row in enumerate(rows[:40])
        if i not in heads
    )
    picture = svg(body, height + AXIS, title, said, "lanes-plot")
    return (
        f'<div class="lanes {kind}" style="--n:{len(rows)}">{"".join(cells)}'
        f'<div class="plot">{picture}</div></div>'
    )


def _bar(row: Lane, axis: Log, y: float, mark: float) -> list[str]:
    assert row.value is not None
    a, b = sorted((axis.share(mark), axis.share(row.value)))
    body = [
        f'<rect class="bar {row.kind}" x="{percent(a)}" y="{y - 5:g}" '
        f'width="{percent(max(b - a, 0.002))}" height="10" rx="1.5">'
        f"{_tip(f'{row.label}: {row.text} {row.detail}'.strip())}</rect>"
    ]
    if row.low is not None and row.high is not None:
        ends = [percent(axis.share(v)) for v in (row.low, row.high)]
        body.append(line(ends[0], y, ends[1], y, "whisker"))
        for end, value in zip(ends, (row.low, row.high), strict=True):
            if axis.low <= value <= axis.high:  # no end is drawn where the picture ends first
                body.append(line(end, y - 3, end, y + 3, "whisker"))
    return body


Point = tuple[float, float, float, float]  # x, median, p20, p80


def latency(series: dict[str, list[Point]], title: str, across: str) -> str:
    """Median milliseconds against a size, with the band from p20 to p80, per candidate."""
    height = 230
    points = [p for found in series.values() for p in found]
    xs = sorted({p[0] for p in points})
    x_axis = Log(xs[0] / 1.12, xs[-1] * 1.12)
    y_axis = Log.around([v for p in points for v in p[1:]], 1.2, 4)

    def y(value: float) -> float:
        return height * (1 - y_axis.share(value))

    body = _grid([], y_axis, height, " ms")
    shown = xs if len(xs) <= 6 else xs[:: math.ceil(len(xs) / 6)]
    for x in shown:
        at = percent(x_axis.share(x))
        body += [line(at, 0, at, height, "grid"), text(at, height + 17, number(x))]
    body.append(text("50%", height + 34, across, "axis"))
    for i, (name, found) in enumerate(series.items()):
        kind = colour(name, i)
        found = sorted(found)
        edge = [(p[0], p[3]) for p in found] + [(p[0], p[2]) for p in reversed(found)]
        corners = " ".join(f"{1000 * x_axis.share(a):.1f},{y(b):.1f}" for a, b in edge)
        body.append(
            f'<svg width="100%" height="{height}" viewBox="0 0 1000 {height}" '
            f'preserveAspectRatio="none"><polygon class="band {kind}" points="{corners}"/></svg>'
        )
        for p, q in zip(found, found[1:], strict=False):
            ends = [(percent(x_axis.share(v[0])), y(v[1])) for v in (p, q)]
            body.append(line(*ends[0], *ends[1], f"series {kind}"))
        for p in found:
            tip = f"{name}, {number(p[0])}: {figures(p[1])} ms (p20 {figures(p[2])}, p80 "
            at = percent(x_axis.share(p[0]))
            body.append(dot(at, y(p[1]), f"point {kind}", f"{tip}{figures(p[3])})", 3.5))
    said = "; ".join(
        f"{name}: " + ", ".join(f"{figures(p[1])} ms at {number(p[0])}" for p in sorted(found))
        for name, found in series.items()
    )
    picture = svg(body, height, title, said, "free")
    return f'<div class="plot axes two">{picture}</div>{legend(list(series), "")}'


def roofline(
    points: Sequence[tuple[str, float, float, str]],
    peak: float | None,
    speeds: dict[str, float],
    title: str,
) -> str:
    """points (candidate, FLOP per byte, GFLOP/s, tooltip) under the measured roof (GFLOP/s, GB/s).

    Ours are filled and drawn last, peers hollow.
    """
    height = 300
    ridge = [peak / speed for speed in speeds.values()] if peak else []
    x_axis = Log.around([p[1] for p in points] + ridge, 1.6, 10)
    y_axis = Log.around([p[2] for p in points] + ([peak] if peak else []), 1.9, 10)

    def y(value: float) -> float:
        return height * (1 - y_axis.share(value))

    body = _grid([], y_axis, height, "")
    for tick in x_axis.ticks(5):
        at = percent(x_axis.share(tick))
        body += [line(at, 0, at, height, "grid"), text(at, height + 17, number(tick))]
    body.append(text("50%", height + 34, "FLOP per byte", "axis"))
    body.append(text("0", -10, "GFLOP/s", "axis", "start"))
    tops: list[tuple[float, str]] = []  # where each line meets the peak
    for level, speed in speeds.items():
        # from the left edge, or from where the line comes in at the bottom, up to the peak
        a = max(x_axis.low, y_axis.low / speed)
        b = min(x_axis.high, (peak or y_axis.high) / speed)
        if a < b:
            ends = [(percent(x_axis.share(x)), y(speed * x)) for x in (a, b)]
            body.append(line(*ends[0], *ends[1], "roof"))
            top, words = x_axis.share(b), level
            if tops and abs(tops[-1][0] - top) < 0.08:  # neighbours share one label
                words = f"{tops.pop()[1]}, {level}"
            tops.append((top, words))
    for top, words in tops:
        body.append(text(percent(top), y(peak or y_axis.high) - 6, words, "roof-name"))
    if peak:
        least = min((peak / s for s in speeds.values()), default=x_axis.low)
        body.append(line(percent(x_axis.share(least)), y(peak), "100%", y(peak), "roof"))
        words = f"peak {figures(peak)} GFLOP/s"
        body.append(text("99%", y(peak) - 6, words, "roof-name", "end"))
    names = list(dict.fromkeys(p[0] for p in points))
    for i in reversed(range(len(names))):
        for name, intensity, rate, tip in points:
            if name == names[i]:
                kind = f"{colour(name, i)} {'ours' if i == 0 else 'peer'}"
                at = percent(x_axis.share(intensity))
                body.append(dot(at, y(rate), f"point {kind}", tip, 4.5 if i == 0 else 4))
    said = "; ".join(p[3] for p in points[:40])
    picture = svg(body, height, title, said, "free")
    listed = " · ".join(f"{name} {figures(speed)}" for name, speed in speeds.items())
    roofs = f'<p class="note">measured: {escape(listed)} GB/s</p>' if listed else ""
    return f'<div class="plot axes two tall">{picture}</div>{legend(names)}{roofs}'


def _grid(body: list[str], y_axis: Log, height: int, unit: str) -> list[str]:
    for tick in y_axis.ticks(5):
        y = height * (1 - y_axis.share(tick))
        body += [line("0", y, "100%", y, "grid")]
        body.append(text("-8", y + 4, number(tick) + unit, "tick", "end"))
    return body


_COLOURS = {"eager": "c1", "compile": "c2", "onnxruntime": "c3", "openvino": "c4", "sdpa": "c5"}


def colour(candidate: str, position: int) -> str:
    """The class of a candidate: one for ours, the same one everywhere for a known peer."""
    return "c0" if position == 0 else _COLOURS.get(candidate, f"c{5 + position % 3}")


def legend(names: Sequence[str], peers: str = " hollow") -> str:
    """names[0] is ours."""
    items = (
        f'<li><i class="key {colour(name, i)}{peers if i else ""}"></i>{escape(name)}</li>'
        for i, name in enumerate(names)
    )
    return f'<ul class="legend">{"".join(items)}</ul>'
