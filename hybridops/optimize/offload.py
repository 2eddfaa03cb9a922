"""optimize(freeze=True, offload=True): the original weights in a file instead of in memory.

A frozen model reads its weights once, to fold and pack them. Whatever reads them later (state_dict,
restore, refresh) finds them where they are: in a file that is mapped into memory, whose pages the
system brings in as they are read, and drops again when it needs the room. The file has no name; it
goes with the last tensor that lies in it.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from ..nn import _derived

_LEAST = 1 << 16  # bytes: biases and norms, which are read in place, stay where they are
_ALIGNED = 64  # bytes, as torch's own memory is


class Offload:
    """Holds a model's weights in a file until remove(); a copy of it holds nothing."""

    def __init__(self) -> None:
        self.model: nn.Module | None = None
        self.memory: mmap.mmap | None = None
        self.places: set[int] = set()  # addresses of storages in the file
        self.read = True  # whether the next call reads what the later ones will not

    def __deepcopy__(self, memo: dict) -> Offload:
        return Offload()

    def __reduce__(self) -> tuple:
        return Offload, ()

    def move(self, model: nn.Module) -> None:
        """Move every large weight and buffer on the CPU.

        Raises OSError where no file of that size can be made, before any of them moves.
        """
        for module in model.modules():
            _derived.clear(module)  # which would keep the old memory alive
        storages = {s.data_ptr(): s for s in map(Tensor.untyped_storage, _tensors(model))}
        large = [s for s in storages.values() if s.nbytes() >= _LEAST and not s.is_shared()]
        if not large:
            return
        # A page that is read brings up to 2 MB of its neighbours: those should be small, too.
        large.sort(key=torch.UntypedStorage.nbytes)
        self.memory = _file(sum(_rounded(s.nbytes()) for s in large))
        at, moved = 0, {}
        for storage in large:
            size = storage.nbytes()
            place = torch.frombuffer(self.memory, dtype=torch.uint8, count=size, offset=at)
            place.untyped_storage().copy_(storage)
            moved[storage.data_ptr()] = place.untyped_storage()
            self.places.add(place.data_ptr())
            at += _rounded(size)
        _give(model, moved)
        self.model = model
        self.drop()
        del storages, large, storage
        trim()

    def drop(self) -> None:
        """Let go the pages that are in memory; those that are read again come from the file."""
        if self.memory is not None:
            self.memory.madvise(mmap.MADV_DONTNEED)

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        """A forward hook of the model, which folds and packs in its first call in inference."""
        if self.read and not module.training:
            self.drop()
            self.read = False

    def remove(self) -> None:
        """Bring everything back into memory that still lies in the file."""
        if self.model is None:
            return
        storages = {s.data_ptr(): s for s in map(Tensor.untyped_storage, _tensors(self.model))}
        _give(self.model, {p: s.clone() for p, s in storages.items() if p in self.places})
        self.model = self.memory = None


def trim() -> None:
    """Give freed memory back to the system, where the C library can."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def is_possible() -> bool:
    """Whether this system can map a file and drop its pages."""
    return hasattr(mmap, "MADV_DONTNEED") and hasattr(os, "posix_fallocate")


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    """Parameters and buffers that are plain numbers on the CPU."""
    for t in chain(model.parameters(), model.buffers()):
        plain = type(t) in (Tensor, nn.Parameter) and t.layout == torch.strided
        if plain and t.device.type == "cpu" and not t.is_inference():
            yield t


def _give(model: nn.Module, storages: dict[int, torch.UntypedStorage]) -> None:
    """Every tensor that lies in one of the storages gets the one that is to take its place."""
    for t in _tensors(model):
        new = storages.get(t.untyped_storage().data_ptr())
        if new is not None:
            moved = torch.empty(0, dtype=t.dtype)
            t.data = moved.set_(new, t.storage_offset(), t.size(), t.stride())


def _rounded(size: int) -> int:
    return -(-size // _ALIGNED) * _ALIGNED


def _file(size: int) -> mmap.mmap:
    """A file without a name in the directory for temporary files, mapped into memory."""
    with tempfile.TemporaryFile() as file:
        os.posix_fallocate(file.fileno(), 0, size)  # a full disk is an error here, a crash later
        return mmap.mmap(file.fileno(), size)
