"""What a model that others named must come through: optimize, verify, report, restore."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from parity import leaves

from hybridops import explain, optimize, report, restore, verify
from hybridops.optimize import Fast
from hybridops.optimize.explain import create


class Real(NamedTuple):
    """A model: its image, whether it has to be told, rules that must serve, reasons to be named."""

    size: int
    told: bool  # the size is one of its arguments
    rules: str
    reasons: tuple[str, ...] = ()


_SIZE = {"timm": "img_size", "torchvision": "image_size", "hf": "image_size"}
_SMALL = {"timm": {"num_classes": 10}, "torchvision": {"num_classes": 10}, "hf": {}}


def cases(library: str, fast: dict[str, Real], slow: dict[str, Real]) -> pytest.MarkDecorator:
    """A test for each name of a library; the slow ones by `make test-models`."""
    params = [pytest.param(f"{library}:{n}", r, id=n) for n, r in fast.items()]
    marks = pytest.mark.models
    params += [pytest.param(f"{library}:{n}", r, id=n, marks=marks) for n, r in slow.items()]
    return pytest.mark.parametrize(("name", "real"), params)


@torch.no_grad()
def check(name: str, real: Real) -> None:
    """The model at its real depth, with random weights, on one small image."""
    library = name.partition(":")[0]
    options = _SMALL[library] | ({_SIZE[library]: real.size} if real.told else {})
    model = create(name, **options).eval()
    x = torch.randn(1, 3, real.size, real.size)
    before, state = leaves(model(x)), {k: v.clone() for k, v in model.state_dict().items()}
    foreseen = explain(model)
    optimize(model)

    served = {line.rule.partition(":Fast")[2] for line in foreseen.layers if line.rule}
    assert served >= set(real.rules.split())
    reasons = " ".join(line.reason for line in foreseen.layers if line.reason)
    assert all(reason in reasons for reason in real.reasons)
    assert all(line.rule or line.reason for line in foreseen.layers)
    assert [line.rule for line in report(model).layers] == [line.rule for line in foreseen.layers]

    result = verify(model, x)
    assert result.ok, str(result)
    assert all(torch.isfinite(y).all() for y in leaves(model(x)))
    fast = [m for m in model.modules() if isinstance(m, Fast)]
    assert all(m._hybridops_plan.settled() for m in fast)  # a call sets nothing
    assert not report(model).fallbacks
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    restore(model)
    assert not any(isinstance(m, Fast) for m in model.modules())
    assert all(torch.equal(y, b) for y, b in zip(leaves(model(x)), before, strict=True))
