"""torchvision's and transformers' models by name: as timm's are in test_real_models.py.

transformers' are model types in their default configuration.
"""

from __future__ import annotations

import pytest
from real import Real, cases, check

_VIT = "Transformer EncoderBlock MultiheadAttention MLPBlock"
_SWIN = "Block Attention MLP PatchMerging"
TORCHVISION = {"resnet18": Real(64, False, "ResNet BasicBlock")}
TORCHVISION_SLOW = {
    "vit_b_16": Real(64, True, _VIT),
    "vit_b_32": Real(96, True, _VIT),
    "swin_t": Real(96, False, _SWIN),
    "swin_s": Real(64, False, _SWIN),
    "swin_v2_t": Real(96, False, "AttentionV2 MLP PatchMergingV2", ("a subclass of",)),
    "maxvit_t": Real(224, False, "Partition Attention"),
    "resnet50": Real(96, False, "ResNet Bottleneck"),
    "mobilenet_v2": Real(64, False, "Conv2dNormActivation FoldedSequential"),
    "mobilenet_v3_small": Real(64, False, "Conv2dNormActivation"),
    "efficientnet_b0": Real(64, False, "Conv2dNormActivation"),
    "vgg11_bn": Real(64, False, "FoldedSequential"),
}
_DETR = "ConvEncoder EncoderLayer DecoderLayer"
_LAYERS = "Layer Attention MLP PatchEmbeddings"
HF = {"segformer": Real(64, False, "Attention MLP PatchEmbeddings")}
HF_SLOW = {
    "vit": Real(64, True, _LAYERS),
    "deit": Real(64, True, _LAYERS),
    "dinov2": Real(56, True, _LAYERS),
    "dinov2_with_registers": Real(56, True, _LAYERS),
    "swin": Real(224, False, "Attention MLP PatchMerging"),
    "beit": Real(64, True, _LAYERS),
    "dpt": Real(64, True, "Layer SelfAttention Intermediate Output PatchEmbeddings"),
    "levit": Real(224, False, "PatchEmbeddings Stage Residual Attention AttentionSubsample Mlp"),
    "cvt": Real(64, False, "Embeddings Layer Attention Intermediate Output"),
    "pvt": Real(64, True, "Attention SelfOutput MLP PatchEmbeddings"),
    "pvt_v2": Real(64, False, "Attention MLP PatchEmbeddings"),
    "mobilevit": Real(64, False, "ConvLayer Layer SelfAttention Intermediate Output"),
    "resnet": Real(64, False, "ConvLayer BottleNeckLayer"),
    "detr": Real(64, False, f"{_DETR} SelfAttention CrossAttention MLP"),
    "conditional_detr": Real(64, False, f"{_DETR} DecoderSelfAttention DecoderCrossAttention MLP"),
    "table-transformer": Real(64, False, f"{_DETR} Attention"),
    "deformable_detr": Real(64, False, "ConvEncoder SelfAttention MLP", ("deformable attention",)),
    "rt_detr": Real(160, False, "EncoderLayer SelfAttention MLP RepVggBlock ResNetBottleNeckLayer"),
}


@cases("torchvision", TORCHVISION, TORCHVISION_SLOW)
def test_torchvision(timm, name, real):
    check(name, real)


@cases("hf", HF, HF_SLOW)
def test_transformers(timm, name, real):
    pytest.importorskip("transformers")
    check(name, real)
