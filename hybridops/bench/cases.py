"""The shapes that real hybrid models have: what `hybridops bench op` measures.

Named after the model they come from, one image each unless said; `--shape ID,B=16` changes one.
Windows (Swin) count as the batch of attention.
"""

from __future__ import annotations

from .case import Attention, Case, Conv, Conv1x1, Conv3x3, ConvStem, Linear, Mlp, PatchEmbed, Peg

ATTENTION = [
    Attention("levit_stage1", B=1, H=4, Nq=196, D=16, Dv=32, bias="table", activation="hardswish"),
    # What an optimized model computes: its table spread out once.
    Attention(
        "levit_stage1_spread",
        B=1,
        H=4,
        Nq=196,
        D=16,
        Dv=32,
        bias=(1, 4, 196, 196),
        activation="hardswish",
    ),
    Attention("levit_stage2", B=1, H=6, Nq=49, D=16, Dv=32, bias="table", activation="hardswish"),
    Attention("levit_stage3", B=1, H=8, Nq=16, D=16, Dv=32, bias="table", activation="hardswish"),
    Attention("levit_down", B=1, H=8, Nq=49, Nk=196, D=16, Dv=64, bias="table"),
    Attention("cpvt_tiny", B=1, H=3, Nq=196, D=64, view="packed"),
    Attention("deit_small", B=1, H=6, Nq=197, D=64, view="packed"),
    Attention("vit_base_384", B=1, H=12, Nq=577, D=64, view="packed"),
    Attention("detr_encoder", B=1, H=8, Nq=850, D=32),
    Attention("detr_encoder_padded", B=1, H=8, Nq=850, D=32, mask="tail"),
    Attention("detr_decoder", B=1, H=8, Nq=100, Nk=850, D=32),
    Attention("swin_window", B=64, H=3, Nq=49, D=32, view="packed", bias="table_transposed"),
]

PEG = [
    Peg("cpvt_tiny", B=1, H=14, W=14, C=192, prefix=1),
    Peg("cpvt_base", B=1, H=14, W=14, C=768, prefix=1),
    Peg("cpvt_tiny_448", B=1, H=28, W=28, C=192, prefix=1),
    Peg("twins_stage1", B=1, H=56, W=56, C=64),
    Peg("coat_7x7", B=1, H=28, W=28, C=152, K=7, residual=False),
]

_LEVIT = (16, 32, 64)
CONV_STEM = [
    ConvStem(
        "levit_128s",
        B=1,
        H=224,
        W=224,
        packed=True,
        layers=(*(Conv(C, activation="hardswish") for C in _LEVIT), Conv(128)),
    ),
    ConvStem(
        "levit_256",
        B=1,
        H=224,
        W=224,
        packed=True,
        layers=(*(Conv(2 * C, activation="hardswish") for C in _LEVIT), Conv(256)),
    ),
    ConvStem(
        "resnet",
        B=1,
        H=224,
        W=224,
        packed=True,
        layers=(Conv(64, 7, 2, 3, "relu"),),
        pool=(3, 2, 1),
        output="image",
    ),
]

PATCH_EMBED = [
    PatchEmbed(
        "deit_tiny", B=1, H=224, W=224, C=192, kernel=(16, 16), prefix=1, pos=197, packed=True
    ),
    PatchEmbed(
        "vit_base", B=1, H=224, W=224, C=768, kernel=(16, 16), prefix=1, pos=197, packed=True
    ),
    PatchEmbed("twins_stage1", B=1, H=224, W=224, C=64, kernel=(4, 4), norm="affine", packed=True),
]

LINEAR = [
    Linear("cpvt_tiny_qkv", M=(1, 197), K=192, N=576, norm="affine", packed=True),
    Linear("cpvt_tiny_proj", M=(1, 197), K=192, N=192, residual=True, packed=True),
    Linear(
        "cpvt_tiny_mlp1", M=(1, 197), K=192, N=768, norm="affine", activation="gelu", packed=True
    ),
    Linear("cpvt_tiny_mlp2", M=(1, 197), K=768, N=192, residual=True, packed=True),
    Linear("levit_128s_qkv", M=(1, 196), K=128, N=256, packed=True),
    Linear("levit_128s_mlp1", M=(1, 196), K=128, N=256, activation="hardswish", packed=True),
    Linear("levit_384_stage3", M=(1, 16), K=768, N=1536, activation="hardswish", packed=True),
    Linear("twins_stage1_mlp1", M=(1, 3136), K=64, N=256, activation="gelu", packed=True),
    Linear(
        "vit_base_mlp1", M=(1, 197), K=768, N=3072, norm="affine", activation="gelu", packed=True
    ),
]

MLP = [
    Mlp("cpvt_tiny", N=196, C=192, hidden=768),
    Mlp("twins_stage1", N=3136, C=64, hidden=256),
    Mlp("vit_base", N=197, C=768, hidden=3072),
    Mlp("levit_128s", N=196, C=128, hidden=256, norm=False, activation="hardswish"),
]

CONV1X1 = [
    Conv1x1("resnet50_first", H=56, W=56, C=256, N=64),
    Conv1x1("resnet50_last", H=56, W=56, C=64, N=256, residual=True),
    Conv1x1("resnet50_stage3", H=14, W=14, C=1024, N=256),
    Conv1x1("resnet50_shortcut", H=28, W=28, C=512, N=1024, stride=2, activation="none"),
    Conv1x1("mobilenetv2_expand", H=14, W=14, C=64, N=384),
]
CONV3X3 = [
    Conv3x3("resnet50_stage1", H=56, W=56, C=64, N=64),
    Conv3x3("resnet50_stage2_down", H=56, W=56, C=128, N=128, stride=2),
    Conv3x3("resnet50_stage3", H=14, W=14, C=256, N=256),
    Conv3x3("resnet18_last", H=28, W=28, C=128, N=128, residual=True),
]

CASES: dict[str, list[Case]] = {
    "attention": [*ATTENTION],
    "peg": [*PEG],
    "conv_stem": [*CONV_STEM],
    "patch_embed": [*PATCH_EMBED],
    "linear": [*LINEAR],
    "mlp": [*MLP],
    "conv1x1": [*CONV1X1],
    "conv3x3": [*CONV3X3],
}
