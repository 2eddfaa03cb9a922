"""Rows and documents: what a run leaves behind, as JSON whose form is a contract.

The form is written down in schema.json beside this file; SCHEMA is its version. Keys may be added
under one version; none changes its meaning or goes.
"""

from __future__ import annotations

import csv
import json
import math
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from .stats import Summary

SCHEMA = 1
# Keys that files of this schema may not have yet
_ADDED = {"device": "cpu", "job": "", "processes": 1}
WRONG = ("FAILED", "MISTRUSTED", "INVALID")
VERDICTS = ("OK", "FAST", "SAME", "SLOW", "AMBIGUOUS", *WRONG, "SKIPPED")


def in_pixels(case: str, times: str = "x") -> str:
    """The image size of a model's row, whose case is "224", "800x1066" or "224 frozen"."""
    size, *how = case.split()
    height, _, width = size.partition("x")
    return " ".join([f"{height}{times}{width or height}", *how])


class BadResult(ValueError):
    """A file that is not a result of `hybridops bench`."""


@dataclass
class Row:
    """One candidate in one comparison. None: not measured, or does not apply."""

    kind: str  # op | model
    name: str
    case: str
    dtype: str
    mode: str
    batch: int | None
    threads: int
    backend: str
    candidate: str
    ours: bool
    verdict: str
    reason: str | None = None
    repro: str = ""
    layout: str = "contiguous"
    cache: str = "warm"
    clock: str = "wall"
    median_ms: float | None = None  # per call
    p20_ms: float | None = None
    p80_ms: float | None = None
    iqr_ms: float | None = None
    min_ms: float | None = None
    n: int | None = None  # rounds
    images_per_s: float | None = None
    peak_mb: float | None = None
    flop: float | None = None  # of the plain-torch meaning, per call
    bytes: float | None = None  # inputs, parameters and outputs, once each
    gflops: float | None = None
    gbps: float | None = None
    intensity: float | None = None  # FLOP per byte
    percent_of_roof: float | None = None
    limit: str | None = None  # what the roof is made of: compute, L1, L2, L3 or DRAM
    error: float | None = None  # max |y - float64| / rms(float64)
    error_ratio: float | None = None  # over torch eager's own in the same dtype
    error_limit: float | None = None
    repeats: bool | None = None  # bit for bit
    others_cpu: float | None = None  # cores that other processes kept busy meanwhile
    # In a peer's row its time over ours; of several processes the geometric mean of theirs
    speedup: float | None = None
    speedup_low: float | None = None
    speedup_high: float | None = None
    device: str = "cpu"  # or the GPU's name
    target_ms: float | None = None  # ours: what its suite asks for
    stretch_ms: float | None = None
    target_speedup: float | None = None  # a peer's row: what its suite asks of the speed-up
    stretch_speedup: float | None = None
    job: str = ""  # which comparison of a run this is
    processes: int = 1  # that measured it

    def set_times(self, times: Summary) -> None:
        self.median_ms, self.p20_ms, self.p80_ms = (
            1e3 * t for t in (times.median, times.p20, times.p80)
        )
        self.iqr_ms, self.min_ms, self.n = 1e3 * times.iqr, 1e3 * times.least, times.n
        if self.kind == "model" and self.batch:
            self.images_per_s = self.batch / times.median

    def set_rates(self, bound: Any) -> None:
        """bound: roof.Bound, or None where the roof is not known."""
        if not self.median_ms:
            return
        seconds = self.median_ms / 1e3
        if self.flop:
            self.gflops = self.flop / seconds / 1e9
        if self.bytes:
            self.gbps = self.bytes / seconds / 1e9
            self.intensity = self.flop / self.bytes if self.flop else None
        if bound is not None:
            self.percent_of_roof, self.limit = 100 * bound.seconds / seconds, bound.limit

    def key(self) -> tuple:
        """What the rows of one comparison share."""
        return (
            *(self.kind, self.name, self.case, self.dtype, self.mode),
            *(self.batch, self.threads, self.layout, self.cache),
        )


def document(env: dict, rows: Iterable[Row]) -> dict:
    return {"schema": SCHEMA, "env": env, "rows": [_plain(asdict(row)) for row in rows]}


def _plain(row: dict) -> dict:
    """JSON knows neither NaN nor infinity: they become null, and the verdict says what happened."""
    bad = {k for k, v in row.items() if isinstance(v, float) and not math.isfinite(v)}
    return {k: None if k in bad else v for k, v in row.items()}


def write_json(doc: dict, path: Path) -> None:
    """Atomically, so that a run that is killed leaves no half file."""
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        fresh.write_text(json.dumps(doc, indent=1, allow_nan=False) + "\n")
        os.replace(fresh, path)
    finally:
        fresh.unlink(missing_ok=True)


def write_csv(rows: Iterable[Row], path: Path) -> None:
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, [f.name for f in fields(Row)])
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)


def load(path: Path) -> dict:
    """A document from a file. Raises BadResult for anything else, naming what is wrong."""
    try:
        doc = json.loads(Path(path).read_text())
    except OSError as error:
        raise BadResult(f"{path}: {error.strerror or error}") from None
    except ValueError as error:  # truncated, or not JSON, or not text
        raise BadResult(f"{path} is not JSON: {error}") from None
    if not isinstance(doc, dict) or "schema" not in doc:
        raise BadResult(f"{path} is not a result of hybridops bench (no schema)")
    if doc["schema"] != SCHEMA:
        raise BadResult(f"{path} has schema {doc['schema']!r}, this version reads {SCHEMA}")
    rows = doc.get("rows")
    if not isinstance(rows, list) or not isinstance(doc.get("env"), dict):
        raise BadResult(f"{path}: env must be an object and rows a list")
    for i, row in enumerate(rows):
        if isinstance(row, dict):
            row.update({key: value for key, value in _ADDED.items() if key not in row})
        _check_row(row, f"{path}: row {i}")
    return doc


def _check_row(row: Any, where: str) -> None:
    if not isinstance(row, dict):
        raise BadResult(f"{where} is not an object")
    for f in fields(Row):
        kinds = str(f.type).split(" | ")
        value = row.get(f.name)
        if value is None:
            if "None" not in kinds and f.name not in row:
                raise BadResult(f"{where} has no {f.name}")
            continue
        kind = "bool" if isinstance(value, bool) else type(value).__name__
        if kind not in kinds and not (kind == "int" and "float" in kinds):
            raise BadResult(f"{where}: {f.name} must be {f.type}, got {value!r}")
    if row["verdict"] not in VERDICTS:
        raise BadResult(f"{where}: unknown verdict {row['verdict']!r}")


def rows_of(doc: dict) -> list[Row]:
    known = {f.name for f in fields(Row)}
    return [Row(**{k: v for k, v in row.items() if k in known}) for row in doc["rows"]]


def exit_code(rows: Iterable[Row]) -> int:
    return 1 if any(row.verdict in WRONG for row in rows) else 0
