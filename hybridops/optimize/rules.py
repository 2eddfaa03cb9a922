"""Which class replaces which, by dotted path; a rule is loaded when its class is seen.

A rule is a subclass of `Fast` and of the class it replaces. Third parties add theirs with
`register`, in a module that an entry point of group "hybridops.rules" names.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from importlib.metadata import entry_points
from typing import Any

from torch import nn

from . import folded, shapes
from .fast import Fast, dotted

_HERE = "hybridops.optimize"
_RELPOS = "timm.models.vision_transformer_relpos"
_WINDOWS = "timm.models.swin_transformer"
_MOBILE = "timm.models._efficientnet_blocks"
_RT_RESNET = "transformers.models.rt_detr.modeling_rt_detr_resnet:RTDetrResNet"
_TORCH = f"{_HERE}.torch_transformer"
_SWIN = "torchvision.models.swin_transformer"
_MAXVIT = "torchvision.models.maxvit"
_VISION = f"{_HERE}.torchvision"


def _family(model: str, prefix: str, **names: str) -> dict[str, str]:
    """transformers' classes of one model: the class's name behind its prefix, by the rule's."""
    path = f"transformers.models.{model}.modeling_{model}:{prefix}"
    return {path + cls: f"{_HERE}.transformers_{model}:{rule}" for rule, cls in names.items()}


_VIT = {
    "FastAttention": "Attention",
    "FastMLP": "MLP",
    "FastPatchEmbeddings": "PatchEmbeddings",
    "FastLayer": "Layer",
}
_DETR = {"FastSelfAttention": "SelfAttention", "FastMLP": "MLP", "FastEncoderLayer": "EncoderLayer"}
_DECODER = {"FastCrossAttention": "CrossAttention", "FastDecoderLayer": "DecoderLayer"}
_BACKBONE = {"FastConvEncoder": "ConvEncoder"}
_CONVS = {"FastConvNormLayer": "ConvNormLayer", "FastRepVggBlock": "RepVggBlock"}
RULES: dict[str, str | type[Fast]] = {
    "torch.nn.modules.container:Sequential": f"{_HERE}.chained:FastSequential",
    "hybridops.models.levit:Levit": f"{_HERE}.ours:FastLevit",
    "hybridops.models.levit:LevitStage": f"{_HERE}.ours:FastLevitStage",
    "hybridops.models.cpvt:Cpvt": f"{_HERE}.ours:FastCpvt",
    "hybridops.models.hybrid_vit.model:HybridVit": f"{_HERE}.ours:FastHybridVit",
    "hybridops.nn.block:Block": f"{_HERE}.ours:FastBlock",
    "timm.layers.attention:Attention": f"{_HERE}.timm_layers:FastAttention",
    "timm.layers.mlp:Mlp": f"{_HERE}.timm_layers:FastMlp",
    "timm.layers.patch_embed:PatchEmbed": f"{_HERE}.timm_layers:FastPatchEmbed",
    "timm.layers.conv_bn_act:ConvNormAct": f"{_HERE}.timm_resnet:FastConvNormAct",
    "timm.layers.norm_act:GroupNormAct": f"{_HERE}.timm_resnet:FastGroupNormAct",
    "timm.layers.std_conv:StdConv2d": f"{_HERE}.timm_resnet:FastStdConv2d",
    "timm.layers.std_conv:StdConv2dSame": f"{_HERE}.timm_resnet:FastStdConv2dSame",
    "timm.models.resnet:BasicBlock": f"{_HERE}.timm_resnet:FastBasicBlock",
    "timm.models.resnet:Bottleneck": f"{_HERE}.timm_resnet:FastBottleneck",
    "timm.models.resnet:ResNet": f"{_HERE}.timm_resnet:FastResNet",
    "timm.models.resnetv2:Bottleneck": f"{_HERE}.timm_resnet:FastBottleneckV2",
    "timm.models.resnetv2:ResNetV2": f"{_HERE}.timm_resnet:FastResNetV2",
    "timm.models._features:FeatureListNet": f"{_HERE}.timm_resnet:FastFeatureListNet",
    f"{_MOBILE}:ConvBnAct": f"{_HERE}.timm_efficientnet:FastConvBnAct",
    f"{_MOBILE}:DepthwiseSeparableConv": f"{_HERE}.timm_efficientnet:FastDepthwiseSeparableConv",
    f"{_MOBILE}:InvertedResidual": f"{_HERE}.timm_efficientnet:FastInvertedResidual",
    f"{_MOBILE}:EdgeResidual": f"{_HERE}.timm_efficientnet:FastEdgeResidual",
    "timm.models.efficientnet:EfficientNet": f"{_HERE}.timm_efficientnet:FastEfficientNet",
    "timm.models.mobilenetv3:MobileNetV3": f"{_HERE}.timm_efficientnet:FastMobileNetV3",
    "timm.layers.hybrid_embed:HybridEmbed": f"{_HERE}.timm_hybrid:FastHybridEmbed",
    "timm.models.vision_transformer_hybrid:ConvStem": f"{_HERE}.timm_hybrid:FastConvStem",
    "torchvision.models.resnet:BasicBlock": f"{_HERE}.torchvision_resnet:FastBasicBlock",
    "torchvision.models.resnet:Bottleneck": f"{_HERE}.torchvision_resnet:FastBottleneck",
    "torchvision.models.resnet:ResNet": f"{_HERE}.torchvision_resnet:FastResNet",
    "timm.models.vision_transformer:Block": f"{_HERE}.timm_vit:FastBlock",
    "timm.models.levit:ConvNorm": f"{_HERE}.timm_levit:FastConvNorm",
    "timm.models.levit:LinearNorm": f"{_HERE}.timm_levit:FastLinearNorm",
    "timm.models.levit:NormLinear": f"{_HERE}.timm_levit:FastNormLinear",
    "timm.models.levit:Stem8": f"{_HERE}.timm_levit:FastStem8",
    "timm.models.levit:Stem16": f"{_HERE}.timm_levit:FastStem16",
    "timm.models.levit:Attention": f"{_HERE}.timm_levit:FastAttention",
    "timm.models.levit:AttentionDownsample": f"{_HERE}.timm_levit:FastAttentionDownsample",
    "timm.models.levit:LevitMlp": f"{_HERE}.timm_levit:FastLevitMlp",
    "timm.models.levit:LevitBlock": f"{_HERE}.timm_levit:FastLevitBlock",
    "timm.models.levit:LevitDownsample": f"{_HERE}.timm_levit:FastLevitDownsample",
    "timm.models.levit:LevitStage": f"{_HERE}.timm_levit:FastLevitStage",
    "timm.models.levit:LevitDistilled": f"{_HERE}.timm_levit:FastLevitDistilled",
    "timm.models.twins:Twins": f"{_HERE}.timm_twins:FastTwins",
    "timm.models.twins:Block": f"{_HERE}.timm_twins:FastBlock",
    "timm.models.twins:PatchEmbed": f"{_HERE}.timm_twins:FastPatchEmbed",
    "timm.models.twins:PosConv": f"{_HERE}.timm_twins:FastPosConv",
    "timm.models.twins:LocallyGroupedAttn": f"{_HERE}.timm_twins:FastLocallyGroupedAttn",
    "timm.models.twins:GlobalSubSampleAttn": f"{_HERE}.timm_twins:FastGlobalSubSampleAttn",
    f"{_WINDOWS}:WindowAttention": f"{_HERE}.timm_swin:FastWindowAttention",
    f"{_WINDOWS}:SwinTransformerBlock": f"{_HERE}.timm_swin:FastBlock",
    f"{_WINDOWS}:PatchMerging": f"{_HERE}.timm_swin:FastPatchMerging",
    f"{_WINDOWS}_v2:WindowAttention": f"{_HERE}.timm_swin:FastWindowAttentionV2",
    f"{_WINDOWS}_v2:PatchMerging": f"{_HERE}.timm_swin:FastPatchMergingV2",
    f"{_WINDOWS}_v2_cr:WindowMultiHeadAttention": f"{_HERE}.timm_swin:FastWindowMultiHeadAttention",
    "timm.models.pvt_v2:Attention": f"{_HERE}.timm_pvt:FastAttention",
    "timm.models.pvt_v2:MlpWithDepthwiseConv": f"{_HERE}.timm_pvt:FastMlpWithDepthwiseConv",
    "timm.models.pvt_v2:Block": f"{_HERE}.timm_pvt:FastBlock",
    "timm.models.pvt_v2:OverlapPatchEmbed": f"{_HERE}.timm_pvt:FastOverlapPatchEmbed",
    "timm.models.maxxvit:AttentionCl": f"{_HERE}.timm_maxvit:FastAttentionCl",
    "timm.models.maxxvit:Attention2d": f"{_HERE}.timm_maxvit:FastAttention2d",
    "timm.models.maxxvit:PartitionAttentionCl": f"{_HERE}.timm_maxvit:FastPartitionAttentionCl",
    "timm.models.gcvit:WindowAttentionGlobal": f"{_HERE}.timm_maxvit:FastWindowAttentionGlobal",
    "timm.models.hiera:MaskUnitAttention": f"{_HERE}.timm_hiera:FastMaskUnitAttention",
    f"{_RELPOS}:RelPosAttention": f"{_HERE}.timm_maxvit:FastRelPosAttention",
    f"{_RELPOS}:RelPosBlock": f"{_HERE}.timm_maxvit:FastRelPosBlock",
    "timm.models.coat:ConvPosEnc": f"{_HERE}.timm_peg:FastCoatConvPosEnc",
    "timm.models.davit:ConvPosEnc": f"{_HERE}.timm_peg:FastDavitConvPosEnc",
    "timm.models.xcit:ConvPatchEmbed": f"{_HERE}.timm_xcit:FastConvPatchEmbed",
    "timm.models.xcit:LPI": f"{_HERE}.timm_peg:FastLPI",
    "timm.models.davit:WindowAttention": f"{_HERE}.timm_attention:FastWindowAttention",
    "timm.models.fastvit:Attention": f"{_HERE}.timm_attention:FastFastVitAttention",
    "timm.models.efficientformer:Attention": f"{_HERE}.timm_attention:FastEfficientFormerAttention",
    "timm.models.efficientformer:MetaBlock1d": f"{_HERE}.timm_attention:FastMetaBlock1d",
    "timm.models.tiny_vit:Attention": f"{_HERE}.timm_attention:FastTinyVitAttention",
    "timm.models.tiny_vit:NormMlp": f"{_HERE}.timm_attention:FastNormMlp",
    "timm.models.beit:Attention": f"{_HERE}.timm_attention:FastBeitAttention",
    "timm.models.beit:Block": f"{_HERE}.timm_attention:FastBeitBlock",
    "timm.models.eva:EvaAttention": f"{_HERE}.timm_rope:FastEvaAttention",
    "timm.layers.attention:AttentionRope": f"{_HERE}.timm_rope:FastAttentionRope",
    "timm.layers.mlp:SwiGLU": f"{_HERE}.timm_glu:FastSwiGLU",
    "timm.layers.mlp:GluMlp": f"{_HERE}.timm_glu:FastGluMlp",
    "timm.models.metaformer:Attention": f"{_HERE}.timm_attention:FastMetaFormerAttention",
    "timm.models.visformer:Attention": f"{_HERE}.timm_attention:FastVisformerAttention",
    "timm.models.volo:Attention": f"{_HERE}.timm_attention:FastVoloAttention",
    "timm.models.nest:Attention": f"{_HERE}.timm_attention:FastNestAttention",
    "timm.models.cait:ClassAttn": f"{_HERE}.timm_attention:FastClassAttn",
    "timm.models.crossvit:CrossAttention": f"{_HERE}.timm_attention:FastCrossAttention",
    "torch.nn.modules.activation:MultiheadAttention": f"{_TORCH}:FastMultiheadAttention",
    "torch.nn.modules.transformer:TransformerEncoderLayer": f"{_TORCH}:FastEncoderLayer",
    "torch.nn.modules.transformer:TransformerDecoderLayer": f"{_TORCH}:FastDecoderLayer",
    "torchvision.ops.misc:MLP": f"{_VISION}_vit:FastMLP",
    "torchvision.models.vision_transformer:MLPBlock": f"{_VISION}_vit:FastMLPBlock",
    "torchvision.models.vision_transformer:EncoderBlock": f"{_VISION}_vit:FastEncoderBlock",
    "torchvision.models.vision_transformer:VisionTransformer": f"{_VISION}_vit:FastTransformer",
    f"{_SWIN}:ShiftedWindowAttention": f"{_VISION}_swin:FastAttention",
    f"{_SWIN}:ShiftedWindowAttentionV2": f"{_VISION}_swin:FastAttentionV2",
    f"{_SWIN}:SwinTransformerBlock": f"{_VISION}_swin:FastBlock",
    f"{_SWIN}:PatchMerging": f"{_VISION}_swin:FastPatchMerging",
    f"{_SWIN}:PatchMergingV2": f"{_VISION}_swin:FastPatchMergingV2",
    f"{_MAXVIT}:RelativePositionalMultiHeadAttention": f"{_VISION}_maxvit:FastAttention",
    f"{_MAXVIT}:PartitionAttentionLayer": f"{_VISION}_maxvit:FastPartition",
    **_family("vit", "ViT", **_VIT),
    **_family("deit", "DeiT", **_VIT),
    **_family("beit", "Beit", **_VIT),
    **_family("dinov2", "Dinov2", **_VIT),
    **_family("dinov2_with_registers", "Dinov2WithRegisters", **_VIT),
    **_family(
        "swin",
        "Swin",
        FastAttention="Attention",
        FastMLP="MLP",
        FastPatchMerging="PatchMerging",
    ),
    **_family(
        "dpt",
        "DPT",
        FastSelfAttention="SelfAttention",
        FastSelfOutput="ViTSelfOutput",
        FastIntermediate="ViTIntermediate",
        FastOutput="ViTOutput",
        FastPatchEmbeddings="ViTPatchEmbeddings",
        FastLayer="ViTLayer",
    ),
    **_family("detr", "Detr", **_DETR, **_DECODER, **_BACKBONE),
    **_family(
        "conditional_detr",
        "ConditionalDetr",
        **_DETR,
        **_BACKBONE,
        FastDecoderSelfAttention="DecoderSelfAttention",
        FastDecoderCrossAttention="DecoderCrossAttention",
        FastDecoderLayer="DecoderLayer",
    ),
    **_family(
        "table_transformer",
        "TableTransformer",
        **_BACKBONE,
        FastAttention="Attention",
        FastEncoderLayer="EncoderLayer",
        FastDecoderLayer="DecoderLayer",
    ),
    **_family(
        "dab_detr",
        "",
        FastAttention="DetrAttention",
        FastEncoderLayer="DabDetrEncoderLayer",
        FastDecoderLayer="DabDetrDecoderLayer",
    ),
    **_family(
        "deformable_detr",
        "DeformableDetr",
        **_BACKBONE,
        FastSelfAttention="SelfAttention",
        FastMLP="MLP",
    ),
    **_family("rt_detr", "RTDetr", **_DETR, **_CONVS),
    **_family("rt_detr_v2", "RTDetrV2", **_DETR, **_CONVS),
    f"{_RT_RESNET}ConvLayer": f"{_HERE}.transformers_rt_detr:FastResNetConvLayer",
    f"{_RT_RESNET}BasicLayer": f"{_HERE}.transformers_rt_detr:FastResNetBasicLayer",
    f"{_RT_RESNET}BottleNeckLayer": f"{_HERE}.transformers_rt_detr:FastResNetBottleNeckLayer",
    **_family("d_fine", "DFine", **_CONVS, FastSelfAttention="SelfAttention"),
    **_family(
        "omdet_turbo",
        "OmDetTurbo",
        **_CONVS,
        FastMultiheadAttention="MultiheadAttention",
        FastEncoderLayer="EncoderLayer",
    ),
    **_family(
        "maskformer",
        "MaskFormerDetr",
        **_DECODER,
        FastSelfAttention="SelfAttention",
        FastMLP="MLP",
    ),
    **_family(
        "resnet",
        "ResNet",
        FastConvLayer="ConvLayer",
        FastBasicLayer="BasicLayer",
        FastBottleNeckLayer="BottleNeckLayer",
    ),
    **_family(
        "bit", "", FastConv="WeightStandardizedConv2d", FastGroupNorm="BitGroupNormActivation"
    ),
    **_family(
        "levit",
        "",
        FastLinearNorm="MLPLayerWithBN",
        FastHead="LevitClassificationLayer",
        FastMlp="LevitMLPLayer",
        FastAttention="LevitAttention",
        FastAttentionSubsample="LevitAttentionSubsample",
        FastResidual="LevitResidualLayer",
        FastStage="LevitStage",
        FastPatchEmbeddings="LevitPatchEmbeddings",
    ),
    **_family(
        "cvt",
        "Cvt",
        FastAttention="SelfAttention",
        FastSelfOutput="SelfOutput",
        FastIntermediate="Intermediate",
        FastOutput="Output",
        FastEmbeddings="ConvEmbeddings",
        FastLayer="Layer",
    ),
    **_family(
        "mobilevit",
        "MobileViT",
        FastSelfAttention="SelfAttention",
        FastSelfOutput="SelfOutput",
        FastIntermediate="Intermediate",
        FastOutput="Output",
        FastLayer="TransformerLayer",
        FastConvLayer="ConvLayer",
    ),
    **_family(
        "pvt",
        "Pvt",
        FastAttention="EfficientSelfAttention",
        FastSelfOutput="SelfOutput",
        FastMLP="FFN",
        FastPatchEmbeddings="PatchEmbeddings",
    ),
    **_family(
        "pvt_v2",
        "PvtV2",
        FastAttention="SelfAttention",
        FastMLP="ConvFeedForwardNetwork",
        FastPatchEmbeddings="OverlapPatchEmbeddings",
    ),
    **_family(
        "segformer",
        "Segformer",
        FastAttention="Attention",
        FastMLP="MixMLP",
        FastPatchEmbeddings="OverlapPatchEmbeddings",
    ),
}
_CHANNELS = "channel attention: scores between channels, not tokens"
_TALKING = "talking heads: products across heads before and behind the softmax"
_LINEAR = "linear attention: products of keys and values first, no scores of pairs"
_FROM_QUERIES = "its bias of relative positions is made from the queries, anew for every image"
_DIFFERENTIAL = "differential attention: the difference of two softmaxes"
_DEFORMABLE = "deformable attention: a query samples a few points of each map, between its tokens"
_SAMPLED = (
    "deformable_detr:DeformableDetr",
    "rt_detr:RTDetr",
    "rt_detr_v2:RTDetrV2",
    "d_fine:DFine",
    "omdet_turbo:OmDetTurbo",
    "grounding_dino:GroundingDino",
    "mm_grounding_dino:MMGroundingDino",
    "lw_detr:LwDetr",
    "rf_detr:RfDetr",
)
_GROUNDED = tuple(path for path in _SAMPLED if "grounding" in path)


def _classes(families: tuple[str, ...], name: str, reason: str) -> dict[str, str]:
    """The same class of several of transformers' models, "model:Prefix" each, with its reason."""
    split = (family.split(":") for family in families)
    return {
        f"transformers.models.{model}.modeling_{model}:{prefix}{name}": reason
        for model, prefix in split
    }


# Known classes that no kernel can serve: the reason that the report gives in place of a rule.
UNSERVED: dict[str, str] = {
    **_classes(_SAMPLED, "MultiscaleDeformableAttention", _DEFORMABLE),
    **_classes(
        _GROUNDED, "MultiheadAttention", "every layer asks it for the attention weights themselves"
    ),
    **_classes(
        _GROUNDED, "BiMultiHeadAttention", "one matrix of scores, softmax along both of its sides"
    ),
    "transformers.models.mobilevitv2.modeling_mobilevitv2:MobileViTV2LinearSelfAttention": (
        "linear attention: one softmax over the tokens weighs a sum, no scores of pairs"
    ),
    "transformers.models.swiftformer.modeling_swiftformer:SwiftFormerEfficientAdditiveAttention": (
        "additive attention: one weighted sum of the queries, no scores of pairs"
    ),
    "transformers.models.poolformer.modeling_poolformer:PoolFormerPooling": (
        "pooling in place of attention"
    ),
    "timm.models.xcit:XCA": _CHANNELS,
    "timm.models.davit:ChannelAttention": _CHANNELS,
    "timm.models.davit:ChannelAttentionV2": _CHANNELS,
    "timm.models.coat:FactorAttnConvRelPosEnc": "factorised attention: its softmax is over tokens, "
    "before any scores",
    "timm.models.mobilevit:LinearSelfAttention": "separable attention: one context vector, no "
    "scores between tokens",
    "timm.models.fastvit:RepConditionalPosEnc": "7 x 7 on an NCHW grid of 8 x 8: torch's "
    "convolution takes half the time of peg",
    "timm.models.cait:TalkingHeadAttn": _TALKING,
    "timm.models.edgenext:CrossCovarianceAttn": _CHANNELS,
    "timm.models.efficientvit_mit:LiteMLA": _LINEAR,
    "timm.models.efficientvit_msra:CascadedGroupAttention": "cascaded heads: each takes "
    "the former one's output beside its own channels",
    "timm.models.swiftformer:EfficientAdditiveAttention": "additive attention: one weighted sum of "
    "the queries, no scores of pairs",
    "timm.models.volo:OutlookAttention": "outlook attention: a product of each token gives the "
    "weights of its neighbourhood, no scores of pairs",
    "timm.models.nextvit:ConvAttention": "convolutions in place of attention",
    "timm.models.metaformer:Pooling": "pooling in place of attention",
    "timm.models.mvitv2:MultiScaleAttention": _FROM_QUERIES,
    "timm.models.vision_transformer_sam:Attention": _FROM_QUERIES,
    "timm.models.convit:GPSA": "gated attention: a mixture of two softmaxes",
    "timm.layers.halo_attn:HaloAttn": "halo attention: blocks of queries with wider blocks of keys",
    "timm.models.efficientformer_v2:Attention2d": _TALKING,
    "timm.models.efficientformer_v2:Attention2dDownsample": _TALKING,
    "timm.models.vision_transformer:ParallelScalingBlock": "attention and MLP share one product",
    "timm.models.vision_transformer:DiffParallelScalingBlock": _DIFFERENTIAL,
    "timm.layers.diff_attention:DiffAttention": _DIFFERENTIAL,
    "timm.models.maxxvit:ParallelPartitionAttention": "two attentions share one "
    "product behind them; each is served",
}
_plugins_loaded = False


def register(path: str, rule: str | type[Fast] | None = None) -> Any:
    """Replace the class at `path` ("package.module:Class") by `rule`, a Fast class or its path.

    Without `rule` it is a decorator. The newest registration of a path wins.
    """
    if path.count(":") != 1:
        raise ValueError(f"register: path must be 'package.module:Class', got {path!r}")
    if rule is not None:
        RULES[path] = rule
        return rule

    def decorate(cls: type[Fast]) -> type[Fast]:
        RULES[path] = cls
        return cls

    return decorate


def load_plugins() -> None:
    """Import what the entry points of group "hybridops.rules" name, once; failures warn."""
    global _plugins_loaded
    if _plugins_loaded:
        return
    _plugins_loaded = True
    for entry in entry_points(group="hybridops.rules"):
        try:
            entry.load()
        except Exception as error:  # someone else's package must not break this one
            warnings.warn(
                f"hybridops: the rules of {entry.value} do not load: {error}", RuntimeWarning
            )


def _original(cls: type[nn.Module]) -> type[nn.Module]:
    return cls.replaces if issubclass(cls, Fast) else cls


def find(module: nn.Module) -> tuple[type[Fast] | None, str | None]:
    """(rule, None), (None, why not), or (None, None) where nothing names this class or a base."""
    cls = _original(type(module))
    rule = RULES.get(dotted(cls))
    if rule is not None and cls is not nn.Sequential:
        return _load(rule), None
    if dotted(cls) in UNSERVED:
        return None, UNSERVED[dotted(cls)]
    shaped, reason = shapes.match(module)
    shaped = shaped or folded.match(module)
    if shaped is not None:
        return shaped, None
    if rule is not None:
        return _load(rule), None
    if reason is not None:
        return None, reason
    base = next((b for b in cls.__mro__ if dotted(b) in RULES), None)
    if base is None or cls.__module__.startswith("hybridops.nn."):
        return None, None
    if _load(RULES[dotted(base)]).implied:
        return None, None
    return None, f"a subclass of {dotted(base)}, whose rule serves that class only"


def _load(rule: str | type[Fast]) -> type[Fast]:
    if not isinstance(rule, str):
        return rule
    module, _, name = rule.partition(":")
    loaded: Callable[..., Any] = importlib.import_module(module)  # type: ignore[assignment]
    return getattr(loaded, name)
