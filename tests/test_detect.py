"""`hybridops detect`: boxes on photographs, from weights that see something and from none."""

from __future__ import annotations

import socket

import pytest
import torch

from hybridops.cli import detect, main
from hybridops.models import detr

pytest.importorskip("PIL.Image")
from PIL import Image


@pytest.fixture
def small(monkeypatch):
    """detr_resnet50 as a small model, so that a test takes seconds."""
    shape = {"dim": 32, "heads": 2, "hidden": 32, "layers": (1, 1), "num_queries": 9}
    monkeypatch.setitem(
        detect.models._MODELS, "detr_resnet50", lambda: detr.Detr((1,) * 4, **shape)
    )


@pytest.fixture
def offline(monkeypatch, tmp_path):
    def refuse(*args, **kwargs):
        raise OSError("no network in tests")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))


@pytest.fixture
def photograph(tmp_path):
    path = tmp_path / "street.png"
    Image.new("RGB", (90, 60), "white").save(path)
    return path


def test_without_network_it_says_so_and_draws(small, offline, photograph, tmp_path, capsys):
    out = tmp_path / "new" / "boxes"
    assert main(["detect", str(photograph), "--out", str(out), "--threshold", "0"]) == 0
    said = capsys.readouterr().out
    assert "seeded random weights (no hub can be reached; --weights FILE takes your own)" in said
    assert "[1/1] street.png: 9 objects" in said
    assert "these weights were never trained" in said
    (drawn,) = out.iterdir()
    with Image.open(drawn) as image:
        assert image.size == (90, 60)
        assert len(set(image.get_flattened_data())) > 1


def test_the_sample_photographs_and_weights_of_a_file(small, offline, tmp_path, capsys):
    pytest.importorskip("sklearn")
    model = detect.create_model("detr_resnet50")
    with torch.no_grad():  # a model that sees one cat everywhere, with certainty
        model.class_embed.weight.zero_()
        model.class_embed.bias.zero_()[17] = 20.0
    path = tmp_path / "cat.pth"
    torch.save({"model": model.state_dict()}, path)
    arguments = ["detect", "--out", str(tmp_path / "out"), "--weights", str(path)]
    assert main(arguments) == 0
    said = capsys.readouterr().out
    assert f"weights of {path} (hybridops)" in said
    assert "china.jpg: 9 objects" in said
    assert "cat 1.00" in said
    assert "never trained" not in said
    assert len(list((tmp_path / "out").iterdir())) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "levit_256"], "unknown model 'levit_256': one of detr_resnet101"),
        (["--threshold", "2"], "--threshold must be between 0 and 1, got 2"),
        (["--weights", "nowhere.pth"], "nowhere.pth: there is no such file"),
        (["nothing.jpg"], "nothing.jpg: no such file"),
    ],
)
def test_errors_are_one_line(small, offline, photograph, tmp_path, capsys, arguments, message):
    given = arguments if arguments[0] == "nothing.jpg" else [str(photograph), *arguments]
    assert main(["detect", *given, "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1


def test_a_file_in_the_place_of_the_folder(small, offline, photograph, capsys):
    assert main(["detect", str(photograph), "--out", str(photograph)]) == 2
    assert "is no folder to write to" in capsys.readouterr().err


def test_boxes_are_drawn_where_they_are(tmp_path):
    image = Image.new("RGB", (200, 100), "white")
    box = torch.tensor([[60.0, 30.0, 140.0, 90.0], [-50.0, -50.0, 900.0, 900.0]])
    found = detr.Objects(torch.tensor([0.9, 0.8]), torch.tensor([17, 300]), box)
    detect.draw(image, found, tmp_path / "drawn.png")
    with Image.open(tmp_path / "drawn.png") as drawn:
        white = (255, 255, 255)
        assert drawn.getpixel((140, 60)) != white
        assert drawn.getpixel((199, 99)) != white
        assert drawn.getpixel((100, 60)) == white
        assert drawn.getpixel((170, 70)) == white
    assert detect.class_name(300) == "class 300"
