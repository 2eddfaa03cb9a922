"""Block sizes, warps and stages of every kernel: a table per architecture, read once, no search.

The tables are tuned_sm<architecture>.json beside this file; a GPU uses the newest one that is not
newer than itself. Each names where its numbers come from. A user's own goes first, which `hybridops
tune` wrote for these very kernels into $XDG_CACHE_HOME/hybridops (or ~/.cache/hybridops).
"""

import functools
import hashlib
import json
import os
import warnings
from pathlib import Path

import torch

ARCHITECTURES = (80, 90)
NOTES = ("source", "kernels", "done")  # beside the kernels in a table that `hybridops tune` wrote
TARGET_PROGRAMS = 2 * 132  # two per multiprocessor of an H100 or H200: enough to keep it busy
# Of every launch: a product and its sum are one instruction. Triton 3.10 means to ask for that.
FUSED = {"enable_fp_fusion": True}


def config(kernel: str, x: torch.Tensor, width: int) -> dict[str, int]:
    """The entry of `kernel` for x's dtype and the smallest listed width that is at least `width`.

    With it the options of every launch.
    Raises ValueError for a width beyond the table.
    """
    kind = "float32" if x.dtype == torch.float32 else "half"
    return row(kernel, kind, width, architecture(x.device))[1] | FUSED


def row(kernel: str, kind: str, width: int, arch: int) -> tuple[int, dict[str, int]]:
    """(the largest width that it is for, the entry). Raises ValueError beyond the table."""
    for largest, entry in table(arch)[kernel][kind]:
        if width <= largest:
            return largest, entry
    raise ValueError(f"{kernel}: no configuration for a width of {width} in {kind}")


def architecture(device: torch.device) -> int:
    """The table's architecture for a device; away from a GPU (interpreter, tests) the oldest."""
    if device.type != "cuda":
        return ARCHITECTURES[0]
    return _architecture(device.index)


@functools.cache
def _architecture(index: int | None) -> int:
    major, minor = torch.cuda.get_device_capability(index)
    return max(a for a in ARCHITECTURES if a <= 10 * major + minor)


@functools.cache
def table(arch: int) -> dict:
    """The whole table: kernel -> "half" or "float32" -> [(largest width, entry), ...]."""
    found = shipped(arch)
    own = users_own(arch)
    try:
        theirs = json.loads(own.read_text()) if own else {}
        return merged(found, theirs) if theirs.get("kernels") == fingerprint() else found
    except FileNotFoundError:
        pass
    except (OSError, ValueError, TypeError, AttributeError) as error:  # not what we wrote
        warnings.warn(
            f"hybridops: your own table {own} is not read: {type(error).__name__}: {error}",
            stacklevel=2,
        )
    return found


def shipped(arch: int) -> dict:
    """The table beside this file, without the notes: where it is from, what `tune` has done."""
    path = Path(__file__).with_name(f"tuned_sm{arch}.json")
    return {k: v for k, v in json.loads(path.read_text()).items() if k not in NOTES}


def users_own(arch: int) -> Path | None:
    """Where a user's own table lies; None where there is no home."""
    named = Path(os.environ.get("XDG_CACHE_HOME") or ".")
    try:
        folder = named if named.is_absolute() else Path.home() / ".cache"
    except RuntimeError:
        return None
    return folder / "hybridops" / f"tuned_sm{arch}.json"


def merged(base: dict, better: dict) -> dict:
    """base with those of its entries replaced that `better` has too.

    Raises ValueError for numbers that no launch takes.
    """
    result: dict = {}
    for kernel, kinds in base.items():
        result[kernel] = {}
        for kind, rows in kinds.items():
            theirs = dict(better.get(kernel, {}).get(kind, []))
            for n, entry in rows:
                new = theirs.get(n, entry)
                if new.keys() != entry.keys() or not all(
                    type(x) is int and 1 <= x <= 1024 for x in new.values()
                ):
                    raise ValueError(f"{kernel}, {kind}, {n}: {new}")
            result[kernel][kind] = [[n, theirs.get(n, entry)] for n, entry in rows]
    return result


@functools.cache
def fingerprint() -> str:
    """Which kernels these are: a table that was tuned for others is not read."""
    sources = sorted(Path(__file__).parent.glob("*.py"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:16]


def precision(x: torch.Tensor) -> str:
    """How products of x are made: fp32 ones as torch makes its own, whichever API chose that.

    torch.get_float32_matmul_precision() raises once the newer fp32_precision was set.
    """
    if x.dtype != torch.float32:
        return "ieee"
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def is_wide(*tensors: torch.Tensor | None) -> bool:
    """Whether an offset inside one image of a tensor can pass 2^31: indices are then 64 bits."""
    return any(
        t is not None
        and sum((n - 1) * abs(s) for n, s in zip(t.shape[1:], t.stride()[1:], strict=True)) >= 2**30
        for t in tensors
    )
