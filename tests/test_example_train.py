"""examples/train.py: one curve, by our kernels or torch, killed or not, on one process or two."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
import time
from importlib import util
from pathlib import Path

import pytest
import torch

import hybridops

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

SCRIPT = Path(__file__).resolve().parents[1] / "examples" / "train.py"


def load_script():
    spec = util.spec_from_file_location("example_train", SCRIPT)
    module = util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


train = load_script()


@pytest.fixture(autouse=True)
def _threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def run(out, *options, steps=6):
    """Train in this process -> curves.json"""
    fixed = ["--out", str(out), "--steps", str(steps), "--batch", "16", "--threads", "1"]
    code = train.main([*fixed, *options])
    assert code == 0
    return json.loads((out / "curves.json").read_text())


def apart(ours, theirs):
    """The largest relative difference of two curves."""
    assert len(ours) == len(theirs)
    return max(abs(a - b) / abs(b) for a, b in zip(ours, theirs, strict=True))


def test_our_kernels_give_torchs_curve(tmp_path):
    """200 steps may differ by 1e-3; the first 12, by which a wrong gradient shows, by 3e-6."""
    ours = run(tmp_path / "ours", "--lr", "0.01", steps=12)
    theirs = run(tmp_path / "theirs", "--lr", "0.01", "--backend", "reference", steps=12)
    assert len(ours["losses"]) == 12
    assert ours["losses"][0] != pytest.approx(ours["losses"][-1], rel=0.01)  # it did train
    assert apart(ours["losses"], theirs["losses"]) <= 3e-6
    assert ours["config"] | {"backend": "reference"} == theirs["config"]


@pytest.mark.models
def test_at_its_defaults_it_learns_the_digits_along_torchs_curve(tmp_path):
    """What the README says: 97 % of the test images, and 200 steps that torch would have made."""
    assert train.main(["--out", str(tmp_path), "--threads", "1"]) == 0
    ours = json.loads((tmp_path / "curves.json").read_text())
    assert ours["accuracy"] >= 0.97
    assert ours["optimized_accuracy"] >= 0.97
    options = ["--out", str(tmp_path), "--threads", "1", "--backend", "reference"]
    theirs = train.Run(train.parse(options), world=1)
    with hybridops.use("reference"):
        for _ in range(200):
            theirs.one_step(theirs.model)
    assert apart(ours["losses"][:200], theirs.losses) <= 1e-3


def test_a_seed_is_a_run(tmp_path):
    first = run(tmp_path / "a", "--seed", "3", steps=2)
    assert run(tmp_path / "b", "--seed", "3", steps=2) == first
    assert run(tmp_path / "c", "--seed", "4", steps=2)["losses"] != first["losses"]


def test_files_are_whole_and_their_owners(tmp_path):
    run(tmp_path, steps=1)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"checkpoint.pt", "curves.json", "curves.svg"}
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o600 for path in tmp_path.iterdir())
    assert (tmp_path / "curves.svg").read_text().rstrip().endswith("</svg>")


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "checkpoint.pt"
    train.write_atomically(path, lambda file: file.write(b"old"))

    def fail(file):
        file.write(b"half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        train.write_atomically(path, fail)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def start(out, *options, steps):
    command = [sys.executable, str(SCRIPT), "--out", str(out), "--steps", str(steps)]
    command += ["--batch", "16", "--threads", "1", "--checkpoint-every", "1", *options]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


def test_kill_9_loses_nothing(tmp_path):
    """Killed twice in the middle of its work, wherever that hits, and resumed: the same bits."""
    steps = 30
    whole = run(tmp_path / "whole", steps=steps)
    out, options = tmp_path / "killed", []
    checkpoint = out / "checkpoint.pt"
    for step in (4, 10):
        process = start(out, *options, steps=steps)
        wait_for(checkpoint, step, process)
        os.kill(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        options = ["--resume"]
    left = saved(checkpoint)["step"]
    assert 0 < left < steps
    assert not (out / "curves.json").exists()
    process = start(out, "--resume", steps=steps)
    _, said = process.communicate(timeout=300)
    assert process.returncode == 0
    assert f"resumed behind step {left}" in said
    resumed = json.loads((out / "curves.json").read_text())
    assert resumed == whole
    mine, theirs = (saved(d / "checkpoint.pt") for d in (out, tmp_path / "whole"))
    for name, value in theirs["model"].items():
        assert torch.equal(mine["model"][name], value), name


def saved(path):
    return torch.load(path, weights_only=True)


def wait_for(checkpoint, step, process, seconds=240):
    """Until the checkpoint has come to that step; whenever it is read, it is whole."""
    end = time.monotonic() + seconds
    while not checkpoint.exists() or saved(checkpoint)["step"] < step:
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < end
        time.sleep(0.005)


def test_two_processes_give_the_curve_of_one(tmp_path):
    one = run(tmp_path / "one", steps=4)
    options = ["--out", str(tmp_path / "two"), "--steps", "4", "--batch", "16", "--threads", "1"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [*launcher, "--nproc-per-node", "2", str(SCRIPT), *options],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    two = json.loads((tmp_path / "two" / "curves.json").read_text())
    assert two["config"]["world"] == 2
    assert apart(two["losses"], one["losses"]) <= 1e-4


def test_bad_requests_are_one_line(tmp_path, capsys):
    def refused(*options):
        code = train.main(["--out", str(tmp_path), *options])
        lines = capsys.readouterr().err.splitlines()
        assert code == 2
        assert len(lines) == 1
        return lines[0]

    assert "there is no checkpoint" in refused("--resume")
    (tmp_path / "checkpoint.pt").write_bytes(b"damaged")
    assert "cannot be read" in refused("--resume")
    run(tmp_path, steps=1)
    capsys.readouterr()
    assert "of a run with steps 1, not 2" in refused("--resume", "--steps", "2")


def test_help_has_an_example(capsys):
    with pytest.raises(SystemExit):
        train.main(["--help"])
    assert "torchrun --nproc-per-node 2 examples/train.py" in capsys.readouterr().out
