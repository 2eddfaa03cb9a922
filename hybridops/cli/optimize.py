"""`hybridops optimize MODEL --image PATH…`: one model, your images, before and after."""

from __future__ import annotations

import argparse

import torch

import hybridops

from . import UserError
from .images import open_photographs
from .measure import compare, thread_count
from .models import Hub, class_name, load, resolve


def run(arguments: argparse.Namespace) -> int:
    """Exit code 1 when the optimized model breaks the error rule."""
    source, name = resolve(arguments.model)
    photographs = open_photographs(arguments.images)
    loaded = load(f"{source}:{name}", Hub(arguments.download_seconds), photographs)
    dtype = torch.float32 if arguments.dtype == "fp32" else torch.bfloat16
    model = loaded.model.to(dtype)
    print(f"{name}: {loaded.detail}, {arguments.dtype}, {thread_count()}")
    batches = [image.to(dtype) for image in loaded.images]
    if arguments.batch:
        batches = [torch.cat(batches)]
    try:
        result, optimized = compare(
            model,
            batches,
            ours=source == "hybridops",
            rounds=arguments.repeat,
            freeze=arguments.freeze,
        )
    except hybridops.NothingToOptimize as error:
        raise UserError(f"{name}: {str(error).partition('. ')[0]}") from None
    print(hybridops.report(optimized))
    print(f"eager      {result.eager:9.2f} ms per call of {len(batches[0])} image(s)")
    print(
        f"optimized  {result.optimized:9.2f} ms, {result.speedup:.2f}x, n = {len(result.eager_ms)}"
    )
    verdict = "holds" if result.within_rule else "BROKEN"
    print(
        f"error against float64: {result.optimized_error:.1e}, torch's own {result.eager_error:.1e}"
        f" (rule: at most twice torch's: {verdict})"
    )
    print(f"top-5 agreement: {result.top5_shared}/{result.top5_total}")
    for (file, _), label in zip(photographs, result.top1, strict=True):
        if description := class_name(loaded, label):
            print(f"  {file}: {description}")
    return 0 if result.within_rule else 1
