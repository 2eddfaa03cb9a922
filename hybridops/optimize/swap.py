"""optimize() and restore(): replace classes in place, and put them back.

Only classes change. Parameters, buffers, names and hooks stay where they are; what a Fast class
derives from them is cached beside them and dropped by restore().
"""

from __future__ import annotations

import difflib
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, TypeVar

from torch import nn

from .. import backend as backends
from ..compat import register_transformers
from ..nn import _derived
from . import rules
from .attentions import is_attention, tell_parts, why_torchs
from .callers import holders_of
from .fast import Fast, dotted, original_class
from .folded import unfolded
from .offload import Offload, is_possible
from .plan import PLAN, Plan
from .wrapped import restored_class

JOURNAL = "_hybridops_journal"
MODES = ("inference", "train")
# Worth a line in the report when nothing serves them. A product by itself stays torch's: on one
# thread of a Zen 3 its time is 0.84 to 0.94 of ours at one row (a head at batch 1) and 0.9 to 1.2
# at a hundred rows and more; only at 16 is it slower (768 to 1000: 0.9 ms against 0.5).
_HOT: dict[type[nn.Module], str] = {
    nn.Linear: "by itself: nothing to fuse, and torch's product is as fast",
    nn.Conv2d: "by itself: the convolution is torch's",
    nn.MultiheadAttention: "no rule",
}

Model = TypeVar("Model", bound=nn.Module)
Filter = Callable[[nn.Module, str], bool]


class NothingToOptimize(ValueError):
    """No rule serves any layer of the model."""


@dataclass
class Layer:
    """One hot layer: replaced by `rule`, or left alone for `reason`."""

    fqn: str
    old: str
    rule: str | None = None
    reason: str | None = None
    note: str | None = None  # what the rule leaves to torch


@dataclass
class Journal:
    """What optimize() did to a model, kept on it for report() and restore()."""

    options: dict[str, Any]
    layers: list[Layer] = field(default_factory=list)
    fallbacks: Counter[tuple[str, str]] = field(
        default_factory=Counter
    )  # backend.fallbacks at that time
    served: Counter[tuple[str, str]] = field(default_factory=Counter)  # backend.served likewise
    verification: Any = None
    handles: list[Any] = field(default_factory=list)
    offload: Offload | None = None


def optimize(
    model: Model,
    mode: str = "inference",
    fold: bool = True,
    freeze: bool = False,
    offload: bool = False,
    precision: str = "exact",
    exclude: str | Sequence[str] = (),
    filter_fn: Filter | None = None,
    backend: str = "auto",
    example: Any = None,
    verify: bool = False,
    strict: bool = True,
) -> Model:
    """Replace every layer that has a rule by its fast twin, in place, and return the model.

    mode: "inference" folds norms into weights and packs them (while the model trains it computes
        as before); "train" only swaps kernels. Weights made in inference mode cannot be watched
        for changes: without freeze they are folded and packed in every call, and a warning says so.
    fold: False swaps kernels only, in inference too. state_dict never changes either way.
    freeze: True makes the model a snapshot, as torch.compile's freezing and exporting do: what its
        first call in inference folds and packs serves all later ones, which look no more for
        changed weights, settings and hooks (layers left to torch do). Saves a tenth of a small
        model's time at batch 1, of a large one next to nothing. model.load_state_dict() takes a
        new snapshot; after any other change call refresh(model).
    offload: True moves a frozen model's large weights into a file without a name in the directory
        for temporary files (TMPDIR; the file takes as much of it as the weights do), so that memory
        holds them once, as the kernels read them. They come back as they are read (state_dict(),
        restore()), and the system may let them go again. Tensors that shared their memory do no
        longer. On a CPU, where files can be mapped; OSError where there is no room for the file.
    precision: "exact": the model's own dtype, fp32 accumulation, error at most 2x torch's own.
    exclude: glob patterns of names ("head*", "blocks.0"): what matches, all below it, and whatever
        would bypass it stay as they are.
    filter_fn: filter_fn(module, name) decides for each module by itself.
    backend: "auto", or a name for hybridops.use(), in force while the model runs.
    example: an input of the model, a tuple of its arguments or a dict of its keyword arguments,
        for verify.
    verify: check every replaced layer against float64; where one fails, restore the model and
        raise VerificationError.
    strict: raise NothingToOptimize where no rule serves, ValueError for a pattern of exclude that
        names no module; False warns.

    A second call with the same options changes nothing, unless somebody has set what layers were
    made of (a norm's eps, an attention's scale, strides): those run as torch's own since, and are
    replaced anew. restore() first for other options.
    Raises ValueError for unknown options, BackendUnavailable for a backend that this process does
    not have.
    """
    options = {"mode": mode, "fold": fold, "freeze": freeze, "offload": offload}
    options |= {"precision": precision, "backend": backend}
    _check_options(model, options, example, verify)
    rules.load_plugins()
    if "transformers" in sys.modules:
        with suppress(ImportError):  # transformers 4 has no place to register at
            register_transformers()
    patterns = [exclude] if isinstance(exclude, str) else list(exclude)
    _check_patterns(model, patterns, strict)
    journal = model.__dict__.get(JOURNAL)
    if journal is not None and journal.options != options:
        raise ValueError(
            f"optimize: already optimized with {journal.options}; restore(model) first"
        )
    for module in model.modules():
        if isinstance(module, Fast) and not module.__dict__[PLAN].settled():
            _put_back(module, _original_of(module))
    layers, swaps = survey(model, mode, patterns, filter_fn)
    if not any(layer.rule for layer in layers):
        _nothing(model, layers, strict)
    for module, rule in swaps:
        _swap(module, rule, Plan(fold=fold and mode == "inference", frozen=freeze))
    _watch(model)
    if not freeze and mode == "inference" and any(p.is_inference() for p in model.parameters()):
        warnings.warn(_UNWATCHED, stacklevel=2)
    if journal is None:
        journal = Journal(
            options, fallbacks=Counter(backends.fallbacks), served=Counter(backends.served)
        )
        journal.handles = [] if backend == "auto" else _force(model, backend)
        if freeze:
            journal.handles.append(model.register_load_state_dict_post_hook(_refresh_loaded))
        model.__dict__[JOURNAL] = journal
    journal.layers = layers
    try:
        if offload and journal.offload is None:
            journal.offload = Offload()
            leave = model.register_forward_hook(journal.offload.leave)
            journal.handles += [journal.offload, leave]
            journal.offload.move(model)
        if verify:
            from .verify import verify as check  # verify needs restore

            check(model, example, raises=True)
    except Exception:
        restore(model)
        raise
    return model


def restore(model: Model) -> Model:
    """Undo optimize(), bit for bit; a model that was never optimized stays as it is.

    A class that was made since from a rule's (by a parametrization or FSDP2, say) is made anew from
    the original. Raises TypeError, before anything changes, where that cannot be.
    """
    originals = {module: _original_of(module) for module in model.modules()}
    for module, original in originals.items():
        if isinstance(module, Fast):
            _put_back(module, original)
        journal = module.__dict__.pop(JOURNAL, None)
        for handle in journal.handles if journal else ():
            handle.remove()
    return model


def refresh(model: Model) -> Model:
    """Forget what optimize() made of the weights: the next call reads them anew.

    Needed after optimize(freeze=True) alone, where a weight, setting or hook has changed since the
    first call; a model that was never optimized stays as it is.
    """
    for _, module in replaced(model):
        _derived.clear(module)
    journal = model.__dict__.get(JOURNAL)
    if journal is not None and journal.offload is not None:
        journal.offload.read = True
    return model


def _refresh_loaded(model: nn.Module, _: Any) -> None:
    refresh(model)


def survey(
    model: nn.Module, mode: str, patterns: Sequence[str] = (), filter_fn: Filter | None = None
) -> tuple[list[Layer], list[tuple[nn.Module, type[Fast]]]]:
    """Every hot layer with its rule or its reason, and the swaps to make; changes nothing."""
    layers: list[Layer] = []
    swaps: list[tuple[nn.Module, type[Fast]]] = []
    covered: set[int] = set()
    parts: dict[int, str] = {}  # of modules that no kernel can serve
    names = {id(module): fqn for fqn, module in model.named_modules()}
    holders = holders_of(model)
    for fqn, module in model.named_modules():
        layer = Layer(fqn, dotted(original_class(module)))
        rule, layer.reason = rules.find(module)
        if rule is not None and rule.yields and id(module) in covered:
            continue
        if rule is not None:
            layer.reason = _reason(module, fqn, rule, mode, patterns, filter_fn, names, holders)
        parts.update(unfolded(module, layer.reason))
        if rule is not None:
            if layer.reason is None:
                layer.rule = dotted(rule)
                layer.note = rule.note(module, holders.get(id(module), ()))
                covered.update(map(id, rule.covered(module)))
                if not isinstance(module, Fast):
                    swaps.append((module, rule))
            elif rule.implied:
                continue
        elif layer.reason is None and id(module) not in covered:
            if layer.old.startswith(("hybridops.nn.", "hybridops.models.")):
                layer.reason = "runs on hybridops kernels already"
                covered.update(map(id, module.modules()))
            else:
                alone = next((why for cls, why in _HOT.items() if isinstance(module, cls)), None)
                layer.reason = alone and parts.get(id(module), alone)
                if alone is None and is_attention(module):
                    layer.reason = why_torchs(module)
                    tell_parts(parts, fqn, module)
        elif layer.old in rules.UNSERVED:
            tell_parts(parts, fqn, module)
        if layer.rule or layer.reason:
            layers.append(layer)
    return layers, swaps


def _reason(module, fqn, rule, mode, patterns, filter_fn, names, holders):
    if isinstance(module, Fast):
        return None
    if _excluded(fqn, patterns):
        return "excluded"
    if filter_fn is not None and not filter_fn(module, fqn):
        return "filter_fn"
    for child in rule.bypassed(module):
        for below in child.modules():
            twice = rule.yields and len(holders[id(below)]) > 1
            if twice and (below._parameters or below._buffers):
                return f"{names[id(below)]} stands in two places"
            if _excluded(names[id(below)], patterns):
                return f"holds the excluded {names[id(below)]}"
            if below._forward_hooks or below._forward_pre_hooks or "forward" in vars(below):
                return f"{names[id(below)]} is hooked, and would be bypassed"
    if "forward" in vars(module):
        return "its forward is overridden on the instance"
    return rule.unserved(module, mode)


def _excluded(fqn, patterns):
    """Whether a pattern names this module or one that holds it."""
    parts = fqn.split(".")
    ancestry = [".".join(parts[: i + 1]) for i in range(len(parts))]
    return any(fnmatchcase(name, pattern) for pattern in patterns for name in ancestry)


def _swap(module, rule, plan):
    plan.rule, plan.facts = rule, rule.facts(module)
    module.__dict__[PLAN] = plan
    rule.on_swap(module)
    module.__class__ = rule


def _original_of(module):
    """The class that restore() gives a module."""
    cls = type(module)
    return restored_class(cls, module.__dict__[PLAN].rule) if isinstance(module, Fast) else cls


def _put_back(module, original):
    type(module).on_restore(module)
    module.__dict__.pop(PLAN, None)
    _derived.clear(module)
    module.__class__ = original


def _watch(model):
    """Settle what every replaced module bypasses, once all classes are what they will be."""
    holders = holders_of(model)
    for module in model.modules():
        if isinstance(module, Fast):
            type(module).learn(module, holders.get(id(module), ()))
            module.__dict__[PLAN].watch(module, type(module).bypassed(module))


def _check_options(model, options, example, verify):
    if not isinstance(model, nn.Module):
        raise TypeError(f"optimize: model must be an nn.Module, got {type(model).__name__}")
    if options["mode"] not in MODES:
        raise ValueError(
            f"optimize: mode must be one of {', '.join(MODES)}, got {options['mode']!r}"
        )
    if options["freeze"] and not (options["mode"] == "inference" and options["fold"]):
        raise ValueError("optimize: freeze=True needs mode='inference' and fold=True")
    if options["offload"]:
        _check_offload(model, options["freeze"])
    if options["precision"] != "exact":
        raise ValueError(f"optimize: precision must be 'exact', got {options['precision']!r}")
    if verify and example is None:
        raise ValueError("optimize: verify=True needs example, an input of the model")
    if options["backend"] != "auto":
        with backends.use(options["backend"]):  # raises for unknown and for absent ones
            pass


def _check_offload(model, freeze):
    if not freeze:
        raise ValueError("optimize: offload=True needs freeze=True")
    elsewhere = {t.device.type for t in model.parameters()} - {"cpu"}
    if elsewhere:
        raise ValueError(f"optimize: offload=True needs weights on the CPU, got {elsewhere.pop()}")
    if not is_possible():
        raise ValueError("optimize: offload=True needs a system that maps files, such as Linux")


def _check_patterns(model, patterns, strict):
    names = [name for name, _ in model.named_modules() if name]
    unused = [p for p in patterns if not any(fnmatchcase(name, p) for name in names)]
    if not unused:
        return
    close = difflib.get_close_matches(unused[0], names, n=3)
    message = f"optimize: exclude={unused[0]!r} names no module of this model" + (
        f"; close to it {', '.join(close)}" if close else ""
    )
    if strict:
        raise ValueError(message)
    warnings.warn(message, stacklevel=3)


def _nothing(model, layers, strict):
    alone = set(_HOT.values())
    found = sorted({layer.reason for layer in layers if layer.reason and layer.reason not in alone})
    why = f" Left alone: {'; '.join(found[:5])}." if found else ""
    message = (
        f"no rule serves any layer of {dotted(original_class(model))}.{why} "
        f"Looked for {len(rules.RULES)} classes; hybridops.explain(model) names every hot layer"
    )
    if strict:
        raise NothingToOptimize(message)
    warnings.warn(message, stacklevel=3)


_UNWATCHED = (
    "optimize: weights made in inference mode carry no version to watch, so they are folded and "
    "packed again in every call; make the model outside of it, or pass freeze=True"
)


class _Forced:
    """Forward hooks of the model that hold hybridops.use(name) open while it runs."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.open: list[AbstractContextManager[None]] = []

    def enter(self, module: nn.Module, args: Any) -> None:
        context = backends.use(self.name)
        context.__enter__()
        self.open.append(context)

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self.open.pop().__exit__(None, None, None)


def _force(model, name):
    forced = _Forced(name)
    return [
        model.register_forward_pre_hook(forced.enter),
        model.register_forward_hook(forced.leave, always_call=True),
    ]


def replaced(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The modules that optimize() replaced, by name."""
    return ((fqn, module) for fqn, module in model.named_modules() if isinstance(module, Fast))
