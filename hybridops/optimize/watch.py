"""Whether anything that a plan was made from has changed, asked of all of it in one call.

A plan stands for hundreds of objects: modules, their hooks and settings, parameters, and each may
change between two calls. Asked one by one from Python, with caches full of weights, that was a
tenth of LeViT-128S at batch 1; `hybridops._host` asks in half the time. It knows identity only:
where it sees a change the plan's own questions decide, as they do without it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Watch(NamedTuple):
    """What must stay, in columns whose order csrc/host/watch.cpp knows."""

    # dicts[i][keys[i]] is values[i]
    dicts: tuple[dict, ...]
    keys: tuple[str, ...]
    values: tuple[Any, ...]
    # vars(owners[i]) is owned[i]
    owners: tuple[object, ...]
    owned: tuple[dict, ...]
    # none of `absent` is a key of any
    absent_from: tuple[dict, ...]
    absent: tuple[str, ...]
    # without a key
    empty: tuple[dict, ...]
    # len(sized[i]) == sizes[i]
    sized: tuple[dict, ...]
    sizes: tuple[int, ...]
    # type(objects[i]) is classes[i]
    objects: tuple[object, ...]
    classes: tuple[type, ...]
    # neither written nor given other data
    tensors: tuple[Tensor, ...]
    versions: tuple[int, ...]
    pointers: tuple[int, ...]
    shapes: tuple[torch.Size, ...]
    strides: tuple[tuple[int, ...], ...]


unchanged: Callable[[Watch], bool] | None  # None without hybridops._host, or with an older one
try:
    unchanged = getattr(import_module("hybridops._host"), "unchanged", None)
except ImportError:
    unchanged = None


def make_watch(
    *,
    places: Iterable[tuple[dict, str, Any]],
    owners: Iterable[nn.Module],
    children: Iterable[nn.Module],
    empty: Iterable[dict],
    sized: Iterable[dict],
    tensors: Iterable[Tensor | None],
) -> Watch:
    """A watch over what these are now.

    places: a dict, a key, and the very object found there. owners: modules whose vars() are among
    those dicts. children: modules that keep their class and their forward.
    """
    dicts, keys, values = zip(*places, strict=True)
    owners, children, sized = tuple(owners), tuple(children), tuple(sized)
    known = tuple(t for t in tensors if t is not None)
    return Watch(
        dicts=dicts,
        keys=keys,
        values=values,
        owners=owners,
        owned=tuple(map(vars, owners)),
        absent_from=tuple(map(vars, children)),
        absent=("forward",),
        empty=tuple(empty),
        sized=sized,
        sizes=tuple(map(len, sized)),
        objects=children,
        classes=tuple(map(type, children)),
        tensors=known,
        versions=tuple(t._version for t in known),
        pointers=tuple(t.data_ptr() for t in known),
        shapes=tuple(t.shape for t in known),
        strides=tuple(t.stride() for t in known),
    )
