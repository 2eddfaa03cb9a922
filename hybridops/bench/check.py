"""Is a candidate right, and can the check be believed? Decided before anything is timed.

    e(y) = max |y - y64| / rms(y64)         FAILED unless  e(y) <= limit * e(torch) + 4 eps

y64 is the plain-torch meaning in float64, e(torch) its error in the dtype at hand. MISTRUSTED means
that the numbers agree and still prove nothing: an answer of zeros or NaN to be compared with, bits
that change from call to call, or answers that do not follow when the inputs change.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

OURS_LIMIT, GRADIENT_LIMIT = 2.0, 3.0
PEER_LIMIT = (
    16.0  # a peer never promised our rule; beyond four lost bits it computes something else
)


@dataclass
class Finding:
    """error: the largest e over all results; ratio: the largest over torch's own, result by result.

    status is "OK", "FAILED" or "MISTRUSTED", and reason says why.
    """

    status: str
    reason: str | None = None
    error: float | None = None
    ratio: float | None = None
    repeats: bool | None = None


def error(y: Tensor, exact: Tensor) -> float:
    """max |y - exact| over the root mean square of exact; inf for NaN that exact does not have."""
    y, exact = y.to(exact.device).double(), exact.double()
    finite = exact.isfinite()
    if not torch.equal(y[~finite].nan_to_num(7.0), exact[~finite].nan_to_num(7.0)):
        return float("inf")
    y, exact = y[finite], exact[finite]
    if not exact.numel():
        return 0.0
    worst = (y - exact).abs().max()
    scale = exact.square().mean().sqrt().clamp_min(torch.finfo(torch.float64).tiny)
    return float(worst / scale) if worst == worst else float("inf")


def believable(exact: Sequence[Tensor]) -> str | None:
    """Why the exact results prove nothing, or None."""
    for i, y in enumerate(exact):
        where = f"result {i} of the reference" if len(exact) > 1 else "the reference"
        if not y.numel():
            return f"{where} is empty"
        if not y.isfinite().any():
            return f"{where} is nowhere finite"
        if (y == 0).double().mean() > 0.9:
            return f"{where} is zero almost everywhere"
        if y.numel() > 1 and y.max() == y.min():
            return f"{where} is constant"
    return None


def judge(
    results: Sequence[Tensor],
    exact: Sequence[Tensor],
    torchs: Sequence[Tensor],
    limits: Sequence[float],
) -> Finding:
    """Compare results with the exact ones; limits are the allowed ratios to torch's error."""
    if len(results) != len(exact):
        return Finding("FAILED", f"{len(results)} results, the reference has {len(exact)}")
    worst_error = worst_ratio = 0.0
    reason = None
    for i, (y, y64, own, limit) in enumerate(zip(results, exact, torchs, limits, strict=True)):
        where = f"result {i}" if len(exact) > 1 else "the result"
        if y.shape != y64.shape:
            expected = tuple(y64.shape)
            return Finding("FAILED", f"{where} has shape {tuple(y.shape)}, expected {expected}")
        eps = torch.finfo(own.dtype).eps if own.dtype.is_floating_point else 0.0
        e, e_own = error(y, y64), error(own, y64)
        floor = 4 * eps
        ratio = e / e_own if e_own else (0.0 if e <= floor else float("inf"))
        worst_error, worst_ratio = max(worst_error, e), max(worst_ratio, ratio)
        if reason is None and not e <= limit * e_own + floor:
            zeros = float((y == 0).double().mean())
            empty = f"; {zeros:.0%} of it is zero" if zeros > 0.5 else ""
            reason = f"{where} is off by {e:.2g}, torch by {e_own:.2g}, allowed {limit:g}x{empty}"
    return Finding("FAILED" if reason else "OK", reason, worst_error, worst_ratio)


def same_bits(a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
    return len(a) == len(b) and all(
        x.shape == y.shape and x.dtype == y.dtype and torch.equal(_bits(x), _bits(y))
        for x, y in zip(a, b, strict=True)
    )


def _bits(x: Tensor) -> Tensor:
    return x.contiguous().flatten().view(torch.uint8)
