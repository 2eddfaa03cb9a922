"""The command line: `hybridops` and `python -m hybridops`.

Each command lives in the file of its name and is imported only when it runs, so `--help` and
`doctor` work without timm, torchvision, pillow or matplotlib.

Exit codes: 0 fine; 1 the answer is bad news (a broken error rule, no C++ library); 2 the request
cannot be served (one line on stderr says why).
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from pathlib import Path
from typing import Any, NoReturn

from .. import __version__


class UserError(Exception):
    """Something that the user can put right: shown as one line, without a traceback."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit code."""
    parser = _build_parser()
    try:
        arguments = parser.parse_args(argv)
        if arguments.command is None:
            parser.print_help()
            return 0
        command = importlib.import_module(f".{arguments.command}", __package__)
        code = command.run(arguments)
        sys.stdout.flush()
        return code
    except SystemExit as stop:  # argparse: --help, --version, a bad option
        return stop.code if isinstance(stop.code, int) else 2
    except (UserError, ImportError) as error:
        print(f"hybridops: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("hybridops: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader (head, less) has gone; nothing is left to tell
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _build_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="hybridops",
        description="Fast kernels for CNN-Transformer hybrid vision models.",
        epilog="example:\n  hybridops demo",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"hybridops {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")

    def add(name: str, summary: str, *examples: str) -> argparse.ArgumentParser:
        lines = "\n  ".join(f"hybridops {name} {example}".rstrip() for example in examples)
        return commands.add_parser(
            name,
            help=summary,
            description=summary[0].upper() + summary[1:] + ".",
            epilog=f"example:\n  {lines}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    _add_bench(add)
    _add_demo(add)
    _add_detect(add)
    _add_doctor(add)
    _add_explain(add)
    _add_optimize(add)
    _add_parity(add)
    _add_profile(add)
    _add_tune(add)
    return parser


MODEL_HELP = "timm:NAME, hybridops:NAME, or a plain name (looked up in timm, then in hybridops)"


def _add_bench(add) -> None:
    bench = add(
        "bench",
        "measure ops and models: error beside time, against peers and this machine's roof",
        "op attention --dtype fp32,bf16",
        "model timm:levit_128s --peers eager,compile,onnxruntime,openvino --json r.json",
        "report r.json -o report.html",
    )
    importlib.import_module(".bench", __package__).add_arguments(bench)


def _add_demo(add) -> None:
    demo = add(
        "demo",
        "optimize three hybrid models and compare speed and error with plain torch",
        "",
        "cat.jpg dog.png --models levit_256 hybridops:cpvt_tiny --out cats.png",
    )
    demo.add_argument(
        "images", nargs="*", metavar="IMAGE", help="default: scikit-learn's two sample photographs"
    )
    demo.add_argument("--models", nargs="+", metavar="MODEL", help=MODEL_HELP)
    demo.add_argument("--out", type=Path, default=Path("hybridops_demo.png"), help="the chart")
    demo.add_argument("--json", type=Path, metavar="FILE", help="write the figures as JSON")
    demo.add_argument("--rounds", type=_positive, metavar="N", help="timed rounds (default: ~3 s)")
    demo.add_argument("--threads", type=_positive, metavar="N", help="default: as torch chooses")
    demo.add_argument("--quick", action="store_true", help="few rounds: a try, not a measurement")
    _add_download(demo)


def _add_detect(add) -> None:
    detect = add(
        "detect",
        "draw the objects that DETR sees on photographs",
        "--out boxes",
        "street.jpg cat.png --out boxes --model detr_resnet101 --threshold 0.9",
    )
    detect.add_argument(
        "images", nargs="*", metavar="IMAGE", help="default: scikit-learn's two sample photographs"
    )
    detect.add_argument("--out", type=Path, required=True, metavar="DIR", help="for the drawings")
    detect.add_argument("--model", default="detr_resnet50", metavar="MODEL", help="detr_*")
    detect.add_argument("--weights", type=Path, metavar="FILE", help="default: the authors'")
    detect.add_argument(
        "--threshold", type=float, default=0.7, metavar="P", help="least score (default: 0.7)"
    )


def _add_doctor(add) -> None:
    doctor = add(
        "doctor",
        "say what serves each op here, what is missing, and how to get it",
        "",
        "--json",
    )
    doctor.add_argument("--json", action="store_true", help="the same as one JSON object")


def _add_explain(add) -> None:
    explain = add(
        "explain",
        "list what optimize() would replace in a model, without its weights",
        "timm:levit_256",
        "torchvision:swin_t",
        "hf:vit",
    )
    explain.add_argument(
        "model",
        metavar="MODEL",
        help=f"{MODEL_HELP}; torchvision:NAME; hf:NAME, a model type or class of transformers in "
        "its default configuration",
    )


def _add_optimize(add) -> None:
    optimize = add(
        "optimize",
        "optimize one model and compare it with plain torch on your images",
        "timm:levit_256 --image cat.jpg dog.png",
        "twins_svt_small --image cat.jpg --dtype bf16 --repeat 50",
    )
    optimize.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    optimize.add_argument("--image", nargs="+", required=True, metavar="PATH", dest="images")
    optimize.add_argument("--repeat", type=_positive, metavar="N", help="rounds (default: ~3 s)")
    optimize.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    optimize.add_argument("--batch", action="store_true", help="all images in one batch")
    optimize.add_argument("--freeze", action="store_true", help="as a snapshot of its weights")
    _add_download(optimize)


def _add_parity(add) -> None:
    parity = add(
        "parity",
        "list the error of every class that is served, forward and backward, in small models",
        "--out docs/parity.md --json parity.json",
        "timm:levit* hf:* --json parity.json",
    )
    parity.add_argument("patterns", nargs="*", metavar="PATTERN", help="of the list (default: all)")
    parity.add_argument(
        "--models",
        type=Path,
        action="append",
        default=[],
        metavar="FILE.py",
        help="run this file, and add its MODELS: {name: (constructor, function giving arguments)}",
    )
    parity.add_argument("--out", type=Path, metavar="FILE.md", help="write the table as Markdown")
    parity.add_argument("--json", type=Path, metavar="FILE", help="write the same as JSON")
    parity.add_argument("--quiet", action="store_true", help="no table, no progress")


def _add_profile(add) -> None:
    profile = add(
        "profile",
        "show where a model's time goes, layer by layer, before and after optimize()",
        "timm:levit_128s",
        "timm:levit_256 --batch 16 --dtype fp32,bf16 --threads 2 --out levit.html",
    )
    profile.add_argument("model", metavar="MODEL", help=f"{MODEL_HELP}; or hf:NAME")
    profile.add_argument("--batch", type=_positive, default=1, metavar="N", help="default: 1")
    profile.add_argument("--size", type=image_size, metavar="N|HxW", help="of the images")
    profile.add_argument("--dtype", type=_dtypes, default=["fp32"], metavar="fp32,bf16")
    profile.add_argument("--threads", type=_positive, metavar="N", help="default: as torch chooses")
    profile.add_argument("--depth", type=_positive, metavar="N", help="default: up to 30 rows")
    profile.add_argument("--backend", default="auto", help="as for optimize() (default: auto)")
    profile.add_argument("--out", type=Path, metavar="FILE.html", help="draw both sides")
    profile.add_argument("--json", type=Path, metavar="FILE", help="write every module as JSON")
    profile.add_argument("--quiet", action="store_true", help="no table, no progress")


def _add_tune(add) -> None:
    tune = add(
        "tune",
        "search faster block sizes for the Triton kernels on this GPU",
        "--seconds 600",
        "--dry-run --arch sm_90 --only attention_forward",
    )
    tune.add_argument("--arch", metavar="sm_N", help="default: this GPU's")
    tune.add_argument(
        "--dry-run",
        action="store_true",
        help="only compile, without a GPU, and say what each configuration needs",
    )
    tune.add_argument(
        "--only", default="*", metavar="PATTERN", help="entries kernel/kind/width, or a kernel"
    )
    tune.add_argument("--out", type=Path, metavar="FILE", help="default: your own table")
    tune.add_argument(
        "--seconds", type=float, default=float("inf"), metavar="S", help="begin no entry later"
    )


def need_folder(*paths: Path | None) -> None:
    """Refuse a file that could not be written, before anything is measured."""
    for path in paths:
        if path is not None and not path.resolve().parent.is_dir():
            raise UserError(f"{path}: there is no directory {path.resolve().parent}")


def _add_download(command) -> None:
    command.add_argument(
        "--download-seconds",
        type=_positive,
        default=40,
        metavar="S",
        help="longest wait for weights from a hub that answers (default: 40)",
    )


def _dtypes(text: str) -> list[str]:
    names = text.split(",")
    if not set(names) <= {"fp32", "bf16"}:
        raise argparse.ArgumentTypeError(f"must be of fp32 and bf16, got {text!r}")
    return names


def image_size(text: str) -> Any:
    """What --size takes: see read_size()."""
    from ..bench.model_task import read_size

    try:
        return read_size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _positive(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1 on, got {text!r}")
    return value
