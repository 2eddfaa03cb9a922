"""Where a model's time goes, as one HTML file: an icicle before and after, and the rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from .. import profile as profiles
from ..profile import Node, Profile, Side
from ..result import in_pixels
from .chart import percent, svg, text
from .page import colours, e, machine, many, page

_LEVEL, _LEAST = 24, 8e-4  # pixels of a row; narrower boxes (share of the width) are not drawn
_WIDE, _NARROW = 1030, 300  # pixels that a picture has on a desktop and on a phone
_LETTER = 6.6
_HEAD = ("eager ms", "optimized ms", "share", "speed-up")


def profile_html(found: Sequence[Profile], env: dict[str, Any], depth: int | None = None) -> str:
    """The page of one model's profiles (of several dtypes, say); depth as for profile.rows."""
    sections = [(f"p{i}", e(facts(p)), _section(p, depth)) for i, p in enumerate(found)]
    name = e(found[0].task.name)
    head = f"<h1>Where the time of {name} goes</h1><p>{machine(env)}</p>"
    foot = (
        "Whole calls were timed with nobody watching; calls that were watched say only how that "
        "time is shared out."
    )
    return page(f"hybridops profile: {name}", head, sections, foot)


def facts(p: Profile) -> str:
    """What was run, in a line."""
    task = p.task
    size = in_pixels(task.case, " × ")
    return f"{task.dtype} · batch {task.batch} · {size} · {many(task.threads, 'thread')}"


def _section(p: Profile, depth: int | None) -> str:
    kinds = dict(_kinds(p))
    longest = max(p.eager.ms, p.optimized.ms)
    faster = f"{p.speedup.value:.2f}× [{p.speedup.low:.2f}, {p.speedup.high:.2f}]"
    key = colours(("c0", "optimized"), ("c2", "left alone"), ("SAME", "torch's own"))
    pictures = "".join(
        f"<h3>{name}: {p.figure(side.ms)} ms{more}</h3>{_icicle(p, side, longest, kinds, name)}"
        for name, side, more in (
            ("before", p.eager, ""),
            ("after optimize()", p.optimized, f", {faster}"),
        )
    )
    doubt = f"<p>Do not trust these times: {e(p.doubt)}.</p>"
    alert = f'<div class="alert" role="note">{doubt}</div>' if p.doubt else ""
    return (
        f"{alert}<p>Width is time, to one scale; each line lies inside the one above. Blank: spent "
        "in the module above itself (Python, dispatch, what it computes between its children). "
        f'Point at a box for its figures.</p><ul class="legend">{key}</ul><br>'
        f'<div class="panel">{pictures}</div><br>{_table(p, depth)}'
    )


def _kinds(p: Profile) -> Iterator[tuple[str, str]]:
    """The colour of each module, on both sides that of what becomes of it."""
    before, after = ({n.name: n for n in side.tree.walk()} for side in (p.eager, p.optimized))
    for name in after:
        standing = name  # the module that computes it, which may be one that holds it
        while standing and not profiles.alike(before[standing], after[standing]):
            standing = standing.rpartition(".")[0]
        node = after[standing]
        if any(inner.kernels for inner in ([node] if standing != name else node.walk())):
            yield name, "c0"
        else:
            reasons = (p.layers[n.name].reason for n in node.walk() if n.name in p.layers)
            yield name, "c2" if any(reasons) else "SAME"


def _icicle(p: Profile, side: Side, longest: float, kinds: dict[str, str], title: str) -> str:
    body: list[str] = []
    depth = _draw(body, side.tree, 0.0, 0, longest, kinds, p, side)
    said = "; ".join(
        f"{row.name} {p.figure(row.eager_ms if side is p.eager else row.optimized_ms)} ms"
        for row in profiles.rows(p)
    )
    return svg(body, _LEVEL * depth + 14, f"Time {title}, {facts(p)}", said, "icicle")


def _draw(
    body: list[str],
    node: Node,
    start: float,
    level: int,
    longest: float,
    kinds: dict[str, str],
    p: Profile,
    side: Side,
) -> int:
    """Draw the node and all below it; returns how many levels that took."""
    width = node.ms / longest
    if width < _LEAST:
        return level
    label = node.name.rpartition(".")[2] or p.task.name.rpartition(":")[2]
    parent = any(child.called for child in node.children)
    how = profiles.how_served([node], p.layers) if side is p.optimized else ""
    itself = f" (itself {p.figure(node.own)} ms)" if parent else ""
    figures = f"{p.figure(node.ms)} ms, {node.ms / side.ms:.1%}{itself}"
    tip = "; ".join(filter(None, [f"{node.name or p.task.name}: {figures}", how]))
    kind = f"box {kinds[node.name]}" + " leaf" * (not parent)
    body.append(
        f'<svg x="{percent(start)}" y="{_LEVEL * level}" width="{percent(width)}" '
        f'height="{_LEVEL}"><title>{e(tip)}</title>'
        f'<rect class="{kind}" width="100%" height="{_LEVEL}"/>'
        f"{_label(label, p.figure(node.ms), width)}</svg>"
    )
    below = level + 1
    for child in node.children:
        below = max(below, _draw(body, child, start, level + 1, longest, kinds, p, side))
        start += child.ms / longest
    return below


def _label(name: str, ms: str, width: float) -> str:
    """As much as fits, on a desktop and on a phone."""
    words = (f"{name}\u2002{ms} ms", name)
    wide, narrow = (
        next((w for w in words if _LETTER * len(w) + 10 < width * pixels), "")
        for pixels in (_WIDE, _NARROW)
    )
    if wide == narrow:
        return text("5", 16, wide, "name", "start") if wide else ""
    shown = text("5", 16, wide, "name wide-only", "start")
    return shown + (text("5", 16, narrow, "name narrow-only", "start") if narrow else "")


def _table(p: Profile, depth: int | None) -> str:
    head = "".join(f'<th scope="col">{h}</th>' for h in _HEAD)
    total = profiles.Row("whole model", p.eager.ms, p.optimized.ms, p.summary)
    body = ""
    for row in [*profiles.rows(p, depth), total]:
        cells = (
            p.figure(row.eager_ms),
            p.figure(row.optimized_ms),
            f"{row.optimized_ms / p.optimized.ms:.1%}",
            f"{row.speedup:.2f}×" if row.speedup else "",
        )
        tds = "".join(f"<td>{cell}</td>" for cell in cells)
        body += (
            f'<tr class="rule"><th scope="row" title="{e(row.name)}">{e(row.name)}</th>{tds}'
            f'<td class="left how">{e(row.how)}</td></tr>'
        )
    last = '<th class="left how" scope="col">served by</th>'
    return (
        f'<div class="panel"><div class="scroll"><table class="layers"><caption>{e(facts(p))}'
        f'</caption><thead><tr><th class="left" scope="col">layer</th>{head}{last}</tr></thead>'
        f"<tbody>{body}</tbody></table></div></div>"
    )
