"""Tasks made from the cases of our ops: the op against its own meaning in plain torch."""

from __future__ import annotations

import dataclasses
import fnmatch
from functools import partial
from typing import Any, get_type_hints

import torch
from torch import Tensor, nn

from .. import backend as backends
from .case import Attention, Case, ConvStem, Inputs, Linear, Mlp, lay_out
from .cases import CASES
from .plain import plain_torch
from .task import Candidate, Skip, Task

DATA = ("x", "q", "k", "v", "qkv", "image", "residual", "key_padding_mask")
OPS = tuple(CASES)


class _Meaning(nn.Module):
    """A case's op as a module in plain torch: weights are parameters, data are arguments."""

    def __init__(self, case: Case, tensors: Inputs):
        super().__init__()
        self.case = case
        self.data = [name for name in tensors if name in DATA]
        self.others = [name for name in tensors if name not in DATA]
        for name, value in tensors.items():
            if name in DATA:
                continue
            if value.is_floating_point():
                self.register_parameter(name, nn.Parameter(value.clone()))
            else:
                self.register_buffer(name, value)

    def weights(self) -> dict[str, Tensor]:
        # not named_parameters(): its walk takes 4 us of a call, and a peer's has none
        return {name: getattr(self, name) for name in self.others}

    def forward(self, *data: Tensor) -> Tensor:
        return self.case.call(dict(zip(self.data, data, strict=True)) | self.weights())


class _Ours(_Meaning):
    """The same through our kernel, weights packed once where nothing is differentiated."""

    packs: Inputs = {}

    def forward(self, *data: Tensor) -> Tensor:
        return self.case.call(dict(zip(self.data, data, strict=True)) | self.weights() | self.packs)


def find_cases(op: str, shape: str) -> list[Case]:
    """Cases for one --shape: an id or pattern with optional changes ("levit_*,B=16"), or "k=v,...".

    Raises ValueError that names what exists.
    """
    name, *changes = [part.strip() for part in shape.split(",")]
    if "=" in name:
        name, changes = "", [name, *changes]
    if not name:
        return [_custom(op, changes)]
    found = [case for case in CASES[op] if fnmatch.fnmatchcase(case.name, name)]
    if not found:
        known = ", ".join(case.name for case in CASES[op])
        raise ValueError(f"no shape {name!r} of {op}; there are {known}")
    return [_changed(case, changes) for case in found] if changes else found


def _changed(case: Case, changes: list[str]) -> Case:
    values = dict(_value(type(case), change) for change in changes)
    name = ",".join([case.name, *changes])
    return dataclasses.replace(case, name=name, **values)


def _custom(op: str, changes: list[str]) -> Case:
    kind = type(CASES[op][0])
    values = dict(_value(kind, change) for change in changes)
    missing = [
        f.name
        for f in dataclasses.fields(kind)
        if f.default is dataclasses.MISSING and f.name not in values and f.name != "name"
    ]
    if missing:
        raise ValueError(f"a shape of {op} also needs {', '.join(missing)} (or begin with an id)")
    return kind(",".join(changes), **values)


def _value(kind: type, change: str) -> tuple[str, Any]:
    key, equals, text = change.partition("=")
    hints = get_type_hints(kind)
    known = [f.name for f in dataclasses.fields(kind) if f.name not in ("name", "unserved")]
    if not equals or key not in known:
        raise ValueError(
            f"not a size of this op: {change!r} (k=v with k one of {', '.join(known)})"
        )
    hint = str(hints[key])
    if "tuple" in hint and "x" in text:  # 16x16
        return key, tuple(_whole(key, part) for part in text.split("x"))
    if text.lower() in ("true", "false", "none"):
        return key, {"true": True, "false": False, "none": None}[text.lower()]
    if "int" in hint and "str" not in hint or text.lstrip("-").isdigit():
        return key, _whole(key, text)
    if hint in (str(float), "float | None"):
        return key, float(text)
    return key, text


def _whole(key: str, text: str) -> int:
    if not text.isdigit() or int(text) > 1 << 24:
        raise ValueError(f"{key} must be a whole number up to 2**24, got {text!r}")
    return int(text)


def chosen_backends(backend: str, device: str = "cpu") -> list[str]:
    """One name for each task: "all" means every backend that this process has but the reference."""
    there = [b for b in backends.available() if (b == "cpu") == (device == "cpu")]
    if backend == "all":
        return [b for b in there if b != "reference"] or ["reference"]
    if backend == "auto" and device == "cpu":
        return [there[0] if there else "reference"]
    return [backend]


def through(task: Task, backend: str) -> Candidate:
    """Ours, forced through one backend, or with "auto" through the one that serves such a call."""
    meaning = task.module
    assert isinstance(meaning, _Meaning)
    skip_unless_there(backend)
    if why := meaning.case.refusal(task.dtype, task.mode, backend):
        raise Skip(why)
    tensors = dict(zip(meaning.data, task.inputs, strict=True)) | meaning.weights()
    twin = _Ours(meaning.case, tensors).to(task.torch_dtype)
    twin.load_state_dict({n: t.to(task.torch_dtype) for n, t in meaning.state_dict().items()})
    if not task.differentiates and getattr(meaning.case, "packed", False) and backend == "cpu":
        twin.packs = meaning.case.pack(twin.weights())
    if backend != "auto":
        return task.candidate("hybridops", twin, backend, world=partial(backends.use, backend))
    return naming_what_ran(task.candidate("hybridops", twin))


def skip_unless_there(backend: str) -> None:
    """Raises Skip where this process lacks a backend that is to be forced."""
    if backend != "auto" and backend not in backends.available():
        why = backends.why_absent(backend) if backend != "reference" else None
        raise Skip(f"backend {backend} is not there: {why or 'not built'}")


def naming_what_ran(candidate: Candidate) -> Candidate:
    """The candidate, its backend named after what served a call of it."""
    before = backends.served.copy()
    candidate.outcome()
    ran = (backends.served - before).keys()
    candidate.backend = "+".join(sorted({what for _, what in ran})) or backends.available()[0]
    return candidate


def rehearsed(case: Case) -> Case:
    """The case with one image, few heads and few tokens: for a dry run on a CPU."""
    sizes: dict[str, Any] = {"B": 1}
    match case:
        case Attention() if not isinstance(case.bias, tuple):
            sizes |= {"H": min(case.H, 2), "Nq": min(case.Nq, 50)}
            sizes |= {"Nk": min(case.Nk, 60)} if case.Nk else {}
        case Linear():
            sizes = {"M": 10}
        case Mlp():
            sizes |= {"N": 10}
        case ConvStem():
            sizes |= {"H": 64, "W": 64}
    return dataclasses.replace(case, **sizes)


def op_task(
    case: Case,
    dtype: str = "fp32",
    mode: str = "fwd",
    threads: int = 1,
    backend: str = "cpu",
    layout: str | None = None,
    seed: int = 0,
    device: str = "cpu",
) -> Task:
    """The task of running one case through one backend; layout: see case.lay_out.

    backend "auto" forces none: on a GPU the table `backend.GPU` chooses, and the row says which.
    """
    layout = layout or case.layout
    drawn = case.make_inputs(torch.float32, "contiguous", seed, device)
    module = _Meaning(case, drawn)

    def draw(seed: int) -> list[Tensor]:
        fresh = case.make_inputs(torch.float32, "contiguous", seed, device)
        return [lay_out(fresh[n], layout) if layout else fresh[n] for n in module.data]

    def ours(task: Task) -> Candidate:
        return through(task, backend)

    parts = [f"hybridops bench op {case.op} --shape {case.name}"]
    parts += [f"--dtype {dtype} --mode {mode} --threads {threads} --backend {backend}"]
    if layout != case.layout:
        parts.append(f"--layout {layout}")
    if device != "cpu":
        parts.append(f"--device {device}")
    return Task(
        kind="op",
        name=case.op,
        case=case.name,
        dtype=dtype,
        mode=mode,
        threads=threads,
        module=module,
        draw=draw,
        ours=ours,
        batch=getattr(case, "B", None),
        layout=layout,
        world=partial(plain_torch, "never"),
        work_share=case.work_share(drawn),
        repro=" ".join(parts),
        seed=seed,
    )
