"""Microbenchmarks: error beside time, real peers side by side, the machine's own roofline.

`hybridops bench --help` is the command; compare() does the same for kernels of your own:

    from hybridops import bench

    result = bench.compare({"mine": mine, "torch": F.gelu}, [x], reference=F.gelu)
    print(result)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .api import Result, compare

__all__ = ["Result", "compare"]


def __getattr__(name: str) -> Any:  # `import hybridops` does not pay for what benchmarks need
    if name in __all__:
        from . import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
