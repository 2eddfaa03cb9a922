"""Block sizes, warps and stages of every kernel: a table per architecture, read once, no search.

The tables are tuned_sm<architecture>.json beside this file; a GPU uses the newest one that is not
newer than itself. Each names where its numbers come from.
"""

import functools
import json
from pathlib import Path

import torch

ARCHITECTURES = (80, 90)
TARGET_PROGRAMS = 2 * 132  # two per multiprocessor of an H100 or H200: enough to keep it busy


def config(kernel: str, x: torch.Tensor, width: int) -> dict[str, int]:
    """The entry of `kernel` for x's dtype and the smallest listed width that is at least `width`.

    Raises ValueError for a width beyond the table.
    """
    kind = "float32" if x.dtype == torch.float32 else "half"
    for largest, entry in table(architecture(x.device))[kernel][kind]:
        if width <= largest:
            return dict(entry)
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
    return json.loads(Path(__file__).with_name(f"tuned_sm{arch}.json").read_text())


def precision(x: torch.Tensor) -> str:
    """How fp32 products are made: torch.set_float32_matmul_precision says."""
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def is_wide(*tensors: torch.Tensor | None) -> bool:
    """Whether an offset inside one image of a tensor can pass 2^31: indices are then 64 bits."""
    return any(
        t is not None
        and sum((n - 1) * abs(s) for n, s in zip(t.shape[1:], t.stride()[1:], strict=True)) >= 2**30
        for t in tensors
    )
