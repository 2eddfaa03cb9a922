"""Pre-norm blocks of timm: norm, product, activation and residual as one kernel each."""

from __future__ import annotations

from typing import Any, ClassVar

from timm.layers import DropPath, LayerScale
from timm.layers.mlp import Mlp
from timm.layers.norm import LayerNorm
from torch import Tensor, nn

from ..ops import mlp_layer
from .fast import (
    Fast,
    activation_name,
    first,
    norm_of,
    not_layer_norm,
    not_one_of,
    one_dtype,
    original_class,
    scaled,
)
from .timm_layers import FastMlp

PARTS = "training keeps the block as it is; attn and mlp are served"


def in_part(name: str, reason: str | None) -> str | None:
    """A child's reason, as its parent's."""
    return reason and f"{name}: {reason}"


def not_drop_path(name: str, module: Any) -> str | None:
    return not_one_of(name, module, nn.Identity, DropPath)


def not_pre_norm(block: Any, rules: dict[type, type[Fast]], attn: str = "attn") -> str | None:
    """Why x + ls1(attn(norm1(x))), x + ls2(mlp(norm2(x))) cannot be fused in inference.

    rules: the classes that attn may have, and the rule of each.
    """
    mixer, mlp = getattr(block, attn), block.mlp
    scales = [name for name in ("ls1", "ls2") if name in block._modules]
    reason = first(
        (
            not_one_of(attn, mixer, *rules),
            not_one_of("mlp", mlp, Mlp),
            not_layer_norm("norm1", block.norm1, LayerNorm),
            not_layer_norm("norm2", block.norm2, LayerNorm),
            *(not_one_of(n, block._modules[n], nn.Identity, LayerScale) for n in scales),
            not_drop_path("drop_path1", block.drop_path1),
            not_drop_path("drop_path2", block.drop_path2),
        )
    )
    if reason:
        return reason
    rule = rules[original_class(mixer)]
    return first(
        (
            in_part(attn, rule.unserved(mixer, "inference")),
            in_part("mlp", FastMlp.unserved(mlp, "inference")),
            None if type(mlp.norm) is nn.Identity else "a norm inside mlp; the parts are served",
        )
    )


class PreNormBlock(Fast):
    """Base of the rules for such blocks around a QkvAttention."""

    rule: ClassVar[type[Any]]  # its attention's
    attention_name: ClassVar[str] = "attn"

    @classmethod
    def unserved(cls, module, mode):
        if mode == "train":
            return PARTS
        return not_pre_norm(module, {cls.rule.replaces: cls.rule}, cls.attention_name)

    @classmethod
    def facts(cls, module):
        return activation_name(module.mlp.act)

    def derive(self: Any):
        """(attention, fc1, fc2), LayerScale folded in"""
        attn, mlp = getattr(self, self.attention_name), self.mlp
        layers = (self.norm1, self.norm2, attn.qkv, attn.proj, mlp.fc1, mlp.fc2)
        if not isinstance(attn, self.rule) or not one_dtype(layer.weight for layer in layers):
            return None
        gamma1, gamma2 = self.gammas()
        return attn.derive(gamma1), scaled(mlp.fc1), scaled(mlp.fc2, gamma2)

    def gammas(self: Any) -> tuple[Tensor | None, Tensor | None]:
        scales = (self._modules.get("ls1"), self._modules.get("ls2"))
        gamma1, gamma2 = (getattr(scale, "gamma", None) for scale in scales)
        return gamma1, gamma2

    def attended(self: Any, x, weights, extra=None):
        """x + attn(norm1(x)) for tokens x"""
        attn = getattr(self, self.attention_name)
        return attn.folded(x, weights[0], extra, norm=norm_of(self.norm1), residual=True)

    def fed_forward(self: Any, x, weights):
        """x + mlp(norm2(x))"""
        norm, activation = norm_of(self.norm2), self._hybridops_plan.facts
        return mlp_layer(x, *weights[1:], norm=norm, activation=activation, residual=True)

    def forward(self, x):
        weights = self._hybridops_plan.derived(self, x)
        if weights is None:
            return self.replaces.forward(self, x)
        return self.fed_forward(self.attended(x, weights), weights)
