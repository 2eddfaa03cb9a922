"""hybridops parity: classes found by themselves, and a planted fault that it must see."""

from __future__ import annotations

import json
from itertools import chain
from pathlib import Path

import pytest
import torch

from hybridops.bench import parity as measured
from hybridops.bench.parity import parity
from hybridops.bench.parity_models import MODELS, Small, of_file
from hybridops.cli import main
from hybridops.cli.parity import _INTRODUCTION, markdown
from hybridops.optimize.rules import RULES

VIT = next(m for m in MODELS if m.name == "timm:vit_tiny_patch16_224")
CPVT = Small("hybridops:cpvt_tiny", 16, {"depth": 1, "patch_size": 8})
FILES = tuple(Path(__file__).with_name(name) for name in ("official.py", "detrs.py"))
WITHOUT = {"hybridops.nn.block:DropPath"}
MLP = "timm.layers.mlp:Mlp"


def test_table_of_a_model_of_timm(timm):
    table = parity([VIT])
    assert table.ok
    assert not table.unbuilt
    assert set(RULES) <= set(table.entries)
    entry = table.entries[MLP]
    assert entry.status == "ok"
    assert entry.rule == "FastMlp"
    assert entry.models == [VIT.name]
    for worst in (entry.forward, entry.backward):
        assert 0 < worst.error <= worst.allowed
        assert worst.torchs > 0
        assert worst.where.startswith(f"{VIT.name} blocks.0.mlp")
    assert table.entries["timm.models.levit:Stem16"].status == "not covered"
    page = markdown(table)
    assert f"| `{MLP}` | FastMlp |" in page
    assert "- `timm.models.levit:Stem16`: not covered" in page


def test_our_own_modules():
    table = parity([CPVT])
    assert table.ok
    for path in ("hybridops.nn.peg:PEG", "hybridops.models.cpvt:Cpvt", "hybridops.nn.mlp:Mlp"):
        entry = table.entries[path]
        assert entry.forward is not None, path
        assert entry.backward is not None, path
    assert table.entries["hybridops.models.levit:Levit"].status == "not covered"


class Slip(torch.autograd.Function):
    """The identity, with a gradient that is 0.1 % too large."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, dy):
        return dy * 1.001


@pytest.mark.parametrize("side", ["forward", "backward"])
def test_a_fault_is_seen_where_it_is(timm, monkeypatch, side):
    from hybridops.optimize.timm_layers import FastMlp

    forward = FastMlp.forward

    def faulty(self, x):
        y = forward(self, x)
        return y * 1.001 if side == "forward" else Slip.apply(y)

    monkeypatch.setattr(FastMlp, "forward", faulty)
    table = parity([VIT])
    assert not table.ok
    entry = table.entries[MLP]
    assert entry.status == "FAILED"
    assert getattr(entry, side).share > 1
    assert (entry.forward.share > 1) == (side == "forward")
    page = markdown(table)
    assert "1 failed" in page
    assert f"`{MLP}` {side}: " in page


def test_a_model_that_cannot_be_built_is_named(timm):
    table = parity([Small("timm:no_such_model", 32)])
    assert not table.ok
    assert "no model 'no_such_model'" in table.unbuilt["timm:no_such_model"]
    assert "- timm:no_such_model: ValueError" in markdown(table)


def test_models_of_a_file(tmp_path, capsys):
    file, data = FILES[0], tmp_path / "parity.json"
    assert main(["parity", "official:twins", "--models", str(file), "--json", str(data)]) == 0
    found = {row["path"]: row for row in json.loads(data.read_text())["classes"]}
    entry = found["Twins' GroupAttention"]
    assert entry["status"] == "ok"
    assert entry["models"] == ["official:twins"]
    assert 0 < entry["backward"]["error"] <= entry["backward"]["allowed"]
    assert found["LeViT's Attention"]["status"].startswith("the authors' own code")
    capsys.readouterr()
    empty = tmp_path / "empty.py"
    for content, said in (("", "holds no MODELS"), ("1 / 0", "division by zero")):
        empty.write_text(content)
        assert main(["parity", "--models", str(empty)]) == 2
        assert said in capsys.readouterr().err


def own_entries():
    """Every class that has an entry, but for those of rules that other tests registered."""
    rules = {path for path, rule in RULES.items() if not str(rule).startswith("hybridops.")}
    return {path for path in parity([]).entries if path not in rules}


def test_the_page_lists_every_class():
    page = (Path(__file__).parents[1] / "docs" / "parity.md").read_text()
    assert _INTRODUCTION in page
    assert all(f"--models tests/{file.name} " in page for file in FILES)
    assert page.count("\n- `") == len(WITHOUT)
    assert not [path for path in own_entries() if f"`{path}`" not in page]
    assert ", 0 failed" in page


@pytest.mark.models
def test_every_class_has_its_figures():
    table = parity([*MODELS, *chain.from_iterable(map(of_file, FILES))])
    assert not table.unbuilt
    assert {path for path in own_entries() if table.entries[path].status != "ok"} == WITHOUT
    assert table.ok


def test_command(timm, tmp_path, capsys, monkeypatch):
    page, data = tmp_path / "parity.md", tmp_path / "parity.json"
    assert main(["parity", VIT.name, "--out", str(page), "--json", str(data)]) == 0
    printed = capsys.readouterr()
    assert printed.out == page.read_text()
    assert f"[1/1] {VIT.name}" in printed.err
    found = {row["path"]: row for row in json.loads(data.read_text())["classes"]}
    assert found[MLP]["status"] == "ok"
    assert main(["parity", "nothing*"]) == 2
    assert "no model of the list matches nothing*" in capsys.readouterr().err
    monkeypatch.setattr(measured, "create", lambda *_, **__: 1 / 0)
    assert main(["parity", VIT.name, "--quiet"]) == 1
