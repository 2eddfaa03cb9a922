"""`hybridops parity`: the error of every class that we serve, forward and backward, as a table."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Iterator
from fnmatch import fnmatch
from pathlib import Path

from .. import backend
from ..bench.parity import Entry, Table, Worst, parity
from ..bench.parity_models import MODELS, Small, of_file
from ..bench.report.page import write_page
from ..bench.table import Bar
from . import UserError, need_folder

_INTRODUCTION = """\
Written by
`hybridops parity --models tests/official.py --models tests/detrs.py --out docs/parity.md`. Errors
are the largest, against float64, relative to the rms of the exact result, in fp32, of the worst
layer of each class in small real models; × is ours over torch's own. Allowed: forward 2 × torch's
own + 4 eps, backward (gradients of all inputs and parameters, in training mode) 3 × + 12 eps. A
ratio above that is within the rule where both errors are a few eps. –: nothing of ours runs there
(a rule for inference alone, say). The authors' own classes are known by their shape, and measured
in copies.
"""


def run(arguments: argparse.Namespace) -> int:
    """Exit code 1 when a class breaks the error rule, or a model could not be measured."""
    need_folder(arguments.out, arguments.json)
    patterns = arguments.patterns or ["*"]
    models = [*MODELS, *_more(arguments.models)]
    chosen = [m for m in models if any(fnmatch(m.name, p) for p in patterns)]
    if not chosen:
        raise UserError(f"no model of the list matches {', '.join(patterns)}")
    bar = Bar(len(chosen), arguments.quiet)

    def progress(name: str) -> None:
        if bar.title:
            bar.finish()
        bar.start(name)
        bar(0.0, "measuring")

    table = parity(chosen, progress)
    bar.clear()
    if arguments.out:
        write_page(markdown(table), arguments.out)
    if arguments.json:
        write_page(json.dumps(table.as_json(), indent=1) + "\n", arguments.json)
    if not arguments.quiet:
        print(markdown(table), end="")
    return 0 if table.ok else 1


def _more(files: Iterable[Path]) -> Iterator[Small]:
    for file in files:
        try:
            yield from of_file(file)
        except Exception as error:  # whatever the file's own code raises
            raise UserError(f"{file}: {type(error).__name__}: {error}") from error


def markdown(table: Table) -> str:
    """The whole page: what was measured, and what was not."""
    return "\n".join(_lines(table)) + "\n"


def _lines(table: Table) -> Iterator[str]:
    entries = sorted(
        table.entries.values(), key=lambda e: (not e.path.startswith("hybrid"), e.path)
    )
    measured = [e for e in entries if e.forward or e.backward]
    failed = [e for e in measured if e.status == "FAILED"]
    yield "# Parity"
    yield ""
    yield _INTRODUCTION
    covered = f"{len(measured)} of {len(entries)} classes measured, {len(failed)} failed"
    library = f"{backend.ISA} library" if backend.ISA else "no C++ library"
    yield f"**{covered}** ({library})."
    yield ""
    yield "| class | served by | forward | torch's | × | backward | torch's | × | | in |"
    yield "|---|---|---|---|---|---|---|---|---|---|"
    for e in measured:
        row = [f"`{e.path}`", e.rule or "itself", *_cells(e.forward), *_cells(e.backward)]
        yield "| " + " | ".join([*row, e.status, ", ".join(e.models)]) + " |"
    yield from _problems(failed)
    left = [e for e in entries if e not in measured]
    if left:
        yield ""
        yield "Without a number:"
        yield ""
        for e in left:
            yield f"- `{e.path}`: {e.status}"
    if table.unbuilt:
        yield ""
        yield "Models that could not be measured to the end:"
        yield ""
        for name, why in table.unbuilt.items():
            yield f"- {name}: {why}"


def _cells(worst: Worst | None) -> tuple[str, str, str]:
    if worst is None:
        return "–", "–", "–"
    return f"{worst.error:.1e}", f"{worst.torchs:.1e}", f"{worst.ratio:.2f}"


def _problems(failed: list[Entry]) -> Iterator[str]:
    for e in failed:
        for side, worst in (("forward", e.forward), ("backward", e.backward)):
            if worst is not None and worst.share > 1:
                why = worst.problem or f"{worst.share:.2f} times what is allowed"
                yield ""
                yield f"`{e.path}` {side}: {why}, at {worst.where}"
