"""The demo's chart: times and speed-ups on the left, errors against float64 on the right."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib

matplotlib.use("Agg")
from matplotlib.figure import Figure

if TYPE_CHECKING:
    from .demo import Row

EAGER, OPTIMIZED, INK = "#b8bec7", "#d9572b", "#2b2f36"


def draw(rows: list[Row], path: Path, machine: str) -> None:
    """Write the chart; the suffix of `path` picks the format."""
    labels = [f"{name.partition(':')[2]}\n{loaded.weights} weights" for name, loaded, _ in rows]
    at = range(len(rows))
    figure = Figure(figsize=(10, 1.6 + 1.15 * len(rows)), layout="constrained", dpi=150)
    times, errors = figure.subplots(1, 2, sharey=True, width_ratios=(2.4, 1))

    for result, y in zip((r for _, _, r in rows), at, strict=True):
        times.barh(y - 0.19, result.eager, 0.34, color=EAGER)
        times.barh(y + 0.19, result.optimized, 0.34, color=OPTIMIZED)
        times.text(result.eager, y - 0.19, f" {result.eager:.1f} ms", va="center", color=INK)
        times.text(
            result.optimized,
            y + 0.19,
            f" {result.optimized:.1f} ms   {result.speedup:.2f}× faster"
            if result.speedup >= 1
            else f" {result.optimized:.1f} ms   {result.speedup:.2f}×",
            va="center",
            color=OPTIMIZED,
            weight="bold",
        )
        scale = result.eager_error or 1.0
        errors.plot([result.error_limit / scale] * 2, [y - 0.32, y + 0.32], color=INK, lw=1.5)
        errors.plot([1.0], [y - 0.12], "o", color=EAGER, ms=8)
        errors.plot([result.optimized_error / scale], [y + 0.12], "o", color=OPTIMIZED, ms=8)

    longest = max(max(r.eager, r.optimized) for _, _, r in rows)
    times.set(yticks=list(at), yticklabels=labels, xlim=(0, 1.3 * longest))
    times.set_ylim(len(rows) - 0.5, -0.5)
    times.set_xlabel("ms per image, batch 1, fp32 (median)")
    errors.set_xlim(left=0)
    errors.set_xlabel("error against float64,\ntorch's own = 1; line: the limit")
    for axes in (times, errors):
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(axis="y", length=0, colors=INK)
        axes.grid(axis="x", color="#e6e8eb", lw=0.8)
        axes.set_axisbelow(True)

    handles = [
        matplotlib.patches.Patch(color=EAGER, label="torch eager"),
        matplotlib.patches.Patch(color=OPTIMIZED, label="hybridops.optimize(model)"),
    ]
    figure.legend(handles=handles, loc="outside upper left", ncols=2, frameon=False)
    figure.supxlabel(machine, fontsize=7.5, color="#7a808a")
    figure.savefig(path)
