"""hybridops.models: built on our kernels already; what is left is work that inference can skip."""

from __future__ import annotations

from ..models.cpvt import Cpvt
from ..models.levit import Levit
from ..nn._derived import fold_in_front
from ..ops import linear
from .fast import Fast, packed_linear


def averaged_heads(heads):
    """NormLinear heads whose outputs are averaged, as one linear layer."""
    folded = [fold_in_front(h.linear.weight, h.linear.bias, h.bn) for h in heads]
    return packed_linear(*(sum(parts) / len(parts) for parts in zip(*folded, strict=True)))


class FastLevit(Fast, Levit):
    """The two heads averaged at inference, (a + b) / 2, are one product."""

    overrides = "forward_head"

    @classmethod
    def bypassed(cls, module):
        return [head for head in (module.head, module.head_dist) if head is not None]

    def forward_head(self, x):
        weights = self._hybridops_plan.derived(self, x)
        if weights is None:
            return Levit.forward_head(self, x)
        return linear(x.mean(1), weights.weight, weights.bias, packed=weights.packed)

    def derive(self):
        return averaged_heads(self.bypassed(self))


class FastCpvt(Fast, Cpvt):
    """The last block computes what the class token needs, and no more."""

    @classmethod
    def bypassed(cls, module):
        return ()  # Cpvt looks after hooks itself

    @classmethod
    def facts(cls, module):
        return module.prune_last_block

    @classmethod
    def on_swap(cls, module):
        module.prune_last_block = True

    @classmethod
    def on_restore(cls, module):
        module.prune_last_block = module._hybridops_plan.facts
