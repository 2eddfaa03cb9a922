"""What a set of timings says: medians, quantiles, and how sure a ratio is.

The ratio of two candidates is the ratio of their medians over rounds in which both were timed. Its
95 % interval comes from a moving-block bootstrap over those rounds: rounds are drawn in runs of
neighbours, because a shared machine is slow for a while, not for one round. A handful of rounds
drawn again and again looks surer than it is: where there are few, and for the ratios that several
processes found, the interval is Student's, of the logarithms.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

RESAMPLES = 1000
# Student's t, 97.5 %, for 1, 2, ... degrees of freedom
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.16)
FEW = len(_T) + 1  # values, of which Student's interval is taken


class Summary(NamedTuple):
    """Seconds per call, over `n` rounds."""

    median: float
    p20: float
    p80: float
    iqr: float
    least: float
    n: int


class Ratio(NamedTuple):
    """A ratio of medians and its 95 % interval."""

    value: float
    low: float
    high: float

    @property
    def noise(self) -> float:
        """Half the width of the interval, relative to the ratio."""
        return (self.high - self.low) / 2 / self.value


def summary(seconds: Sequence[float]) -> Summary:
    p20, p25, median, p75, p80 = np.quantile(seconds, (0.2, 0.25, 0.5, 0.75, 0.8))
    return Summary(
        float(median), float(p20), float(p80), float(p75 - p25), min(seconds), len(seconds)
    )


def ratio(
    over: Sequence[float], under: Sequence[float], *, seed: int = 0, resamples: int = RESAMPLES
) -> Ratio:
    """median(over) / median(under), with its interval; entry i of both is from round i.

    Raises ValueError for sequences of different or zero length.
    """
    a, b = np.asarray(over, dtype=float), np.asarray(under, dtype=float)
    if a.shape != b.shape or a.ndim != 1 or not a.size:
        raise ValueError(
            f"ratio: needs as many rounds of both, at least 1, got {a.shape} and {b.shape}"
        )
    value = float(np.median(a) / np.median(b))
    if a.size <= FEW:
        return _around(np.log(a / b), value)
    n = a.size
    length = max(1, round(n**0.5))
    blocks = -(-n // length)
    starts = np.random.default_rng(seed).integers(0, n, (resamples, blocks, 1))
    rounds = ((starts + np.arange(length)) % n).reshape(resamples, -1)[:, :n]
    drawn = np.median(a[rounds], axis=1) / np.median(b[rounds], axis=1)
    low, high = np.quantile(drawn, (0.025, 0.975))
    return Ratio(value, min(float(low), value), max(float(high), value))


def over_processes(ratios: Sequence[float]) -> Ratio:
    """The geometric mean of independent ratios, with the interval that their differences allow.

    Raises ValueError where there are none.
    """
    if not len(ratios):
        raise ValueError("over_processes: needs at least one ratio")
    logs = np.log(np.asarray(ratios, dtype=float))
    return _around(logs, float(np.exp(logs.mean())))


def student(n: int) -> float:
    """Half of a mean's 95 % interval, in standard deviations of its n values, at least two."""
    return _T[min(n - 1, len(_T)) - 1] / n**0.5


def _around(logs: np.ndarray, value: float) -> Ratio:
    """The interval around `value` of a mean of these logarithms; of a single one anything."""
    if logs.size == 1:
        return Ratio(value, 0.0, math.inf)
    factor = math.exp(student(logs.size) * float(logs.std(ddof=1)))
    return Ratio(value, value / factor, value * factor)


def verdict(speedup: Ratio, margin: float) -> str:
    """FAST or SLOW beyond doubt by more than `margin`, SAME within two margins, else AMBIGUOUS."""
    if speedup.low > 1 + margin:
        return "FAST"
    if speedup.high < 1 - margin:
        return "SLOW"
    if speedup.low >= 1 - 2 * margin and speedup.high <= 1 + 2 * margin:
        return "SAME"
    return "AMBIGUOUS"
