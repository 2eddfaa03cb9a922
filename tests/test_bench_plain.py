"""What ours is measured against: the numbers of the reference, and none of our checks."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cases import all_cases

import hybridops
from hybridops import ops
from hybridops.bench.cases import CASES
from hybridops.bench.plain import PLAIN, plain_torch

SMALL = {"mlp": {"N": 5}, "conv1x1": {"H": 9, "W": 7}, "conv3x3": {"H": 9, "W": 7}}
BODIES = [replace(case, **sizes) for op, sizes in SMALL.items() for case in CASES[op]]
# A row without keys is 0 in the reference and NaN in plain torch.
ODD = [case for case in all_cases() if getattr(case, "bias", None) != "masking"]
ODD = [case for case in ODD if getattr(case, "mask", None) != "blocks"]


@pytest.mark.parametrize("case", ODD + BODIES, ids=str)
def test_plain_torch_is_the_reference(case):
    t = case.make_inputs(torch.float32)
    with torch.no_grad():
        with hybridops.use("reference"):
            expected = case.call(t)
        with plain_torch("never"):
            got = case.call(t)
    torch.testing.assert_close(got, expected)


def test_plain_torch_checks_nothing(monkeypatch):
    """A door's checks took a tenth of eager's time in a stem: what it lost was our speed-up."""

    def check(*_, **__):
        raise AssertionError("a check of ours in what we are measured against")

    for op in ("attention", *PLAIN):
        door = getattr(ops, op)
        for name in ("check_tensor", "check_int", "activation_code", "unpack_norm"):
            if name in door.__globals__:
                monkeypatch.setitem(door.__globals__, name, check)
    for op in CASES:
        t = CASES[op][0].make_inputs(torch.float32)
        with plain_torch("never"), torch.no_grad():
            CASES[op][0].call(t)
