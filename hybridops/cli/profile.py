"""`hybridops profile MODEL`: where a model's time goes, layer by layer, before and after."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch

from ..backend import BackendUnavailable
from ..bench.environment import environment
from ..bench.model_task import build_model, full_name, model_task
from ..bench.profile import Profile, Row, profile, rows
from ..bench.result import in_pixels
from ..bench.table import Bar
from ..bench.task import threads
from . import UserError, need_folder

SCHEMA = 1
_HEAD = ("layer", "eager ms", "optimized", "share", "speed-up", "served by")
_LEAST_NAME, _LEAST_HOW = 12, 16  # columns; "served by" goes where there are fewer


def run(arguments: argparse.Namespace) -> int:
    need_folder(arguments.json, arguments.out)
    bar = Bar(len(arguments.dtype), arguments.quiet)
    try:
        found = _profiles(arguments, bar)
    except (ValueError, BackendUnavailable) as error:
        raise UserError(str(error)) from None
    finally:
        bar.clear()
    env = environment()
    if arguments.json:
        profiles = [p.as_json(arguments.depth) for p in found]
        _write(arguments.json, json.dumps({"schema": SCHEMA, "env": env, "profiles": profiles}))
    if arguments.out:
        from ..bench.report.icicle import profile_html

        _write(arguments.out, profile_html(found, env, arguments.depth))
    return 0


def _profiles(arguments: argparse.Namespace, bar: Bar) -> list[Profile]:
    name = full_name(arguments.model)
    count = arguments.threads or torch.get_num_threads()
    found = []
    with threads(count):
        bar.start(f"{name} {arguments.dtype[0]}")
        bar(0.0, "building")
        model, size = build_model(name, arguments.size)
        for i, dtype in enumerate(arguments.dtype):
            if i:
                bar.start(f"{name} {dtype}")
            options: dict[str, Any] = {"size": size, "batch": arguments.batch, "dtype": dtype}
            task = model_task(name, model, **options, threads=count)
            p = profile(task, backend=arguments.backend, progress=bar)
            found.append(p)
            bar.finish()
            if not arguments.quiet:
                columns = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
                print(table(p, arguments.depth, columns), flush=True)
    return found


def _write(path: Path, text: str) -> None:
    from ..bench.report.page import write_page

    try:
        write_page(text, path)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from None


def table(p: Profile, depth: int | None = None, columns: int | None = None) -> str:
    """Aligned rows that add up to the whole model; cut to `columns` where a terminal has those."""
    task = p.task
    heading = (
        f"{task.name}  {in_pixels(task.case)}  batch {task.batch}  {task.dtype}  "
        f"{task.threads} thread{'s' * (task.threads != 1)}"
    )
    whole = Row("whole model", p.eager.ms, p.optimized.ms, _interval(p))
    lines = [_HEAD, *(_cells(row, p) for row in (*rows(p, depth), whole))]
    widths = [max(len(line[i]) for line in lines) for i in range(len(_HEAD))]
    if columns is not None:
        widths = _cut(widths, columns)
    body = [_line(cells, widths) for cells in lines]
    body.insert(-1, "-" * min(len(body[-1]), columns or 79))
    watched = (side.watched_ms / side.ms - 1 for side in (p.eager, p.optimized))
    notes = [
        "share: of the optimized model's time",
        "calls that were watched took {:+.0%} and {:+.0%}: scaled out".format(*watched),
        p.summary,
        *([f"do not trust these times: {p.doubt}"] if p.doubt else []),
    ]
    return "\n".join([_short(heading, columns or 999), *body, "", *notes, ""])


def _cells(row: Row, p: Profile) -> tuple[str, ...]:
    speedup = f"{row.speedup:.2f}x" if row.speedup else ""
    share = f"{row.optimized_ms / p.optimized.ms:.1%}"
    return row.name, p.figure(row.eager_ms), p.figure(row.optimized_ms), share, speedup, row.how


def _interval(p: Profile) -> str:
    return f"speed-up within [{p.speedup.low:.2f}, {p.speedup.high:.2f}]"


def _cut(widths: list[int], columns: int) -> list[int]:
    """What does not fit gives way: "served by", then "share" and "speed-up", then the names."""
    kept = list(widths)
    for i in (_HEAD.index("served by"), _HEAD.index("share"), _HEAD.index("speed-up")):
        name = min(kept[0], _LEAST_NAME)
        how = min(kept[-1], _LEAST_HOW)
        if _width([name, *kept[1:-1], how]) > columns:
            kept[i] = 0
    kept[0] = min(kept[0], columns - _width([0, *kept[1:-1], min(kept[-1], _LEAST_HOW)]) - 2)
    kept[-1] = min(kept[-1], max(0, columns - _width([*kept[:-1], 0]) - 2))
    return kept


def _width(widths: list[int]) -> int:
    shown = [width for width in widths if width]
    return sum(shown) + 2 * (len(shown) - 1)


def _line(cells: tuple[str, ...], widths: list[int]) -> str:
    name, *numbers, how = cells
    shown = name if len(name) <= widths[0] else "…" + name[1 - widths[0] :]
    middle = [cell.rjust(w) for cell, w in zip(numbers, widths[1:-1], strict=True) if w]
    return "  ".join([shown.ljust(widths[0]), *middle, _short(how, widths[-1])]).rstrip()


def _short(words: str, most: int) -> str:
    return words if len(words) <= most else words[: max(0, most - 1)] + "…" * (most > 0)
