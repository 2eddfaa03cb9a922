"""The search: from a table's entry to a faster one, step by step, among what the compiler allows.

A step doubles or halves one block size or the warps, or adds or takes one stage. Every neighbour of
the best configuration so far is compiled ahead of time (aot.py, in a process of its own); one that
spills, or needs more shared memory than the architecture lends, is never run. What is left is
checked against float64 before it is timed, and the fastest becomes the next centre, until none of
its neighbours is faster by more than 2 %.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

# Bytes that one program may have. The table of sm_80, which lends 163 KiB, serves sm_86 and sm_89
# too, which lend 99.
SHARED = {80: 99 * 1024, 90: 227 * 1024}
LEAST_GAIN = 0.02
_LIMITS = {"num_warps": (1, 16), "num_stages": (1, 5)}
_BLOCK = (16, 256)

Config = dict[str, int]
Entry = tuple[str, str, int]  # kernel, "half" or "float32", largest width


class Compiler:
    """Asks aot.py for what configurations need. A context: the process ends with it."""

    def __init__(self, arch: int):
        self.arch = arch
        environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "hybridops.tune.aot", str(arch), "-"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        self.entries: dict[Entry, int] = {tuple(e): n for e, n in self._answer()}

    def needs(self, entry: Entry, config: Config) -> dict:
        """registers, shared and spilled bytes; or error."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"entry": entry, "config": config}) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self):
        assert self.process.stdout is not None
        if line := self.process.stdout.readline():
            return json.loads(line)
        said = self.process.communicate()[1].strip().splitlines()
        raise RuntimeError(f"the compiling process ended: {said[-1] if said else 'no word'}")

    def __enter__(self) -> Compiler:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()


def refused(needs: dict, arch: int) -> str | None:
    """Why a configuration is not to be run, or None."""
    if "error" in needs:
        return needs["error"]
    if needs["spilled"]:
        return f"{needs['spilled']} bytes spilled"
    if needs["shared"] > SHARED[arch]:
        return f"{needs['shared']} bytes of shared memory, {SHARED[arch]} is all there is"
    return None


def neighbours(config: Config) -> Iterator[Config]:
    """One step away in each direction, within the limits."""
    for key, value in config.items():
        low, high = _LIMITS.get(key, _BLOCK)
        steps = (value - 1, value + 1) if key == "num_stages" else (value // 2, value * 2)
        yield from ({**config, key: new} for new in steps if low <= new <= high)


@dataclass
class Found:
    """The best configuration of an entry; seconds of it and of the one it began with."""

    config: Config
    seconds: float
    before: float
    tried: int
    rejected: int = 0


def search(
    start: Config,
    allowed: Callable[[Config], str | None],
    right: Callable[[Config], str | None],
    seconds: Callable[[Config], float],
    say: Callable[[str], None] = lambda text: None,
) -> Found:
    """The fastest configuration in reach. allowed and right give a reason against, or None.

    Raises ValueError where the one to begin with is itself not allowed or not right.
    """
    if why := allowed(start) or right(start):
        raise ValueError(f"the configuration to begin with is refused: {why}")
    least = seconds(start)
    best, found = start, Found(start, least, least, 1)
    seen = {_key(start)}
    while True:
        centre = best
        for config in neighbours(centre):
            if _key(config) in seen:
                continue
            seen.add(_key(config))
            if why := allowed(config) or right(config):
                found.rejected += 1
                say(f"{shown(config)}: {why}")
                continue
            took = seconds(config)
            found.tried += 1
            say(f"{shown(config)}: {1e6 * took:.1f} us, the best so far {1e6 * found.seconds:.1f}")
            if took < (1 - LEAST_GAIN) * found.seconds:
                best, found.config, found.seconds = config, config, took
        if best is centre:
            return found


def shown(config: Config) -> str:
    return " ".join(f"{key.removeprefix('num_').lower()} {n}" for key, n in config.items())


def _key(config: Config) -> tuple:
    return tuple(sorted(config.items()))
