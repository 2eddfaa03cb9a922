"""The report's sections in words and figures: a summary, every row, the machine."""

from __future__ import annotations

import math
from collections.abc import Sequence

from .. import result, roof
from ..result import Row
from ..table import figures
from .page import (
    OPEN_ROWS,
    Run,
    case_title,
    details,
    e,
    empty,
    many,
    pairs,
    panel_title,
    short,
    small,
)


def glance(runs: Sequence[Run]) -> str:
    """The geometric mean against each peer, by kind of comparison."""
    found: dict[tuple, dict[str, list[Row]]] = {}
    for run in runs:
        for row in run.rows:
            if row.speedup:
                family = row.name if row.kind == "model" else "ops"
                key = (run.name, family, row.mode, row.dtype, row.threads, row.cache)
                found.setdefault(key, {}).setdefault(row.candidate, []).append(row)
    if not found:
        return empty("Nothing was compared: no peer was timed beside a candidate that is right.")
    peers = list(dict.fromkeys(peer for by in found.values() for peer in by))
    head = "".join(f'<th scope="col">{e(short(peer))}</th>' for peer in peers)
    body = []
    for (run, family, mode, dtype, threads, cache), by in found.items():
        facts = [mode, dtype, many(threads, "thread"), *["cold cache"] * (cache == "cold"), run]
        cells = "".join(_mean(by.get(peer, [])) for peer in peers)
        body.append(
            f'<tr class="rule"><th scope="row" title="{e(family)}">{e(family)}'
            f"<small>{e(', '.join(filter(None, facts)))}</small></th>{cells}</tr>"
        )
    return (
        "<p>How many times as long each peer takes: the geometric mean over the comparisons, their "
        "least and their largest. Above 1, ours is faster.</p>"
        f'<div class="panel"><div class="scroll"><table><caption>Speed-up over each peer</caption>'
        f'<thead><tr><th class="left" scope="col">ours against</th>{head}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div></div>"
    )


def _mean(rows: Sequence[Row]) -> str:
    values = [row.speedup for row in rows if row.speedup]
    if not values:
        return "<td>–</td>"
    mean = math.exp(sum(map(math.log, values)) / len(values))
    spread = f"{min(values):.2f}–{max(values):.2f}, n = {len(values)}" if values[1:] else ""
    if not values[1:] and rows[0].speedup_low and rows[0].speedup_high:
        spread = f"[{rows[0].speedup_low:.2f}, {rows[0].speedup_high:.2f}]"
    unsure = sum(row.verdict == "AMBIGUOUS" for row in rows)
    spread += f"<br>{unsure} ambiguous" if unsure else ""
    return f"<td>{mean:.2f}×<small>{spread}</small></td>"


# rows


_HEAD = ("candidate", "verdict", "speed-up", "ms", "× torch's", "error", "GFLOP/s", "GB/s", "roof")


def rows(runs: Sequence[Run]) -> str:
    panels: dict[str, list[list[Row]]] = {}
    for run in runs:
        for compared in run.comparisons:
            panels.setdefault(panel_title(run, compared[0]), []).append(compared)
    if not panels:
        return empty("The files hold no rows.")
    head = "".join(f'<th scope="col">{h}</th>' for h in _HEAD[1:])
    drawn = []
    for title, groups in panels.items():
        body = "".join(map(_group, groups))
        table = (
            f'<div class="scroll"><table class="rows"><caption>{e(title)}</caption><thead><tr>'
            f'<th class="left" scope="col">{_HEAD[0]}</th>{head}</tr></thead>{body}</table></div>'
        )
        drawn.append((title, _verdicts([r for g in groups for r in g]), table))
    lines = sum(len(run.rows) for run in runs)
    return (
        "<p>The line below each row repeats it: one click or tap selects all of it.</p>"
        + details(drawn, lines <= OPEN_ROWS)
    )


def _group(compared: Sequence[Row]) -> str:
    n = len(_HEAD)
    case = e(case_title(compared[0]))
    head = f'<tr class="group"><th scope="rowgroup" colspan="{n}">{case}</th></tr>'
    return f"<tbody>{head}{''.join(map(_tr, compared))}</tbody>"


def _tr(row: Row) -> str:
    name = f"{row.candidate} ({row.backend})" if row.ours and row.backend else row.candidate
    notes = [row.reason] if row.reason else []
    notes += [f"{figures(row.images_per_s)} images/s"] if row.images_per_s else []
    notes += [f"{row.peak_mb:.0f} MB at its peak"] if row.peak_mb is not None else []
    band = small(f"{figures(row.p20_ms)}–{figures(row.p80_ms)}") if row.median_ms else ""
    speed = interval = ""
    if row.speedup is not None:
        speed = f"{row.speedup:.2f}×"
        interval = small(f"{row.speedup_low or 0:.2f}–{row.speedup_high or 0:.2f}")
    share = f"{row.percent_of_roof:.0f} %" if row.percent_of_roof is not None else ""
    cells = [
        f'<span class="v {row.verdict}">{row.verdict}</span>',
        speed + interval,
        figures(row.median_ms) + band,
        f"{row.error_ratio:.2f}" if row.error_ratio is not None else "",
        f"{row.error:.1e}" if row.error is not None else "",
        figures(row.gflops),
        figures(row.gbps),
        share + (small(row.limit) if share and row.limit else ""),
    ]
    tds = "".join(f"<td>{cell}</td>" for cell in cells)
    said = f"{e('; '.join(notes))}<br>" if notes else ""
    # an option is kept on one line, which a hyphen would not do by itself
    words = (f"<span>{e(w)}</span>" if w.startswith("-") else e(w) for w in row.repro.split(" "))
    repeat = f"<code>{' '.join(words)}</code>" if row.repro else ""
    return (
        f'<tr class="rule"><th scope="row" title="{e(name)}">{e(name)}</th>{tds}</tr>'
        f'<tr class="repeat"><td colspan="{len(_HEAD)}"><small>{said}</small>{repeat}</td></tr>'
    )


def _verdicts(rows: Sequence[Row]) -> str:
    counts = {v: sum(row.verdict == v for row in rows) for v in result.VERDICTS}
    return ", ".join(f"{n} {verdict}" for verdict, n in counts.items() if n)


# the machine


def machines(runs: Sequence[Run]) -> str:
    """Each run's machine; once where the runs are parts of one."""
    return "".join(map(_machine, runs if all(run.name for run in runs) else runs[:1]))


def _machine(run: Run) -> str:
    env = run.env
    dirty = ", with changes not committed" if env.get("dirty") else ""
    facts = {
        "CPU": env.get("cpu"),
        "GPU": env.get("gpu"),
        "cores": env.get("cores"),
        "threads": ", ".join(map(str, sorted({row.threads for row in run.rows}))),
        "instruction set": f"{env.get('isa')} (ours), {env.get('torch_isa')} (torch)",
        "governor": env.get("governor"),
        "load at the end": env.get("load"),
        "others meanwhile": _others(run.rows),
        "date": env.get("date"),
        "hybridops": f"{env.get('hybridops')}, {env.get('git')}{dirty}"
        if env.get("git")
        else env.get("hybridops"),
        "torch": env.get("torch"),
        "Python": env.get("python"),
        "packages": pairs(env.get("peers")),
        "variables": pairs(env.get("variables"), "=") or "none that matter",
        "seed": env.get("seed"),
        "machine": env.get("machine"),
    }
    listed = "".join(
        f"<dt>{key}</dt><dd>{e(value)}</dd>" for key, value in facts.items() if value is not None
    )
    title = f"<h3>{e(run.name)}</h3>" if run.name else ""
    return (
        f'<div class="panels" style="margin-top:12px"><div class="panel">{title}'
        f'<dl class="facts">{listed}</dl></div>{_roof_table(env)}</div>'
    )


def _others(rows: Sequence[Row]) -> str | None:
    known = [row.others_cpu for row in rows if row.others_cpu is not None]
    return f"up to {max(known):.1f} cores busy with other processes" if known else None


def _roof_table(env: dict) -> str:
    try:
        known = roof.Roof.from_json(env.get("roof"))
    except (ValueError, TypeError):
        return f'<div class="panel">{empty("No measured roof in this file.")}</div>'
    counts = sorted({n for r in (known.flops, known.bandwidth) for by in r.values() for n in by})
    head = "".join(f'<th scope="col">{many(n, "thread")}</th>' for n in counts)
    body = ""
    for rates, unit in ((known.flops, "GFLOP/s"), (known.bandwidth, "GB/s")):
        for key, by in rates.items():
            size = known.cache_bytes.get(key)
            note = f" ({_bytes(size)})" if size else ""
            cells = "".join(f"<td>{figures(by.get(n)) or '–'}</td>" for n in counts)
            body += f'<tr class="rule"><th scope="row">{e(key)}{note}, {unit}</th>{cells}</tr>'
    return (
        f'<div class="panel"><div class="scroll"><table><caption>The measured roof</caption>'
        f'<thead><tr><th class="left" scope="col">measured roof</th>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div></div>"
    )


def _bytes(size: int) -> str:
    return f"{size >> 20} MiB" if size >= 1 << 20 else f"{size >> 10} KiB"
