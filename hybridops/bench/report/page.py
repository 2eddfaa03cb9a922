"""The page around a report, and what its sections are made of: runs, panels, escaped text.

The file needs nothing else: no script, font or image, and its policy forbids the browser to fetch
any. Whatever a result file says is text here, whoever wrote it.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

import hybridops

from ..result import Row, in_pixels

OPEN_BARS, OPEN_ROWS = 300, 60  # more than that: panels are closed, with a summary each
Panel = tuple[str, str, str]  # title, summary, body


@dataclass
class Run:
    """One document, its rows by comparison (ours first)."""

    env: dict[str, Any]
    rows: list[Row]
    name: str  # empty where no title has to tell it from another run
    comparisons: list[list[Row]] = field(default_factory=list)

    def __post_init__(self) -> None:
        last = None
        for row in self.rows:
            if row.ours or row.key() != last or not self.comparisons:
                self.comparisons.append([])
            self.comparisons[-1].append(row)
            last = row.key()


def page(title: str, head: str, sections: Sequence[tuple[str, str, str]], foot: str) -> str:
    """The whole file. sections: (anchor, title, body); title, head and bodies are HTML."""
    links = "".join(f'<a href="#{anchor}">{name}</a>' for anchor, name, _ in sections)
    bodies = "".join(
        f'<section aria-labelledby="{anchor}"><h2 id="{anchor}">{name}</h2>{body}</section>'
        for anchor, name, body in sections
    )
    style = (Path(__file__).parent / "report.css").read_text(encoding="utf-8")
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title>\n<style>\n{style}</style></head>\n<body><main><header>{head}"
        f'<nav aria-label="Sections">{links}</nav></header>{bodies}'
        f"<footer>Drawn by hybridops {e(hybridops.__version__)}. {foot}</footer>"
        "</main></body></html>\n"
    )


def write_page(text: str, output: Path) -> None:
    """Write it whole or not at all."""
    output = Path(output)
    fresh = output.with_name(f".{output.name}.{os.getpid()}")
    try:
        fresh.write_text(text, encoding="utf-8")
        os.replace(fresh, output)
    finally:
        fresh.unlink(missing_ok=True)


def machine(env: dict[str, Any]) -> str:
    """The machine in a line, escaped."""
    facts = [env.get("cpu"), many(env.get("cores"), "core"), env.get("gpu")]
    facts += [f"torch {env.get('torch')}", str(env.get("date", ""))[:10]]
    return " · ".join(e(f) for f in facts if f)


def panel_title(run: Run, row: Row) -> str:
    facts = [row.name, row.mode, row.dtype, many(row.threads, "thread")]
    facts += [row.layout] * (row.layout != "contiguous") + ["cold cache"] * (row.cache == "cold")
    facts += [f"{row.processes} processes"] * (row.processes > 1)
    return " · ".join([*facts, *[run.name] * bool(run.name)])


def case_title(row: Row) -> str:
    if row.kind != "model":
        return row.case
    return f"batch {row.batch}, {in_pixels(row.case, ' × ')}"


def row_title(row: Row) -> str:
    return f"{row.name} {case_title(row)} {row.mode} {row.dtype}"


def many(n: Any, word: str) -> str:
    return "" if n is None else f"{n} {word}{'s' * (n != 1)}"


def pairs(values: Any, sign: str = " ") -> str | None:
    if not isinstance(values, dict):
        return None
    return ", ".join(f"{key}{sign}{value}" for key, value in values.items())


def short(words: str, most: int = 40) -> str:
    return words if len(words) <= most else words[: most - 1] + "…"


def e(value: Any) -> str:
    return escape(str(value), quote=True)


def small(words: str) -> str:
    return f"<small>{e(words)}</small>"


def empty(words: str) -> str:
    return f'<p class="empty">{e(words)}</p>'


def colours(*kinds: tuple[str, str]) -> str:
    return "".join(f'<li><i class="key square {k}"></i>{words}</li>' for k, words in kinds)


def grid(panels: Iterable[Panel], lines: int = 0) -> str:
    """Panels side by side; closed, one below the other, where that would be too much."""
    drawn = list(panels)
    if lines > OPEN_BARS or len(drawn) > 40:
        return details(drawn, False)
    bodies = (f'<div class="panel"><h3>{e(title)}</h3>{body}</div>' for title, _, body in drawn)
    return f'<div class="panels">{"".join(bodies)}</div>'


def details(panels: Iterable[Panel], is_open: bool) -> str:
    flag = " open" if is_open else ""
    return "".join(
        f'<details class="panel"{flag}><summary>{e(title)}<span>{e(summary)}</span></summary>'
        f"{body}</details>"
        for title, summary, body in panels
    )
