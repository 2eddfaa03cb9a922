"""Who throws away the second of the two things that a module returns: attention's weights.

Read from the source of the methods that hold it: `self.attn(q, k, v)[0]`, `x, _ = self.attn(q, k,
v)` where nothing reads `_`, or any call with need_weights=False. A method is trusted only if it
mentions the module in no other way; whatever cannot be read, or is not understood, may read them.
"""

from __future__ import annotations

import ast
import inspect
import sys
import textwrap
from collections.abc import Iterable, Iterator
from functools import lru_cache
from types import CodeType, FrameType, FunctionType
from typing import Any, NamedTuple

from torch import nn

from .fast import original_class

# A function, as copies and pickles of a model know it: its module, its name, its first line
Site = tuple[str, str, int]
Holder = tuple[nn.Module, str]  # a module and the name under which it holds another

_BETWEEN = ("torch.", "hybridops.")  # what stands between a caller and the forward: hooks, tracers


class Callers(NamedTuple):
    """frugal: the functions that throw the weights away; reader: who may read them, or None."""

    frugal: frozenset[Site]
    reader: str | None


class _Use(NamedTuple):
    """What a function does with a module: its calls that drop the weights, and other mentions."""

    frugal: int
    other: int


def holders_of(model: nn.Module) -> dict[int, list[Holder]]:
    """By the id of every module below the model: what holds it, a holder once for each name."""
    found: dict[int, list[Holder]] = {}
    for holder in model.modules():
        for name, child in holder._modules.items():
            found.setdefault(id(child), []).append((holder, name))
    return found


def callers(holders: Iterable[Holder]) -> Callers:
    """Who calls a module that these hold, as far as their classes' source says."""
    names = tuple(sorted({name for _, name in holders}))
    frugal, readers = set(), []
    for cls in dict.fromkeys(original_class(holder) for holder, _ in holders):
        called = False
        for function in _methods(cls):
            use = _use(function, names)
            if use is None or use.other:
                readers.append(f"{function.__qualname__} may read them")
            elif use.frugal:
                frugal.add(_site(function.__code__, function.__module__))
                called = True
        if not called and not readers:
            readers.append(f"nothing in {cls.__name__} calls it by its name")
    return Callers(frozenset(frugal), next(iter(readers), None))


def is_called_from(sites: frozenset[Site]) -> bool:
    """Whether the module whose forward asks was called by one of these functions."""
    frame = sys._getframe(1)
    while frame.f_back is not None and _module(frame).startswith(_BETWEEN):
        frame = frame.f_back
    return _site(frame.f_code, _module(frame)) in sites


def _module(frame: FrameType) -> str:
    return frame.f_globals.get("__name__") or ""


def _site(code: CodeType, module: str) -> Site:
    return module, code.co_name, code.co_firstlineno


def _methods(cls: type) -> Iterator[FunctionType]:
    """Every function of a class and of its bases below nn.Module, without constructors."""
    for base in cls.__mro__:
        if base in (nn.Module, object):
            continue
        for name, value in vars(base).items():
            value = getattr(value, "__func__", getattr(value, "fget", value))
            value = inspect.unwrap(value) if callable(value) else value
            if isinstance(value, FunctionType) and name != "__init__":
                yield value


@lru_cache(maxsize=1024)
def _use(function: FunctionType, names: tuple[str, ...]) -> _Use | None:
    """What it does with the attributes of these names, or None where its source cannot be read."""
    if not _mentions(function.__code__, set(names)):
        return _Use(0, 0)
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):
        return None
    parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
    frugal = other = 0
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and node.value in names:
            other += 1  # getattr(self, "attn"), say
        elif isinstance(node, ast.Attribute) and node.attr in names:
            parent = parents[node]
            if isinstance(parent, ast.Call) and parent.func is node:
                drops = _drops(parent, parents[parent], tree)
                frugal, other = frugal + drops, other + (not drops)
            elif isinstance(node.ctx, ast.Load) and not _reads_a_setting(parent):
                other += 1
    return _Use(frugal, other)


def _mentions(code: CodeType, names: set[str]) -> bool:
    inner = [c for c in code.co_consts if isinstance(c, CodeType)]
    words = {*code.co_names, *(c for c in code.co_consts if isinstance(c, str))}
    return bool(words & names) or any(_mentions(c, names) for c in inner)


def _reads_a_setting(node: ast.AST) -> bool:
    """self.attn.num_heads, and not self.attn.forward."""
    return isinstance(node, ast.Attribute) and node.attr not in ("forward", "__call__")


def _drops(call: ast.Call, around: ast.AST, tree: ast.AST) -> bool:
    """Whether the second result of a call, which stands in `around`, is made but never read."""
    for keyword in call.keywords:
        if keyword.arg == "need_weights" and _is(keyword.value, False):
            return True
    if isinstance(around, ast.Subscript):
        return _is(around.slice, 0) and isinstance(around.ctx, ast.Load)
    if not isinstance(around, ast.Assign) or len(around.targets) != 1:
        return False
    target: Any = around.targets[0]
    if not isinstance(target, ast.Tuple) or len(target.elts) != 2:
        return False
    second = target.elts[1]
    return isinstance(second, ast.Name) and not _is_read(second.id, tree)


def _is(node: ast.AST, value: Any) -> bool:
    return isinstance(node, ast.Constant) and node.value is value


def _is_read(name: str, tree: ast.AST) -> bool:
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and node.id == name and isinstance(node.ctx, ast.Load):
            return True
        if isinstance(node, (ast.Global, ast.Nonlocal)) and name in node.names:
            return True
        if isinstance(node, ast.Name) and node.id in ("locals", "vars", "eval", "exec"):
            return True
    return False
