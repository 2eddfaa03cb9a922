"""`hybridops bench`: ops and models against their peers, and what to do with the results."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..bench import jobs, peers, processes, regress, result, roof, table
from ..bench.cases import CASES
from ..bench.environment import environment
from ..bench.sample import Settings
from . import UserError, image_size, need_folder

SAVED = Path(".benchmarks") / "hybridops"
REHEARSAL: dict[str, Any] = {"min_time": 1e-6, "max_noise": 0.5, "timeout": 1e-3, "most_rounds": 3}


def run(arguments: argparse.Namespace) -> int:
    """Exit code 1 for a wrong result, 2 for a regression (or a request that cannot be served)."""
    command = globals()[f"_{arguments.bench_command}"]
    try:
        return command(arguments)
    except (result.BadResult, ValueError) as error:
        raise UserError(str(error)) from None


def _list(arguments: argparse.Namespace) -> int:
    for op, cases in CASES.items():
        print(f"{op}\n  " + "\n  ".join(case.name for case in cases))
    print("\npeers")
    for name in peers.PEERS:
        line = peers.absent(name)
        print(f"  {name:18}{peers.peer(name).SUMMARY}" + (f"  [absent: {line}]" if line else ""))
    print("\nmodels: any of timm:NAME, hf:NAME (a transformers model type), hybridops:NAME")
    return 0


def _env(arguments: argparse.Namespace) -> int:
    bar = table.Bar(1, arguments.quiet)
    for count in arguments.threads or [1]:
        roof.roof(count, refresh=arguments.probe, progress=lambda text: bar(0.5, text))
    bar.clear()
    print(json.dumps(environment(tuple(arguments.threads or [1])), indent=1))
    if why := roof.why_no_roof():
        print(f"no roof: {why}", file=sys.stderr)
    return 0


def _op(arguments: argparse.Namespace) -> int:
    planned = [
        job
        for name in (CASES if arguments.name == "all" else [arguments.name])
        for job in jobs.op_jobs(
            name,
            shape=arguments.shape or ["*"],
            dtype=arguments.dtype,
            mode=arguments.mode or ["fwd"],
            threads=arguments.threads,
            backend=arguments.backend,
            layout=arguments.layout,
            peers=arguments.peers,
            seed=arguments.seed,
            device=arguments.device,
            rehearsal=arguments.dry_run,
        )
    ]
    return _measure(planned, arguments)


def _model(arguments: argparse.Namespace) -> int:
    planned = [
        job
        for name in arguments.name
        for job in jobs.model_jobs(
            name,
            batch=arguments.batch,
            size=arguments.size or [None],
            dtype=arguments.dtype,
            mode=arguments.mode or ["infer"],
            threads=arguments.threads,
            peers=arguments.peers,
            metric=arguments.metric,
            seed=arguments.seed,
            device=arguments.device,
            graph=arguments.graph,
            freeze=arguments.freeze,
            offload=arguments.offload,
            rehearsal=arguments.dry_run,
        )
    ]
    return _measure(planned, arguments)


def _run(arguments: argparse.Namespace) -> int:
    return _measure(jobs.suite_jobs(arguments.suite, rehearsal=arguments.dry_run), arguments)


def _measure(planned: list[jobs.Job], arguments: argparse.Namespace) -> int:
    settings = Settings(
        arguments.min_time,
        arguments.max_noise,
        arguments.timeout,
        arguments.cache,
        arguments.seed,
    )
    if arguments.dry_run:
        settings = replace(settings, **REHEARSAL)
    base = result.rows_of(result.load(_saved(arguments.baseline))) if arguments.baseline else None
    if arguments.save is not None:
        _saved(arguments.save)  # a bad name is refused before anything is measured
    need_folder(arguments.json, arguments.csv)
    if arguments.processes > 1:
        rows, code = _in_processes(arguments), 0
    else:
        rows, code = _here(planned, settings, arguments)
    _write(rows, arguments)
    code = code or result.exit_code(rows)
    if base is not None:
        code = _judge(base, rows, 0.05, fail=True) or code
    return code


def _in_processes(arguments: argparse.Namespace) -> list[result.Row]:
    """The rows of all processes as one run's."""
    if arguments.resume or arguments.stop_after is not None or arguments.dry_run:
        raise UserError("--processes goes with none of --resume, --stop-after and --dry-run")
    found: list[list[result.Row]] = []
    try:
        for rows in processes.in_processes(arguments):
            found.append(rows)
    except processes.ProcessFailed as error:
        raise UserError(str(error)) from None
    except KeyboardInterrupt:  # see _here
        arguments.save = None
        if found:
            _write(processes.combined(found, arguments.max_noise), arguments)
        raise
    rows = processes.combined(found, arguments.max_noise)
    if not arguments.quiet:
        print(table.table(rows), flush=True)
    return rows


def _here(
    planned: list[jobs.Job], settings: Settings, arguments: argparse.Namespace
) -> tuple[list[result.Row], int]:
    """Measure in this process: the rows, and the exit code 1 where the run ended early."""
    rows, planned = _earlier(planned, arguments)
    bar = table.Bar(len(planned), arguments.quiet)
    code = 0
    try:
        for found in jobs.run_jobs(
            _until(planned, arguments.stop_after),
            settings,
            started=bar.start,
            progress=bar,
            keep_going=arguments.resume,
        ):
            rows += found
            bar.finish()
            if not arguments.quiet:
                print(table.table(found), flush=True)
            if arguments.resume:
                _write(rows, arguments)
    except jobs.Lost as error:
        print(f"hybridops: {error}; the same command goes on in a new process", file=sys.stderr)
        code = 1
    except KeyboardInterrupt:  # what was measured is worth a look, but is no run to save
        bar.clear()
        arguments.save = None
        if rows:
            _write(rows, arguments)
        raise
    return rows, code


def _earlier(
    planned: list[jobs.Job], arguments: argparse.Namespace
) -> tuple[list[result.Row], list[jobs.Job]]:
    """The rows that an interrupted run left, and what is still to be measured."""
    if arguments.resume and not arguments.json:
        raise UserError("--resume goes on with the file that --json names")
    if not (arguments.resume and arguments.json.exists()):
        return [], planned
    doc = result.load(arguments.json)
    here = environment() | {"rehearsal": arguments.dry_run}
    for key in ("gpu", "cpu", "torch", "hybridops", "git", "rehearsal"):
        if doc["env"].get(key) != here[key]:
            raise UserError(
                f"{arguments.json} was measured with {key} {doc['env'].get(key)!r}, here it is "
                f"{here[key]!r}: name another file"
            )
    left = jobs.unmeasured(planned, doc)
    if not arguments.quiet:
        kept = len(planned) - len(left)
        print(f"{arguments.json} has {kept} of {len(planned)} comparisons", file=sys.stderr)
    return result.rows_of(doc), left


def _until(planned: list[jobs.Job], seconds: float | None) -> Iterator[jobs.Job]:
    """The jobs that can begin within that time."""
    start = time.monotonic()
    for done, job in enumerate(planned):
        if seconds is not None and time.monotonic() - start > seconds:
            left = f"{len(planned) - done} of {len(planned)} comparisons"
            print(f"stopped after {seconds:g} s with {left} to go", file=sys.stderr)
            return
        yield job


def _write(rows: list[result.Row], arguments: argparse.Namespace) -> None:
    threads = tuple(sorted({row.threads for row in rows}))
    on_gpu = any(row.device != "cpu" for row in rows)
    env = environment(threads, seed=arguments.seed, on_gpu=on_gpu)
    document = result.document(env | {"rehearsal": arguments.dry_run}, rows)
    if arguments.json:
        result.write_json(document, arguments.json)
    if arguments.csv:
        result.write_csv(rows, arguments.csv)
    if arguments.save:
        SAVED.mkdir(parents=True, exist_ok=True)
        result.write_json(document, _saved(arguments.save))


def _saved(name: str) -> Path:
    if not name.replace("-", "").replace("_", "").replace(".", "").isalnum() or name[0] == ".":
        raise UserError(f"a saved run's name has letters, digits, - _ and . only, got {name!r}")
    return SAVED / f"{name}.json"


def _compare(arguments: argparse.Namespace) -> int:
    base, new = (result.load(path) for path in (arguments.base, arguments.new))
    if base["env"].get("machine") != new["env"].get("machine"):
        print("the two runs are from different machines", file=sys.stderr)
    threshold = regress.parse_rule(arguments.fail_on) if arguments.fail_on else 0.05
    old, fresh = result.rows_of(base), result.rows_of(new)
    return _judge(old, fresh, threshold, fail=bool(arguments.fail_on))


def _judge(base: list[result.Row], new: list[result.Row], threshold: float, fail: bool) -> int:
    changes = regress.changes(base, new, threshold)
    if not changes:
        raise UserError("the two runs have no timed row of ours in common")
    print(table.change_table(changes))
    lost = regress.missing(base, new)
    for row in lost:
        print(f"MISSING         {row.name} {row.case} {row.mode} {row.dtype}: not timed any more")
    slower = any(change.verdict == "SLOWER" for change in changes)
    return 2 if fail and (slower or lost) else 0


def _report(arguments: argparse.Namespace) -> int:
    from ..bench.report import write_report

    write_report(arguments.results, arguments.output)
    print(f"wrote {arguments.output}")
    return 0


def add_arguments(bench: argparse.ArgumentParser) -> None:
    """The sub-commands and their options."""
    commands = bench.add_subparsers(dest="bench_command", metavar="COMMAND", required=True)

    def add(name: str, summary: str, *examples: str) -> argparse.ArgumentParser:
        lines = "\n  ".join(f"hybridops bench {name} {example}".rstrip() for example in examples)
        return commands.add_parser(
            name,
            help=summary,
            description=summary[0].upper() + summary[1:] + ".",
            epilog=f"example:\n  {lines}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    add("list", "list ops, their shapes, and peers", "")
    env = add("env", "print the environment and this machine's measured roof", "", "--probe")
    env.add_argument("--probe", action="store_true", help="measure the roof again")
    env.add_argument("--threads", type=_whole_list, default=[], metavar="N,…")
    env.add_argument("--quiet", action="store_true", help="no progress")

    op = add(
        "op",
        "measure an op on the shapes of real models",
        "attention --shape 'levit_*' --dtype fp32,bf16 --threads 1,2",
        "linear --shape M=50,K=64,N=96,activation=gelu --mode fwd,bwd",
        "peg --shape cpvt_tiny,B=16 --peers eager,compile,onnxruntime --json peg.json",
    )
    op.add_argument("name", metavar="NAME", help=f"{', '.join(CASES)}, or all")
    op.add_argument(
        "--shape",
        action="append",
        metavar="ID|k=v,…",
        help="a shape's id or pattern, changed by k=v if wanted; may be given again (default: all)",
    )
    op.add_argument("--mode", type=_list_of, metavar="fwd,bwd", help="bwd: forward and backward")
    op.add_argument("--backend", default="auto", help="cpu, triton, cuda, or all (default: auto)")
    op.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    _dry_run(op)
    op.add_argument(
        "--layout", help="strides of the inputs: contiguous, transposed, sliced, channels_last, …"
    )
    _common(op, "eager, for attention also sdpa")

    model = add(
        "model",
        "measure whole models, as they come and optimized",
        "timm:levit_128s --batch 1,16 --peers eager,compile,onnxruntime,openvino --json r.json",
        "cpvt_tiny --mode train --batch 16 --metric latency,peak-mem",
    )
    model.add_argument(
        "name", nargs="+", metavar="NAME", help="timm:NAME, hf:NAME, hybridops:NAME or a plain name"
    )
    model.add_argument("--batch", type=_whole_list, default=[1], metavar="N,…")
    model.add_argument("--size", type=_sizes, metavar="N|HxW,…", help="of the images")
    model.add_argument("--mode", type=_list_of, metavar="infer,train", help="train: a step of SGD")
    model.add_argument(
        "--metric",
        type=_list_of,
        default=["latency"],
        help=f"{', '.join(jobs.METRICS)} (peak-mem runs each candidate in a process of its own)",
    )
    model.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    model.add_argument("--graph", action="store_true", help="ours as a CUDA graph")
    model.add_argument("--freeze", action="store_true", help="ours as a snapshot: optimize(freeze)")
    model.add_argument(
        "--offload", action="store_true", help="the same, its weights in a file: optimize(offload)"
    )
    _dry_run(model)
    _common(model, "eager, compile")

    suite = add(
        "run",
        "measure what a suite file asks for",
        "benchmarks/hot_paths.toml --save main",
        "benchmarks/targets_avx2.toml --processes 5 --timeout 3 --json targets.json",
    )
    suite.add_argument("suite", type=Path, metavar="SUITE.toml")
    _dry_run(suite)
    _measuring(suite)

    compare = add(
        "compare", "say what became faster or slower", "base.json new.json --fail-on 'slow>5%%'"
    )
    compare.add_argument("base", type=Path, metavar="BASE.json")
    compare.add_argument("new", type=Path, metavar="NEW.json")
    compare.add_argument("--fail-on", metavar="slow>N%%", help="exit with 2 if so, or if rows miss")

    report = add("report", "draw results as one HTML file", "*.json -o report.html")
    report.add_argument("results", type=Path, nargs="+", metavar="RESULT.json")
    report.add_argument("-o", "--output", type=Path, default=Path("report.html"))


def _common(command: argparse.ArgumentParser, peers_default: str) -> None:
    command.add_argument("--dtype", type=_list_of, default=["fp32"], metavar="fp32,bf16,…")
    command.add_argument("--threads", type=_whole_list, default=[], metavar="N,…")
    command.add_argument(
        "--peers",
        type=_list_of,
        metavar="NAME,…",
        help=f"default: {peers_default}; `hybridops bench list` names all",
    )
    _measuring(command)


def _dry_run(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--dry-run",
        action="store_true",
        help="every comparison once, small and on the CPU: proves the calls, measures nothing",
    )


def _measuring(command: argparse.ArgumentParser) -> None:
    command.set_defaults(dry_run=False)
    command.add_argument(
        "--min-time",
        type=float,
        default=Settings.min_time,
        metavar="S",
        help="timed seconds per candidate, at least (default: %(default)s)",
    )
    command.add_argument(
        "--max-noise",
        type=_share,
        default=Settings.max_noise,
        metavar="X%",
        help="stop when every ratio is known that well (default: 2%%)",
    )
    command.add_argument(
        "--timeout",
        type=float,
        default=Settings.timeout,
        metavar="S",
        help="seconds of rounds per comparison, at most (default: %(default)s)",
    )
    command.add_argument(
        "--processes",
        type=_count,
        default=1,
        metavar="N",
        help="measure all of it N times, in a process each; intervals then tell how those differ",
    )
    command.add_argument("--cache", choices=("warm", "cold"), default="warm")
    command.add_argument("--json", type=Path, metavar="FILE", help="write the results as JSON")
    command.add_argument("--csv", type=Path, metavar="FILE", help="write the rows as CSV")
    command.add_argument("--save", metavar="NAME", help=f"keep the results as {SAVED}/NAME.json")
    command.add_argument("--baseline", metavar="NAME", help="compare with a kept run; 2 if slower")
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--quiet", action="store_true", help="no table, no progress")
    command.add_argument(
        "--resume",
        action="store_true",
        help="write --json after each comparison, and go on where it left off; none ends the run",
    )
    command.add_argument(
        "--stop-after", type=float, metavar="S", help="begin no comparison after S seconds"
    )


def _list_of(text: str) -> list[str]:
    return [part for part in text.split(",") if part]


def _whole_list(text: str) -> list[int]:
    parts = text.split(",")
    if not all(part.isdigit() and 0 < int(part) < 1 << 20 for part in parts):
        raise argparse.ArgumentTypeError(f"must be whole numbers from 1 on, got {text!r}")
    return [int(part) for part in parts]


def _count(text: str) -> int:
    count, *more = _whole_list(text)
    if more:
        raise argparse.ArgumentTypeError(f"must be one whole number from 1 on, got {text!r}")
    return count


def _sizes(text: str) -> list:
    return [image_size(part) for part in text.split(",")]


def _share(text: str) -> float:
    number = text.removesuffix("%")
    try:
        return float(number) / (100 if number != text else 1)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"must be a share such as 2% or 0.02, got {text!r}"
        ) from None
