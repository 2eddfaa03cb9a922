"""Whole models: LeViT against timm's and transformers', CPVT against Algorithm 1 in plain torch.

What every model of ours must do stands here too: copies, training steps, torch.compile, names.
"""

from __future__ import annotations

import copy
import pickle
from functools import partial

import pytest
import torch
from check import accurate, same_bits
from test_nn import gradients, randomize
from torch import nn

import hybridops
from hybridops import models
from hybridops.models import Cpvt, HybridVit, Levit, create_model, list_models
from hybridops.models.hybrid_vit import BiT, ResNetD

LEVIT_PARAMETERS = {
    "levit_128s": 7_777_058,
    "levit_128": 9_213_936,
    "levit_192": 10_947_069,
    "levit_256": 18_893_876,
    "levit_384": 39_128_836,
}
CPVT_PARAMETERS = {
    "cpvt_tiny": 5_681_512,
    "cpvt_tiny_peg5": 5_689_192,
    "cpvt_tiny_gap_peg5": 5_689_000,
    "cpvt_small": 21_978_856,
    "cpvt_small_peg5": 21_994_216,
    "cpvt_small_gap_peg5": 21_993_832,
    "cpvt_base": 86_424_040,
    "cpvt_base_peg5": 86_454_760,
    "cpvt_base_gap_peg5": 86_453_992,
    "cpvt_tiny_gap": 5_681_512 - 192,  # without the class token
    "cpvt_small_gap": 21_978_856 - 384,
    "cpvt_base_gap": 86_424_040 - 768,
}


def small_levit(**kwargs):
    return Levit((32, 48, 64), 8, (2, 3, 4), (1, 2, 1), img_size=(64, 96), num_classes=11, **kwargs)


def small_cpvt(**kwargs):
    kwargs = {"peg_positions": (0, 2), "num_classes": 11, **kwargs}
    model = Cpvt(48, 3, 3, **kwargs)
    for part in model.modules():
        if isinstance(part, nn.LayerNorm):
            nn.init.normal_(part.weight, 1, 0.2)
            nn.init.normal_(part.bias, 0, 0.2)
    return model


@pytest.mark.parametrize(("name", "count"), [*LEVIT_PARAMETERS.items(), *CPVT_PARAMETERS.items()])
def test_parameter_count(name, count):
    with torch.device("meta"):
        model = create_model(name)
    assert sum(p.numel() for p in model.parameters()) == count


def timm_pair(timm, name, **kwargs):
    original = randomize(timm.create_model(name, **kwargs)).eval()
    for key, gate in original.named_parameters():  # as small as in trained nets: with gates near 1
        if key.endswith(("mlp.ln2.bn.weight", "attn.proj.ln.bn.weight")):  # a deep net is chaotic
            with torch.no_grad():
                gate.mul_(0.3)
    ours = create_model(name.replace("_conv", ""), drop_path_rate=0.0, **kwargs).eval()
    assert models.load_weights(ours, original.state_dict()) == "timm"
    return ours, original


@pytest.mark.parametrize("name", LEVIT_PARAMETERS)
def test_levit_gives_timms_logits(timm, name):
    ours, original = timm_pair(timm, name)
    assert list(ours.state_dict()) == list(original.state_dict())
    x = torch.randn(1, 3, 224, 224)
    with torch.inference_mode():
        y, torchs = ours(x), original(x)
        accurate(y, torchs, original.double()(x.double()), name)
        with hybridops.use("reference"):
            torch.testing.assert_close(ours(x), torchs, rtol=1e-5, atol=1e-5)


def test_levit_of_another_size_and_of_convolutions(timm):
    x = torch.randn(2, 1, 96, 160)
    for name in ("levit_128s", "levit_conv_128s"):
        ours, original = timm_pair(timm, name, img_size=(96, 160), in_chans=1, num_classes=7)
        with torch.inference_mode():
            torch.testing.assert_close(ours(x), original(x), rtol=1e-4, atol=1e-4)


def set_mode(model, mode):
    for part in model.modules():  # timm's train() returns nothing at times
        part.training = mode == "train"


def smooth(model):
    """Hardswish's slope jumps at -3 and 3: one rounding away from there, fp32 may take either."""
    for part in list(model.modules()):
        for name, child in part.named_children():
            if isinstance(child, nn.Hardswish):
                setattr(part, name, nn.SiLU())


def calibrate(model, x):
    """BatchNorm statistics of x itself, but for the heads': a few samples are no statistics."""
    body = (model.stem, model.stages)
    norms = [m for part in body for m in part.modules() if hasattr(m, "running_mean")]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = 1.0
    set_mode(model, "train")
    with torch.no_grad():
        model(x)
    for norm in norms:
        norm.momentum = 0.1


# In training BatchNorm takes two of the dimensions that a batch has out of every gradient: of three
# images it leaves rounding, a hundred times what twelve leave, which no factor of 3 bounds.
CONDITIONED = {
    "eval": (3, {}),
    "train": (12, {"embed_dim": (64, 96, 128), "num_heads": (2, 3, 4), "depth": (1, 2, 1)}),
}


@pytest.mark.parametrize("mode", CONDITIONED)
def test_levit_has_timms_gradients(timm, mode):
    batch, shape = CONDITIONED[mode]
    ours, original = timm_pair(timm, "levit_128s", img_size=128, num_classes=20, **shape)
    x = torch.randn(batch, 3, 128, 128)

    def at(model, dtype):
        model.load_state_dict(start)
        set_mode(model.to(dtype), mode)
        y, grads = gradients(model, [x.to(dtype)])
        assert grads.keys() - {"input 0"} == dict(ours.named_parameters()).keys()
        return y, grads

    calibrate(original, x)
    start = copy.deepcopy(original.state_dict())
    y, grads = at(ours, torch.float64)
    expected, expected_grads = at(original, torch.float64)
    torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(grads, expected_grads, rtol=1e-6, atol=1e-8)
    for name, buffer in original.named_buffers():
        torch.testing.assert_close(ours.get_buffer(name), buffer)

    smooth(ours), smooth(original)
    calibrate(original.float(), x)
    start = copy.deepcopy(original.state_dict())
    y64, grads64 = at(original, torch.float64)
    torchs, torchs_grads = at(original, torch.float32)
    y, grads = at(ours, torch.float32)
    accurate(y, torchs, y64, "levit_128s")
    every = [torch.cat([g.flatten() for g in d.values()]) for d in (grads, torchs_grads, grads64)]
    accurate(*every, "levit_128s gradients", factor=3)


@pytest.mark.parametrize("teacher", [True, False])
def test_levit_of_transformers(teacher):
    transformers = pytest.importorskip("transformers")
    config = transformers.LevitConfig(
        image_size=64, hidden_sizes=[32, 48, 64], num_attention_heads=[2, 3, 4], depths=[1, 2, 1]
    )
    config.key_dim, config.num_labels = [8, 8, 8], 11
    config.down_ops = [["Subsample", 8, 4, 4, 2, 2], ["Subsample", 8, 6, 4, 2, 2]]
    kind = "WithTeacher" if teacher else ""
    original = randomize(getattr(transformers, f"LevitForImageClassification{kind}")(config)).eval()
    ours = Levit(
        (32, 48, 64), 8, (2, 3, 4), (1, 2, 1), img_size=64, num_classes=11, distilled=teacher
    )
    assert models.load_weights(ours.eval(), original.state_dict()) == "transformers"
    x = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        torch.testing.assert_close(ours(x), original(x).logits, rtol=1e-4, atol=1e-4)


def official(model):
    """The state dict of facebookresearch/LeViT for the same weights."""
    state = model.state_dict()
    renamed = {name: state[ours] for ours, name, _ in models.weights.levit_names(model)}
    for name, buffer in model.named_buffers():
        if name.endswith("attention_bias_idxs"):
            renamed[f"{len(renamed)}.attention_bias_idxs"] = buffer
    return renamed


def test_official_levit():
    model, other = (randomize(create_model("levit_128s")) for _ in range(2))
    state = official(model)
    shapes = {  # levit.py: attention and MLP alternate, a downsampling pair between the stages
        "patch_embed.6.c.weight": (128, 64, 3, 3),
        "blocks.0.m.qkv.c.weight": (4 * 64, 128),
        "blocks.0.m.attention_biases": (4, 196),
        "blocks.3.m.2.c.weight": (128, 256),
        "blocks.4.kv.c.weight": (8 * 80, 128),
        "blocks.4.q.1.bn.weight": (8 * 16,),
        "blocks.4.proj.1.c.weight": (256, 8 * 64),
        "blocks.5.m.0.c.weight": (512, 256),
        "blocks.6.m.proj.1.c.weight": (256, 6 * 32),
        "blocks.12.attention_biases": (16, 49),
        "blocks.21.m.2.bn.running_var": (384,),
        "head.bn.running_mean": (384,),
        "head_dist.l.weight": (1000, 384),
    }
    assert {name: tuple(state[name].shape) for name in shapes} == shapes
    assert models.load_weights(other, state) == "official"
    for name, value in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], value), name


def test_distillation_heads(timm):
    shape = {"embed_dim": (32, 48, 64), "num_heads": (2, 3, 4), "depth": (1, 1, 1)}
    ours, original = timm_pair(timm, "levit_128s", img_size=64, num_classes=7, **shape)
    ours.distilled_training = original.distilled_training = True
    x = torch.randn(8, 3, 64, 64).double()
    for net in (ours, original):
        set_mode(net.double(), "train")
    for head, expected in zip(ours(x), original(x), strict=True):
        torch.testing.assert_close(head, expected, rtol=1e-9, atol=1e-9)
    model, x = small_levit().train(), torch.randn(2, 3, 64, 96)
    assert model(x).shape == (2, 11)
    model.distilled_training = True
    y, dist = model(x)
    assert y.shape == dist.shape == (2, 11)
    assert model.eval()(x).shape == (2, 11)
    assert small_levit(distilled=False).eval()(x).shape == (2, 11)


class Algorithm1(nn.Module):
    """CPVT in the paper's words, on torch's own transformer layer."""

    def __init__(self, dim, heads, layers, positions, gap, classes, patch=16):
        super().__init__()
        self.positions, self.gap = positions, gap
        self.patch_embed = nn.Conv2d(3, dim, patch, patch)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(
                dim, heads, 4 * dim, 0.0, "gelu", 1e-6, batch_first=True, norm_first=True
            )
            for _ in range(layers)
        )
        self.pos = nn.ModuleList(nn.Conv2d(dim, dim, 3, 1, 1, groups=dim) for _ in positions)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.head = nn.Linear(dim, classes)

    def forward(self, x):
        x = self.patch_embed(x)
        H, W = x.shape[2:]
        x = x.flatten(2).transpose(1, 2)
        P = 0 if self.gap else 1
        if P:
            x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1)
        for i, block in enumerate(self.blocks):
            x = block(x)
            if i in self.positions:
                pos = self.pos[self.positions.index(i)]
                image = x[:, P:].transpose(1, 2).reshape(len(x), -1, H, W)
                image = pos(image) + image
                x = torch.cat([x[:, :P], image.flatten(2).transpose(1, 2)], 1)
        x = self.norm(x)
        return self.head(x.mean(1) if self.gap else x[:, 0])

    def own_name(self, name):
        """The name of the same parameter in hybridops.models.Cpvt."""
        renames = {
            "patch_embed.": "patch_embed.proj.",
            "self_attn.in_proj_": "attn.qkv.",
            "self_attn.out_proj": "attn.proj",
            "linear1": "mlp.fc1",
            "linear2": "mlp.fc2",
        }
        for theirs, ours in renames.items():
            name = name.replace(theirs, ours)
        head, _, rest = name.partition(".")
        return f"pos_block.{rest.replace('.', '.pos.')}" if head == "pos" else name


def cpvt_pair(model, positions, gap):
    classes, dim = model.head.weight.shape
    heads, layers = model.blocks[0].attn.num_heads, len(model.blocks)
    plain = Algorithm1(dim, heads, layers, positions, gap, classes)
    if gap:
        del plain.cls_token
    state = model.state_dict()
    plain.load_state_dict({name: state[plain.own_name(name)] for name in plain.state_dict()})
    assert len(state) == len(plain.state_dict())
    return plain


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("gap", [False, True])
def test_cpvt_is_algorithm_1(gap, mode):
    model = small_cpvt(global_pool="avg" if gap else "token")
    plain = cpvt_pair(model, (0, 2), gap)
    model.train(mode == "train")
    plain.train()  # torch's layer has another fast path for evaluation
    x = torch.randn(2, 3, 48, 80)
    y64, grads64 = gradients(copy.deepcopy(plain).double(), [x.double()])
    torchs, torchs_grads = gradients(plain, [x])
    y, grads = gradients(model, [x])
    accurate(y, torchs, y64, "cpvt")
    for name, expected in torchs_grads.items():
        grad = grads[plain.own_name(name) if "input" not in name else name]
        accurate(grad, expected, grads64[name], f"d{name}", factor=3, scale=1.0)


@pytest.mark.parametrize("name", ["cpvt_tiny", "cpvt_tiny_gap_peg5"])
def test_cpvt_by_name_is_algorithm_1(name):
    model = create_model(name).eval()
    plain = cpvt_pair(model, (0, 1, 2, 3, 4) if "peg5" in name else (0,), "gap" in name).train()
    x = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        accurate(model(x), plain(x), plain.double()(x.double()), name)


@pytest.mark.parametrize("size", [(160, 160), (224, 224), (192, 320), (448, 448), (100, 250)])
@pytest.mark.parametrize("gap", [False, True])
def test_cpvt_takes_any_size(size, gap):
    model = small_cpvt(global_pool="avg" if gap else "token").eval()
    plain, x = cpvt_pair(model, (0, 2), gap).train(), torch.randn(1, 3, *size)
    with torch.no_grad():
        torch.testing.assert_close(model(x), plain(x), rtol=1e-4, atol=1e-4)
        tokens = (size[0] // 16) * (size[1] // 16) + (not gap)
        assert model.forward_features(x).shape == (1, tokens, 48)


@pytest.mark.parametrize("pegs", [(0,), (0, 2)])
def test_pruning_the_last_block_changes_nothing(pegs):
    model, x = small_cpvt(peg_positions=pegs).eval(), torch.randn(2, 3, 64, 96)
    complete = model.forward_features(x)
    seen = []
    y, grads = gradients(model, [x])
    model.prune_last_block = True
    pruned, pruned_grads = gradients(model, [x])
    torch.testing.assert_close(pruned, y, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(pruned_grads, grads, rtol=1e-3, atol=1e-4)
    with torch.inference_mode():
        torch.testing.assert_close(model(x), y, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(model.forward_features(x), complete)
        model.blocks[-1].register_forward_hook(lambda m, args, out: seen.append(out.shape))
        torch.testing.assert_close(model(x), y, rtol=1e-5, atol=1e-5)
    assert seen == [(2, 25, 48)]  # a hook sees the whole block


def test_pruning_spares_the_other_tokens(monkeypatch):
    rows = []
    linear = hybridops.ops.linear
    monkeypatch.setattr(
        hybridops.ops,
        "linear",
        lambda x, *a, **k: rows.append(x[..., 0].numel()) or linear(x, *a, **k),
    )
    model, x = small_cpvt().eval(), torch.randn(1, 3, 64, 64)
    model.prune_last_block = True
    model(x)
    assert rows[-6:] == [1, 17, 1, 1, 1, 1]  # q, kv, proj, fc1, fc2, head


def small_hybrid(body=BiT):
    return HybridVit(partial(body, (1, 1)), 48, 2, 3, img_size=(64, 96), num_classes=11)


SMALL = {
    "levit": (small_levit, (2, 3, 64, 96)),
    "hybrid": (small_hybrid, (2, 3, 64, 96)),
    "hybrid_resnet": (lambda: small_hybrid(ResNetD), (2, 3, 64, 96)),
    "cpvt": (small_cpvt, (2, 3, 64, 96)),
    "cpvt_gap": (lambda: small_cpvt(global_pool="avg"), (2, 3, 64, 96)),
}


def build(name):
    make, shape = SMALL[name]
    model = make()
    return (model if name.startswith("cpvt") else randomize(model)).eval(), torch.randn(shape)


@pytest.mark.parametrize("name", SMALL)
def test_copies_and_changed_weights(name):
    model, x = build(name)
    with torch.inference_mode():
        y = model(x)
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert same_bits(twin(x), y)
    other = build(name)[0]
    model.load_state_dict(other.state_dict())
    with torch.inference_mode():
        assert same_bits(model(x), other(x))
        assert not same_bits(model(x), y)


@pytest.mark.parametrize("name", SMALL)
def test_a_training_step_is_seen(name):
    model, x = build(name)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with torch.inference_mode():
        before = model(x)
    model.train()(x).square().mean().backward()
    assert all(p.grad is not None for p in model.parameters())
    optimizer.step()
    with torch.inference_mode():
        after = model.eval()(x)
        assert not same_bits(after, before)
        with hybridops.use("reference"):
            torch.testing.assert_close(model(x), after, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", SMALL)
def test_compiles_as_one_graph(name):
    torch.compiler.reset()
    model, x = build(name)
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-4)


def test_names():
    assert list_models("levit*") == sorted(LEVIT_PARAMETERS)
    assert len(list_models("cpvt*")) == 12
    assert set(list_models()) >= set(CPVT_PARAMETERS)
    with pytest.raises(ValueError, match="'levit_512' is none of cpvt_base"):
        create_model("levit_512")
    with pytest.raises(ValueError, match="no weights of cpvt_tiny to download"):
        create_model("cpvt_tiny", pretrained=True)
    with pytest.raises(ValueError, match="exclude each other"):
        create_model("levit_256", pretrained=True, checkpoint="x.pt")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Levit(img_size=200), "multiple of 16"),
        (lambda: small_levit()(torch.randn(1, 3, 64, 64)), r"must be \(B, 3, 64, 96\), got"),
        (lambda: small_cpvt()(torch.randn(1, 1, 64, 64)), r"must be \(B, 3, H, W\)"),
        (lambda: small_cpvt()(torch.randn(1, 3, 64, 15)), "one .* patch at least"),
        (lambda: small_cpvt(peg_positions=(3,)), "blocks of 0 ... 2"),
        (lambda: small_cpvt(peg_positions=(0, 0)), "must be different"),
        (lambda: small_cpvt(global_pool="max"), "'token' or 'avg'"),
    ],
)
def test_wrong_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_optimized_levit_runs_its_stages_at_once(cpu_library):
    torch.manual_seed(3)
    model, x = randomize(small_levit()).eval(), torch.randn(2, 3, 64, 96)
    with torch.inference_mode():
        before, exact = model(x), copy.deepcopy(model).double()(x.double())
        hybridops.optimize(model)
        with torch.profiler.profile() as seen:
            ours = model(x)
    accurate(ours, before, exact, "levit")
    counts = {event.key: event.count for event in seen.key_averages()}
    assert counts["hybridops::chain"] == 2  # the stages; the mean token and its heads
    assert "hybridops::attention_layer" not in counts
    result = hybridops.verify(model, x)
    assert result.ok, str(result)
    with torch.inference_mode():
        assert torch.equal(hybridops.restore(model)(x), before)
