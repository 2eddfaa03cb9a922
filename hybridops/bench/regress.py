"""Two runs against each other: what became faster or slower.

Times of two runs on a shared machine differ by themselves. So a row of ours is judged by its
speed-up over a peer timed in the same run, where both runs have one, and only where the intervals
do not overlap; without a common peer the medians decide, and the p20-p80 bands must not overlap.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from .result import Row


@dataclass
class Change:
    """One row of ours in both runs. factor: new time over old, the machine's own change removed."""

    new: Row
    against: str  # the peer that both runs share, or "time" where there is none
    factor: float
    clear: bool  # beyond the noise of both runs
    verdict: str = "SAME"  # FASTER | SLOWER | SAME


def parse_rule(text: str) -> float:
    """The share in "slow>5%" as 0.05. Raises ValueError for anything else."""
    found = re.fullmatch(r"\s*slow\s*>\s*(\d+(?:\.\d+)?)\s*%\s*", text)
    if not found:
        raise ValueError(f"--fail-on takes a rule such as 'slow>5%', got {text!r}")
    return float(found[1]) / 100


def changes(base: list[Row], new: list[Row], threshold: float = 0.05) -> list[Change]:
    """Every row of ours that both runs timed, with what became of it."""
    olds, news = _comparisons(base), _comparisons(new)
    found = []
    for key, rows in news.items():
        if key in olds and (change := _change(olds[key], rows)):
            if change.clear and change.factor > 1 + threshold:
                change.verdict = "SLOWER"
            elif change.clear and change.factor < 1 - threshold:
                change.verdict = "FASTER"
            found.append(change)
    return found


def missing(base: list[Row], new: list[Row]) -> list[Row]:
    """Rows of ours that the base timed and the new run did not: a regression may hide there."""
    timed = {
        k for k, rows in _comparisons(new).items() if any(r.ours and r.median_ms for r in rows)
    }
    return [r for r in base if r.ours and r.median_ms and r.key() + (r.backend,) not in timed]


def _comparisons(rows: list[Row]) -> dict[tuple, list[Row]]:
    """Rows by comparison; peers' rows carry no backend of ours, so they follow their own ours."""
    found: dict[tuple, list[Row]] = {}
    current: tuple | None = None
    for row in rows:
        if row.ours:
            current = row.key() + (row.backend,)
        if current is not None and row.key() == current[:-1]:
            found.setdefault(current, []).append(row)
    return found


def _change(olds: list[Row], news: list[Row]) -> Change | None:
    old, new = olds[0], news[0]
    if not old.median_ms or not new.median_ms:
        return None
    before = {row.candidate: row for row in olds if row.speedup}
    for row in news:
        past = before.get(row.candidate)
        if past is None or not row.speedup or not past.speedup:
            continue
        clear = _apart(_speedup(past), _speedup(row))
        return Change(new, row.candidate, past.speedup / row.speedup, clear)
    return Change(new, "time", new.median_ms / old.median_ms, _apart(_band(old), _band(new)))


def _apart(a: tuple[float, float], b: tuple[float, float]) -> bool:
    return a[1] < b[0] or b[1] < a[0]


def _speedup(row: Row) -> tuple[float, float]:
    return row.speedup_low or 0.0, row.speedup_high or float("inf")


def _band(row: Row) -> tuple[float, float]:
    return row.p20_ms or 0.0, row.p80_ms or float("inf")
