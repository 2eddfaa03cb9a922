"""Where a model's time goes, module by module, as it comes and after optimize().

Whole calls are timed as everywhere in the bench, interleaved and with nobody watching. Other calls
are watched, and say how that time is shared out: per module the median of its own time (what it
calls not counted), scaled so that all of them add up to the whole.

To watch is to wrap nn.Module.__call__ meanwhile. Forward hooks would not do: a child that is hooked
may not be bypassed or fused, so a hooked model takes another path. What is bypassed is not called,
and its time is that of the module that stands in for it.
"""

from __future__ import annotations

import statistics
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from ..optimize import report
from ..optimize.chained import apart
from ..optimize.swap import Layer
from . import stats
from .clock import Clock, Wall, settle
from .measure import crowded
from .model_task import optimized
from .sample import Settings, interleaved
from .task import Candidate, Task

LEAST_WATCHED, MOST_WATCHED = 5, 50
_WATCHED_SECONDS = 1.0  # of each side, about
_KERNELS = {"hybridops": "", "mkldnn": "oneDNN conv"}  # by namespace: the word, or the op's own


@dataclass
class Node:
    """A module: milliseconds spent in itself, the kernels it launched, and its children."""

    name: str
    own: float = 0.0
    calls: int = 0
    kernels: Counter[str] = field(default_factory=Counter)
    children: list[Node] = field(default_factory=list)

    @property
    def ms(self) -> float:
        """With all that is below."""
        return self.own + sum(child.ms for child in self.children)

    @property
    def called(self) -> bool:
        """It, or anything below: a ModuleList is never called itself."""
        return self.calls > 0 or any(child.called for child in self.children)

    def as_json(self) -> dict[str, Any]:
        """What was called, as plain data."""
        return {
            "name": self.name,
            "ms": self.ms,
            "own_ms": self.own,
            "calls": self.calls,
            "kernels": dict(self.kernels),
            "children": [child.as_json() for child in self.children if child.called],
        }

    def walk(self) -> Iterator[Node]:
        yield self
        for child in self.children:
            yield from child.walk()


@dataclass
class Side:
    """The model before or after: the median whole call, and the tree that shares it out.

    watched_ms: the median call that was watched; what it takes longer is the price of watching.
    """

    ms: float
    watched_ms: float
    tree: Node


@dataclass
class Profile:
    """Both sides of one model, and what optimize() says of its layers (by name)."""

    task: Task
    eager: Side
    optimized: Side
    speedup: stats.Ratio
    layers: dict[str, Layer]
    summary: str
    doubt: str | None = None  # why the times say little

    def figure(self, ms: float) -> str:
        """Milliseconds as text, with as many decimals as the whole model's time deserves."""
        return f"{ms:.{2 if self.eager.ms >= 10 else 3}f}"

    def as_json(self, depth: int | None = None) -> dict[str, Any]:
        """All of it as plain data; depth as for rows()."""
        task = self.task
        return {
            **{k: getattr(task, k) for k in ("name", "dtype", "batch", "threads")},
            "size": int(task.case) if task.case.isdigit() else task.case,
            "summary": self.summary,
            "doubt": self.doubt,
            "speedup": self.speedup.value,
            "speedup_low": self.speedup.low,
            "speedup_high": self.speedup.high,
            "rows": [asdict(row) for row in rows(self, depth)],
            **{
                name: {"ms": side.ms, "watched_ms": side.watched_ms, "tree": side.tree.as_json()}
                for name, side in (("eager", self.eager), ("optimized", self.optimized))
            },
        }


class Watch:
    """Who calls whom, and how long each is at work itself, while a `with watch.on():` block runs.

    names: of the modules, by id(); a module without a name counts as part of its caller.
    """

    def __init__(self, model: nn.Module, now: Callable[[], float] = time.perf_counter) -> None:
        self.names = {id(module): name for name, module in model.named_modules()}
        self.now = now
        self.own: defaultdict[str, float] = defaultdict(float)
        self.calls: Counter[str] = Counter()
        self.inside: list[str] = []  # the modules being called, outermost first
        self._since = 0.0

    @contextmanager
    def on(self) -> Iterator[None]:
        plain = nn.Module.__call__

        def call(module, *args, **kwargs):
            name = self.names.get(id(module))
            if name is None:
                return plain(module, *args, **kwargs)
            self._clock()
            self.inside.append(name)
            self.calls[name] += 1
            try:
                return plain(module, *args, **kwargs)
            finally:
                self._clock()
                self.inside.pop()

        nn.Module.__call__ = call  # type: ignore[method-assign]
        try:
            yield
        finally:
            nn.Module.__call__ = plain  # type: ignore[method-assign]

    def _clock(self) -> None:
        now = self.now()
        if self.inside:
            self.own[self.inside[-1]] += now - self._since
        self._since = now


class _Kernels(TorchDispatchMode):
    """Counts the calls of our ops, and of packed convolutions, by the module that makes them."""

    def __init__(self, watch: Watch) -> None:
        super().__init__()
        self.watch = watch
        self.found: defaultdict[str, Counter[str]] = defaultdict(Counter)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace in _KERNELS and self.watch.inside:
            word = _KERNELS[func.namespace] or func._schema.name.partition("::")[2]
            self.found[self.watch.inside[-1]][word] += 1
        return func(*args, **(kwargs or {}))


def profile(
    task: Task,
    settings: Settings | None = None,
    *,
    backend: str = "auto",
    clock: Clock | None = None,
    now: Callable[[], float] = time.perf_counter,
    progress: Callable[[float, str], None] = lambda share, text: None,
) -> Profile:
    """Time the task's model before and after optimize(), then watch both.

    backend: as for optimize(). Raises BackendUnavailable for one that this process does not have.
    """
    settings = settings or Settings()
    progress(0.0, "optimizing")
    task.set_inputs(task.seed)
    before, after = task.cast_module(), optimized(task, backend)
    found = report(after)
    sides = {
        "eager": (before, task.candidate("eager", before, world=task.world)),
        "optimized": (after, task.candidate("optimized", after)),
    }
    timings = interleaved(
        [candidate for _, candidate in sides.values()],
        clock or Wall(),
        settings,
        progress=lambda share, text: progress(0.7 * share, text),
    )
    whole = {name: statistics.median(seconds) for name, seconds in timings.seconds.items()}
    rounds = round(_WATCHED_SECONDS / max(1e-9, *whole.values()))
    rounds = max(LEAST_WATCHED, min(MOST_WATCHED, rounds))
    watched: dict[str, list[Watch]] = {name: [] for name in sides}
    with apart():  # blocks that run as one dispatch are watched one by one
        for i in range(rounds):
            progress(0.7 + 0.3 * i / rounds, f"watching call {i + 1} of {rounds}")
            for name, (module, candidate) in sides.items():
                watched[name].append(_watched(module, candidate, now))
        made = {
            name: _side(module, whole[name], watched[name], _kernels(module, candidate))
            for name, (module, candidate) in sides.items()
        }
    speedup = stats.ratio(timings.seconds["eager"], timings.seconds["optimized"])
    layers = {layer.fqn: layer for layer in found.layers}
    doubt = crowded(task.threads, timings.others)
    return Profile(
        task, **made, speedup=speedup, layers=layers, summary=found.summary()[0], doubt=doubt
    )


def _watched(module: nn.Module, candidate: Candidate, now: Callable[[], float]) -> Watch:
    watch = Watch(module, now)
    settle()
    with candidate.world():
        candidate.run()  # wakes the thread pool; does not count
        with watch.on():
            candidate.run()
    return watch


def _kernels(module: nn.Module, candidate: Candidate) -> Mapping[str, Counter[str]]:
    watch = Watch(module)
    kernels = _Kernels(watch)
    with candidate.world(), watch.on(), kernels:
        candidate.run()
    return kernels.found


def _side(
    module: nn.Module, whole: float, watches: list[Watch], kernels: Mapping[str, Counter[str]]
) -> Side:
    own = {name: statistics.median(watch.own[name] for watch in watches) for name in watches[0].own}
    scale = 1e3 * whole / (sum(own.values()) or 1.0)
    nodes: dict[str, Node] = {}
    for name, _ in module.named_modules():
        ms = scale * own.get(name, 0.0)
        nodes[name] = Node(name, ms, watches[0].calls[name], kernels.get(name, Counter()))
        if name:
            nodes[name.rpartition(".")[0]].children.append(nodes[name])
    longest = statistics.median(sum(watch.own.values()) for watch in watches)
    return Side(1e3 * whole, 1e3 * longest, nodes[""])


# rows: the two trees held together


@dataclass
class Row:
    """A part of the model, on both sides, and what serves it in the optimized one."""

    name: str
    eager_ms: float
    optimized_ms: float
    how: str = ""

    @property
    def speedup(self) -> float | None:
        return self.eager_ms / self.optimized_ms if self.eager_ms and self.optimized_ms else None


SMALL = 0.005  # of both sides: such rows are put together
MOST_ROWS = 30


def rows(profile: Profile, depth: int | None = None) -> list[Row]:
    """The model cut into rows that add up to the whole, on both sides.

    A row is a module at `depth`, or above it where either side calls nothing further down. What a
    module computes in place of some of its children is a row with them. The last row is what is
    left to the modules in between: Python, dispatch, and what they compute themselves. depth None:
    as deep as MOST_ROWS allow.
    """
    if depth is not None:
        return _Cut(profile, depth).rows
    found = _Cut(profile, 1).rows
    for deeper in range(2, 8):
        more = _Cut(profile, deeper).rows
        if len(more) > MOST_ROWS:
            break
        found = more
    return found


class _Cut:
    def __init__(self, profile: Profile, depth: int) -> None:
        self.profile = profile
        self.found: list[Row] = []
        self.glue = Row("glue", 0.0, 0.0, "Python, dispatch, what modules compute between others")
        self._down(profile.eager.tree, profile.optimized.tree, depth)
        self.rows = [*self._large(), self.glue]

    def _down(self, eager: Node, optimized: Node, depth: int) -> None:
        pairs = list(zip(eager.children, optimized.children, strict=True))
        both = [(a, b) for a, b in pairs if alike(a, b) and a.called]
        if not depth or not both:
            self._add(eager.name or "(model)", [(eager, optimized)])
            return
        alone = list(_alone(eager, optimized, depth)) if eager.calls or not eager.name else []
        if alone:
            itself = Node("", eager.own, 1), Node("", optimized.own, 1, optimized.kernels)
            start = len(eager.name) + 1 if eager.name else 0
            parts = " + ".join(a.name[start:] for a, _ in alone)
            self._add(f"{eager.name or '(model)'}: {parts}", [itself, *alone])
        else:
            self.glue.eager_ms += eager.own
            self.glue.optimized_ms += optimized.own
        for a, b in both:
            self._down(a, b, depth - 1)

    def _add(self, name: str, pairs: list[tuple[Node, Node]]) -> None:
        before, after = (sum(pair[i].ms for pair in pairs) for i in (0, 1))
        how = how_served([b for _, b in pairs], self.profile.layers)
        self.found.append(Row(name, before, after, how))

    def _large(self) -> list[Row]:
        least = SMALL * self.profile.eager.ms, SMALL * self.profile.optimized.ms
        small = [r for r in self.found if r.eager_ms < least[0] and r.optimized_ms < least[1]]
        if len(small) < 2:
            return self.found
        sums = (sum(r.eager_ms for r in small), sum(r.optimized_ms for r in small))
        rest = Row(f"{len(small)} more", *sums, f"each below {SMALL:.1%} of the whole")
        return [*(r for r in self.found if r not in small), rest]


def _alone(eager: Node, optimized: Node, depth: int) -> Iterator[tuple[Node, Node]]:
    """The children that one side computes itself, also those that only a container holds."""
    for a, b in zip(eager.children, optimized.children, strict=True):
        if not alike(a, b):
            yield a, b
        elif depth > 1 and not a.calls:
            yield from _alone(a, b, depth - 1)


def alike(a: Node, b: Node) -> bool:
    """Whether both sides call it, or neither does: else its parent computes it on one of them."""
    return a.called == b.called and bool(a.calls) == bool(b.calls)


def how_served(nodes: list[Node], layers: Mapping[str, Layer]) -> str:
    """The kernels that ran in these modules, then what was left alone and why."""
    below = [node for top in nodes for node in top.walk()]
    ran: Counter[str] = sum((node.kernels for node in below), Counter())
    parts = [", ".join(f"{op} ×{n}" if n > 1 else op for op, n in ran.most_common())] if ran else []
    left: Counter[str] = Counter()
    for node in below:
        reason = layers[node.name].reason if node.calls and node.name in layers else None
        if reason and not any(inner.kernels for inner in node.walk()):
            left[reason] += 1
    parts += [
        f"{n} left alone: {why}" if n > 1 else f"left alone: {why}" for why, n in left.items()
    ]
    return "; ".join(parts) or "torch's own"
