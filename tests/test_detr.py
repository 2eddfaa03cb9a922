"""DETR against transformers': weights, outputs with and without padding, processing."""

from __future__ import annotations

import copy
import re
from types import SimpleNamespace

import pytest
import torch
from check import accurate, same_bits
from detr_pairs import awake, batch, pair, pixel_mask, random_prediction, small

import hybridops
from hybridops import models
from hybridops.models import WeightsError, create_model, detr, load_weights
from hybridops.models.detr.processing import resized_shape

PARAMETERS = {
    "detr_resnet50": 41_524_768,
    "detr_resnet50_dc5": 41_524_768,
    "detr_resnet101": 60_464_672,
    "detr_resnet101_dc5": 60_464_672,
    "detr_resnet50_panoptic": 42_899_288,
    "detr_resnet50_dc5_panoptic": 42_899_288,
    "detr_resnet101_panoptic": 42_899_288 + 60_464_672 - 41_524_768,
}


@pytest.fixture
def hf(timm):
    return pytest.importorskip("transformers")


@pytest.mark.parametrize(("name", "count"), PARAMETERS.items())
def test_parameter_count(name, count):
    with torch.device("meta"):
        model = create_model(name)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == count


def test_freezing_leaves_what_the_authors_train():
    with torch.device("meta"):
        model = create_model("detr_resnet50")
    model.backbone.freeze_early()
    frozen = {k.split(".")[1] for k, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {"conv1", "layer1"}
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 41_302_368


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("kind", ["plain", "dilated", "masks"])
def test_outputs(hf, kind, padded, dtype):
    ours, theirs = pair(hf, masks=kind == "masks", dilated=kind == "dilated")
    images, mask = batch(padded)
    exact = copy.deepcopy(theirs).to(dtype).double()
    ours, theirs, images = ours.to(dtype), theirs.to(dtype), images.to(dtype)
    theirs = theirs.to(memory_format=torch.channels_last)  # as ours: oneDNN rounds otherwise there
    with torch.no_grad():
        y = ours(images, mask)
        torchs = theirs(images, pixel_mask(mask))
        y64 = exact(images.double(), pixel_mask(mask))
    for name, theirs_name in (
        ("logits", "logits"),
        ("boxes", "pred_boxes"),
        ("masks", "pred_masks"),
    ):
        if getattr(y, name) is not None:
            accurate(getattr(y, name), torchs[theirs_name], y64[theirs_name], name)
    assert (y.masks is None) == (kind != "masks")
    assert y.auxiliary == ()


def test_padding_is_left_out():
    model = awake(small())
    images, mask = batch(padded=True)
    noise = images + mask[:, None] * torch.randn_like(images)
    with torch.no_grad():
        pos = model(images, mask).logits
        assert not torch.equal(pos[1], model(images).logits[1])
        with hybridops.use("reference"):
            torch.testing.assert_close(model(images, mask).logits, pos, rtol=1e-4, atol=1e-4)
        # noise in the padding reaches the image through the convolutions' borders alone
        far = mask.clone()
        far[1, :, 32:] = True
        away = torch.where(mask[:, None] & (torch.arange(160) > 140), noise, images)
        assert same_bits(model(away, far).logits[0], model(images, far).logits[0])


def official_names(state):
    """Ours as the authors write them: a mask head stands beside a whole DETR."""
    panoptic = any(k.startswith("mask_head.") for k in state)
    named = {}
    for key, value in state.items():
        part = key.split(".")[0]
        if part == "backbone":
            key = key.replace("backbone.", "backbone.0.body.", 1)
        elif part in ("encoder", "decoder"):
            key = "transformer." + key
        wrapped = panoptic and part not in ("mask_head", "bbox_attention")
        named["detr." + key if wrapped else key] = value
    return named


def legacy_names(state):
    """transformers 5's names as hub checkpoints of transformers 4 have them."""
    named = {}
    for key, value in state.items():
        key = key.replace("backbone.model.", "backbone.conv_encoder.model.")
        key = key.replace(".o_proj.", ".out_proj.")
        key = re.sub(r"(layers\.\d+)\.mlp\.fc", r"\1.fc", key)
        key = re.sub(r"(bbox_attention\.[qk])_proj", r"\1_linear", key)
        for i, theirs in ((1, "conv1"), (2, "conv2")):
            key = key.replace(f"mask_head.{theirs}.conv", f"mask_head.lay{i}")
            key = key.replace(f"mask_head.{theirs}.norm", f"mask_head.gn{i}")
        for i in range(3):
            stage = f"mask_head.fpn_stages.{i}."
            key = key.replace(stage + "fpn_adapter", f"mask_head.adapter{i + 1}")
            key = key.replace(stage + "refine.conv", f"mask_head.lay{i + 3}")
            key = key.replace(stage + "refine.norm", f"mask_head.gn{i + 3}")
        named[key.replace("output_conv", "out_lay")] = value
    return named


@pytest.mark.parametrize("masks", [False, True], ids=["boxes", "masks"])
def test_names_of_other_implementations(hf, masks):
    ours, theirs = pair(hf, masks=masks)
    state = ours.state_dict()
    assert "transformer.encoder.layers.0.self_attn.in_proj_weight" in "\n".join(
        official_names(state)
    )
    for family, named in (
        ("transformers", legacy_names(theirs.state_dict())),
        ("official", official_names(state)),
        ("hybridops", state),
    ):
        fresh = small(masks=masks)
        extra = {"detr.model.backbone.model.bn1.num_batches_tracked": torch.tensor(0)}
        assert load_weights(fresh, named | (extra if family == "transformers" else {})) == family
        assert all(same_bits(v, state[k]) for k, v in fresh.state_dict().items())


def test_weights_that_do_not_fit_change_nothing(hf):
    ours, theirs = pair(hf)
    state = theirs.state_dict()
    del state["model.encoder.layers.1.self_attn.k_proj.weight"]
    state["class_labels_classifier.weight"] = torch.zeros(5, 64)
    fresh = small()
    before = copy.deepcopy(fresh.state_dict())
    with pytest.raises(WeightsError, match=r"encoder.layers.1.self_attn.in_proj_weight") as error:
        load_weights(fresh, state)
    assert error.value.mismatched == {"class_embed.weight": ((12, 64), (5, 64))}
    assert "encoder.layers.1.self_attn.q_proj.weight" in error.value.unexpected
    assert all(same_bits(v, before[k]) for k, v in fresh.state_dict().items())
    with pytest.raises(WeightsError, match="no weights that Detr knows"):
        load_weights(fresh, {"something": torch.zeros(1)})


def test_parts_that_cannot_be_joined_are_named(hf):
    """Torch would join integers with reals, and rows of unequal counts."""
    ours, theirs = pair(hf)
    before, state = copy.deepcopy(ours.state_dict()), theirs.state_dict()
    k, q = (f"encoder.layers.0.self_attn.{letter}_proj.weight" for letter in "kq")

    def error_of(**parts):
        named = {f"model.encoder.layers.0.self_attn.{n}_proj.weight": v for n, v in parts.items()}
        with pytest.raises(WeightsError, match="do not fit Detr") as error:
            load_weights(ours, state | named)
        assert not error.value.missing + error.value.unexpected
        assert all(same_bits(v, before[key]) for key, v in ours.state_dict().items())
        return error.value

    square = state[f"model.{k}"]
    for odd in (square.int(), square.to("meta"), square.to_sparse(), square.to(torch.complex64)):
        assert error_of(k=odd).unusable == (k,)
    unequal = error_of(k=torch.zeros(96, 64), q=torch.zeros(32, 64)).mismatched
    assert unequal == {q: ((64, 64), (32, 64)), k: ((64, 64), (96, 64))}
    assert error_of(k=torch.zeros(64, 63)).mismatched == {k: ((64, 64), (64, 63))}
    load_weights(ours, state | {f"model.{k}": square.double()})


SIZES = [(480, 640), (640, 427), (427, 640), (800, 1066), (50, 2000), (33, 31), (1333, 1333)]


def test_processing_is_transformers_own(hf):
    from transformers.image_transforms import get_size_with_aspect_ratio
    from transformers.models.detr.image_processing_detr import DetrImageProcessor

    for size in SIZES + [(h, w) for h in range(30, 90, 7) for w in range(31, 300, 13)]:
        for shortest, longest in ((800, 1333), (64, 100)):
            expected = get_size_with_aspect_ratio(size, shortest, longest)
            assert resized_shape(size, shortest, longest) == expected, size
    photographs = [torch.randint(0, 256, (3, *size), dtype=torch.uint8) for size in SIZES[:2]]
    processor = DetrImageProcessor(size={"shortest_edge": 64, "longest_edge": 100})
    theirs = processor(photographs, return_tensors="pt")
    ours = detr.preprocess(photographs, 64, 100)
    torch.testing.assert_close(ours.images, theirs["pixel_values"], rtol=0, atol=1e-5)
    assert torch.equal(ours.padding_mask, theirs["pixel_mask"] == 0)
    assert detr.preprocess(photographs[:1]).padding_mask is None

    prediction = random_prediction()
    outputs = SimpleNamespace(logits=prediction.logits, pred_boxes=prediction.boxes)
    expected = processor.post_process_object_detection(outputs, 0.3, ours.sizes)
    for got, want in zip(detr.detections(prediction, ours, 0.3), expected, strict=True):
        order = want["scores"].argsort(descending=True)
        assert 0 < len(order) < 12
        torch.testing.assert_close(got.scores, want["scores"][order])
        torch.testing.assert_close(got.boxes, want["boxes"][order])
        assert torch.equal(got.labels, want["labels"][order])


@pytest.mark.parametrize("size", [(1, 200), (1, 5000), (5000, 1)])
def test_a_strip_stays_an_image(size):
    batch = detr.preprocess([torch.zeros(3, *size, dtype=torch.uint8)])
    assert min(batch.resized[0]) >= 1
    with torch.inference_mode():
        (found,) = detr.detections(small(1)(batch.images, batch.padding_mask), batch, 0.0)
    assert found.boxes.shape == (12, 4)


def test_masks_come_back_in_the_photographs_size():
    photographs = [torch.randint(0, 256, (3, *s), dtype=torch.uint8) for s in ((60, 90), (40, 70))]
    prepared = detr.preprocess(photographs, 64, 100)
    prediction = random_prediction(masks=True)
    size = tuple(-(-n // 4) for n in prepared.images.shape[2:])
    masks = torch.full((2, 12, *size), -1.0)
    masks[:, :, :, : size[1] // 2] = 1.0  # the left half of the padded image
    for found, (_, w), photograph in zip(
        detr.detections(prediction._replace(masks=masks), prepared, 0.1),
        prepared.resized,
        photographs,
        strict=True,
    ):
        assert found.masks.shape == (len(found.scores), *photograph.shape[1:])
        share = found.masks.float().mean().item()
        assert abs(share - prepared.images.shape[3] / 2 / w) < 0.05
    none = detr.detections(prediction._replace(masks=masks), prepared, 1.1)[0]
    assert none.masks.shape == (0, 60, 90)


def test_what_does_not_fit_the_model():
    model = small()
    with pytest.raises(ValueError, match=r"images must be \(B, 3, H, W\), got \(2, 1, 64, 64\)"):
        model(torch.zeros(2, 1, 64, 64))
    with pytest.raises(TypeError, match="padding_mask must be bool"):
        model(torch.zeros(2, 3, 64, 64), torch.zeros(2, 64, 64))
    with pytest.raises(ValueError, match=r"padding_mask must be \(2, 64, 64\), got \(2, 64, 32\)"):
        model(torch.zeros(2, 3, 64, 64), torch.zeros(2, 64, 32, dtype=torch.bool))
    with pytest.raises(TypeError, match="must be uint8"):
        detr.preprocess([torch.zeros(3, 8, 8)])
    with pytest.raises(ValueError, match="got none"):
        detr.preprocess([])


def test_other_weights_are_seen_after_an_evaluation():
    model, other = awake(small()), small()
    images, mask = batch(padded=True)
    with torch.no_grad():
        before = model(images, mask).logits
        model.load_state_dict(other.state_dict())
        torch.testing.assert_close(model(images, mask).logits, other(images, mask).logits)
        assert not torch.equal(model(images, mask).logits, before)


def test_a_block_that_is_watched_keeps_its_result():
    model = awake(small())
    images, _ = batch(padded=False)
    seen = {}

    def keep(name):
        def hook(module, args, output):
            seen[name] = (output, output.clone())

        return hook

    for name in ("layer1.0", "layer2.1"):
        model.backbone.get_submodule(name).register_forward_hook(keep(name))
    with torch.no_grad():
        features = model.backbone(images)
        with hybridops.use("reference"):
            plain = model.backbone(images)
    for got, expected in zip(features, plain, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert len(seen) == 2
    assert all(same_bits(now, then) for now, then in seen.values())


def test_compiles_whole():
    model = awake(small(1, layers=(1, 1)))
    images, mask = batch(padded=True)
    with torch.no_grad():
        expected = model(images, mask)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        for image, m in ((images, mask), (images[:1], mask[:1])):
            torch.testing.assert_close(compiled(image, m).boxes, expected.boxes[: len(image)])


def test_names():
    assert len(detr.COCO) == 91
    named = {1: "person", 17: "cat", 44: "bottle", 67: "dining table", 90: "toothbrush"}
    assert {i: detr.COCO[i] for i in named} == named
    assert detr.COCO.count("N/A") == 11
    assert set(PARAMETERS) <= set(models.list_models("detr_*"))
