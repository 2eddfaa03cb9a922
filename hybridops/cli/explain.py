"""`hybridops explain MODEL`: what optimize() would replace, without weights."""

from __future__ import annotations

import argparse

import hybridops

from .models import resolve


def run(arguments: argparse.Namespace) -> int:
    source, name = resolve(arguments.model)
    print(hybridops.explain(f"{source}:{name}"))
    return 0
