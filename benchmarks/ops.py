"""Every op's test cases, timed against the op's own reference in plain torch: error first.

    python benchmarks/ops.py                       all ops, fp32
    python benchmarks/ops.py peg linear --dtype bfloat16 --threads 1

Ours and torch's run in turn, round by round; the table gives medians and their ratio. The error is
the largest one against float64, over torch's own in the same dtype: above 2, no time is printed.
The reference of attention spells out the scores: torch's fused attention is a stronger peer where
it takes the case, and so are the whole models of `python -m hybridops demo`.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from statistics import median

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from cases import all_cases
from check import run

import hybridops

ROUNDS, MIN_SECONDS = 15, 2e-3


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("ops", nargs="*", help="attention, linear, peg, patch_embed, conv_stem")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if hybridops.backend.ISA is None:
        parser.exit(1, f"no C++ library: {hybridops.backend.why_no_library()}\n")
    print(f"torch {torch.__version__}, {hybridops.backend.ISA}, {options.threads} threads")
    print(f"{'case':32}{'ours us':>10}{'torch us':>10}{'ratio':>8}{'error ratio':>13}")
    wrong = 0
    for case in all_cases():
        if options.ops and case.op not in options.ops:
            continue
        wrong += not row(case, getattr(torch, options.dtype))
    return 1 if wrong else 0


def row(case, dtype) -> bool:
    inputs = case.make_inputs(dtype)
    exact, _ = run(case, case.make_inputs(torch.float64), "reference")
    try:
        ours, _ = run(case, inputs, "cpu")
    except hybridops.BackendUnavailable:
        return True  # a case that only the reference serves
    if ours.numel() == 0:
        return True
    torchs, _ = run(case, inputs, "reference")
    floor = 2 * torch.finfo(dtype).eps * exact.square().mean().sqrt().item()
    error, own = (float((y.double() - exact).abs().max()) + floor for y in (ours, torchs))
    if not error <= 2 * own:
        print(f"{case!s:32}{'wrong':>10}{'':>18}{error / own:13.2f}")
        return False
    a, b = in_turn(lambda: run(case, inputs, "cpu"), lambda: run(case, inputs, "reference"))
    print(f"{case!s:32}{a * 1e6:10.1f}{b * 1e6:10.1f}{b / a:8.2f}{error / own:13.2f}", flush=True)
    return True


@torch.inference_mode()
def in_turn(*calls) -> list[float]:
    """Median seconds of each call, over rounds in which they follow one another."""
    counts = []
    for call in calls:
        call()
        start = time.perf_counter()
        call()
        counts.append(max(1, int(MIN_SECONDS / (time.perf_counter() - start))))
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(ROUNDS):
        for call, count, seconds in zip(calls, counts, times, strict=True):
            start = time.perf_counter()
            for _ in range(count):
                call()
            seconds.append((time.perf_counter() - start) / count)
    return [median(seconds) for seconds in times]


if __name__ == "__main__":
    sys.exit(main())
