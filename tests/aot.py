"""Compiles every Triton kernel ahead of time, for a GPU that need not be there.

    python tests/aot.py 90 resources.json

Triton gets a driver that only names the architecture, and a launch that only compiles. Then the
kernels' own forward() and backward() are called on meta tensors in the shapes of `calls`, so that
what is compiled is what would be launched: same configuration, same specialisation. The JSON holds
one row per compiled kernel, and the entries of the tuning table that were used.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from hybridops.kernels import (
    attention,
    attention_backward,
    conv_stem,
    linear,
    patch_embed,
    peg,
    tuned,
)

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
HALF, FULL = torch.bfloat16, torch.float32


class Driver:
    """What a launch asks of a driver before it has a kernel."""

    def __init__(self, arch: int):
        self.target = GPUTarget("cuda", arch, 32)

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


def meta(*shape, dtype=HALF):
    return torch.empty(shape, dtype=dtype, device="meta")


def attend(D, dtype=HALF, Dv=None, N=(1024, 1024), B=8, table=False, mask=False, backward=True):
    q, k = meta(B, N[0], 4, D, dtype=dtype), meta(B, N[1], 4, D, dtype=dtype)
    v = meta(B, N[1], 4, Dv or D, dtype=dtype)
    bias, index = (
        (meta(4, 256, dtype=dtype), meta(*N, dtype=torch.int64)) if table else (None, None)
    )
    padding = meta(B, N[1], dtype=torch.bool) if mask else None
    out, lse = attention.forward(q, k, v, bias, index, padding, 0.125, 5 if table else 0)
    if backward:
        attention_backward.backward(out, q, k, v, bias, index, padding, out, lse, 0.125, table)


def grid(K, dtype=HALF):
    x, weight = meta(8, 1 + 14 * 14, 384, dtype=dtype), meta(384, 1, K, K, dtype=dtype)
    where = (14, 14, 1, 1, K // 2, True)
    y = peg.forward(x, weight, meta(384, dtype=dtype), *where, 0, False)
    peg.backward(y, x, weight, *where)


def product(N, dtype=HALF, norm=False):
    x, weight, vector = (meta(*s, dtype=dtype) for s in ((8, 196, 384), (N, 384), (384,)))
    residual = None if norm else meta(8, 196, N, dtype=dtype)
    gain = vector if norm else None
    linear.forward(x, weight, meta(N, dtype=dtype), None, gain, gain, 1e-6, residual, 2 * norm)


def stem(channels, dtype=HALF):
    image, weights, Ci = meta(8, 3, 224, 224, dtype=dtype), [], 3
    for Co in channels:
        weights.append(meta(Co, Ci, 3, 3, dtype=dtype))
        Ci = Co
    L = len(channels)
    biases = [meta(Co, dtype=dtype) for Co in channels]
    conv_stem.forward(image, weights, biases, [], [2] * L, [1] * 4 * L, [5] * L, [3, 2, 1, 1, 1, 1])


def patches(C, dtype=HALF):
    image, weight = meta(8, 3, 224, 224, dtype=dtype), meta(C, 3, 16, 16, dtype=dtype)
    bias, pos = meta(C, dtype=dtype), meta(197, C, dtype=dtype)
    prefix = meta(1, C, dtype=dtype)
    padding = [0] * 4
    patch_embed.forward(image, weight, bias, None, bias, bias, 1e-6, pos, prefix, 16, padding)


def calls():
    """At least one call for every entry of the tuning table, and for every kernel and option."""
    for D in (64, 128):
        yield attend, (D,)
        yield attend, (D, FULL)
    yield attend, (16, HALF, 32, (196, 196), 64, True)  # LeViT with its table
    yield attend, (128, HALF, 128, (196, 196), 8, True)
    for D in (64, 128):
        yield attend, (D, FULL, D, (196, 196), 8, True)
    yield attend, (32, HALF, 32, (100, 950), 2, False, True)  # DETR: padding, split keys
    yield attend, (16, HALF, 16, (1, 1), 1, True, True)  # sizes that become constants
    for K in (3, 7):
        yield grid, (K,)
        yield grid, (K, FULL)
    for N in (64, 1536):
        yield product, (N,)
        yield product, (N, HALF, True)
    yield product, (1536, FULL)
    yield stem, ((32, 64, 128),)
    yield stem, ((32, 64), FULL)
    yield patches, (192,)
    yield patches, (768,)


def resources(kernel) -> dict[str, int]:
    """Registers, shared memory and bytes of local memory (spills) of a compiled kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        ask = [str(CUOBJDUMP), "--dump-resource-usage", file.name]
        text = subprocess.run(ask, capture_output=True, text=True, check=True).stdout
    found = {name: int(n) for name, n in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}
    return {
        "registers": found["REG"],
        "shared": kernel.metadata.shared,
        "spilled": found["STACK"] + found["LOCAL"],
    }


def compile_all(arch: int) -> dict:
    rows, used, seen = [], set(), set()
    run, config = JITFunction.run, tuned.config
    call = None

    def only_compile(self, *args, grid, warmup, **options):
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        if kernel.hash not in seen:
            seen.add(kernel.hash)
            name = f"{self.fn.__module__.rpartition('.')[2]}.{self.fn.__name__.strip('_')}"
            blocks = {key: n for key, n in options.items() if key.startswith("BLOCK_")}
            launch = {key: getattr(kernel.metadata, key) for key in ("num_warps", "num_stages")}
            rows.append({"kernel": name, "call": call, **resources(kernel), **blocks, **launch})
        return kernel

    def recorded(kernel, x, width):
        kind = "float32" if x.dtype == FULL else "half"
        largest = min(n for n, _ in tuned.table(arch)[kernel][kind] if n >= width)
        used.add((kernel, kind, largest))
        return config(kernel, x, width)

    driver.set_active(Driver(arch))
    JITFunction.run, tuned.config, tuned.architecture = only_compile, recorded, lambda device: arch
    for function, arguments in calls():
        started = time.monotonic()
        words = (str(a).removeprefix("torch.") for a in arguments)
        call = f"{function.__name__}({', '.join(words)})"
        function(*arguments)
        print(f"sm_{arch} {time.monotonic() - started:6.1f} s {call}", flush=True)
    return {"arch": arch, "triton": triton.__version__, "rows": rows, "used": sorted(used)}


if __name__ == "__main__":
    result = compile_all(int(sys.argv[1]))
    Path(sys.argv[2]).write_text(json.dumps(result, indent=1) + "\n")
