"""Results as one HTML file: pictures first, then every row with the command that repeats it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path

from .. import result
from . import plots, tables
from .page import Run, e, machine, many, page, row_title, short, write_page


def write_report(paths: Sequence[Path], output: Path) -> None:
    """Draw the result files at `paths` into `output`. Raises BadResult for what is none."""
    text = report_html([result.load(path) for path in paths], [path.name for path in paths])
    write_page(text, output)


def report_html(documents: Sequence[dict], names: Sequence[str] = ()) -> str:
    """The report of one or several documents, as result.load or Result.document gives them."""
    runs = [
        Run(doc["env"], result.rows_of(doc), name or f"run {i + 1}")
        for i, (doc, name) in enumerate(zip_longest(documents, names[: len(documents)]))
    ]
    if not _overlap(runs):  # nothing is shown twice, so no title needs to say which run it is
        for run in runs:
            run.name = ""
    sections = [
        ("glance", "At a glance", tables.glance(runs)),
        ("speed", "Speed-up", plots.speed(runs)),
        ("latency", "Latency against size", plots.latency(runs)),
        ("roofline", "Roofline", plots.roofline(runs)),
        ("error", "Error", plots.error(runs)),
        ("changes", "Changes", plots.changes(runs) if _overlap(runs) else ""),
        ("rows", "Every row", tables.rows(runs)),
        ("machine", "Machine", tables.machines(runs)),
    ]
    kept = [(anchor, title, body) for anchor, title, body in sections if body]
    what = e(_what(runs))
    foot = "The numbers are those of the result files; nothing was measured for the drawing."
    head = f"<h1>{what}</h1>{_lead(runs)}{_alert(runs)}"
    return page(f"hybridops bench: {what}", head, kept, foot)


def _overlap(runs: Sequence[Run]) -> bool:
    """Whether two runs have a row in common, or come from different machines."""
    keys = [{row.key() for row in run.rows} for run in runs]
    machines = {run.env.get("machine") for run in runs}
    return len(machines) > 1 or len(set().union(*keys)) < sum(map(len, keys))


def _what(runs: Sequence[Run]) -> str:
    names = list(dict.fromkeys(row.name for run in runs for row in run.rows))
    if not names:
        return "No rows"
    return ", ".join(map(short, names[:4])) + (f" and {len(names) - 4} more" * (len(names) > 4))


def _lead(runs: Sequence[Run]) -> str:
    words = machine(runs[0].env if runs else {})
    timed = sum(row.median_ms is not None for run in runs for row in run.rows)
    compared = sum(len(run.comparisons) for run in runs)
    return f"<p>{words}<br>{many(compared, 'comparison')}, {many(timed, 'row')} timed.</p>"


def _alert(runs: Sequence[Run]) -> str:
    wrong = [row for run in runs for row in run.rows if row.verdict in result.WRONG]
    if not wrong:
        return ""
    lines = "".join(
        f'<p><span class="v {row.verdict}">{row.verdict}</span> {e(short(row_title(row), 120))}, '
        f"{e(row.candidate)}: {e(row.reason or 'no reason given')}</p>"
        for row in wrong[:12]
    )
    more = f"<p>and {len(wrong) - 12} more below.</p>" if len(wrong) > 12 else ""
    return f'<div class="alert" role="note">{lines}{more}</div>'
