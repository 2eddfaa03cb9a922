"""Compiles Triton kernels ahead of time, for a GPU that need not be there.

    python -m hybridops.tune.aot 90 resources.json    every entry of the tuning table
    python -m hybridops.tune.aot 90 -                 requests by line on stdin, answers on stdout

Triton gets a driver that only names the architecture, and a launch that only compiles. Then the
kernels' own forward() and backward() are called on meta tensors in the shapes of `calls`, so that
what is compiled is what would be launched: same configuration, same specialisation. The JSON holds
one row per compiled kernel, the entries of the tuning table that were used, and whether an fp32
product has TF32 after torch.set_float32_matmul_precision("high").

The first answer says which of `calls` uses which entry: [[[kernel, kind, width], number], ...].
Then a request is {"entry": [...], "config": {...}}, and its answer holds registers, shared memory
and spills, or the error that compiling it gave.
"""

from __future__ import annotations

import contextlib
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

from ..kernels import (
    attention,
    attention_backward,
    conv_backward,
    conv_stem,
    linear,
    patch_embed,
    peg,
    tuned,
)
from .work import FULL, HALF, calls

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


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


def attend(D, dtype=HALF, Dv=None, N=(1024, 1024), B=8, bias=None, mask=False):
    q, k = meta(B, N[0], 4, D, dtype=dtype), meta(B, N[1], 4, D, dtype=dtype)
    v = meta(B, N[1], 4, Dv or D, dtype=dtype)
    shapes = {None: None, "dense": (1, 4, *N), "table": (4, 256)}
    added = meta(*shapes[bias], dtype=dtype) if bias else None
    index = meta(*N, dtype=torch.int64) if bias == "table" else None
    padding = meta(B, N[1], dtype=torch.bool) if mask else None
    given = (q, k, v, added, index, padding)
    out, lse = attention.forward(*given, 0.125, 5 if index is not None else 0)
    attention_backward.backward(out, *given, out, lse, 0.125, bias is not None)


def grid(K, dtype=HALF):
    x, weight = meta(8, 1 + 14 * 14, 384, dtype=dtype), meta(384, 1, K, K, dtype=dtype)
    where = (14, 14, 1, 1, K // 2, True)
    y = peg.forward(x, weight, meta(384, dtype=dtype), *where, 0, False)
    peg.backward(y, x, weight, *where)


def product(N, dtype=HALF, norm=False):
    x, weight, vector = (meta(*s, dtype=dtype) for s in ((8, 196, 384), (N, 384), (384,)))
    residual = None if norm else meta(8, 196, N, dtype=dtype)
    gain = vector if norm else None
    vectors = (meta(N, dtype=dtype), None, gain, gain)
    dy = linear.forward(x, weight, *vectors, 1e-6, residual, 2 * norm)
    linear.backward(dy, x, weight)


def stem(channels, dtype=HALF):
    image, weights, Ci = meta(8, 3, 224, 224, dtype=dtype), [], 3
    for Co in channels:
        weights.append(meta(Co, Ci, 3, 3, dtype=dtype))
        Ci = Co
    L = len(channels)
    biases = [meta(Co, dtype=dtype) for Co in channels]
    conv_stem.forward(image, weights, biases, [], [2] * L, [1] * 4 * L, [5] * L, [3, 2, 1, 1, 1, 1])
    size = 224
    for i, weight in enumerate(weights):
        size //= 2
        dz = meta(8, size * size, weight.shape[0], dtype=dtype)
        conv_backward.backward(dz, image, weight, 2, [1] * 4, i > 0)
        image = dz.unflatten(1, (size, size)).permute(0, 3, 1, 2)


def patches(C, dtype=HALF):
    image, weight = meta(8, 3, 224, 224, dtype=dtype), meta(C, 3, 16, 16, dtype=dtype)
    bias, pos = meta(C, dtype=dtype), meta(197, C, dtype=dtype)
    prefix = meta(1, C, dtype=dtype)
    padding = [0] * 4
    patch_embed.forward(image, weight, bias, None, bias, bias, 1e-6, pos, prefix, 16, padding)
    conv_backward.backward(meta(8, 196, C, dtype=dtype), image, weight, 16, padding, True)


def resources(kernel) -> dict[str, int]:
    """Registers, shared memory, bytes of local memory (spills); 1 where it multiplies in TF32."""
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
        "tf32": int("tf32" in kernel.asm["ptx"]),
    }


class Ahead:
    """Triton on no GPU: calls on meta tensors compile their kernels, all or the one asked for."""

    def __init__(self, arch: int):
        self.arch, self.run, self.config = arch, JITFunction.run, tuned.config
        self.used: set[tuple[str, str, int]] = set()
        self.asked: tuple | None = None  # (entry, configuration): only that launch is compiled
        self.launches: list[tuple] = []  # (name, compiled kernel, launch options)
        self.due = False
        driver.set_active(Driver(arch))
        tuned.architecture = lambda device: arch
        tuned.config = self._config
        ahead = self

        def run(self, *args, grid, warmup, **options):
            if ahead.asked is None or (ahead.due and "num_warps" in options):
                ahead.due = False
                kernel = ahead.run(self, *args, grid=grid, warmup=True, **options)
                name = f"{self.fn.__module__.rpartition('.')[2]}.{self.fn.__name__.strip('_')}"
                ahead.launches.append((name, kernel, options))

        JITFunction.run = run

    def _config(self, kernel, x, width):
        kind = "float32" if x.dtype == FULL else "half"
        entry = (kernel, kind, tuned.row(kernel, kind, width, self.arch)[0])
        self.used.add(entry)
        if self.asked is not None and entry == self.asked[0]:
            self.due = True
            return self.asked[1] | tuned.FUSED
        return self.config(kernel, x, width)

    def call(self, function, arguments) -> list[tuple]:
        """The launches that one call compiled."""
        self.launches = []
        globals()[function](*arguments)
        return self.launches

    def compile_all(self) -> dict:
        rows, seen = [], set()
        for function, arguments in calls():
            started = time.monotonic()
            call = f"{function}({', '.join(str(a).removeprefix('torch.') for a in arguments)})"
            for name, kernel, options in self.call(function, arguments):
                if kernel.hash not in seen:
                    seen.add(kernel.hash)
                    blocks = {key: n for key, n in options.items() if key.startswith("BLOCK_")}
                    launch = {k: getattr(kernel.metadata, k) for k in ("num_warps", "num_stages")}
                    launch["fused"] = kernel.metadata.enable_fp_fusion
                    known = {"kernel": name, "call": call}
                    rows.append({**known, **resources(kernel), **blocks, **launch})
            print(f"sm_{self.arch} {time.monotonic() - started:6.1f} s {call}", flush=True)
        used, tf32 = sorted(self.used), self._tf32_where_allowed()
        found = {"rows": rows, "used": used, "tf32_where_allowed": tf32}
        return {"arch": self.arch, "triton": triton.__version__, **found}

    def _tf32_where_allowed(self) -> bool:
        kept = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high")
        try:
            largest, config = tuned.row("linear_forward", "float32", 1536, self.arch)
            entry = ("linear_forward", "float32", largest)
            return bool(self.one(entry, config, ("product", (1536, FULL)))["tf32"])
        finally:
            torch.set_float32_matmul_precision(kept)

    def entries(self) -> dict[tuple, int]:
        """Entry -> the number of the first call that uses it. Compiles nothing."""
        found: dict[tuple, int] = {}
        self.asked = ((), {})
        for number, call in enumerate(calls()):
            self.used = set()
            self.call(*call)
            for entry in self.used:
                found.setdefault(entry, number)
        self.asked = None
        return found

    def one(self, entry: tuple, config: dict, call: tuple) -> dict:
        """What one entry needs in that configuration, all launches of it taken together."""
        self.asked = (entry, config)
        try:
            found = [resources(kernel) for _, kernel, _ in self.call(*call)]
        except Exception as error:  # a configuration that Triton refuses is an answer
            return {"error": " ".join(f"{type(error).__name__}: {error}".split())[:200]}
        finally:
            self.asked = None
        return {key: max(row[key] for row in found) for key in found[0]}

    def serve(self) -> None:
        """Answers requests until stdin ends."""
        numbers, every = self.entries(), list(calls())
        print(json.dumps(list(numbers.items())), flush=True)
        for line in sys.stdin:
            request = json.loads(line)
            entry = tuple(request["entry"])
            with contextlib.redirect_stdout(sys.stderr):
                answer = self.one(entry, request["config"], every[numbers[entry]])
            print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    ahead = Ahead(int(sys.argv[1]))
    if sys.argv[2] == "-":
        ahead.serve()
    else:
        Path(sys.argv[2]).write_text(json.dumps(ahead.compile_all(), indent=1) + "\n")
