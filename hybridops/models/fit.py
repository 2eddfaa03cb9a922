"""Whether somebody's tensors fit a model of ours, as a WeightsError says where they do not."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

State = Mapping[str, Tensor]

# Projections that we keep in one tensor: a part of its name, and of the names of its equal parts
_JOINED = {
    ".in_proj_": (".q_proj.", ".k_proj.", ".v_proj."),
    ".attn.qkv.": (".attn.query.", ".attn.key.", ".attn.value."),
}


class WeightsError(ValueError):
    """Weights that cannot be loaded: unreadable, of an unknown family, or not of this model.

    missing, unexpected: names; mismatched: name -> (the shape we need, the shape we got); unusable:
    names of tensors whose kind cannot be copied (without data, sparse, integers for real numbers).
    """

    def __init__(
        self,
        message: str,
        missing: tuple[str, ...] = (),
        unexpected: tuple[str, ...] = (),
        mismatched: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]] | None = None,
        unusable: tuple[str, ...] = (),
    ) -> None:
        super().__init__(message)
        self.missing = missing
        self.unexpected = unexpected
        self.mismatched = dict(mismatched or {})
        self.unusable = unusable


def is_dense(tensor: Tensor) -> bool:
    """Whether a tensor's numbers may be laid out anew: it has data, one number per element."""
    packed = tensor.is_meta or tensor.is_quantized or tensor.is_nested
    return tensor.layout == torch.strided and not packed


def join(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state dict with projections in one tensor, wherever all three are there and alike.

    What is not (sparse, integers, of unequal shapes) stays apart, and check() says what it is.
    """
    for whole, names in _JOINED.items():
        for key in [k for k in state if names[0] in k]:
            parts = [key.replace(names[0], name) for name in names]
            tensors = [state[part] for part in parts if part in state]
            if len(tensors) < len(parts) or not _alike(tensors):
                continue
            if len({t.dtype for t in tensors}) > 1:  # which torch.cat promotes, or refuses to
                tensors = [t.double() for t in tensors]
            for part in parts:
                del state[part]
            state[key.replace(names[0], whole)] = torch.cat(tensors)
    return state


def _alike(tensors: list[Tensor]) -> bool:
    dense = all(is_dense(t) and t.is_floating_point() and t.ndim for t in tensors)
    return dense and len({t.shape for t in tensors}) == 1


def _apart(own: dict[str, Tensor], state: State) -> dict[str, Tensor]:
    """The model's tensors; those of which the state dict has all parts, as these parts."""
    for whole, names in _JOINED.items():
        for key in [k for k in own if whole in k and k not in state]:
            parts = [key.replace(whole, name) for name in names]
            if all(part in state for part in parts):
                own |= dict(zip(parts, own.pop(key).chunk(len(parts)), strict=True))
    return own


def check(model: nn.Module, state: State) -> None:
    """Raises WeightsError unless the state dict has just the model's keys, shapes and kinds."""
    own = _apart(model.state_dict(), state)
    missing = tuple(k for k in own if k not in state)
    unexpected = tuple(k for k in state if k not in own)
    kinds = {k: kind for k, t in own.items() if k in state and (kind := _unusable(t, state[k]))}
    mismatched = {
        k: (tuple(t.shape), tuple(state[k].shape))
        for k, t in own.items()
        if k in state and k not in kinds and t.shape != state[k].shape
    }
    if not (missing or unexpected or mismatched or kinds):
        return
    shapes = [f"{k} is {got}, needs {want}" for k, (want, got) in mismatched.items()]
    parts = [
        f"{len(names)} {what} ({some(names)})"
        for what, names in (
            ("missing", missing),
            ("unexpected", unexpected),
            ("of another shape", shapes),
            ("of no use", [f"{k} is {kind}" for k, kind in kinds.items()]),
        )
        if names
    ]
    message = f"weights do not fit {type(model).__name__}: {'; '.join(parts)}"
    raise WeightsError(message, missing, unexpected, mismatched, tuple(kinds))


def _unusable(own: Tensor, given: Tensor) -> str | None:
    """Why `given` cannot be copied as it is: torch would find out in the middle, or not at all."""
    if given.is_meta:
        return "without data (meta)"
    if given.is_nested:
        return "nested"
    if given.layout != torch.strided:
        return f"{given.layout}".removeprefix("torch.")
    if given.is_complex() or given.is_floating_point() != own.is_floating_point():
        return f"{given.dtype} for {own.dtype}"
    return None


def some(names: Iterable[str]) -> str:
    """The first few names, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return ", ".join(names[:4]) + more
