"""hybridops.optimize(model): fast layers in place of an existing model's own, and back."""

from .explain import explain
from .fast import Fast
from .report import Report, report
from .rules import register
from .swap import NothingToOptimize, optimize, refresh, restore
from .verify import Verification, VerificationError, verify

__all__ = [
    "Fast",
    "NothingToOptimize",
    "Report",
    "Verification",
    "VerificationError",
    "explain",
    "optimize",
    "refresh",
    "register",
    "report",
    "restore",
    "verify",
]
