"""`hybridops profile`: times shared out by a clock of ours, rows that add up, table, page, command.

No time that a real clock gave is looked at.
"""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from test_bench_report import ENV, HOSTILE, Page
from torch import nn

from hybridops import cli
from hybridops.bench import profile as profiles
from hybridops.bench import sample, stats
from hybridops.bench.model_task import model_task
from hybridops.bench.profile import Node, Profile, Side, Watch, how_served, rows
from hybridops.bench.report.icicle import profile_html
from hybridops.bench.sample import Settings
from hybridops.cli.profile import table
from hybridops.models.cpvt import Cpvt
from hybridops.optimize.swap import Layer

ONCE = Settings(least_rounds=3, most_rounds=3)


@pytest.fixture(autouse=True, scope="module")
def in_a_hurry():
    """Nothing here depends on how well times are known."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(profiles, "LEAST_WATCHED", 1)
        patch.setattr(profiles, "MOST_WATCHED", 1)
        for module in (profiles, sample):
            patch.setattr(module, "settle", lambda: None)
        yield


class Work(nn.Module):
    """Takes `seconds` of a clock that nothing else moves."""

    def __init__(self, clock: list[float], seconds: float, *parts: nn.Module) -> None:
        super().__init__()
        self.clock, self.seconds, self.parts = clock, seconds, nn.ModuleList(parts)

    def forward(self, x):
        self.clock[0] += self.seconds
        for part in self.parts:
            x = part(x)
        return x


class Fixed:
    """A clock by which a call takes as long as it is told."""

    name = "fixed"

    def __init__(self, *seconds: float) -> None:
        self.seconds, self.known = list(seconds), {}

    def time(self, run, calls, before=None):
        run()
        if run not in self.known:
            self.known[run] = self.seconds.pop(0)
        return self.known[run]


def nodes(*tree) -> Node:
    """(name, own ms, calls, kernels, *children) as a Node."""
    name, own, calls, kernels, *children = tree
    return Node(name, own, calls, profiles.Counter(kernels), [nodes(*c) for c in children])


def made(eager: tuple, optimized: tuple, **layers: str) -> Profile:
    """A profile of those trees; layers: by name, why each was left alone."""
    task = SimpleNamespace(name="timm:tiny", case="32", batch=1, dtype="fp32", threads=1)
    before, after = nodes(*eager), nodes(*optimized)
    return Profile(
        task,
        Side(before.ms, 1.1 * before.ms, before),
        Side(after.ms, after.ms, after),
        stats.Ratio(before.ms / after.ms, 1.0, 9.0),
        {name: Layer(name, "torch.nn:Linear", None, why) for name, why in layers.items()},
        "Tiny: 1 of 2 hot layers replaced",
    )


def tiny() -> Profile:
    """A stem that one side computes in the model itself, two blocks, of which one is fused."""
    left = ("blocks.1", 4.0, 1, "")
    return made(
        ("", 1.0, 1, "", ("stem", 9.0, 1, ""),
         ("blocks", 0.0, 0, "", ("blocks.0", 2.0, 1, "", ("blocks.0.fc", 4.0, 1, "")), left)),
        ("", 3.0, 1, ["conv_stem"], ("stem", 0.0, 0, ""),
         ("blocks", 0.0, 0, "",
          ("blocks.0", 3.0, 1, ["linear", "linear"], ("blocks.0.fc", 0.0, 0, "")), left)),
        **{"blocks.1": "no rule", "blocks.0.fc": "never said, since it is not called"},
    )  # fmt: skip


@pytest.fixture(scope="module")
def small() -> Profile:
    """Of a model whose last block is pruned, and whose blocks are fused."""
    model = Cpvt(32, 2, 3, patch_size=8, num_classes=7).eval()
    return profiles.profile(model_task("cpvt", model, size=16), ONCE)


# watching


def test_each_module_is_charged_its_own_time():
    clock = [0.0]
    inner = Work(clock, 2.0)
    model = Work(clock, 1.0, Work(clock, 4.0, inner, inner), Work(clock, 8.0))
    watch = Watch(model, lambda: clock[0])
    with watch.on():
        model(torch.zeros(1))
    assert watch.own == {"": 1.0, "parts.0": 4.0, "parts.0.parts.0": 4.0, "parts.1": 8.0}
    assert watch.calls["parts.0.parts.0"] == 2
    assert watch.calls["parts"] == 0


def test_a_module_without_a_name_is_part_of_its_caller():
    clock = [0.0]
    model = Work(clock, 1.0)
    hidden = Work(clock, 2.0)
    model.__dict__["hidden"] = hidden
    model.register_forward_hook(lambda module, *_: module.hidden(None))
    watch = Watch(model, lambda: clock[0])
    with watch.on():
        model(None)
    assert watch.own == {"": 3.0}


def test_watching_ends_also_where_a_module_raises():
    plain = nn.Module.__call__
    watch = Watch(nn.Linear(2, 2))
    with pytest.raises(RuntimeError), watch.on():
        nn.Sequential(nn.Linear(2, 2))(torch.zeros(3))
    assert nn.Module.__call__ is plain
    assert watch.inside == []


def test_the_whole_is_measured_unwatched_and_shared_out(monkeypatch):
    """The watched calls last 15 s; the unwatched ones 30 ms and 60 ms, and these count."""
    clock = [0.0]
    model = Work(clock, 1.0, Work(clock, 4.0, Work(clock, 2.0)), Work(clock, 8.0))
    monkeypatch.setattr(Work, "__deepcopy__", lambda self, memo: self, raising=False)
    task = model_task("tiny", model, size=2)
    p = profiles.profile(task, ONCE, clock=Fixed(0.030, 0.060), now=lambda: clock[0])
    assert sorted((round(p.eager.ms, 9), round(p.optimized.ms, 9))) == [30.0, 60.0]
    assert p.eager.watched_ms == 15e3
    shares = {node.name: node.ms / p.eager.ms for node in p.eager.tree.walk()}
    assert shares == pytest.approx(
        {"": 1, "parts": 14 / 15, "parts.0": 6 / 15, "parts.0.parts": 2 / 15}
        | {"parts.0.parts.0": 2 / 15, "parts.0.parts.0.parts": 0, "parts.1": 8 / 15}
        | {"parts.1.parts": 0}
    )


def test_what_is_bypassed_is_charged_to_what_stands_in_for_it(small, cpu_library):
    """Watching changes nothing about which kernels run, nor which modules are called."""
    p = small
    after = {node.name: node for node in p.optimized.tree.walk()}
    before = {node.name: node for node in p.eager.tree.walk()}
    assert after["blocks.1"].kernels == {"chain": 1}
    assert before["blocks.1.attn.qkv"].calls == 1
    assert after["blocks.1.attn.qkv"].calls == after["blocks.1.attn"].calls == 0
    assert not any(node.kernels for node in before.values())
    assert all(node.own == 0 for node in after.values() if not node.calls)
    names = [row.name for row in rows(p, 2)]
    assert "(model): blocks.2 + norm + head" in names  # the last block is pruned by the model


@pytest.mark.parametrize("depth", [1, 2, 3, 4, 9, None])
def test_rows_add_up_to_the_whole(small, depth):
    p = small
    found = rows(p, depth)
    assert sum(row.eager_ms for row in found) == pytest.approx(p.eager.ms)
    assert sum(row.optimized_ms for row in found) == pytest.approx(p.optimized.ms)
    assert len(found) <= profiles.MOST_ROWS


# rows


def test_rows_of_what_both_sides_call():
    found = [(r.name, r.eager_ms, r.optimized_ms, r.how) for r in rows(tiny(), 2)]
    assert found[:-1] == [
        ("(model): stem", 10.0, 3.0, "conv_stem"),
        ("blocks.0", 6.0, 3.0, "linear ×2"),
        ("blocks.1", 4.0, 4.0, "left alone: no rule"),
    ]
    assert found[-1][:3] == ("glue", 0.0, 0.0)


def test_a_row_at_depth_holds_all_that_is_below():
    found = {r.name: (r.eager_ms, r.optimized_ms, r.how) for r in rows(tiny(), 1)}
    assert found["blocks"] == (10.0, 7.0, "linear ×2; left alone: no rule")


def test_time_between_children_is_glue():
    p = made(
        ("", 5.0, 1, "", ("a", 1.0, 1, ""), ("b", 1.0, 1, "")),
        ("", 2.0, 1, "", ("a", 1.0, 1, ""), ("b", 1.0, 1, "")),
    )
    glue = rows(p)[-1]
    assert (glue.name, glue.eager_ms, glue.optimized_ms, glue.speedup) == ("glue", 5.0, 2.0, 2.5)


def test_small_rows_are_put_together():
    side = ("", 0.0, 1, "", *((f"m{i}", 1e-3, 1, "") for i in range(9)), ("large", 9.0, 1, ""))
    found = rows(made(side, side))
    assert [row.name for row in found] == ["large", "9 more", "glue"]
    assert found[1].eager_ms == pytest.approx(9e-3)


def test_reasons_are_counted():
    layers = {f"m.{i}": Layer(f"m.{i}", "x:Y", None, "no rule") for i in range(2)}
    below = (("m.0", 1.0, 1, ""), ("m.1", 1.0, 1, ""))
    assert how_served([nodes("m", 0.0, 0, "", *below)], layers) == "2 left alone: no rule"
    assert how_served([nodes("n", 0.0, 1, "")], layers) == "torch's own"
    already = {"n": Layer("n", "hybridops.nn:PEG", None, "runs on hybridops kernels already")}
    assert how_served([nodes("n", 0.0, 1, ["peg"])], already) == "peg"


# table


@pytest.mark.parametrize("columns", [40, 60, 80, 120])
def test_the_table_fits_the_terminal(columns):
    lines = table(tiny(), None, columns).split("\n\n")[0].splitlines()
    assert max(map(len, lines)) <= columns
    assert any("10.00" in line and ("3.33x" in line or columns < 60) for line in lines)


def test_piped_the_table_is_whole():
    text = table(tiny(), 1)
    assert "(model): stem" in text
    assert "linear ×2; left alone: no rule" in text
    whole = next(line for line in text.splitlines() if line.startswith("whole model"))
    assert whole.split()[2:6] == ["20.00", "10.00", "100.0%", "2.00x"]


def test_doubt_is_said_everywhere():
    p = replace(tiny(), doubt="other processes used 2.0 of 2 cores meanwhile")
    assert "do not trust these times: other processes used 2.0" in table(p)
    assert Page(profile_html([p], ENV)).text.count("Do not trust these times") == 1
    assert p.as_json()["doubt"] == p.doubt
    assert "trust" not in table(tiny()) + profile_html([tiny()], ENV)


# page


def boxes(page: Page) -> list[dict]:
    """The nested pictures, one per module and side."""
    return [a for tag, a in page.tags if tag == "svg" and "x" in a]


def test_both_sides_are_drawn_to_one_scale():
    found = boxes(Page(profile_html([tiny()], ENV, 1)))
    assert [box["width"] for box in found if box["y"] == "0"] == ["100%", "50%"]
    assert len(found) == 10  # 6 modules with time before, 4 after


def test_a_side_that_became_slower_fits_too():
    p = tiny()
    found = boxes(Page(profile_html([replace(p, eager=p.optimized, optimized=p.eager)], ENV)))
    assert [box["width"] for box in found if box["y"] == "0"] == ["50%", "100%"]


def test_children_lie_inside_their_parent():
    for box in boxes(Page(profile_html([tiny()], ENV))):
        start, width = (float(box[key].rstrip("%")) for key in ("x", "width"))
        assert 0 <= start <= start + width <= 100.01


def test_colours_say_what_becomes_of_a_module():
    text = profile_html([tiny()], ENV)
    assert text.count('class="box c0 leaf"') == 3  # the stem, blocks.0.fc; blocks.0 after
    assert text.count('class="box c2 leaf"') == 2  # blocks.1 on both sides


def test_the_page_fetches_nothing_and_text_stays_text():
    p = tiny()
    p.task.name = HOSTILE
    p.optimized.tree.children[0].name = p.eager.tree.children[0].name = HOSTILE
    page = Page(profile_html([p], ENV | {"cpu": HOSTILE}))
    assert page.count("script") == page.count("img") == page.count("link") == 0
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)


# command


@pytest.fixture
def quick(monkeypatch):
    """A tiny model in place of any, measured shortly."""
    model = Cpvt(32, 2, 2, patch_size=8, num_classes=7).eval()
    monkeypatch.setattr("hybridops.cli.profile.build_model", lambda name, size: (model, 16))
    monkeypatch.setattr(profiles, "Settings", lambda: ONCE)
    monkeypatch.setattr("hybridops.cli.profile.threads", lambda count: nullcontext())


def test_the_command_prints_draws_and_writes(quick, tmp_path, capsys):
    out, data = tmp_path / "p.html", tmp_path / "p.json"
    arguments = ["--dtype", "fp32,bf16", "--out", str(out), "--json", str(data), "--depth", "2"]
    assert cli.main(["profile", "hybridops:cpvt_tiny", *arguments]) == 0
    printed = capsys.readouterr()
    assert printed.out.count("whole model") == 2
    assert printed.err.splitlines() == [
        "[1/2] hybridops:cpvt_tiny fp32",
        "[2/2] hybridops:cpvt_tiny bf16",
    ]
    assert Page(out.read_text()).count("section") == 2
    document = json.loads(data.read_text())
    assert document["schema"] == 1
    first, second = document["profiles"]
    assert (first["dtype"], second["dtype"], first["size"]) == ("fp32", "bf16", 16)
    for side in ("eager", "optimized"):
        assert first[side]["tree"]["ms"] == pytest.approx(first[side]["ms"])
        assert sum(row[f"{side}_ms"] for row in first["rows"]) == pytest.approx(first[side]["ms"])


def test_quiet_prints_nothing(quick, capsys):
    assert cli.main(["profile", "cpvt_tiny", "--quiet"]) == 0
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["timm:no_such_model"], "no_such_model"),
        (["no_such_model"], "neither timm nor hybridops"),
        (["elsewhere:levit_128s"], "is one of"),
        (["cpvt_tiny", "--dtype", "int4"], "fp32 and bf16"),
        (["cpvt_tiny", "--threads", "0"], "whole number"),
        (["cpvt_tiny", "--depth", "x"], "whole number"),
        (["timm:levit_128s", "--size", "7"], "does not take 7 x 7"),
        (["timm:levit_128s", "--size", "8by8"], "or HxW"),
        (["cpvt_tiny", "--out", "/no/such/folder/p.html"], "no directory"),
        (["cpvt_tiny", "--json", "/no/such/folder/p.json"], "no directory"),
        (["cpvt_tiny", "--size", "32", "--backend", "abacus"], "abacus"),
    ],
)
def test_what_cannot_be_served_is_one_line(arguments, match, capsys):
    assert cli.main(["profile", *arguments]) == 2
    *progress, last = capsys.readouterr().err.splitlines()
    assert last.startswith("hybridops")
    assert match in last
    assert all(line.startswith("[1/1] ") for line in progress)
