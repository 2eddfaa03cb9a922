"""timm's hybrid vision transformers: a convolutional backbone in front of the tokens."""

from __future__ import annotations

import torch.nn.functional as F
from timm.layers.format import Format, nchw_to
from timm.layers.hybrid_embed import HybridEmbed
from timm.models.vision_transformer_hybrid import ConvStem
from torch import nn

from .convs import TRAINING, Chain, run, steps, why_not
from .fast import Fast, not_one_of


class FastConvStem(Chain, ConvStem):
    """MobileCLIP's: patches of 4, 2 and 2 with BatchNorm and GELU."""


class FastHybridEmbed(Fast, HybridEmbed):
    """The projection, on an image that is channels_last: its result is tokens by view.

    A backbone that is one chain of convolutions (R+Ti/16's stem) is run with it.
    """

    channels_last = True

    @classmethod
    def bypassed(cls, module):
        return [module.backbone, module.proj] if cls.facts(module) else [module.proj]

    @classmethod
    def facts(cls, module):
        plain = type(module.backbone) is nn.Sequential
        return plain and why_not([module.backbone]) is None

    @classmethod
    def unserved(cls, module, mode):
        if mode == "train":
            return TRAINING
        if type(module.proj) is nn.Identity:
            return "no projection: the backbone's image is the tokens"
        return not_one_of("proj", module.proj, nn.Conv2d) or why_not([module.proj])

    def forward(self, x):
        weights = self._hybridops_plan.derived(self, x)
        if weights is None:
            return HybridEmbed.forward(self, x)
        backbone, proj = weights
        x = self.backbone(x) if backbone is None else run(backbone, x)
        if isinstance(x, (list, tuple)):
            x = x[-1]
        if self.dynamic_img_pad:
            h, w = self.patch_size
            x = F.pad(x, (0, -x.shape[3] % w, 0, -x.shape[2] % h))
        x = run(proj, x)
        if self.flatten:
            return x.flatten(2).transpose(1, 2)
        return x if self.output_fmt == Format.NCHW else nchw_to(x, self.output_fmt)

    def derive(self):
        chain = steps([self.backbone]) if self._hybridops_plan.facts else None
        return chain, steps([self.proj])
