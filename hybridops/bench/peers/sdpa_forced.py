"""torch's scaled_dot_product_attention with one of its own kernels forced, each a peer by its name.

One that does not take a case (flash takes no bias, cuDNN no odd sizes) is SKIPPED with torch's
words for it.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace

from torch.nn.attention import SDPBackend, sdpa_kernel

from ..task import Candidate, Skip, Task
from . import sdpa

_REFUSED = ("No available kernel", "No viable backend")


def _build(name: str, kernel: SDPBackend, task: Task) -> Candidate:
    candidate = sdpa.build(task)
    world = candidate.world

    @contextmanager
    def forced() -> Iterator[None]:
        with world(), sdpa_kernel(kernel):
            yield

    candidate.world = forced
    candidate.name = name
    with forced(), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            candidate.run()
        except RuntimeError as error:
            if not any(words in str(error) for words in _REFUSED):
                raise
            raise Skip(f"{name} does not take this case{_why(said)}") from None
    candidate.outcome = _outcome(task, kernel, candidate.outcome)
    return candidate


def _outcome(task, kernel, outcome):
    def forced():
        with sdpa_kernel(kernel):
            return outcome()

    return forced


def _why(said: list) -> str:
    """The first of torch's reasons that is not about a kernel switched off by us."""
    texts = [str(w.message).splitlines()[0] for w in said]
    reasons = [t.partition(" (Triggered")[0] for t in texts if "disabled" not in t]
    reasons = [t for t in reasons if not t.endswith("because:")]
    return f": {reasons[0]}" if reasons else ""


def _peer(name: str, kernel: SDPBackend) -> SimpleNamespace:
    summary = f"torch's scaled_dot_product_attention, its {kernel.name} kernel forced"
    return SimpleNamespace(SUMMARY=summary, INSTALL=None, build=partial(_build, name, kernel))


FLASH = _peer("sdpa-flash", SDPBackend.FLASH_ATTENTION)
EFFICIENT = _peer("sdpa-efficient", SDPBackend.EFFICIENT_ATTENTION)
CUDNN = _peer("sdpa-cudnn", SDPBackend.CUDNN_ATTENTION)
MATH = _peer("sdpa-math", SDPBackend.MATH)
