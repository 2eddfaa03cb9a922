"""Rules for timm's families, layer by layer: real classes, odd sizes, gradients, restore."""

from __future__ import annotations

import copy
import importlib

import pytest
import torch
from check import accurate, rms, same_bits
from torch import Tensor, nn

from hybridops import explain, optimize, report, restore, verify
from hybridops.optimize import Fast, rules
from hybridops.optimize.gates import fit_statistics, randomise_gates

DROPPED = {"attn_drop": 0.5}


def swin(masked=False, **options):
    from timm.models.swin_transformer import WindowAttention

    mask = [-100.0 * (torch.rand(3, 15, 15) < 0.3)] if masked else []
    return WindowAttention(24, 3, window_size=(3, 5), **options), [torch.randn(6, 15, 24), *mask]


def swin_block(size, shift):
    from timm.models.swin_transformer import SwinTransformerBlock

    block = SwinTransformerBlock(24, size, 3, window_size=(3, 5), shift_size=shift, mlp_ratio=2.5)
    return block, [torch.randn(2, *size, 24)]


def swin_v2(masked=False):
    from timm.models.swin_transformer_v2 import WindowAttention

    mask = [-100.0 * (torch.rand(3, 15, 15) < 0.3)] if masked else []
    return WindowAttention(24, (3, 5), 3), [torch.randn(6, 15, 24), *mask]


def merging(version):
    from timm.models import swin_transformer, swin_transformer_v2

    module = swin_transformer if version == 1 else swin_transformer_v2
    return module.PatchMerging(20, 36), [torch.randn(2, 7, 5, 20)]


def pvt(**options):
    from timm.models.pvt_v2 import Attention

    return Attention(24, 3, **options), [torch.randn(2, 8 * 10, 24), (8, 10)]


def pvt_mlp(**options):
    from timm.models.pvt_v2 import MlpWithDepthwiseConv

    return MlpWithDepthwiseConv(20, 44, **options), [torch.randn(2, 7 * 5, 20), (7, 5)]


def pvt_block(**options):
    from timm.models.pvt_v2 import Block

    return Block(24, 3, qkv_bias=True, **options), [torch.randn(2, 8 * 10, 24), (8, 10)]


def pvt_patches():
    from timm.models.pvt_v2 import OverlapPatchEmbed

    return OverlapPatchEmbed(7, 4, 3, 20), [torch.randn(2, 3, 29, 37)]


def rel_pos(kind, size):
    from functools import partial

    from timm.layers import RelPosBias, RelPosBiasTf, RelPosMlp

    kinds = {"bias": RelPosBias, "tf": RelPosBiasTf, "mlp": RelPosMlp}
    return partial(kinds[kind], window_size=size) if kind else None


def maxvit(kind=None, shared=False, **options):
    from timm.models.maxxvit import AttentionCl

    layer = AttentionCl(24, 24, dim_head=8, rel_pos_cls=rel_pos(kind, (3, 5)), **options)
    bias = [torch.randn(1, 3, 15, 15)] if shared else []
    return layer, [torch.randn(4, 3, 5, 24), *bias]


def coatnet(kind=None, channels_last=True, **options):
    from timm.models.maxxvit import Attention2d

    layer = Attention2d(24, 40, dim_head=8, rel_pos_cls=rel_pos(kind, (3, 5)), **options)
    x = torch.randn(2, 24, 3, 5)
    return layer, [x.contiguous(memory_format=torch.channels_last) if channels_last else x]


def partition(kind):
    from timm.models.maxxvit import MaxxVitTransformerCfg, PartitionAttentionCl

    cfg = MaxxVitTransformerCfg(dim_head=8, window_size=(3, 5), grid_size=(3, 5), init_values=0.5)
    return PartitionAttentionCl(24, kind, cfg), [torch.randn(2, 6, 10, 24)]


def tiny_vit():
    from timm.models.tiny_vit import Attention

    return Attention(24, 8, 3, attn_ratio=2, resolution=(3, 5)), [torch.randn(2, 15, 24)]


def tiny_vit_mlp():
    from timm.models.tiny_vit import NormMlp

    return NormMlp(20, 44), [torch.randn(2, 15, 20)]


def efficientformer():
    from timm.models.efficientformer import Attention

    return Attention(24, 8, 3, 2, resolution=(3, 5)), [torch.randn(2, 15, 24)]


def meta_block():
    from timm.models.efficientformer import MetaBlock1d

    return MetaBlock1d(24), [torch.randn(2, 49, 24)]


def davit():
    from timm.models.davit import WindowAttention

    return WindowAttention(24, (3, 5), 3), [torch.randn(4, 15, 24)]


def davit_peg(act, channels_last=True):
    from timm.models.davit import ConvPosEnc

    x = torch.randn(2, 20, 7, 5)
    x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
    return ConvPosEnc(20, act=act), [x]


def coat_peg():
    from timm.models.coat import ConvPosEnc

    return ConvPosEnc(20), [torch.randn(2, 1 + 7 * 5, 20), (7, 5)]


def fastvit():
    from timm.models.fastvit import Attention

    return Attention(24, 8), [torch.randn(2, 24, 3, 5)]


def xcit_lpi():
    from timm.models.xcit import LPI

    return LPI(20), [torch.randn(2, 7 * 5, 20), 7, 5]


def beit(table=True, shared=False, **options):
    from timm.models.beit import Attention

    layer = Attention(24, 3, qkv_bias=True, window_size=(3, 5) if table else None, **options)
    bias = [torch.randn(1, 3, 16, 16)] if shared else []
    return layer, [torch.randn(2, 16, 24), *bias]


def beit_block(init_values):
    from timm.models.beit import Block

    options = {"window_size": (3, 5), "qkv_bias": True, "init_values": init_values}
    return Block(24, 3, **options), [torch.randn(2, 16, 24)]


def eva(rope=False, **options):
    from timm.models.eva import EvaAttention

    layer = EvaAttention(24, 3, norm_layer=nn.LayerNorm, **options)
    return layer, [torch.randn(2, 16, 24), *([torch.randn(15, 16)] if rope else [])]


def rope_attention(**options):
    from timm.layers.attention import AttentionRope

    return AttentionRope(24, 3, **options), [torch.randn(2, 16, 24), torch.randn(15, 16)]


def nest():
    from timm.models.nest import Attention

    return Attention(24, 3), [torch.randn(2, 4, 15, 24)]


def metaformer():
    from timm.models.metaformer import Attention

    return Attention(24, head_dim=8), [torch.randn(2, 15, 24)]


def visformer(channels_last=False):
    from timm.models.visformer import Attention

    x = torch.randn(2, 24, 3, 5)
    x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
    return Attention(24, 3, head_dim_ratio=0.5), [x]


def volo():
    from timm.models.volo import Attention

    return Attention(24, 3), [torch.randn(2, 3, 5, 24)]


def gcvit(use_global):
    from timm.models.gcvit import WindowAttentionGlobal

    queries = [torch.randn(2, 3, 5, 24)] if use_global else []
    return WindowAttentionGlobal(24, 3, (3, 5), use_global), [torch.randn(6, 15, 24), *queries]


def hiera(**options):
    from timm.models.hiera import MaskUnitAttention

    return MaskUnitAttention(24, 30, 3, **options), [torch.randn(2, 48, 24)]


def swin_cr(masked=False):
    from timm.models.swin_transformer_v2_cr import WindowMultiHeadAttention

    mask = [-100.0 * (torch.rand(3, 15, 15) < 0.3)] if masked else []
    layer = WindowMultiHeadAttention(24, 3, (3, 5))
    layer.meta_mlp.drop1.p = 0.0  # else no two runs in training are alike
    return layer, [torch.randn(6, 15, 24), *mask]


def relpos(**options):
    from timm.models.vision_transformer_relpos import RelPosAttention

    kind = rel_pos("bias", (3, 5))
    return RelPosAttention(24, 3, rel_pos_cls=kind, **options), [torch.randn(2, 15, 24)]


def relpos_block(shared=False):
    from timm.models.vision_transformer_relpos import RelPosBlock

    kind = None if shared else rel_pos("mlp", (3, 5))
    bias = [torch.randn(1, 3, 15, 15)] if shared else []
    return RelPosBlock(24, 3, rel_pos_cls=kind, init_values=0.5), [torch.randn(2, 15, 24), *bias]


def swiglu(**options):
    from timm.layers import SwiGLU

    return SwiGLU(20, 44, **options), [torch.randn(2, 7, 20)]


def glu(**options):
    from timm.layers import GluMlp

    return GluMlp(20, 44, act_layer=nn.SiLU, **options), [torch.randn(2, 7, 20)]


def cait():
    from timm.models.cait import ClassAttn

    return ClassAttn(24, 3, qkv_bias=True), [torch.randn(2, 16, 24)]


def crossvit():
    from timm.models.crossvit import CrossAttention

    return CrossAttention(24, 3), [torch.randn(2, 16, 24)]


def vit_block(**options):
    from timm.models.vision_transformer import Block

    return Block(24, 3, qkv_bias=True, init_values=0.5, **options), [torch.randn(2, 15, 24)]


def levit_conv(downsample=False):
    from timm.models.levit import Attention, AttentionDownsample

    options = {"resolution": (7, 5), "use_conv": True, "attn_ratio": 2.0}
    if downsample:
        return AttentionDownsample(24, 36, 8, 3, **options), [torch.randn(2, 24, 7, 5)]
    return Attention(24, 8, 3, **options), [torch.randn(2, 24, 7, 5)]


CASES = {
    "swin": swin,
    "swin-no-bias": lambda: swin(qkv_bias=False),
    "swin-head-dim": lambda: swin(head_dim=12),
    "swin-masked": lambda: swin(masked=True),
    "swin-block": lambda: swin_block((6, 10), 0),
    "swin-block-shifted": lambda: swin_block((6, 10), (1, 2)),
    "swin-block-padded": lambda: swin_block((7, 11), (1, 2)),
    "swin-merging": lambda: merging(1),
    "swin-v2": swin_v2,
    "swin-v2-masked": lambda: swin_v2(masked=True),
    "swin-v2-merging": lambda: merging(2),
    "pvt": pvt,
    "pvt-subsampled": lambda: pvt(sr_ratio=3),
    "pvt-linear": lambda: pvt(linear_attn=True),
    "pvt-mlp": pvt_mlp,
    "pvt-mlp-relu": lambda: pvt_mlp(extra_relu=True),
    "pvt-block": lambda: pvt_block(sr_ratio=2),
    "pvt-block-linear": lambda: pvt_block(linear_attn=True),
    "pvt-patches": pvt_patches,
    "maxvit": lambda: maxvit("bias"),
    "maxvit-packed": lambda: maxvit("bias", head_first=False),
    "maxvit-tf": lambda: maxvit("tf"),
    "maxvit-mlp": lambda: maxvit("mlp"),
    "maxvit-shared": lambda: maxvit(shared=True),
    "maxvit-block": lambda: partition("block"),
    "maxvit-grid": lambda: partition("grid"),
    "coatnet": lambda: coatnet("bias"),
    "coatnet-nchw": lambda: coatnet("tf", channels_last=False),
    "coatnet-packed": lambda: coatnet(head_first=False, expand_first=False),
    "tiny-vit": tiny_vit,
    "tiny-vit-mlp": tiny_vit_mlp,
    "efficientformer": efficientformer,
    "efficientformer-block": meta_block,
    "davit": davit,
    "davit-peg": lambda: davit_peg(False),
    "davit-peg-act": lambda: davit_peg(True),
    "davit-peg-nchw": lambda: davit_peg(True, channels_last=False),
    "coat-peg": coat_peg,
    "fastvit": fastvit,
    "xcit-lpi": xcit_lpi,
    "beit": beit,
    "beit-shared": lambda: beit(shared=True),
    "beit-both": lambda: beit(table=False, shared=True, qkv_bias_separate=True),
    "beit-block": lambda: beit_block(None),
    "beit-block-scaled": lambda: beit_block(0.5),
    "eva": lambda: eva(rope=True),
    "eva-unfused": lambda: eva(rope=True, qkv_fused=False, rotate_half=True),
    "eva-normed": lambda: eva(qk_norm=True, scale_norm=False),
    "rope": rope_attention,
    "rope-unfused": lambda: rope_attention(qkv_fused=False, num_prefix_tokens=1),
    "nest": nest,
    "metaformer": metaformer,
    "visformer": visformer,
    "visformer-channels-last": lambda: visformer(channels_last=True),
    "volo": volo,
    "gcvit": lambda: gcvit(False),
    "gcvit-global": lambda: gcvit(True),
    "hiera": lambda: hiera(q_stride=4),
    "hiera-units": lambda: hiera(q_stride=2, window_size=4, use_mask_unit_attn=True),
    "swin-cr": swin_cr,
    "swin-cr-masked": lambda: swin_cr(masked=True),
    "relpos": relpos,
    "relpos-normed": lambda: relpos(qk_norm=True),
    "relpos-block": relpos_block,
    "relpos-block-shared": lambda: relpos_block(shared=True),
    "swiglu": swiglu,
    "swiglu-normed": lambda: swiglu(norm_layer=nn.LayerNorm, bias=False),
    "glu": glu,
    "glu-first": lambda: glu(gate_last=False),
    "cait": cait,
    "crossvit": crossvit,
    "vit-block-qk-norm": lambda: vit_block(qk_norm=True),
    "vit-block-all-norms": lambda: vit_block(qk_norm=True, scale_attn_norm=True),
    "levit-conv": levit_conv,
    "levit-conv-downsample": lambda: levit_conv(downsample=True),
}
# what training keeps as it is, though its parts may be served
ONLY_INFERENCE = {name for name in CASES if "-block" in name or name in ("maxvit-grid",)}
UNTRAINED = {"levit-conv", "levit-conv-downsample"}  # training leaves all of it


def build(name: str) -> tuple[nn.Module, list]:
    """A layer whose every branch counts, and its arguments."""
    layer, args = CASES[name]()
    randomise_gates(layer, 0)
    layer.eval()
    fit_statistics(layer, tuple(args), 0)
    forget_biases(layer)
    return layer, args


def forget_biases(layer: nn.Module) -> None:
    """LeViT and its kin keep their biases in eval mode; their train() returns None."""
    layer.train()
    layer.eval()


def cast(args: list, dtype: torch.dtype) -> list:
    return [a.to(dtype) if isinstance(a, Tensor) else a for a in args]


def gradients(layer: nn.Module, args: list, dy: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    x = args[0].detach().requires_grad_()
    y = layer(x, *args[1:])
    y.backward(dy.to(y.dtype))
    found = {n: p.grad for n, p in layer.named_parameters() if p.grad is not None}
    return y.detach(), found | {"x": x.grad}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_inference_is_as_exact_as_torch(timm, name, dtype):
    layer, args = build(name)
    layer.to(dtype)
    args = cast(args, dtype)
    exact = copy.deepcopy(layer).double()(*cast(args, torch.float64))
    torchs = layer(*args)
    state = {k: v.clone() for k, v in layer.state_dict().items()}
    optimize(layer)
    assert isinstance(layer, Fast)
    y = layer(*args)
    accurate(y, torchs, exact, name)
    assert y.stride() == torchs.stride() or y.ndim == 4
    assert same_bits(layer(*args), y)
    assert {k: v.shape for k, v in layer.state_dict().items()} == {
        k: v.shape for k, v in state.items()
    }
    assert all(same_bits(v, state[k]) for k, v in layer.state_dict().items())
    assert same_bits(restore(layer)(*args), torchs)
    assert not any(isinstance(m, Fast) for m in layer.modules())


@pytest.mark.parametrize("mode", ["train", "inference"])
@pytest.mark.parametrize("name", [n for n in CASES if n not in UNTRAINED])
def test_gradients_are_as_exact_as_torchs(timm, name, mode):
    plain, args = build(name)
    plain.train(mode == "train")
    fast = optimize(copy.deepcopy(plain), mode=mode)
    assert isinstance(fast, Fast) or (mode == "train" and name in ONLY_INFERENCE)
    exact = copy.deepcopy(plain).double()
    dy = torch.randn_like(copy.deepcopy(plain)(*args), dtype=torch.float64)
    y, ours = gradients(fast, args, dy)
    torchs, theirs = gradients(plain, args, dy)
    y64, best = gradients(exact, cast(args, torch.float64), dy)
    accurate(y, torchs, y64, name)
    assert set(ours) == set(theirs)
    for key, gradient in ours.items():
        what = f"{name}: gradient of {key}"
        accurate(gradient, theirs[key], best[key], what, factor=3, scale=rms(dy))
    if mode == "train":  # running statistics move as they do in torch
        assert all(
            torch.allclose(v, plain.state_dict()[k], rtol=1e-4, atol=1e-5)
            for k, v in fast.state_dict().items()
        )


@pytest.mark.parametrize("name", CASES)
def test_verify_notices_every_planted_fault(timm, name):
    layer, args = build(name)
    result = verify(optimize(layer), tuple(args))
    assert result.ok, str(result)
    assert not result.missed


@pytest.mark.filterwarnings("ignore:no rule serves")
@pytest.mark.parametrize("build_it", [swin, pvt, maxvit, beit, eva], ids=lambda f: f.__name__)
def test_attention_dropout_in_training_is_torchs(timm, build_it):
    layer, _ = build_it(**DROPPED)
    model = nn.Sequential(layer, nn.Linear(2, 2))
    optimize(model, mode="train", strict=False)
    reasons = {line.fqn: line.reason for line in report(model).layers}
    assert "attention dropout 0.5" in reasons["0"]


def test_monte_carlo_dropout_is_respected(timm):
    layer, args = swin(**DROPPED)
    optimize(layer.eval())
    with torch.no_grad():
        assert same_bits(layer(*args), layer(*args))
        layer.attn_drop.train()
        assert not same_bits(layer(*args), layer(*args))


def test_masks_fall_back_and_are_counted(timm):
    layer, (x,) = eva()
    mask = torch.randn(16, 16)
    with torch.no_grad():
        expected = layer.eval()(x, attn_mask=mask)
        optimize(layer)
        assert same_bits(layer(x, attn_mask=mask), expected)
    assert report(layer).fallbacks["timm EvaAttention", "mask"] == 1


@pytest.mark.parametrize("name", ["swin-block-shifted", "pvt-block", "maxvit-grid", "xcit-lpi"])
def test_compiles_in_one_graph(timm, name):
    layer, args = build(name)
    optimize(layer)
    with torch.no_grad():
        expected = layer(*args)
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        assert torch.allclose(compiled(*args), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["swin", "pvt-mlp", "coatnet", "tiny-vit", "davit-peg", "cait"])
def test_a_hooked_part_is_called(timm, name):
    layer, args = build(name)
    optimize(layer)
    with torch.no_grad():
        before = layer(*args)
        part = next(m for m in layer.modules() if isinstance(m, (nn.Linear, nn.Conv2d)))
        handle = part.register_forward_hook(lambda module, args, y: y * 0)
        assert not torch.allclose(layer(*args), before)
        handle.remove()
        assert same_bits(layer(*args), before)


@pytest.mark.parametrize("name", ["swin", "swin-v2", "maxvit-tf", "beit", "efficientformer"])
def test_a_changed_bias_is_followed(timm, name):
    layer, args = build(name)
    optimize(layer)
    with torch.no_grad():
        before = layer(*args)
        names = ("table", "cpb_mlp", "attention_biases")
        table = next(p for n, p in layer.named_parameters() if any(part in n for part in names))
        table.mul_(-2)
        after = layer(*args)
        assert not torch.allclose(after, before)
        forget_biases(layer)
        exact = copy.deepcopy(restore(layer)).double()(*cast(args, torch.float64))
        accurate(after, layer(*args), exact, name)


def resolve(path: str) -> type:
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)


def test_every_named_class_exists(timm):
    known = [p for p in (*rules.RULES, *rules.UNSERVED) if p.startswith("timm.")]
    assert all(isinstance(resolve(path), type) for path in known)
    assert not rules.RULES.keys() & rules.UNSERVED.keys()
    served = {path: rules.RULES[path] for path in known if path in rules.RULES}
    assert all(resolve(rule).replaces is resolve(path) for path, rule in served.items())


def test_a_class_without_kernels_is_named_with_its_reason(timm):
    from timm.models.xcit import XCA

    model = nn.Sequential(XCA(24, 3), nn.Linear(24, 24))
    assert rules.find(model[0]) == (None, rules.UNSERVED["timm.models.xcit:XCA"])
    lines = {line.fqn: line for line in explain(model).layers}
    assert lines["0"].rule is None
    assert "channel attention" in lines["0"].reason


@pytest.mark.filterwarnings("ignore:no rule serves")
@pytest.mark.parametrize("part", ["qkv", "proj"])
@pytest.mark.parametrize("build_it", [swin, maxvit, beit, nest], ids=lambda f: f.__name__)
def test_a_parametrised_product_is_left_alone(timm, build_it, part):
    layer, args = build_it()
    layer.eval()
    nn.utils.parametrizations.weight_norm(getattr(layer, part))
    with torch.no_grad():
        expected = layer(*args)
        optimize(layer, strict=False)
        assert not isinstance(layer, Fast)
        assert part in report(layer).layers[0].reason
        assert same_bits(layer(*args), expected)


def test_a_product_shared_by_two_layers(timm):
    """Nothing is folded into the parameters themselves, so both keep their own."""
    (one, args), (other, _) = build("swin"), build("swin")
    other.qkv, other.relative_position_bias_table = one.qkv, one.relative_position_bias_table
    model = nn.Sequential(one, other)
    x, exact = args[0], copy.deepcopy(model).double()(args[0].double())
    with torch.no_grad():
        torchs = model(x)
        accurate(optimize(model)(x), torchs, exact, "shared")
        one.qkv.weight.mul_(0.5)
        exact = copy.deepcopy(restore(copy.deepcopy(model))).double()(x.double())
        accurate(model(x), restore(copy.deepcopy(model))(x), exact, "shared, changed")


AUTOCAST = ("swin-masked", "swin-v2", "pvt-linear", "pvt-mlp", "pvt-patches", "maxvit", "coatnet")
AUTOCAST += ("tiny-vit", "beit", "rope", "nest", "swiglu", "xcit-lpi", "cait", "swin-block")


@pytest.mark.parametrize("name", AUTOCAST)
@torch.no_grad()
def test_autocast_is_as_exact_as_eager(timm, name):
    layer, args = build(name)
    exact = copy.deepcopy(layer).double()(*cast(args, torch.float64))
    with torch.autocast("cpu", torch.bfloat16):
        forget_biases(layer)
        torchs = layer(*args)
        forget_biases(layer)
        y = optimize(layer)(*args)
    assert y.dtype == torchs.dtype
    error, own = ((t.double() - exact).abs().max() for t in (y, torchs))
    assert error <= 2 * own + 4 * torch.finfo(torch.bfloat16).eps * rms(exact)
