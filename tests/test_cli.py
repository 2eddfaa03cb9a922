"""The command line: help, exit codes, one clear line for what a user gets wrong, and doctor."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import hybridops
from hybridops import backend
from hybridops.cli import doctor, main
from hybridops.cli.images import open_photographs, to_tensor
from hybridops.cli.models import Hub, resolve

COMMANDS = ("demo", "doctor", "explain", "optimize", "profile")


def in_new_process(*arguments, **environment):
    return subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, "HF_HUB_OFFLINE": "1", **environment},
        capture_output=True,
        text=True,
    )


@pytest.fixture
def picture(tmp_path):
    """Writes an image file of that array and returns its path."""

    def write(values, name="picture.png"):
        path = tmp_path / name
        Image.fromarray(np.asarray(values)).save(path)
        return str(path)

    return write


def test_no_arguments_print_help(capsys):
    assert main([]) == 0
    out = capsys.readouterr().out
    assert all(command in out for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example_that_parses(command, capsys):
    from hybridops.cli import _build_parser

    assert main([command, "--help"]) == 0
    examples = capsys.readouterr().out.split("example:\n")[1].strip().splitlines()
    for example in examples:
        program, *arguments = example.split()
        assert program == "hybridops"
        assert _build_parser().parse_args(arguments).command == command


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"hybridops {hybridops.__version__}\n"


def test_commands_are_imported_only_when_they_run():
    heavy = "{'timm', 'torchvision', 'transformers', 'matplotlib', 'PIL', 'sklearn'}"
    code = f"import sys, hybridops.cli; print({heavy} & set(sys.modules))"
    assert in_new_process("-c", code).stdout.strip() == "set()"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nonsense"], "invalid choice: 'nonsense'"),
        (["demo", "--rounds", "0"], "must be a whole number from 1 on, got '0'"),
        (["optimize", "levit_128s"], "the following arguments are required: --image"),
        (["explain", "levit_129s"], "unknown model 'levit_129s'; close to levit_128s"),
        (["explain", "hybridops:resnet50"], "unknown model 'hybridops:resnet50'"),
        (["explain", "elsewhere:levit_128s"], "a model's name is one of timm:NAME"),
        (["explain", "torchvision:vit_b_17"], "no model 'vit_b_17'; close to it vit_b_16"),
        (["demo", "--models", "hf:vit"], "it must start with timm: or hybridops:"),
        (["demo", "missing.png"], "missing.png: no such file"),
        (["demo", "."], ". is a directory, not an image file"),
        (["demo", "--models", __file__], "is a file, not a model"),
        (["demo", "--out", "no/such/folder.png"], "is in a folder that does not exist"),
        (["demo", "--out", "chart.txt"], "must end in .png, .svg, .pdf"),
        (["demo", "--json", "."], ". is a directory"),
        (["optimize", "levit_128s", "--image", __file__], "is not an image that pillow can read"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else "",
)
def test_a_user_error_is_one_line_and_exit_code_2(arguments, message, capsys):
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1


def test_a_truncated_photograph_is_one_line(picture, capsys):
    path = picture(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8), "cut.jpg")
    with open(path, "r+b") as file:
        file.truncate(900)
    assert main(["optimize", "levit_128s", "--image", path]) == 2
    assert "cut.jpg cannot be read" in capsys.readouterr().err


def test_a_model_without_rules_is_one_line(picture, capsys):
    path = picture(np.zeros((8, 8, 3), np.uint8))
    assert main(["optimize", "timm:test_nfnet", "--image", path]) == 2
    assert "test_nfnet: no rule serves any layer" in capsys.readouterr().err


def test_a_missing_extra_is_one_line_with_its_command(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    assert main(["explain", "timm:levit_128s"]) == 2
    assert "torchvision is not installed: pip install torchvision" in capsys.readouterr().err


def test_our_models_need_no_timm(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    assert resolve("cpvt_tiny") == ("hybridops", "cpvt_tiny")
    assert resolve("hybridops:levit_256") == ("hybridops", "levit_256")


def test_a_plain_name_is_timms_first():
    assert resolve("levit_256") == ("timm", "levit_256")
    assert resolve("cpvt_tiny") == ("hybridops", "cpvt_tiny")


def test_explain_lists_what_would_be_replaced(capsys):
    assert main(["explain", "levit_128s"]) == 0
    out = capsys.readouterr().out
    assert "FastAttention" in out
    assert "hot layers replaced" in out


@pytest.mark.parametrize(
    "shape",
    [(30, 40), (30, 40, 4), (30, 40, 3), (1, 1, 3), (1, 4000, 3), (4000, 1), (300, 2, 4)],
    ids=lambda shape: "x".join(map(str, shape)),
)
def test_any_image_becomes_a_tensor(shape, picture):
    values = np.random.default_rng(0).integers(0, 255, shape, np.uint8)
    (_, image), *_ = open_photographs([picture(values)])
    x = to_tensor(image)
    assert x.shape == (1, 3, 224, 224)
    assert x.dtype == torch.float32
    assert x.isfinite().all()


def test_sixteen_bit_grey_is_scaled_not_clipped(picture):
    path = picture(np.full((8, 8), 32768, np.uint16))
    (_, image), *_ = open_photographs([path])
    assert image.getpixel((4, 4)) == (128, 128, 128)


def test_the_centre_is_cut_out(picture):
    values = np.zeros((100, 200, 3), np.uint8)
    values[:, 50:150] = 255  # the centre square is white
    (_, image), *_ = open_photographs([picture(values)])
    assert torch.equal(to_tensor(image, 32, 0.8, (0, 0, 0), (1, 1, 1)), torch.ones(1, 3, 32, 32))


def test_weights_come_from_the_cache_when_offline(tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert Hub(1).fetch("some/model") == (None, "HF_HUB_OFFLINE is set")
    repository = tmp_path / "models--some--model"
    weights = repository / "snapshots" / "abc" / "model.safetensors"
    weights.parent.mkdir(parents=True)
    weights.touch()
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    assert Hub(1).fetch("some/model") == (weights, "")


def test_what_a_hub_gives_is_its_owners(tmp_path, monkeypatch):
    from hybridops.cli.models import Hub

    hub = """
import pathlib
def hf_hub_download(repository, name):
    file = pathlib.Path(repository) / name
    file.parent.mkdir()
    file.touch()
    return file
"""
    (tmp_path / "huggingface_hub.py").write_text(hub)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    path, why = Hub(60)._download(str(tmp_path / "cache"))
    assert why == ""
    assert [p.stat().st_mode & 0o777 for p in (path.parent, path)] == [0o700, 0o600]


def test_a_hub_that_does_not_answer_costs_seconds(tmp_path, monkeypatch):
    import socket
    import time

    from huggingface_hub import constants

    silent = socket.create_server(("127.0.0.1", 0))  # accepts, and never says a word
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
    hub, start = Hub(60), time.monotonic()
    for repository in ("a/a", "b/b", "c/c"):  # asked once, not once per model
        path, why = hub.fetch(repository)
        assert path is None
        assert why
    assert time.monotonic() - start < 8
    silent.close()


BUILT = any(Path(hybridops.__file__).parent.glob("_cpu_*.so"))
CHOICES = ("HYBRIDOPS_LIBRARY", "ATEN_CPU_CAPABILITY")
STATES = {
    "present": {},
    "absent": {"HYBRIDOPS_LIBRARY": "none"},
    "avx2": {"ATEN_CPU_CAPABILITY": "avx2"},
    "default": {"ATEN_CPU_CAPABILITY": "default"},
}


@pytest.mark.parametrize("state", STATES)
def test_doctor_tells_the_truth(state, monkeypatch):
    for name in CHOICES:  # whatever this run was started with
        monkeypatch.delenv(name, raising=False)
    done = in_new_process("-m", "hybridops", "doctor", "--json", **STATES[state])
    findings = json.loads(done.stdout)
    library, cells = findings["library"], findings["ops"]
    assert set(cells) == {"attention", "peg", "patch_embed", "conv_stem", "linear"}
    served = {cells[op][dtype]["backend"] for op in cells for dtype in ("float32", "bfloat16")}
    assert {cells[op]["float64"]["backend"] for op in cells} == {"reference"}
    if state in ("absent", "default") or not BUILT:
        assert library["isa"] is None
        assert library["path"] is None
        assert served == {"reference"}
        assert done.returncode == 1
        assert any(library["why_none"] in line or "C++" in line for line in findings["advice"])
    else:
        assert library["isa"] in (("avx2",) if state == "avx2" else ("avx2", "avx512"))
        assert os.path.isfile(library["path"])
        assert served == {"cpu"}
        assert done.returncode == 0
    if state == "absent":
        assert any(line.endswith("unset HYBRIDOPS_LIBRARY") for line in findings["advice"])
    if state == "default":
        assert any(line.endswith("unset ATEN_CPU_CAPABILITY") for line in findings["advice"])


def test_doctor_reads_like_a_page(capsys):
    assert main(["doctor"]) == (0 if backend.ISA else 1)
    out = capsys.readouterr().out
    assert f"torch {torch.__version__}" in out
    for name in ("triton", "cuda"):
        assert f"{name} kernels:" in out
        assert (backend.why_absent(name) or "ready") in out
    assert all(op in out for op in ("attention", "peg", "patch_embed", "conv_stem", "linear"))


def test_doctor_sees_a_kernel_that_is_wrong(monkeypatch, cpu_library):
    real = hybridops.ops.linear

    def wrong(*arguments, **options):
        y = real(*arguments, **options)
        return y * 1.001 if backend._forced is None else y

    monkeypatch.setattr(hybridops.ops, "linear", wrong)
    findings = doctor.examine()
    assert findings["ops"]["linear"]["float32"]["backend"] == "wrong"
    assert not findings["fast"]
    assert any("broken for linear" in line for line in findings["advice"])


def test_doctor_leaves_the_fallback_count_alone():
    backend.fallbacks["peg", "planted"] = 3
    try:
        before = backend.fallbacks.copy()
        doctor.examine()
        assert backend.fallbacks == before
    finally:
        del backend.fallbacks["peg", "planted"]


def test_doctor_says_how_to_get_what_is_missing(monkeypatch):
    present = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda name: None if name == "timm" else present(name))
    assert any(line.endswith("pip install timm") for line in doctor.examine()["advice"])
