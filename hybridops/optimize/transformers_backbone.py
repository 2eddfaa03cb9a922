"""timm's ResNet inside transformers' DETRs: frozen norms folded, convolutions packed once."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from timm.models._features import FeatureListNet
from timm.models.resnet import Bottleneck
from torch import Tensor, nn

from ..nn.conv import Conv, folded_conv, not_bare_conv
from .convs import FROZEN, path_of
from .fast import Fast, first, not_one_of

_STEM = ("conv1", "bn1", "act1", "maxpool")


class Block(NamedTuple):
    convs: tuple[Conv, Conv, Conv]
    downsample: Conv | None

    def __call__(self, x: Tensor, overwrite: bool) -> Tensor:
        """relu(x + the three convolutions), as ResNet's bottlenecks; may overwrite x if told."""
        first, second, third = self.convs
        identity = x if self.downsample is None else self.downsample(x)
        overwrite = overwrite or self.downsample is not None
        return third(second(first(x, "relu"), "relu"), "relu", identity, overwrite)


class ConvEncoder(Fast):
    @classmethod
    def unserved(cls, module, mode):
        if mode == "train":
            return "training keeps the backbone as it is"
        net = module.model
        reason = not_one_of("model", net, FeatureListNet)
        if reason:
            return reason
        names = tuple(net._modules)
        stages = names[len(_STEM) :]
        if names[: len(_STEM)] != _STEM or not all(n.startswith("layer") for n in stages):
            return f"model has the children {', '.join(names)}, not a ResNet's with a 7 x 7 stem"
        return first(
            (
                _not_conv_norm("conv1", net.conv1, net.bn1),
                not_one_of("act1", net.act1, nn.ReLU),
                not_one_of("maxpool", net.maxpool, nn.MaxPool2d),
                *(_not_bottleneck(f"{n}.{i}", b) for n in stages for i, b in enumerate(net[n])),
            )
        )

    @classmethod
    def torchs_own(cls, original):
        # oneDNN sums channels_last in one chain: 1.8 times the rms error of NCHW after 28 layers,
        # with torch's own convolutions just as with packed ones
        return original.to(memory_format=torch.channels_last)

    def forward(self: Any, pixel_values, pixel_mask):
        weights = self._hybridops_plan.derived(self, pixel_values)
        if weights is None:
            return self.replaces.forward(self, pixel_values, pixel_mask)
        stem, stages = weights
        x = stem.pooled(pixel_values, "relu", self.model.maxpool)
        found = []
        for name, blocks in stages:
            for i, block in enumerate(blocks):
                x = block(x, overwrite=i > 0)  # the first one's input is a feature map to return
            if name in self.model.return_layers:
                mask = F.interpolate(pixel_mask[None].float(), size=x.shape[-2:])[0].bool()
                found.append((x, mask))
        return found

    def derive(self: Any):
        net = self.model
        stages = [(n, [_folded(b) for b in net[n]]) for n in net if n.startswith("layer")]
        return folded_conv(net.conv1, net.bn1), stages


def _folded(block: Any) -> Block:
    a, b, c = ((getattr(block, f"conv{i}"), getattr(block, f"bn{i}")) for i in (1, 2, 3))
    convs = (folded_conv(*a), folded_conv(*b), folded_conv(*c))
    return Block(convs, None if block.downsample is None else folded_conv(*block.downsample))


def _not_conv_norm(name: str, conv: Any, norm: Any) -> str | None:
    reason = not_one_of(name, conv, nn.Conv2d) or not_bare_conv(conv)
    if reason is None and path_of(norm) not in FROZEN:
        return f"the norm behind {name} is {type(norm).__name__}, which is not frozen"
    return reason


def _not_bottleneck(name: str, block: Any) -> str | None:
    reason = not_one_of(name, block, Bottleneck)
    if reason:
        return reason
    down = block.downsample
    if down is not None and len(down) != 2:
        return f"{name}.downsample has {len(down)} parts"
    if block.se is not None:
        return f"{name} has squeeze-and-excitation"
    convs = [(f"{name}.conv{i}", block.get_submodule(f"conv{i}"), i) for i in (1, 2, 3)]
    return first(
        (
            *(_not_conv_norm(n, conv, block.get_submodule(f"bn{i}")) for n, conv, i in convs),
            *(not_one_of(f"{name}.act{i}", getattr(block, f"act{i}"), nn.ReLU) for i in (1, 2, 3)),
            *(
                not_one_of(f"{name}.{n}", getattr(block, n), nn.Identity)
                for n in ("drop_block", "aa")
            ),
            None if down is None else _not_conv_norm(f"{name}.downsample", *down),
        )
    )
