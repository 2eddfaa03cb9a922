"""timm's models by name, at their real depth and a small image: verified, restored, explained."""

from __future__ import annotations

from real import Real, cases, check

CHANNELS, TALKING = "channel attention", "talking heads"
FAST = {
    "pvt_v2_b0": Real(64, False, "OverlapPatchEmbed Block Attention MlpWithDepthwiseConv"),
    "maxvit_pico_rw_256": Real(64, True, "PartitionAttentionCl AttentionCl Mlp"),
}
SLOW = {
    "swin_tiny_patch4_window7_224": Real(
        112, True, "PatchEmbed Block WindowAttention Mlp PatchMerging"
    ),
    "tiny_vit_5m_224": Real(96, False, "TinyVitAttention NormMlp"),
    "davit_tiny": Real(64, False, "DavitConvPosEnc WindowAttention Mlp", (CHANNELS,)),
    "levit_conv_128s": Real(224, False, "Stem16 LevitBlock LevitDownsample LevitDistilled"),
    "mobilenetv3_small_050": Real(64, False, "MobileNetV3 InvertedResidual DepthwiseSeparableConv"),
    "mobilenetv4_conv_small": Real(64, False, "MobileNetV3 ConvNormAct ConvBnAct"),
    "efficientnet_b0": Real(64, False, "EfficientNet InvertedResidual DepthwiseSeparableConv"),
    "tf_efficientnetv2_b0": Real(64, False, "EfficientNet InvertedResidual EdgeResidual ConvBnAct"),
    "mixnet_s": Real(64, False, "EfficientNet", ("MixedConv2d has no kernel",)),
    "swin_s3_tiny_224": Real(112, True, "Block WindowAttention PatchMerging"),
    "swinv2_tiny_window8_256": Real(128, True, "WindowAttentionV2 Mlp PatchMergingV2"),
    "swinv2_cr_tiny_224": Real(112, True, "WindowMultiHeadAttention Mlp"),
    "pvt_v2_b1": Real(96, False, "OverlapPatchEmbed Block Attention MlpWithDepthwiseConv"),
    "pvt_v2_b2_li": Real(64, False, "OverlapPatchEmbed Block Attention MlpWithDepthwiseConv"),
    "maxvit_tiny_tf_224": Real(64, True, "PartitionAttentionCl AttentionCl Mlp"),
    "maxvit_rmlp_pico_rw_256": Real(64, True, "PartitionAttentionCl AttentionCl Mlp"),
    "maxvit_tiny_pm_256": Real(64, True, "AttentionCl Mlp", ("two attentions share",)),
    "maxxvit_rmlp_nano_rw_256": Real(64, True, "PartitionAttentionCl AttentionCl Mlp"),
    "maxxvitv2_nano_rw_256": Real(64, True, "PartitionAttentionCl AttentionCl Mlp"),
    "coatnet_pico_rw_224": Real(64, True, "Attention2d"),
    "coatnet_rmlp_nano_rw_224": Real(64, True, "Attention2d Mlp"),
    "coatnet_0_224": Real(64, True, "Attention2d"),
    "coatnext_nano_rw_224": Real(64, True, "Attention2d"),
    "mobilevit_xxs": Real(64, False, "Block Attention Mlp ConvNormAct"),
    "mobilevitv2_050": Real(64, False, "ConvNormAct", ("separable attention",)),
    "efficientformer_l1": Real(224, False, "MetaBlock1d EfficientFormerAttention Mlp"),
    "efficientformerv2_s0": Real(224, False, "ConvNormAct", (TALKING,)),
    "xcit_nano_12_p16_224": Real(64, True, "ConvPatchEmbed LPI ClassAttn Mlp", (CHANNELS,)),
    "xcit_nano_12_p8_224": Real(64, True, "ConvPatchEmbed LPI ClassAttn Mlp", (CHANNELS,)),
    "coat_tiny": Real(64, True, "CoatConvPosEnc PatchEmbed Mlp", ("factorised attention",)),
    "coat_lite_tiny": Real(64, True, "CoatConvPosEnc PatchEmbed Mlp", ("factorised attention",)),
    "fastvit_t8": Real(64, False, "ConvNormAct"),
    "fastvit_sa12": Real(64, False, "ConvNormAct FastVitAttention", ("7 x 7 on an NCHW",)),
    "fastvit_mci0": Real(64, False, "ConvNormAct FastVitAttention", ("7 x 7 on an NCHW",)),
    "crossvit_tiny_240": Real(240, False, "Block Attention Mlp CrossAttention"),
    "crossvit_9_dagger_240": Real(240, False, "Block Attention Mlp CrossAttention"),
    "cait_xxs24_224": Real(64, True, "PatchEmbed ClassAttn Mlp", (TALKING,)),
    "beit_base_patch16_224": Real(64, True, "PatchEmbed BeitBlock BeitAttention Mlp"),
    "beitv2_base_patch16_224": Real(64, True, "PatchEmbed BeitBlock BeitAttention Mlp"),
    "beit3_base_patch16_224": Real(64, True, "PatchEmbed Attention Mlp", ("norm inside",)),
    "eva02_tiny_patch14_224": Real(56, True, "PatchEmbed EvaAttention GluMlp"),
    "vit_pe_core_tiny_patch16_384": Real(64, True, "PatchEmbed AttentionRope Mlp"),
    "deit_tiny_distilled_patch16_224": Real(64, True, "PatchEmbed Block Attention Mlp"),
    "deit3_small_patch16_224": Real(64, True, "PatchEmbed Block Attention Mlp"),
    "vit_relpos_small_patch16_224": Real(64, True, "PatchEmbed RelPosBlock RelPosAttention Mlp"),
    "levit_128s": Real(224, False, "Stem16 LevitBlock LevitDownsample LevitDistilled"),
    "twins_svt_small": Real(64, False, "Twins Block LocallyGroupedAttn GlobalSubSampleAttn Mlp"),
    "twins_pcpvt_small": Real(64, False, "Twins Block GlobalSubSampleAttn Mlp"),
    "nest_tiny": Real(224, False, "NestAttention Mlp"),
    "caformer_s18": Real(64, False, "MetaFormerAttention", ("StarReLU",)),
    "visformer_tiny": Real(64, True, "VisformerAttention", ("output format NCHW",)),
    "volo_d1_224": Real(64, True, "VoloAttention Mlp", ("outlook attention",)),
    "gcvit_xxtiny": Real(128, True, "WindowAttentionGlobal Mlp"),
    "hiera_tiny_224": Real(224, False, "MaskUnitAttention Mlp"),
    "edgenext_xx_small": Real(64, False, "Mlp", (CHANNELS,)),
    "mvitv2_tiny": Real(64, True, "Mlp", ("made from the queries",)),
    "pit_ti_224": Real(224, False, "Block Attention Mlp"),
}


@cases("timm", FAST, SLOW)
def test_real_model(timm, name, real):
    check(name, real)
