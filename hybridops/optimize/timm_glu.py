"""timm's gated MLPs, act(x @ gate) * (x @ value): the activation inside the gate's product."""

from __future__ import annotations

from typing import ClassVar

from timm.layers.mlp import GluMlp, SwiGLU

from ..nn._derived import Weights
from ..ops import linear
from .fast import Fast, activation_name, first, not_activation, not_plain_linear, packed_linear
from .qkv import as_they_are


class _GatedMlp(Fast):
    """Base of both: `products` gives gate, value and fc2, unpacked."""

    layers: ClassVar[tuple[str, ...]] = ("fc1", "fc2")

    @classmethod
    def unserved(cls, module, mode):
        reasons = (not_plain_linear(name, getattr(module, name)) for name in cls.layers)
        return first(reasons) or not_activation("act", module.act)

    @classmethod
    def facts(cls, module):
        return activation_name(module.act)

    def forward(self, x):
        plan = self._hybridops_plan
        weights = plan.derived(self, x)
        if weights is None and not plan.intact():
            return self.replaces.forward(self, x)
        gate, value, fc2 = weights or self.products()
        hidden = linear(x, gate.weight, gate.bias, activation=plan.facts, packed=gate.packed)
        hidden = hidden * linear(x, value.weight, value.bias, packed=value.packed)
        hidden = self.norm(self.drop1(hidden))
        return self.drop2(linear(hidden, fc2.weight, fc2.bias, packed=fc2.packed))

    def derive(self):
        return tuple(packed_linear(layer.weight, layer.bias) for layer in self.products())


class FastSwiGLU(_GatedMlp, SwiGLU):
    layers = ("fc1_g", "fc1_x", "fc2")

    def products(self):
        return tuple(as_they_are(getattr(self, name)) for name in self.layers)


class FastGluMlp(_GatedMlp, GluMlp):
    def products(self):
        fc1 = self.fc1
        biases = (None, None) if fc1.bias is None else fc1.bias.chunk(2)
        halves = [Weights(*half, None) for half in zip(fc1.weight.chunk(2), biases, strict=True)]
        gate, value = reversed(halves) if self.gate_last else halves
        return gate, value, as_they_are(self.fc2)
