"""`hybridops tune`: which configurations the compiler allows, and which of them is fastest here."""

from __future__ import annotations

import argparse
import fnmatch
import json
import re
import sys
import time
from functools import partial
from pathlib import Path

import torch

from .. import backend
from ..bench.result import write_json
from . import UserError, need_folder


def run(arguments: argparse.Namespace) -> int:
    """Exit code 1 where an entry of the table is itself not allowed or not right."""
    if backend._NO_TRITON:
        raise UserError(f"tune: {backend._NO_TRITON}")
    from ..kernels import tuned

    arch = _architecture(arguments, tuned)
    need_folder(arguments.out)
    entries = [entry for entry in _entries(tuned, arch) if _wanted(entry, arguments.only)]
    if not entries:
        raise UserError(f"tune: no entry matches {arguments.only!r}")
    if arguments.dry_run:
        return _dry_run(arch, entries, tuned)
    return _tune(arch, entries, tuned, arguments.out or tuned.users_own(arch), arguments.seconds)


def _architecture(arguments: argparse.Namespace, tuned) -> int:
    known = ", ".join(f"sm_{a}" for a in tuned.ARCHITECTURES)
    if arguments.arch is None:
        if not torch.cuda.is_available():
            raise UserError(f"tune: torch sees no GPU (--dry-run --arch of {known} needs none)")
        return tuned.architecture(torch.device("cuda", torch.cuda.current_device()))
    found = re.fullmatch(r"sm_?(\d+)", arguments.arch)
    if not found or int(found[1]) not in tuned.ARCHITECTURES:
        raise UserError(f"tune: there are tables for {known}, got {arguments.arch!r}")
    if not arguments.dry_run and not torch.cuda.is_available():
        raise UserError("tune: torch sees no GPU (--dry-run needs none)")
    return int(found[1])


def _entries(tuned, arch: int) -> list[tuple]:
    return [
        (kernel, kind, largest)
        for kernel, kinds in tuned.shipped(arch).items()
        for kind, rows in kinds.items()
        for largest, _ in rows
    ]


def _wanted(entry: tuple, pattern: str) -> bool:
    return fnmatch.fnmatchcase("/".join(map(str, entry)), pattern) or entry[0] == pattern


def _dry_run(arch: int, entries: list[tuple], tuned) -> int:
    from ..tune.search import Compiler, neighbours, refused, shown

    code = 0
    with Compiler(arch) as compiler:
        for entry in entries:
            start = tuned.row(*entry, arch)[1]
            print(f"sm_{arch} {'/'.join(map(str, entry))}")
            for config in (start, *neighbours(start)):
                needs = compiler.needs(entry, config)
                why = refused(needs, arch)
                code |= bool(why) and config is start
                figures = "" if "error" in needs else f"{needs['registers']:3} registers, "
                figures += "" if "error" in needs else f"{needs['shared']:6} bytes shared"
                said = f"refused: {why}" if why else "allowed"
                ours = " (the table's)" if config is start else ""
                print(f"  {shown(config):52} {figures}  {said}{ours}", flush=True)
    return code


def _tune(arch: int, entries: list[tuple], tuned, out: Path | None, seconds: float) -> int:
    """Entry by entry into `out`; what it has already, for these very kernels, stays."""
    from ..tune import work
    from ..tune.gpu import Trial
    from ..tune.search import Compiler, search, shown

    if out is None:
        raise UserError("tune: there is no home to write to: name a file with --out")
    out.parent.mkdir(parents=True, exist_ok=True)
    table, notes = _begun(tuned, arch, out)
    done = notes["done"]
    calls, code, begin = list(work.calls()), 0, time.monotonic()
    with Compiler(arch) as compiler:
        for number, entry in enumerate(entries):
            name = "/".join(map(str, entry))
            if name in done:
                continue
            if time.monotonic() - begin > seconds:
                print(f"stopped after {seconds:g} s; the same command goes on", file=sys.stderr)
                return code
            print(f"[{number + 1}/{len(entries)}] {name}", file=sys.stderr, flush=True)
            trial = Trial(entry, calls[compiler.entries[entry]])
            try:
                found = search(
                    tuned.row(*entry, arch)[1],
                    partial(_refused, compiler, entry),
                    trial.right,
                    trial.seconds,
                    lambda text: print(f"  {text}", file=sys.stderr, flush=True),
                )
            except ValueError as error:
                print(f"  {error}", file=sys.stderr)
                code = 1
                continue
            for row in table[entry[0]][entry[1]]:
                if row[0] == entry[2]:
                    row[1] = found.config
            done[name] = {"us": 1e6 * found.seconds, "before": 1e6 * found.before}
            write_json(notes | table, out)
            gain = f"{1e6 * found.before:.1f} -> {1e6 * found.seconds:.1f} us"
            print(f"{name}: {shown(found.config)}  {gain}, {found.tried} timed", flush=True)
    print(f"wrote {out}")
    return code


def _refused(compiler, entry: tuple, config: dict) -> str | None:
    from ..tune.search import refused

    return refused(compiler.needs(entry, config), compiler.arch)


def _begun(tuned, arch: int, out: Path) -> tuple[dict, dict]:
    """The table to go on with, and its notes: where it is from, and what is done in it."""
    table = tuned.shipped(arch)
    source = f"hybridops tune on {torch.cuda.get_device_name()}, torch {torch.__version__}"
    notes = {"source": source, "kernels": tuned.fingerprint(), "done": {}}
    try:
        old = json.loads(out.read_text())
        if all(old[key] == notes[key] for key in ("source", "kernels")):
            return tuned.merged(table, old), notes | {"done": old["done"]}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass
    return table, notes
