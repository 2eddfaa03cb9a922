"""`hybridops explain MODEL`: what optimize() would replace, without weights."""

from __future__ import annotations

import argparse

import hybridops

from . import UserError
from .models import resolve


def run(arguments: argparse.Namespace) -> int:
    name = arguments.model
    if name.partition(":")[0] in ("timm", "hybridops") or ":" not in name:
        name = ":".join(resolve(name))  # names what is close to a misspelt one
    try:
        print(hybridops.explain(name))
    except ValueError as error:
        raise UserError(str(error)) from None
    return 0
