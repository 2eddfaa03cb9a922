"""Named cases of every op that the tests run; those of real models are in hybridops/bench/cases.py.

Few, but odd: 1, 16, 49, 50, 196, 197 and 577 tokens, odd channels, empty dimensions, and for every
option at least one case that a kernel without it fails.
"""

from __future__ import annotations

import torch

from hybridops.bench.case import Attention, Case, Conv, ConvStem, Linear, PatchEmbed, Peg

ATTENTION = [
    Attention("one_token", Nq=1, D=16),
    Attention("n16_d32", Nq=16, D=32),
    Attention("n49_d32_packed", Nq=49, D=32, H=3, view="packed"),
    Attention("n50_d36", Nq=50, D=36, B=1),
    Attention("n196_d48_chunk", Nq=196, D=48, B=1, H=3, view="packed"),
    Attention("n197_d64", Nq=197, D=64, B=1, H=3, view="packed"),
    Attention("n577_d96", Nq=577, D=96, B=1, H=1),
    Attention("odd_dims", B=3, Nq=7, Nk=11, D=5, Dv=3),
    Attention("maps", Nq=49, D=32, view="maps"),
    Attention("maps_n197_odd", Nq=197, D=17, B=1, view="maps"),
    # LeViT: small keys, wide values, a bias table, Hardswish, heads interleaved
    Attention(
        "levit", Nq=196, D=16, Dv=32, B=1, view="interleaved", bias="table", activation="hardswish"
    ),
    Attention("levit_down", Nq=49, Nk=196, D=16, Dv=64, B=1, bias="table", activation="hardswish"),
    Attention("levit_wide", Nq=16, Nk=49, D=32, Dv=128, bias="table", index_dtype=torch.int32),
    Attention("levit_32_64", Nq=49, D=32, Dv=64, view="interleaved", bias="table"),
    Attention("swin_table", B=4, Nq=49, D=32, H=3, view="packed", bias="table_transposed"),
    # cross attention: class attention, DETR's queries over a padded image
    Attention("class", Nq=1, Nk=197, D=64),
    Attention("detr_100x850", B=3, H=1, Nq=100, Nk=850, D=32, mask="blocks"),
    Attention("detr_850", B=3, H=1, Nq=850, D=32, mask="blocks"),
    Attention("mask_tail", Nq=49, D=32, mask="tail"),
    Attention("mask_and_bias", B=3, Nq=50, D=32, mask="blocks", bias=(1, 2, 50, 50)),
    Attention("mask_and_table", B=3, Nq=49, D=16, mask="blocks", bias="table"),
    # every way a dense bias broadcasts
    Attention("bias_full", Nq=50, D=32, bias=(2, 2, 50, 50)),
    Attention("bias_head", Nq=49, D=32, bias=(1, 2, 49, 49)),
    Attention("bias_head_3d", Nq=49, Nk=17, D=32, bias=(2, 49, 17)),
    Attention("bias_batch", Nq=17, D=32, bias=(2, 1, 17, 17)),
    Attention("bias_shared", Nq=17, D=32, bias=(1, 1, 17, 17)),
    Attention("bias_keys", Nq=17, D=32, bias=(2, 2, 1, 17)),
    Attention("bias_queries", Nq=17, Nk=19, D=32, bias=(1, 2, 17, 1)),
    Attention("bias_scalar", Nq=17, D=32, bias=(1, 1, 1, 1)),
    Attention("bias_expanded", Nq=17, D=32, bias="expanded"),
    Attention("bias_masking", Nq=33, D=32, bias="masking"),
    # scale, range of the scores, and every activation
    Attention("scale_one", Nq=49, D=16, scale=1.0),
    Attention("scale_negative", Nq=17, D=16, scale=-0.7),
    Attention("scale_zero", Nq=17, D=16, scale=0.0),
    Attention("one_hot", Nq=50, D=32, spread=60.0),
    *(
        Attention(f"act_{name}", Nq=17, D=16, activation=name)
        for name in ("relu", "gelu", "gelu_tanh", "silu")
    ),
    # any dimension may be 0
    Attention("empty_batch", B=0, Nq=5, D=16),
    Attention("empty_batch_bias", B=0, Nq=5, D=16, bias=(0, 1, 5, 5)),
    Attention("empty_heads", H=0, Nq=5, D=16),
    Attention("empty_queries", Nq=0, Nk=5, D=16),
    Attention("empty_keys", Nq=5, Nk=0, D=16),
    Attention("empty_d", Nq=5, D=0, Dv=16),
    Attention("empty_dv", Nq=5, D=16, Dv=0),
]

LINEAR = [
    *(Linear(f"m{M}", M=M, N=37, K=192) for M in (1, 2, 5, 6, 7, 13, 196, 197)),
    *(
        Linear(f"n{N}_k{K}", M=7, N=N, K=K)
        for N, K in ((1, 17), (3, 1), (7, 3), (17, 7), (192, 37), (577, 192), (37, 577), (1, 1))
    ),
    Linear("tokens", M=(2, 49), N=64, K=48),
    Linear("vector", M=(), N=37, K=17),
    Linear("rank4", M=(2, 3, 5), N=16, K=16),
    Linear("plain", M=50, N=96, K=64, bias=False),
    Linear("packed", M=(1, 197), N=192, K=192, packed=True),
    Linear("packed_odd", M=13, N=37, K=41, packed=True, activation="gelu"),
    Linear("deep", M=33, N=192, K=1537, packed=True),
    Linear("many_tokens", M=20000, N=7, K=9),  # its weight gradient is a sum over all of them
    Linear("norm", M=(2, 50), N=37, K=192, norm="affine"),
    Linear("norm_no_bias", M=7, N=17, K=33, norm="no_bias", bias=False),
    Linear("norm_small", M=13, N=32, K=45, norm="affine", spread=1e-3),
    Linear("norm_offset", M=13, N=32, K=96, norm="affine", mean=50.0),
    Linear("residual", M=(2, 49), N=48, K=32, residual=True),
    Linear("mlp_in", M=(1, 49), N=256, K=64, norm="affine", activation="gelu", packed=True),
    Linear("mlp_out", M=(1, 49), N=64, K=256, residual=True, packed=True),
    Linear(
        "everything",
        M=(3, 17),
        N=35,
        K=29,
        norm="affine",
        activation="silu",
        residual=True,
        packed=True,
    ),
    *(
        Linear(f"act_{name}", M=13, N=33, K=32, activation=name)
        for name in ("relu", "gelu", "gelu_tanh", "silu", "hardswish")
    ),
    Linear("empty_rows", M=0, N=16, K=32, residual=True),
    Linear("empty_batch", M=(0, 49), N=16, K=32, norm="affine", activation="gelu"),
    Linear("empty_n", M=5, N=0, K=32),
    Linear("empty_k", M=5, N=16, K=0),
]

PEG = [
    Peg("cpvt", H=14, W=14, C=48, prefix=1),
    Peg("cpvt_gap", H=14, W=14, C=33),
    Peg("large_grid", B=3, H=96, W=80, C=9),  # its weight gradient is a sum over all of it
    *(Peg(f"k{K}", H=5, W=9, C=37, K=K, prefix=2) for K in (3, 5, 7, 9)),
    *(
        Peg(f"grid_{H}x{W}", H=H, W=W, C=19, K=K)
        for H, W, K in ((1, 1, 3), (1, 7, 5), (7, 1, 3), (7, 7, 7), (2, 2, 9))
    ),
    *(Peg(f"c{C}", B=1, H=7, W=7, C=C) for C in (1, 8, 15, 16, 17, 64)),
    Peg("c270", B=1, H=2, W=8, C=270),
    Peg("no_bias", H=7, W=7, C=24, bias=False),
    Peg("no_residual", H=7, W=9, C=24, residual=False, prefix=1),
    *(Peg(f"stride{S}", H=14, W=13, C=21, stride=S, residual=False) for S in (2, 4, 8)),
    Peg("stride2_k5_prefix", H=9, W=7, C=16, K=5, stride=2, residual=False, prefix=2),
    Peg("kernel_is_stride", H=14, W=14, C=17, K=7, stride=7, padding=0, residual=False),
    Peg("k4_s4", H=8, W=8, C=17, K=4, stride=4, padding=0, residual=False),
    Peg("k8_s8", H=16, W=8, C=9, K=8, stride=8, padding=0, residual=False),
    Peg("no_padding", H=7, W=7, C=12, padding=0, residual=False),
    Peg("wide_padding", H=5, W=4, C=12, padding=3, residual=False, prefix=1),
    Peg("even_kernel", H=6, W=5, C=12, K=2, padding=1, residual=False),
    *(
        Peg(f"act_{name}", H=5, W=7, C=18, activation=name, prefix=1)
        for name in ("relu", "gelu", "gelu_tanh", "silu", "hardswish")
    ),
    Peg("act_no_residual", H=7, W=7, C=18, activation="hardswish", residual=False, stride=2),
    Peg("gate", H=7, W=7, C=18, gate=True, residual=False, prefix=1),
    Peg("gate_act", H=5, W=5, C=18, gate=True, activation="relu"),
    *(Peg(f"row_of_{W}", B=1, H=1, W=W, C=17) for W in (6, 8, 15)),
    Peg("wide_gate_act", B=1, H=2, W=16, C=18, gate=True, activation="gelu", prefix=1),
    Peg("empty_batch", B=0, H=3, W=3, C=8),
    Peg("empty_channels", H=3, W=3, C=0),
    Peg("empty_grid", H=0, W=3, C=8, prefix=1, unserved="empty grid"),
]

PATCH_EMBED = [
    PatchEmbed("vit", H=32, W=32, C=48, kernel=(16, 16), prefix=1, pos=5, leading=True),
    PatchEmbed("vit_b1_196", B=1, H=56, W=56, C=37, kernel=(4, 4), pos=196),
    PatchEmbed("patch14", B=1, H=28, W=42, C=33, kernel=(14, 14), pos=6, prefix=2),
    PatchEmbed("patch8", H=24, W=16, C=17, kernel=(8, 8)),
    PatchEmbed("patch4", H=20, W=28, C=96, kernel=(4, 4), norm="affine"),
    PatchEmbed("patch2_64", H=14, W=14, Ci=64, C=40, kernel=(2, 2), norm="affine"),
    PatchEmbed("rectangular", H=16, W=24, C=19, kernel=(8, 4), stride=4),
    PatchEmbed("leftover", H=19, W=21, C=16, kernel=(4, 4), bias=False),
    PatchEmbed("one_patch", B=1, H=16, W=16, C=7, kernel=(16, 16)),
    PatchEmbed("gray", H=16, W=16, Ci=1, C=16, kernel=(4, 4)),
    PatchEmbed("four", H=16, W=16, Ci=4, C=16, kernel=(8, 8)),
    PatchEmbed("one_channel", H=8, W=8, C=1, kernel=(4, 4)),
    PatchEmbed("overlap_k7s4", H=29, W=32, C=33, kernel=(7, 7), stride=4, padding=2, norm="affine"),
    PatchEmbed("overlap_k3s2", H=14, W=13, Ci=24, C=40, kernel=(3, 3), stride=2, padding=1),
    PatchEmbed("overlap_k9s5", H=21, W=23, C=19, kernel=(7, 9), stride=5, padding=(1, 2, 3, 4)),
    PatchEmbed("beyond", B=1, H=9, W=3, C=9, kernel=(8, 8), stride=3, padding=(2, 9, 1, 8)),
    PatchEmbed("many", B=1, H=96, W=104, C=9, kernel=(8, 8), prefix=1, pos=157),
    PatchEmbed("padding_same", H=15, W=14, C=16, kernel=(3, 3), stride=2, padding="same"),
    PatchEmbed("padding_four", H=9, W=9, C=16, kernel=(4, 4), padding=(1, 0, 2, 3)),
    PatchEmbed("norm_no_bias", H=16, W=16, C=21, kernel=(8, 8), norm="no_bias", bias=False),
    PatchEmbed("pos_all", H=16, W=16, C=24, kernel=(8, 8), pos=6, prefix=2, norm="affine"),
    PatchEmbed("pos_patches", H=16, W=16, C=24, kernel=(8, 8), pos=4, prefix=2),
    PatchEmbed("prefix_only", H=16, W=16, C=24, kernel=(8, 8), prefix=1, leading=True),
    PatchEmbed("uint8", H=32, W=16, C=24, kernel=(16, 16), uint8=True),
    PatchEmbed("uint8_normalised", H=32, W=16, C=24, kernel=(16, 16), uint8=True, normalise=True),
    PatchEmbed(
        "uint8_overlap",
        H=16,
        W=16,
        C=24,
        kernel=(3, 3),
        stride=2,
        padding=1,
        uint8=True,
        normalise=True,
    ),
    PatchEmbed("normalised", H=16, W=16, C=24, kernel=(8, 8), normalise=True, bias=False),
    PatchEmbed("packed", H=32, W=32, C=37, kernel=(16, 16), packed=True),
    PatchEmbed(
        "packed_overlap", H=14, W=14, Ci=19, C=24, kernel=(3, 3), stride=2, padding=1, packed=True
    ),
    PatchEmbed("channels_last", H=32, W=16, C=24, kernel=(16, 16), layout="channels_last"),
    PatchEmbed(
        "channels_last_uint8",
        H=16,
        W=16,
        C=24,
        kernel=(4, 4),
        uint8=True,
        normalise=True,
        layout="channels_last",
    ),
    PatchEmbed(
        "channels_last_overlap",
        H=14,
        W=14,
        Ci=9,
        C=24,
        kernel=(3, 3),
        stride=2,
        padding=1,
        layout="channels_last",
    ),
    PatchEmbed(
        "channels_last_left",  # every window ends on the image, the first begins before it
        H=8,
        W=9,
        Ci=4,
        C=16,
        kernel=(4, 4),
        padding=(0, 2, 0, 0),
        layout="channels_last",
    ),
    PatchEmbed("empty_batch", B=0, H=16, W=16, C=24, kernel=(8, 8), prefix=1, pos=5),
    PatchEmbed("empty_channels", H=16, W=16, C=0, kernel=(8, 8)),
    PatchEmbed("empty_input_channels", H=16, W=16, Ci=0, C=5, kernel=(8, 8), prefix=1),
]

LEVIT = tuple(
    Conv(Co, activation=act)
    for Co, act in ((16, "hardswish"), (32, "hardswish"), (64, "hardswish"), (128, "none"))
)
DEEP = (Conv(16, activation="relu"), Conv(16, stride=1, activation="relu"), Conv(32, stride=1))
CONV_STEM = [
    ConvStem("levit", H=48, W=48, layers=LEVIT),
    ConvStem("levit_packed", B=1, H=64, W=32, layers=LEVIT, packed=True),
    ConvStem("levit_odd_image", B=1, H=37, W=51, layers=LEVIT),
    ConvStem("resnet", H=32, W=32, layers=(Conv(24, 7, 2, 3, "relu"),), pool=(3, 2, 1)),
    ConvStem(
        "resnet_odd",
        B=1,
        H=31,
        W=29,
        layers=(Conv(17, 7, 2, 3, "relu"),),
        pool=(3, 2, 1),
        packed=True,
    ),
    ConvStem("deep", H=20, W=24, layers=DEEP, pool=(3, 2, 1)),
    ConvStem("deep_image", H=20, W=24, layers=DEEP, output="image"),
    ConvStem("same", H=21, W=24, layers=(Conv(16, 3, 2, "same", "silu"), Conv(9, 5, 1, "same"))),
    ConvStem("same_pool", H=20, W=20, layers=(Conv(16, 7, 2, "same"),), pool=(3, 2, "same")),
    ConvStem("four_paddings", H=11, W=10, layers=(Conv(16, 3, 1, (0, 1, 2, 3), "gelu"),)),
    ConvStem(
        "four_paddings_between",
        H=9,
        W=10,
        layers=(Conv(10, 3, 1, activation="relu"), Conv(9, 3, 2, (0, 2, 1, 1), "silu")),
        pool=(3, 2, (1, 0, 0, 1)),
    ),
    ConvStem("odd_channels", H=13, W=11, Ci=5, layers=(Conv(7, activation="gelu"), Conv(3, 3, 1))),
    ConvStem("one_channel", H=9, W=9, Ci=1, layers=(Conv(1, 3, 1),)),
    ConvStem("pointwise", H=7, W=7, Ci=33, layers=(Conv(40, 1, 1, 0, "silu"),)),
    ConvStem("large_kernel", B=1, H=12, W=12, layers=(Conv(8, 11, 4, 5),)),
    ConvStem("no_bias", H=12, W=12, layers=(Conv(16, bias=False, activation="relu"), Conv(16))),
    ConvStem("gelu_tanh", H=9, W=9, layers=(Conv(16, activation="gelu_tanh"),)),
    ConvStem("uint8", H=32, W=32, layers=LEVIT[:2], uint8=True),
    ConvStem(
        "uint8_packed",
        H=17,
        W=16,
        layers=(Conv(20, 7, 2, 3, "relu"),),
        uint8=True,
        pool=(3, 2, 1),
        packed=True,
    ),
    ConvStem("channels_last", H=32, W=32, layers=LEVIT[:3], layout="channels_last"),
    ConvStem(
        "channels_last_uint8", H=15, W=16, layers=LEVIT[:2], uint8=True, layout="channels_last"
    ),
    ConvStem(
        "cmt_affine",
        H=16,
        W=16,
        unserved="group_norm or affine",
        layers=(Conv(16, activation="gelu", extra="affine"), Conv(16, 3, 1, extra="affine")),
    ),
    ConvStem(
        "bit_group_norm",
        H=16,
        W=16,
        unserved="group_norm or affine",
        pool=(3, 2, 1),
        layers=(Conv(16, 7, 2, "same", "relu", False, "group_norm"),),
    ),
    ConvStem("empty_batch", B=0, H=16, W=16, layers=LEVIT[:2], pool=(3, 2, 1)),
    ConvStem("empty_channels", H=8, W=8, layers=(Conv(0),)),
    ConvStem("empty_between", H=8, W=8, layers=(Conv(0, activation="relu"), Conv(5))),
]

CASES: dict[str, list] = {
    "attention": ATTENTION,
    "linear": LINEAR,
    "peg": PEG,
    "patch_embed": PATCH_EMBED,
    "conv_stem": CONV_STEM,
}


def all_cases() -> list[Case]:
    return [case for cases in CASES.values() for case in cases]


def find(name: str) -> Case:
    """The case with that full name, such as "peg-cpvt"."""
    return next(case for case in all_cases() if str(case) == name)
