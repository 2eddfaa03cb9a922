"""A run on the terminal: one aligned table, a progress bar where somebody watches, no colour."""

from __future__ import annotations

import math
import shutil
import sys
import time
from collections.abc import Sequence
from typing import TextIO

from .regress import Change
from .result import Row, in_pixels

_TARGET = "target"  # a column only where a row has one
_COLUMNS = (
    "candidate",
    "ms",
    "p20-p80",
    "GFLOP/s",
    "GB/s",
    "roof",
    "error",
    "x torch's",
    "speed-up",
)


def table(rows: Sequence[Row]) -> str:
    """Every comparison under a heading of its own; what was not timed says why."""
    blocks: list[tuple[str, list[list[str]]]] = []
    last = None
    lines: list[list[str]] = []
    for row in rows:
        if row.ours or row.key() != last:
            blocks.append((_heading(row), lines := []))
            last = row.key()
        lines.append(_cells(row))
    columns = list(_COLUMNS)
    if any(row.target_ms or row.target_speedup for row in rows):
        columns.insert(2, _TARGET)
        every = (line for _, lines in blocks for line in lines)
        for row, line in zip(rows, every, strict=True):
            line.insert(2, _target(row))
    widths = [
        max([len(columns[i])] + [len(line[i]) for _, lines in blocks for line in lines])
        for i in range(len(columns))
    ]
    return "\n".join(
        line for heading, lines in blocks for line in _block(heading, columns, lines, widths)
    )


def _target(row: Row) -> str:
    """What was asked for, a time or a speed-up over this peer, and whether it was reached."""
    if row.target_speedup:
        asked = _both(row.target_speedup, row.stretch_speedup) + "x"
        return asked + _reached(row.speedup, row.target_speedup, row.stretch_speedup)
    if row.target_ms:
        asked, figure = _both(row.target_ms, row.stretch_ms), row.median_ms
        less = [-x if x else None for x in (figure, row.target_ms, row.stretch_ms)]
        return asked + _reached(*less)
    return ""


def _both(target: float, stretch: float | None) -> str:
    return "/".join(dict.fromkeys(figures(x) for x in (target, stretch) if x))


def _reached(found: float | None, target: float | None, stretch: float | None) -> str:
    """More is better here."""
    if found is None or target is None:
        return ""
    if stretch is not None and stretch > target and found >= stretch:
        return " stretch"
    return " reached" if found >= target else " missed"


def _block(
    heading: str, columns: Sequence[str], lines: list[list[str]], widths: list[int]
) -> list[str]:
    def align(cells: Sequence[str]) -> str:
        first, *rest = (
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(cells, widths, strict=False))
        )
        return "  ".join(["  " + first, *rest, *cells[len(widths) :]]).rstrip()

    return [heading, align(columns), *map(align, lines), ""]


def _heading(row: Row) -> str:
    parts = [
        row.name,
        row.case if row.kind == "op" else in_pixels(row.case),
        row.mode,
        row.dtype,
    ]
    if row.batch is not None and row.kind == "model":
        parts.insert(2, f"batch {row.batch}")
    if row.device == "cpu":
        parts.append(f"{row.threads} thread{'s' * (row.threads != 1)}")
    else:
        parts.append(row.device)
    if row.layout != "contiguous":
        parts.append(row.layout)
    parts.append(f"{row.cache} cache, {row.clock}")
    if row.processes > 1:
        parts.append(f"{row.processes} processes")
    return "  ".join(parts)


def _cells(row: Row) -> list[str]:
    name = f"{row.candidate} ({row.backend})" if row.ours and row.backend else row.candidate
    if row.median_ms is None:
        return [name, *[""] * (len(_COLUMNS) - 2), row.verdict, row.reason or ""]
    ratio = ""
    if row.speedup is not None:
        ratio = f"{row.speedup:.2f} [{row.speedup_low:.2f}, {row.speedup_high:.2f}] {row.verdict:9}"
    elif row.verdict != "OK":
        ratio = row.verdict
    cells = [
        name,
        figures(row.median_ms),
        f"{figures(row.p20_ms)}-{figures(row.p80_ms)}",
        figures(row.gflops),
        figures(row.gbps),
        f"{row.percent_of_roof:.0f}% {row.limit}" if row.percent_of_roof is not None else "",
        f"{row.error:.1e}" if row.error is not None else "",
        f"{row.error_ratio:.2f}" if row.error_ratio is not None else "",
        ratio,
    ]
    extra = []
    if row.images_per_s:
        extra.append(f"{figures(row.images_per_s)} images/s")
    if row.peak_mb:
        extra.append(f"{row.peak_mb:.0f} MB at its peak")
    if row.reason:
        extra.append(row.reason)
    return [*cells, ", ".join(extra)]


def figures(x: float | None) -> str:
    """Three significant figures, never in powers of ten."""
    if x is None or not math.isfinite(x):
        return ""
    if x == 0:
        return "0"
    digits = 2 - math.floor(math.log10(abs(x)))
    return f"{x:.{max(0, digits)}f}"


def change_table(changes: Sequence[Change]) -> str:
    """Rows of two runs, slowest change first."""
    lines = []
    for change in sorted(changes, key=lambda c: -c.factor):
        row = change.new
        what = " ".join([row.name, row.case, row.mode, row.dtype])
        batch = f" batch {row.batch}" if row.batch is not None else ""
        sure = "" if change.clear else "  (within the noise)"
        than = f"measured against {change.against}" if change.against != "time" else "by its time"
        lines.append(
            f"{change.verdict:7}{change.factor - 1:+7.1%}  {what}{batch}, {row.threads} threads, "
            f"{than}{sure}"
        )
    return "\n".join(lines)


class Bar:
    """A progress bar on stderr; plain lines when that is not a terminal, nothing when quiet."""

    def __init__(self, total: int, quiet: bool = False, stream: TextIO | None = None):
        self.total, self.done, self.quiet = max(1, total), 0, quiet
        self.stream = stream or sys.stderr
        self.live = self.stream.isatty()
        self.title, self._last = "", 0.0

    def start(self, title: str) -> None:
        self.title = title
        if not self.quiet and not self.live:
            print(f"[{self.done + 1}/{self.total}] {title}", file=self.stream, flush=True)

    def __call__(self, share: float, text: str) -> None:
        now = time.monotonic()
        if self.quiet or not self.live or now - self._last < 0.1:
            return
        self._last = now
        whole = (self.done + min(max(share, 0.0), 1.0)) / self.total
        filled = "#" * round(20 * whole)
        line = f"[{filled:<20}] {whole:4.0%}  {self.title}: {text}"
        width = shutil.get_terminal_size().columns - 1
        self.stream.write("\r\033[K" + line[:width])
        self.stream.flush()

    def finish(self) -> None:
        """One comparison more is done."""
        self.done += 1
        self.clear()

    def clear(self) -> None:
        if self.live and not self.quiet:
            self.stream.write("\r\033[K")
            self.stream.flush()
