"""hybridops: fast kernels for CNN-Transformer hybrid vision models."""

from . import backend, ops
from .backend import BackendUnavailable, use

__version__ = "0.1.0"
__all__ = ["BackendUnavailable", "backend", "ops", "use"]
