"""Times held against the machine: what is faster than its roof is not believed."""

from __future__ import annotations

import dataclasses
import threading
import time

import pytest
import torch
import torch.nn.functional as F
from test_bench import QUICK, compared, fixed_roof  # noqa: F401 - a fixture
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from hybridops.bench import measure, op_task, roof, work


class Later:
    """A device that works in its own time, as a GPU does: a call returns at once."""

    def __init__(self):
        self.running: threading.Thread | None = None

    def __call__(self, x):
        self.synchronise()
        y = torch.empty(x.shape[0], x.shape[0])
        self.running = threading.Thread(target=lambda: (time.sleep(2e-3), torch.mm(x, x.T, out=y)))
        self.running.start()
        return y

    def synchronise(self):
        if self.running is not None:
            self.running.join()


class Forgets:
    """A timer that does not wait for the device."""

    name = "forgets"

    def time(self, run, calls, before=None):
        start = time.perf_counter()
        return (time.perf_counter() - start) / calls  # it only ever queued the work


def test_a_timer_that_forgets_to_synchronise_is_invalid():
    device = Later()

    def right(x):
        y = device(x)
        device.synchronise()
        return y

    x = torch.randn(300, 300)
    ours, theirs = compared(right, lambda x: x @ x.T, (x,), timer=Forgets())
    assert ours.verdict == "INVALID"
    assert "% of what this machine can do" in ours.reason
    assert ours.percent_of_roof > 105
    assert theirs.speedup is None


def test_work_that_is_skipped_is_invalid(monkeypatch):
    slow = roof.Roof({"fp32": {1: 1e-3}}, {"DRAM": {1: 1e-3}})
    monkeypatch.setattr(measure.roofs, "roof", lambda threads, refresh=False: slow)
    ours, theirs = compared(lambda x: x @ x.T, lambda x: x @ x.T)
    assert ours.verdict == theirs.verdict == "INVALID"


def test_a_roof_that_was_too_low_is_measured_again(monkeypatch):
    asked = []

    def probe(threads, refresh=False):
        asked.append(refresh)
        peak = 1e6 if refresh else 1e-6
        return roof.Roof({"fp32": {1: peak}}, {"DRAM": {1: peak}})

    monkeypatch.setattr(measure.roofs, "roof", probe)
    ours, _ = compared(lambda x: x @ x.T, lambda x: x @ x.T)
    assert ours.verdict == "OK"
    assert True in asked


class Always:
    """A clock on which every call takes a millisecond."""

    name = "always"

    def time(self, run, calls, before=None):
        return 1e-3


@pytest.mark.parametrize(("size", "verdict"), [(3, "OK"), (5, "INVALID")])
def test_winograd_may_be_faster_than_the_products_as_written(size, verdict, monkeypatch):
    x, weight = torch.randn(1, 8, 16, 16), torch.randn(8, 8, size, size)
    flop = 2 * x.numel() * weight[0].numel()
    machine = roof.Roof({"fp32": {1: flop / 1.5e-3 / 1e9}}, {"DRAM": {1: 1e3}})
    monkeypatch.setattr(measure.roofs, "roof", lambda threads, refresh=False: machine)

    def conv(x):
        return F.conv2d(x, weight.to(x.dtype), padding=size // 2)

    ours, _ = compared(conv, conv, (x,), timer=Always())
    assert ours.verdict == verdict
    assert ours.flop == flop
    assert ours.percent_of_roof == pytest.approx(150)


@pytest.mark.parametrize(
    ("options", "share"),
    [
        ({}, 24 / 72),
        ({"stride": 2}, 25 / 36),
        ({"stride": (1, 2)}, 1.0),
        ({"stride": 3}, 1.0),
        ({"dilation": 2}, 1.0),
        ({"groups": 2}, 1.0),
    ],
    ids=str,
)
def test_what_winograd_spares(options, share):
    x, weight = torch.randn(2, 8, 15, 17), torch.randn(6, 8 // options.get("groups", 1), 3, 3)
    y, counts = work.counted(lambda: F.conv2d(x, weight, **options))
    assert counts.flop == 2 * y.numel() * weight[0].numel()
    assert counts.least == pytest.approx(counts.flop * share)


def test_flops_of_a_module_that_is_given_a_view_of_a_parameter():
    class Queries(nn.Module):
        def __init__(self):
            super().__init__()
            self.queries, self.fc = nn.Parameter(torch.randn(3, 8)), nn.Linear(8, 8)

        def forward(self, x):
            return self.fc(self.queries.expand(len(x), -1, -1)) + x[:, None]

    task = op_task.op_task(op_task.find_cases("linear", "M=4,K=8,N=8")[0], backend="reference")
    task = dataclasses.replace(task, module=Queries())
    with FlopCounterMode(display=False) as counter:
        (y,), _ = task.exact([torch.randn(4, 8)])
    assert y.dtype == torch.float64
    assert counter.get_total_flops() == 2 * 4 * 3 * 8 * 8


def test_flops_are_those_of_the_formula():
    def flop(op, shape, mode="fwd"):
        (case,) = op_task.find_cases(op, shape)
        task = op_task.op_task(case, mode=mode, backend="reference")
        return measure.measure(task, [], QUICK)[0].flop

    assert flop("linear", "M=7,K=12,N=5") == 2 * 7 * 12 * 5
    assert flop("linear", "M=7,K=12,N=5", "bwd") == 3 * 2 * 7 * 12 * 5
    assert flop("attention", "B=2,H=3,Nq=10,Nk=14,D=4,Dv=6") == 2 * 2 * 3 * 10 * 14 * (4 + 6)
    assert flop("peg", "B=1,H=4,W=4,C=8") == 2 * 16 * 8 * 9
    assert flop("peg", "B=1,H=4,W=4,C=8", "bwd") == 3 * 2 * 16 * 8 * 9
    padded = flop("attention", "B=1,H=2,Nq=9,D=4,mask=tail")
    assert padded == pytest.approx(2 * 2 * 9 * 9 * 8 * 6 / 9)


def test_a_stride_that_no_kernel_has_is_refused_by_name(cpu_library):
    (case,) = op_task.find_cases("conv3x3", "B=1,C=8,N=8,H=9,W=9,stride=3")
    with pytest.raises(ValueError, match=r"stride must be in \[1, 2\], got 3"):
        measure.measure(op_task.op_task(case), [], QUICK)
