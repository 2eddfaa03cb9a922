"""`hybridops demo`: photographs through three hybrid models, before and after optimize()."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import torch

import hybridops
from hybridops import backend

from . import UserError
from .doctor import cpu_name, is_amd
from .images import open_photographs, sample_photographs
from .measure import Comparison, compare, thread_count
from .models import Hub, Loaded, class_name, load, resolve

MODELS = ("timm:levit_256", "hybridops:cpvt_tiny", "timm:twins_svt_small")
Row = tuple[str, Loaded, Comparison]


class Progress:
    """One line per model that changes in a terminal; plain lines where the output is a pipe."""

    def __init__(self, count: int) -> None:
        self._count, self._head, self._said = count, "", ""
        self._live = sys.stderr.isatty()

    def start(self, index: int, name: str) -> None:
        self._head, self._said = f"[{index + 1}/{self._count}] {name}: ", ""

    def say(self, text: str) -> None:
        if self._live:
            print(f"\r\x1b[K{self._head}{text} …", end="", file=sys.stderr, flush=True)
        elif text.partition(",")[0] != self._said.partition(",")[0]:  # "timing, round n" once
            print(f"{self._head}{text.partition(',')[0]}", file=sys.stderr, flush=True)
        self._said = text

    def done(self, text: str) -> None:
        clear = "\r\x1b[K" if self._live else ""
        print(f"{clear}{self._head}{text}", file=sys.stderr, flush=True)


def run(arguments: argparse.Namespace) -> int:
    """Exit code 1 when an optimized model breaks the error rule."""
    names = [":".join(resolve(model)) for model in arguments.models or MODELS]
    _check_writable(arguments.out, (".png", ".svg", ".pdf"))
    if arguments.json is not None:
        _check_writable(arguments.json, ())
    from . import chart  # before the work: without matplotlib there is no point in starting

    photographs = open_photographs(arguments.images) if arguments.images else sample_photographs()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    print(f"hybridops {hybridops.__version__}, {machine()}", *honesty(), sep="\n")
    files = ", ".join(name for name, _ in photographs)
    print(f"images: {files}; batch 1, fp32, eager and optimized timed in turn\n", flush=True)
    hub, progress, rows = Hub(arguments.download_seconds), Progress(len(names)), []
    begin = time.monotonic()
    for index, name in enumerate(names):
        progress.start(index, name)
        progress.say("loading")
        loaded = load(name, hub, photographs)
        progress.done(loaded.detail)
        try:
            result, _ = compare(
                loaded.model,
                loaded.images,
                ours=name.startswith("hybridops:"),
                rounds=arguments.rounds,
                quick=arguments.quick,
                say=progress.say,
            )
        except hybridops.NothingToOptimize as error:
            raise UserError(f"{name}: {str(error).partition('. ')[0]}") from None
        progress.done(f"{result.speedup:.2f}x over {len(result.eager_ms)} rounds")
        for (file, _), label in zip(photographs, result.top1, strict=True):
            if description := class_name(loaded, label):
                progress.done(f"{file} shows: {description}")
        rows.append((name, loaded._replace(model=torch.nn.Identity()), result))  # frees it
    print("", *table(rows), "", sep="\n")
    chart.draw(rows, arguments.out, machine())
    if arguments.json is not None:
        _write_json(arguments.json, rows, [name for name, _ in photographs])
        print(f"figures: {arguments.json}")
    print(f"chart:   {arguments.out}   ({time.monotonic() - begin:.0f} s in all)")
    return 0 if all(result.within_rule for _, _, result in rows) else 1


def machine() -> str:
    """CPU, torch, threads and our library, in one line."""
    library = f"{backend.ISA} library" if backend.ISA else "no C++ library"
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{cpu_name()}, torch {torch.__version__} ({capability}), {thread_count()}, {library}"


def honesty() -> list[str]:
    """What a reader must know before believing a ratio."""
    lines = []
    if is_amd():
        lines.append(
            "note: on AMD CPUs stock torch's fp32 matrix products run at AVX2 speed, also where "
            "the CPU has AVX-512 (a vendor check inside MKL)"
        )
    if backend.ISA is None:
        lines.append(f"note: plain torch on both sides, no kernels: {backend.why_no_library()}")
    return lines


def table(rows: list[Row]) -> list[str]:
    """The result, one line per model."""
    width = max(len(name) for name, _, _ in rows)
    head = ("model", "weights", "eager ms", "optimized ms", "speed-up", "error", "torch's own")
    layout = f"{{:{width}}}  {{:7}}  {{:>8}}  {{:>12}}  {{:>8}}  {{:>7}}  {{:>11}}  {{:8}}  {{}}"
    lines = [layout.format(*head, "rule", "top-5 agreement")]
    for name, loaded, result in rows:
        lines.append(
            layout.format(
                name,
                loaded.weights,
                f"{result.eager:.2f}",
                f"{result.optimized:.2f}",
                f"{result.speedup:.2f}x",
                f"{result.optimized_error:.1e}",
                f"{result.eager_error:.1e}",
                "holds" if result.within_rule else "BROKEN",
                f"{result.top5_shared}/{result.top5_total}",
            )
        )
    lines.append("error: max |logits - float64| / rms(float64); rule: at most twice torch's own")
    return lines


def _check_writable(path: Path, suffixes: tuple[str, ...]) -> None:
    if path.is_dir() or not path.parent.is_dir():
        what = "is a directory" if path.is_dir() else "is in a folder that does not exist"
        raise UserError(f"{path} {what}: a file to write is needed")
    if suffixes and path.suffix.lower() not in suffixes:
        raise UserError(f"{path} must end in {', '.join(suffixes)}")
    try:
        new = not path.exists()
        path.open("ab").close()
        if new:
            path.unlink()
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}") from None


def _write_json(path: Path, rows: list[Row], images: list[str]) -> None:
    models = [
        {"model": name, "weights": loaded.detail, **result.figures()}
        for name, loaded, result in rows
    ]
    context = {
        "hybridops": hybridops.__version__,
        "torch": torch.__version__,
        "cpu": cpu_name(),
        "isa": backend.ISA,
        "threads": torch.get_num_threads(),
        "notes": honesty(),
        "images": images,
    }
    path.write_text(json.dumps(context | {"models": models}, indent=1) + "\n")
