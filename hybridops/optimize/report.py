"""report(model): what optimize() replaced, what it left alone and why, what served it since."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import nn

from .. import backend
from .fast import original_class
from .swap import JOURNAL, Layer

_HEADER = ("layer", "was", "now", "error", "torch's")


@dataclass
class Report:
    """A model's layers, the calls that no kernel served, and what served those on a GPU.

    `str()`, `.markdown()`, `.json()`.
    """

    model: str
    options: dict[str, Any]
    layers: list[Layer]
    fallbacks: dict[tuple[str, str], int] = field(default_factory=dict)
    errors: dict[str, tuple[float, float]] = field(default_factory=dict)  # fqn -> ours, torch's
    served: dict[tuple[str, str], int] = field(default_factory=dict)  # on a GPU: op, what ran

    @property
    def replaced(self) -> int:
        """How many layers run on a rule."""
        return sum(layer.rule is not None for layer in self.layers)

    def rows(self) -> list[tuple[str, ...]]:
        """One row per hot layer, as strings."""
        rows = []
        for layer in self.layers:
            now = layer.rule.partition(":")[2] if layer.rule else f"left alone: {layer.reason}"
            now += f" ({layer.note})" if layer.note else ""
            ours, theirs = self.errors.get(layer.fqn, ("", ""))
            errors = [e if isinstance(e, str) else f"{e:.1e}" for e in (ours, theirs)]
            rows.append((layer.fqn or "(model)", layer.old.partition(":")[2], now, *errors))
        return rows

    def summary(self) -> list[str]:
        """The facts that are not about one layer."""
        options = ", ".join(f"{name}={value}" for name, value in self.options.items())
        lines = [
            f"{self.model}: {self.replaced} of {len(self.layers)} hot layers replaced ({options})"
        ]
        for (op, reason), calls in sorted(self.fallbacks.items()):
            lines.append(f"{op}: {calls} calls fell back: {reason}")
        for (op, what), calls in sorted(self.served.items()):
            lines.append(f"{op}: {calls} calls on a GPU served by {what}")
        return lines

    def __str__(self) -> str:
        header, rows = self._columns()
        return "\n".join([*aligned([header, *rows]), "", *self.summary()])

    def markdown(self) -> str:
        """The same as a Markdown table."""
        header, rows = self._columns()
        lines = ["| " + " | ".join(row) + " |" for row in (header, ["---"] * len(header), *rows)]
        return "\n".join([*lines, "", *(f"- {line}" for line in self.summary())])

    def json(self) -> str:
        """The same as JSON: model, options, layers, fallbacks, errors, served."""
        content = asdict(self)
        for counted in ("fallbacks", "served"):
            calls = sorted(getattr(self, counted).items())
            content[counted] = [[op, what, count] for (op, what), count in calls]
        return json.dumps(content, indent=2)

    def _columns(self):
        """Header and rows, without the error columns where nothing was verified."""
        width = len(_HEADER) if self.errors else 3
        return list(_HEADER[:width]), [list(row[:width]) for row in self.rows()]


def report(model: nn.Module) -> Report:
    """What optimize(model) did. Calls are counted over the whole process since then.

    Raises ValueError for a model that was not optimized (explain(model) shows what would happen).
    """
    journal = model.__dict__.get(JOURNAL) if isinstance(model, nn.Module) else None
    if journal is None:
        raise ValueError(
            "report: this model was not optimized; explain(model) shows what would happen"
        )
    since = backend.fallbacks - journal.fallbacks
    checks = journal.verification.checks if journal.verification else ()
    errors = {check.fqn: (check.error, check.eager) for check in checks}
    return Report(
        original_class(model).__name__,
        journal.options,
        journal.layers,
        dict(since),
        errors,
        dict(backend.served - journal.served),
    )


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of strings as lines with aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
