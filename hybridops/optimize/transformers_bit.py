"""transformers' BiT: convolutions with standardised weights, each norm with its activation."""

from __future__ import annotations

from typing import Any

from transformers.models.bit.modeling_bit import (
    BitGroupNormActivation,
    DynamicPad2d,
    WeightStandardizedConv2d,
)

from . import convs
from .fast import first, not_one_of

_GEOMETRY = ("kernel_size", "stride", "dilation")


class FastConv(convs.StandardisedConv, WeightStandardizedConv2d):
    """`pad` pads as TensorFlow's SAME does, or is None."""

    @classmethod
    def unserved(cls, module, mode):
        return first((super().unserved(module, mode), _odd_pad(module)))

    def derive(self: Any):
        conv = super().derive()
        conv.same = self.pad is not None
        return conv


class FastGroupNorm(convs.ActivatedGroupNorm, BitGroupNormActivation):
    behind = "activation"


def _odd_pad(conv):
    """Why the padding in front of a convolution is not SAME with zeros, or None."""
    pad = conv.pad
    if pad is None:
        return None
    reason = not_one_of("pad", pad, DynamicPad2d)
    if reason:
        return reason
    alike = all(getattr(pad, name) == getattr(conv, name) for name in _GEOMETRY)
    plain = alike and pad.value == 0 and conv.padding == (0, 0)
    return None if plain else "pad has another geometry than the convolution, or other values"
