"""Classes known by their shape: those of the authors' own code, copied into many repositories.

Nothing but a copy has the same class name, the same children and the same forward parameters; and
before a rule is trusted with one, it must compute what the class computes, in float64 on a copy of
the very module with its gates awake. Otherwise the module is left alone, with the reason.
"""

from __future__ import annotations

import copy
import copyreg
import importlib
import inspect
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .. import backend
from .fast import Fast, dotted, original_class
from .gates import randomise_gates
from .plan import PLAN, Plan

SAME = 1e-9  # of the output's rms: what float64 leaves between two orders of summation
_ELSEWHERE = {"timm", "torchvision", "transformers", "torch", "hybridops"}  # known by path


@dataclass(frozen=True)
class Shape:
    """What a class of this name must look like.

    children: each child's name and the names of the classes that it may have; those after a "?" may
    be missing. tensors: its own parameters and buffers. forward: the parameters after self.
    """

    what: str
    rule: str
    children: dict[str, str]
    forward: str
    tensors: str = ""

    def difference(self, module: nn.Module) -> str | None:
        """Why the module is not of this shape, or None."""
        children = {name: child for name, child in module._modules.items() if child is not None}
        found = {name: original_class(child).__name__ for name, child in children.items()}
        optional = {name for name, classes in self.children.items() if classes.startswith("?")}
        missing = self.children.keys() - found.keys() - optional
        if missing or found.keys() - self.children.keys():
            return f"its children are {', '.join(found) or 'none'}"
        for name, cls in found.items():
            if cls not in self.children[name].lstrip("?").split():
                return f"{name} is {cls}"
        tensors = " ".join(sorted([*module._parameters, *module._buffers]))
        if tensors != self.tensors:
            return f"its tensors are {tensors or 'none'}"
        forward = " ".join(list(inspect.signature(type(module).forward).parameters)[1:])
        return None if forward == self.forward else f"forward takes {forward}"


_DROP = "Dropout"
_TWINS = {"attn_drop": _DROP, "proj": "Linear", "proj_drop": _DROP}
_DETR = {"self_attn": "MultiheadAttention", "linear1": "Linear"}
_DETR |= {"linear2": "Linear", "dropout": _DROP, "dropout1": _DROP, "dropout2": _DROP}
_DETR |= {"norm1": "LayerNorm", "norm2": "LayerNorm"}
_CROSS = {"multihead_attn": _DETR["self_attn"], "dropout3": _DROP, "norm3": "LayerNorm"}
_PADDED = "tgt_key_padding_mask memory_key_padding_mask"
_TABLE = "attention_bias_idxs attention_biases"
SHAPES: dict[str, tuple[Shape, ...]] = {
    "Linear_BN": (
        Shape("LeViT's", "official_levit:LinearBN", {"c": "Linear", "bn": "BatchNorm1d"}, "x"),
    ),
    "Conv2d_BN": (
        Shape("LeViT's", "official_levit:ConvBN", {"c": "Conv2d", "bn": "BatchNorm2d"}, "input"),
    ),
    "BN_Linear": (
        Shape("LeViT's", "official_levit:BNLinear", {"bn": "BatchNorm1d", "l": "Linear"}, "input"),
    ),
    "Residual": (Shape("LeViT's", "official_levit:Residual", {"m": "Attention Sequential"}, "x"),),
    "Attention": (
        Shape(
            "LeViT's",
            "official_levit:Attention",
            {"qkv": "Linear_BN", "proj": "Sequential"},
            "x",
            _TABLE,
        ),
        Shape(
            "Twins' and PVT's",
            "official_twins:Attention",
            {"q": "Linear", "kv": "Linear", **_TWINS, "sr": "?Conv2d", "norm": "?LayerNorm"},
            "x H W",
        ),
    ),
    "AttentionSubsample": (
        Shape(
            "LeViT's",
            "official_levit:AttentionSubsample",
            {"kv": "Linear_BN", "q": "Sequential", "proj": "Sequential"},
            "x",
            _TABLE,
        ),
    ),
    "GroupAttention": (
        Shape("Twins'", "official_twins:GroupAttention", {"qkv": "Linear", **_TWINS}, "x H W"),
    ),
    "PosCNN": (Shape("Twins'", "official_twins:PosCNN", {"proj": "Sequential"}, "x H W"),),
    "TransformerEncoderLayer": (
        Shape(
            "DETR's",
            "official_detr:EncoderLayer",
            _DETR,
            "src src_mask src_key_padding_mask pos",
        ),
    ),
    "TransformerDecoderLayer": (
        Shape(
            "DETR's",
            "official_detr:DecoderLayer",
            _DETR | _CROSS,
            f"tgt memory tgt_mask memory_mask {_PADDED} pos query_pos",
        ),
    ),
}


class Shaped(Fast):
    """Base of the rules for such classes: `bind` makes the class that replaces an actual one."""

    base: ClassVar[type[Shaped]]

    @classmethod
    def example(cls, module: Any, generator: torch.Generator) -> tuple[Any, ...]:
        """Arguments of the module's forward, small, float32."""
        raise NotImplementedError


class _Bound(type):
    """The class of the classes that `bind` makes: pickled as what they are made from."""

    base: type[Shaped]
    replaces: type[nn.Module]


copyreg.pickle(_Bound, lambda cls: (bind, (cls.base, cls.replaces)))  # type: ignore


def bind(base: type[Shaped], cls: type[nn.Module]) -> type[Fast]:
    """The rule `base` as a subclass of the class that it replaces; the same one each time."""
    bound = _BOUND.get((base, cls))
    if bound is None:
        names = {"replaces": cls, "base": base, "__module__": base.__module__}
        made: Any = _Bound(base.__name__, (base, cls), names | {"__doc__": base.__doc__})
        bound = _BOUND[base, cls] = made
    return bound


_BOUND: dict[tuple[type, type], type[Fast]] = {}


def hidden_methods(cls: type, base: type) -> list[str]:
    """What a class defines that the rule `base` would hide, its forward aside."""
    return sorted(_methods(cls) & _methods(base) - {"forward"})


def _methods(cls: type) -> set[str]:
    """What a class defines beyond nn.Module, Python's own names aside."""
    own = [base for base in cls.__mro__ if base not in nn.Module.__mro__]
    return {name for base in own for name in vars(base) if not name.startswith("__")}


def match(module: nn.Module) -> tuple[type[Fast] | None, str | None]:
    """The rule for a module known by its shape, why it is not one, or (None, None)."""
    cls = type(module)
    if isinstance(module, Shaped):
        return cls, None  # type: ignore[return-value]
    shapes = SHAPES.get(cls.__name__, ())
    known = cls.__module__.partition(".")[0] in _ELSEWHERE
    if not shapes or known or type(cls) is not type:
        return None, None
    differences = [(shape, shape.difference(module)) for shape in shapes]
    shape = next((shape for shape, difference in differences if difference is None), None)
    if shape is None:
        named = "; ".join(f"not {shape.what} {cls.__name__}: {why}" for shape, why in differences)
        return None, named
    path, _, name = shape.rule.partition(":")
    base = getattr(importlib.import_module(f"hybridops.optimize.{path}"), name)
    hidden = hidden_methods(cls, base)
    if hidden:
        return None, f"has the shape of {shape.what} {cls.__name__}, and a {hidden[0]} of its own"
    rule = bind(base, cls)
    if any(t.is_meta for t in module.parameters()) or rule.unserved(module, "inference"):
        return rule, None  # nothing to compute with, or nothing that will be replaced
    reason = _differs(module, rule, base)
    if reason:
        return None, f"has the shape of {shape.what} {cls.__name__}, but {reason}"
    return rule, None


def _install(part: Any, rule: type[Fast]) -> None:
    part.__dict__[PLAN] = plan = Plan(fold=True)
    plan.facts = rule.facts(part)
    part.__class__ = rule
    plan.watch(part, rule.bypassed(part))


@torch.no_grad()
def _differs(module: nn.Module, rule: Any, base: type[Shaped]) -> str | None:
    """How the rule's results differ from the module's, on a copy in float64."""
    plain = copy.deepcopy(module).cpu().float()
    randomise_gates(plain, 0)
    plain.double().train()
    plain.eval()  # drops what it may have cached
    fast: Any = copy.deepcopy(plain)
    args = rule.example(plain, torch.Generator().manual_seed(0))
    args = pytree.tree_map_only(Tensor, lambda x: x.double(), args)
    for part in reversed(list(fast.modules())):  # a residual runs on the rule of what it holds
        found, _ = (rule, None) if part is fast else match(part)
        if found is not None and found.unserved(part, "inference") is None:
            _install(part, found)
    try:
        with backend.use("reference"):
            expected, results = plain(*args), fast(*args)
    except Exception as error:
        return f"fails on its input: {type(error).__name__}: {error}".partition("\n")[0]
    if pytree.tree_structure(expected) != pytree.tree_structure(results):
        return "returns something else"
    for y, ours in zip(pytree.tree_leaves(expected), pytree.tree_leaves(results), strict=True):
        if isinstance(y, Tensor) != isinstance(ours, Tensor) or y.shape != ours.shape:
            return "returns something else"
        if (y - ours).abs().max() > SAME * y.square().mean().sqrt().clamp_min(1e-30):
            return f"computes something else than {dotted(base)}"
    return None
