"""timm's XCiT: its stem, three or four convolutions of stride 2, straight into tokens."""

from __future__ import annotations

from timm.models.xcit import ConvPatchEmbed
from torch import nn

from ..nn._derived import fold_behind, packed_weights
from ..ops import ConvLayer, conv_stem, pack_conv
from .convs import TRAINING, one_dtype_in, read_chain, why_not
from .fast import Fast, first, not_foldable_norm, not_plain_conv


class FastConvPatchEmbed(Fast, ConvPatchEmbed):
    @classmethod
    def unserved(cls, module, mode):
        if mode == "train":
            return TRAINING
        return why_not([module.proj]) or first(map(_not_plain, _links(module)))

    def forward(self, x):
        layers = self._hybridops_plan.derived(self, x)
        if layers is None:
            return ConvPatchEmbed.forward(self, x)
        H, W = x.shape[2:]
        for layer in layers:
            kernel = layer.weight.shape[2]
            H, W = ((side + 2 * layer.padding - kernel) // layer.stride + 1 for side in (H, W))
        return conv_stem(x, layers), (H, W)

    def derive(self):
        return [_layer(link) for link in _links(self)] if one_dtype_in([self.proj]) else None


def _links(module):
    return read_chain([module.proj])


def _not_plain(link):
    norm = link.norm and not_foldable_norm("a norm", link.norm, nn.BatchNorm2d)
    return not_plain_conv("a convolution", link.conv) or norm


def _layer(link):
    conv = link.conv
    w = packed_weights(*fold_behind(conv.weight, conv.bias, link.norm), pack_conv)
    return ConvLayer(w.weight, w.bias, conv.stride[0], conv.padding[0], link.activation, w.packed)
