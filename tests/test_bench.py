"""`hybridops bench` catches what is wrong: planted faults, each with the verdict it deserves."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hybridops import bench, ops
from hybridops.bench import check, clock, measure, op_task, peers, roof, sample, stats
from hybridops.bench.cases import CASES
from hybridops.bench.model_task import model_task, read_size
from hybridops.bench.result import in_pixels
from hybridops.bench.task import Skip

QUICK = sample.Settings(min_time=1e-3, timeout=0.2, least_rounds=3)
X = torch.randn(64, 96, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def fixed_roof(monkeypatch):
    """A roof that no machine of today reaches with two threads, and no probing."""
    fixed = roof.Roof(
        {dtype: {1: 1e4, 2: 2e4} for dtype in ("fp32", "bf16", "fp64")},
        {level: {1: 1e4, 2: 2e4} for level in ("L1", "L2", "L3", "DRAM")},
        {"L1": 1 << 15, "L2": 1 << 20, "L3": 1 << 25},
    )
    monkeypatch.setattr(measure.roofs, "roof", lambda threads, refresh=False: fixed)


def compared(mine, reference=F.gelu, inputs=(X,), **options):
    options = {"min_time": 1e-3, "timeout": 0.2, "threads": 1} | options
    candidates = {"mine": mine, "torch": reference}
    return bench.compare(candidates, list(inputs), reference=reference, **options).rows


def test_a_right_kernel_is_timed_and_compared():
    mine, theirs = compared(lambda x: F.gelu(x))
    assert mine.verdict == "OK"
    assert mine.ours
    assert mine.speedup is None
    assert mine.error_ratio == pytest.approx(1.0)
    assert mine.repeats
    assert theirs.verdict in ("FAST", "SAME", "SLOW", "AMBIGUOUS")
    assert theirs.speedup_low <= theirs.speedup <= theirs.speedup_high
    assert theirs.speedup == pytest.approx(theirs.median_ms / mine.median_ms)
    assert mine.p20_ms <= mine.median_ms <= mine.p80_ms
    assert mine.n >= 3
    assert mine.bytes == 2 * X.numel() * 4
    assert 0 < mine.percent_of_roof < 105


def wrong_on_one(x):
    y = F.gelu(x)
    y[17, 3] += 1e-3
    return y


def half_done(x):
    y = torch.zeros_like(x)
    y[: len(x) // 2] = F.gelu(x[: len(x) // 2])
    return y


def nan_somewhere(x):
    y = F.gelu(x)
    y[-1, -1] = float("nan")
    return y


def writes_its_input(x):
    y = F.gelu(x)
    x[0, 0] += 1
    return y


@pytest.mark.parametrize(
    ("mine", "reason"),
    [
        (torch.zeros_like, "100% of it is zero"),
        (wrong_on_one, "off by"),
        (half_done, "off by"),
        (nan_somewhere, "off by inf"),
        (writes_its_input, "writes to its inputs"),
        (lambda x: F.gelu(x)[:, :1], r"shape \(64, 1\), expected \(64, 96\)"),
        (lambda x: (F.gelu(x), x), "2 results"),
        (lambda x: F.gelu(x.bfloat16()).float(), "off by"),
    ],
)
def test_a_wrong_kernel_fails_and_no_row_claims_a_speedup(mine, reason):
    ours, theirs = compared(mine)
    assert ours.verdict == "FAILED"
    assert ours.median_ms is None
    assert re.search(reason, ours.reason), ours.reason
    assert theirs.speedup is None
    assert theirs.verdict == "OK"


def test_a_wrong_peer_fails_alone():
    candidates = {"mine": F.gelu, "lazy": torch.zeros_like, "broken": lambda x: 1 / 0}
    ours, lazy, broken = bench.compare(
        candidates, [X], reference=F.gelu, min_time=1e-3, timeout=0.2
    ).rows
    assert (ours.verdict, lazy.verdict, broken.verdict) == ("OK", "FAILED", "FAILED")
    assert lazy.speedup is None
    assert "ZeroDivisionError" in broken.reason


def test_an_answer_that_is_remembered_is_mistrusted():
    answers: dict[int, torch.Tensor] = {}

    def remembers(x):
        return answers.setdefault(x.data_ptr(), F.gelu(x))

    ours, theirs = compared(remembers)
    assert ours.verdict == "MISTRUSTED"
    assert "new inputs" in ours.reason


def test_bits_that_change_are_mistrusted():
    calls = iter(range(10**6))
    ours, _ = compared(lambda x: F.gelu(x) * (1 + 1e-7 * (next(calls) % 2)))
    assert ours.verdict == "MISTRUSTED"
    assert "bits" in ours.reason


@pytest.mark.parametrize(
    ("reference", "reason"),
    [
        (torch.zeros_like, "zero almost everywhere"),
        (torch.ones_like, "constant"),
        (lambda x: x * float("nan"), "nowhere finite"),
    ],
)
def test_a_reference_that_proves_nothing_is_mistrusted(reference, reason):
    ours, theirs = compared(reference, reference)
    assert ours.verdict == "MISTRUSTED"
    assert reason in ours.reason
    assert theirs.speedup is None


def test_gradients_are_compared():
    class Gelu(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return F.gelu(x)

        @staticmethod
        def backward(ctx, dy):
            return dy * 0.5

    wrong, _ = compared(Gelu.apply, gradients=True)
    assert wrong.verdict == "FAILED"
    assert "result 1" in wrong.reason
    right, _ = compared(lambda x: F.gelu(x), gradients=True)
    assert right.verdict == "OK"
    assert right.mode == "bwd"


def test_inputs_of_the_caller_stay_what_they_are():
    x = X.clone()
    compared(lambda x: F.gelu(x), inputs=(x,))
    assert torch.equal(x, X)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"candidates": {}}, ValueError, "at least one candidate"),
        ({"inputs": [1.0]}, TypeError, "input 0 is float"),
        ({"inputs": [torch.arange(3)]}, ValueError, "floating-point"),
        ({"timeout": 0}, ValueError, "timeout must be positive"),
        ({"min_time": float("nan")}, ValueError, "min_time must be positive"),
        ({"max_noise": 2}, ValueError, "max_noise"),
        ({"cache": "hot"}, ValueError, "warm or cold"),
    ],
)
def test_bad_requests_are_refused(options, error, match):
    options = {"candidates": {"mine": F.gelu}, "inputs": [X], "reference": F.gelu} | options
    with pytest.raises(error, match=match):
        bench.compare(options.pop("candidates"), options.pop("inputs"), **options)


# statistics


def test_the_interval_holds_the_true_ratio():
    random = np.random.default_rng(0)
    held = 0
    for seed in range(100):
        common = 1 + 0.2 * random.random(60)  # the machine's own drift, the same for both
        a = 2e-3 * common * (1 + 0.03 * random.standard_normal(60))
        b = 1e-3 * common * (1 + 0.03 * random.standard_normal(60))
        found = stats.ratio(list(a), list(b), seed=seed)
        held += found.low <= 2.0 <= found.high
    assert held >= 85
    assert found.noise < 0.1


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (1.03, 1.5, "FAST"),
        (0.7, 0.97, "SLOW"),
        (0.99, 1.01, "SAME"),
        (0.9, 1.2, "AMBIGUOUS"),
        (1.0, 1.1, "AMBIGUOUS"),
    ],
)
def test_verdicts(low, high, expected):
    assert stats.verdict(stats.Ratio((low + high) / 2, low, high), 0.02) == expected


def test_ratio_refuses_unpaired_rounds():
    with pytest.raises(ValueError, match="as many rounds"):
        stats.ratio([1.0, 2.0], [1.0])


def test_candidates_take_turns():
    turns: list[str] = []
    task = op_task.op_task(CASES["peg"][0])
    task.set_inputs(0)

    def candidate(name):
        made = task.candidate(name, torch.nn.Identity())
        made.run = lambda: turns.append(name)
        return made

    timings = sample.interleaved([candidate(n) for n in "abc"], clock.Wall(), QUICK)
    assert {len(s) for s in timings.seconds.values()} == {len(timings.seconds["a"])}
    blocks = [n for i, n in enumerate(turns) if i == 0 or turns[i - 1] != n]
    rounds = blocks[-9:]  # never all of one, then all of another
    assert set(rounds) == set("abc")


def test_cold_calls_are_flushed():
    flushed = []
    task = op_task.op_task(CASES["peg"][0])
    task.set_inputs(0)
    made = task.candidate("a", torch.nn.Identity())
    sample.interleaved([made], clock.Wall(), QUICK, flush=lambda: flushed.append(1))
    assert len(flushed) >= 3


class Counting:
    """A clock that counts the calls it is given to time."""

    def __init__(self, seconds):
        self.seconds, self.timed = seconds, 0

    def time(self, run, calls, before=None):
        self.timed += calls
        for _ in range(calls):
            run()
        return self.seconds


@pytest.mark.parametrize(
    ("flush", "seconds", "expected"), [(0, 1e-3, 3), (0, 0.1, 1), (1, 1e-3, 1)]
)
def test_a_turn_begins_with_calls_that_do_not_count(flush, seconds, expected):
    task, ran = op_task.op_task(CASES["peg"][0]), []
    task.set_inputs(0)
    made = task.candidate("a", torch.nn.Identity())
    made.run = lambda: ran.append(1)
    timer = Counting(seconds)
    timings = sample.interleaved([made], timer, QUICK, flush=(lambda: None) if flush else None)
    assert len(ran) - timer.timed == expected * len(timings.seconds["a"])


def test_error_of_non_finite_results():
    exact = torch.tensor([1.0, float("inf"), float("nan")], dtype=torch.float64)
    assert check.error(exact.float(), exact) == 0
    assert check.error(torch.tensor([1.0, 1.0, float("nan")]), exact) == float("inf")
    assert check.error(torch.tensor([float("nan"), float("inf"), float("nan")]), exact) == float(
        "inf"
    )


# ops and peers


@pytest.mark.parametrize("op", sorted(CASES))
@pytest.mark.parametrize("mode", ["fwd", "bwd"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_every_op_is_right_by_the_benchmark_too(op, mode, dtype, best_backend):
    small = {"conv_stem": "levit_128s,H=32,W=32", "patch_embed": "deit_tiny,H=32,W=32,pos=5"}
    case = small.get(op)
    (case,) = op_task.find_cases(op, case or CASES[op][0].name)
    task = op_task.op_task(case, dtype, mode, threads=1, backend=best_backend)
    peer_names = ["eager", "sdpa"] if op == "attention" else ["eager"]
    rows = measure.measure(task, peer_names, QUICK)
    assert [row.verdict for row in rows if row.verdict in ("FAILED", "MISTRUSTED")] == []
    served = (dtype, mode, best_backend) == ("fp32", "fwd", "cpu")
    if op in ("conv1x1", "conv3x3") and not served:  # else torch's own would pass for our kernel
        assert rows[0].verdict == "SKIPPED"
        assert rows[0].reason == "ours is for fp32, inference and the CPU"
        return
    assert rows[0].backend == best_backend
    assert rows[0].flop > 0


@pytest.mark.parametrize(
    ("op", "shape", "match"),
    [
        ("peg", "nothing", "no shape 'nothing' of peg; there are cpvt_tiny"),
        ("peg", "H=4,W=4", "also needs C"),
        ("peg", "cpvt_tiny,Q=3", "not a size of this op: 'Q=3'"),
        ("peg", "cpvt_tiny,B", "not a size of this op: 'B'"),
        ("peg", "cpvt_tiny,B=-1", "B must be a whole number"),
        ("peg", "cpvt_tiny,B=99999999999", "B must be a whole number"),
    ],
)
def test_shapes_that_do_not_exist(op, shape, match):
    with pytest.raises(ValueError, match=match):
        op_task.find_cases(op, shape)


def test_a_shape_changed_keeps_the_rest():
    (case,) = op_task.find_cases("patch_embed", "deit_tiny,B=3,kernel=8x8")
    assert (case.B, case.C, case.kernel) == (3, 192, (8, 8))


@pytest.mark.parametrize("op", ["linear", "mlp", "patch_embed", "conv_stem", "conv1x1", "conv3x3"])
def test_eager_packs_no_weights(op, monkeypatch):
    case = next(case for case in CASES[op] if case.packed)
    task = op_task.op_task(case)
    monkeypatch.setattr(torch.ops.hybridops, "pack_linear", pytest.fail)
    with task.world(), torch.no_grad():
        task.module(*task.draw(0))


def test_an_mlp_is_measured_in_one_dispatch(cpu_library, monkeypatch):
    task = op_task.op_task(op_task.find_cases("mlp", "cpvt_tiny,N=5")[0])
    task.set_inputs(0)
    monkeypatch.setattr(ops.layer, "linear", pytest.fail)  # what the layer is made of elsewhere
    assert task.ours(task).outcome()[0].shape == (1, 5, 192)


def test_peers_say_why_they_cannot():
    fwd = op_task.op_task(op_task.find_cases("linear", "M=4,K=8,N=8")[0], backend="reference")
    fwd.set_inputs(0)
    with pytest.raises(Skip, match="only for the op attention"):
        peers.build("sdpa", fwd)
    with pytest.raises(Skip, match="image"):
        peers.build("channels_last", fwd)
    with pytest.raises(ValueError, match="unknown peer 'nobody'; there are eager"):
        peers.peer("nobody")


def test_the_floor_of_a_model_is_its_products():
    """Linear layers and convolutions, each with its own weights, but none that is grouped."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1),
        nn.Conv2d(8, 8, 3, 1, 1, groups=8),
        nn.Conv2d(8, 6, (1, 2), (1, 2)),
        nn.Flatten(2),
        nn.Linear(32, 24, bias=False),
        nn.Linear(24, 5),
    ).eval()
    task = model_task("floor", model, size=16, batch=2)
    ours, floor = measure.measure(task, ["products"], QUICK)
    assert floor.backend.startswith("4, ")
    assert floor.verdict in ("FAST", "SAME", "SLOW", "AMBIGUOUS"), floor.reason
    assert floor.error_ratio == 1  # eager's answer, as it says
    task = model_task("floor", model, size=16, batch=2, mode="train")
    ours, floor = measure.measure(task, ["products"], QUICK)
    assert floor.backend.startswith("8, ")  # each with its gradients
    assert floor.error_ratio == 1
    for mode, dtype in (("train", "bf16"), ("infer", "fp32")):
        other = model_task("floor", model, size=16, mode=mode, dtype=dtype)
        other.kind = "model" if mode == "train" else "op"
        other.set_inputs(0)
        with pytest.raises(Skip, match="of a model on a CPU only"):
            peers.build("products", other)


def test_absent_peers_are_skipped_with_the_pip_line(monkeypatch):
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None)
    task = op_task.op_task(op_task.find_cases("linear", "M=4,K=8,N=8")[0], backend="reference")
    _, ort, openvino = measure.measure(task, ["onnxruntime", "openvino"], QUICK)
    assert (ort.verdict, openvino.verdict) == ("SKIPPED", "SKIPPED")
    assert "pip install onnxruntime" in ort.reason
    assert "pip install openvino" in openvino.reason


@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_peers_that_read_onnx(name):
    if line := peers.absent(name):
        pytest.skip(f"not installed: {line}")
    task = op_task.op_task(CASES["attention"][2], backend="reference")
    ours, theirs = measure.measure(task, [name], QUICK)
    assert theirs.verdict in ("FAST", "SAME", "SLOW", "AMBIGUOUS"), theirs.reason
    assert theirs.error < 1e-4


@pytest.mark.slow
def test_compiled_peers_are_compiled():
    task = op_task.op_task(op_task.find_cases("linear", "M=4,K=8,N=8")[0], backend="reference")
    _, compiled, frozen = measure.measure(task, ["compile", "compile-freezing"], QUICK)
    assert {compiled.verdict, frozen.verdict} <= {"FAST", "SAME", "SLOW", "AMBIGUOUS"}


def test_the_preloaded_peer_answers_from_its_own_process():
    from hybridops.bench.peers import mkl512

    task = op_task.op_task(op_task.find_cases("linear", "M=4,K=8,N=8")[0], backend="reference")
    library = torch.__file__  # anything that exists: what is no library is ignored with a warning
    build = {"eager-mkl512": lambda task: mkl512.preloaded(task, library)}
    _, theirs = measure.measure(task, build, QUICK)
    assert theirs.verdict in ("FAST", "SAME", "SLOW", "AMBIGUOUS"), theirs.reason
    assert theirs.error_ratio == pytest.approx(1.0)


def test_the_preloaded_peer_needs_a_library(monkeypatch):
    from hybridops.bench.peers import mkl512

    monkeypatch.setattr(mkl512, "_cpuinfo", lambda: "AuthenticAMD avx512f")
    monkeypatch.delenv(mkl512.VARIABLE, raising=False)
    with pytest.raises(Skip, match="names no library"):
        mkl512.build(op_task.op_task(CASES["peg"][0]))
    monkeypatch.setenv(mkl512.VARIABLE, "/nowhere/lib.so")
    with pytest.raises(Skip, match="no file"):
        mkl512.build(op_task.op_task(CASES["peg"][0]))


def test_images_need_not_be_square():
    assert [read_size(text) for text in (224, "224", "8x8", "6x9")] == [224, 224, 8, (6, 9)]
    task = model_task("tiny", torch.nn.Conv2d(3, 4, 1), size=(6, 9), batch=2)
    task.set_inputs(0)
    assert task.inputs[0].shape == (2, 3, 6, 9)
    assert task.case == "6x9"
    assert "--size 6x9" in task.repro
    shown = [in_pixels(case, " × ") for case in ("224", "6x9", "224 frozen")]
    assert shown == ["224 × 224", "6 × 9", "224 × 224 frozen"]
    for wrong in ("", "8x", "x8", "8x8x8", "-8", "0", True, 2.0, [8, 8], "1" * 7):
        with pytest.raises(ValueError, match="size: must be a side"):
            read_size(wrong)
