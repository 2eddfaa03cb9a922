"""Attentions that no rule names: how the report knows one, and what belongs to it."""

from __future__ import annotations

import dis
import inspect
from functools import lru_cache
from typing import Any

from torch import nn

from . import rules

_NAMES = ("Attention", "Attn", "MHSA", "MHA")


def is_attention(module: nn.Module) -> bool:
    """Whether a class that no rule names is an attention: by its forward, or its name and parts."""
    if _computes_scores(type(module).forward):
        return True
    if not any(word in type(module).__name__ for word in _NAMES):
        return False
    below = [child for child in module.modules() if child is not module]
    if any(_is_known(child) or is_attention(child) for child in below):
        return False
    return any(isinstance(child, (nn.Linear, nn.Conv2d)) for child in below)


def why_torchs(module: nn.Module) -> str:
    """The reason that the report gives for an attention without a rule."""
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    if code is not None and "ALL_ATTENTION_FUNCTIONS" in code.co_names:  # transformers' choice
        return 'no rule; attn_implementation="hybridops" gives it the attention kernel'
    return "no rule for this kind of attention"


def _is_known(module: nn.Module) -> bool:
    rule, reason = rules.find(module)
    return reason is not None or (rule is not None and not rule.implied)


def tell_parts(parts: dict[int, str], fqn: str, module: nn.Module) -> None:
    """What stands below an attention that no rule serves is part of that."""
    part = f"part of {fqn or 'the model'}, which is torch's"
    parts.update((id(below), part) for below in module.modules())


@lru_cache(maxsize=1024)
def _computes_scores(forward: Any) -> bool:
    """Whether a forward computes an attention itself: a softmax among products."""
    code = getattr(inspect.unwrap(forward), "__code__", None)
    if code is None:
        return False
    words = set(code.co_names)
    if "scaled_dot_product_attention" in words:
        return True
    products = words & {"matmul", "einsum", "bmm", "baddbmm"} or any(
        step.opname == "BINARY_MATRIX_MULTIPLY" or step.argrepr == "@"  # Python 3.10, and later
        for step in dis.get_instructions(code)
    )
    return "softmax" in words and bool(products)
