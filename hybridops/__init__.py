"""hybridops: fast kernels for CNN-Transformer hybrid vision models."""

from . import backend, bench, compat, models, nn, ops
from .backend import BackendUnavailable, use
from .optimize import NothingToOptimize, explain, optimize, refresh, report, restore, verify

__version__ = "0.1.0"
__all__ = [
    "BackendUnavailable",
    "NothingToOptimize",
    "backend",
    "bench",
    "compat",
    "explain",
    "models",
    "nn",
    "ops",
    "optimize",
    "refresh",
    "report",
    "restore",
    "use",
    "verify",
]
