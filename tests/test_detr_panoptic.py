"""detr.segments: transformers' panoptic post-processing, and what that gets wrong."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from hybridops.models import detr
from hybridops.models.detr import Batch, Prediction, segments

CLASSES, QUERIES, SIZES = 6, 14, [(37, 50), (64, 33)]


@pytest.fixture
def processor(timm):
    transformers = pytest.importorskip("transformers")
    return transformers.DetrImageProcessor()


def smooth(*shape):
    """Blobs: what masks look like, so that whole segments win, lose and overlap."""
    coarse = torch.randn(*shape[:-2], 3, 4) * 6
    return F.interpolate(coarse, shape[-2:], mode="bilinear")


def random_prediction(seed):
    torch.manual_seed(seed)
    logits = torch.randn(2, QUERIES, CLASSES + 1) * 4
    return Prediction(logits, torch.rand(2, QUERIES, 4), masks=smooth(2, QUERIES, 16, 20))


def whole_batch(sizes=SIZES, resized=((64, 80), (64, 80))):
    return Batch(torch.zeros(len(sizes), 3, 64, 80), None, list(sizes), list(resized))


def theirs(processor, prediction, stuff, **thresholds):
    outputs = SimpleNamespace(logits=prediction.logits, pred_masks=prediction.masks)
    return processor.post_process_panoptic_segmentation(
        outputs, label_ids_to_fuse=set(stuff), target_sizes=SIZES, **thresholds
    )


@pytest.mark.parametrize("stuff", [(), (1, 4)], ids=["things", "stuff"])
@pytest.mark.parametrize("threshold", [0.3, 0.85, 1.0])
def test_as_transformers(processor, stuff, threshold):
    fused = compared = 0
    for seed in range(24):
        prediction = random_prediction(seed)
        ours = segments(prediction, whole_batch(), threshold, 0.2, 0.1, stuff)
        expected = theirs(
            processor,
            prediction,
            stuff,
            threshold=threshold,
            mask_threshold=0.2,
            overlap_mask_area_threshold=0.1,
        )
        for mine, other, size in zip(ours, expected, SIZES, strict=True):
            assert mine.map.shape == size
            assert mine.map.dtype == torch.int32
            info = other["segments_info"]
            owners = {s["id"]: s["label_id"] for s in info}
            if any(owners[s["id"]] != s["label_id"] for s in info):
                continue  # it gave one id to two kinds: see below
            merged = [s for i, s in enumerate(info) if s["id"] in [t["id"] for t in info[:i]]]
            if any(not s["was_fused"] for s in merged):
                continue  # one id to two things of a kind
            fused += len(merged)
            compared += 1
            assert torch.equal(mine.map, other["segmentation"].clamp_min(0).int())
            assert mine.labels.tolist() == [owners[i] for i in sorted(owners)]
            for i, score in enumerate(mine.scores.tolist(), 1):
                best = max(s["score"] for s in info if s["id"] == i)
                assert score == pytest.approx(best, abs=2e-6)
    assert compared > 12
    assert (fused > 0) == (bool(stuff) and threshold < 1)


def test_ids_stay_different_behind_merged_stuff(processor):
    """stuff, thing, the same stuff, thing: transformers gives both things the id 2."""
    masks = torch.full((1, 4, 8, 8), -20.0)
    for query in range(4):
        masks[0, query, :, 2 * query : 2 * query + 2] = 20.0
    logits = torch.full((1, 4, CLASSES + 1), -20.0)
    for query, label in enumerate((5, 0, 5, 1)):
        logits[0, query, label] = 20.0 + query
    prediction = Prediction(logits, torch.rand(1, 4, 4), masks=masks)
    batch = Batch(torch.zeros(1, 3, 32, 32), None, [(8, 8)], [(32, 32)])
    (found,) = segments(prediction, batch, stuff={5})
    assert found.map[0, ::2].tolist() == [1, 2, 1, 3]
    assert found.labels.tolist() == [5, 0, 1]
    (apart,) = segments(prediction, batch, stuff=())
    assert apart.map[0, ::2].tolist() == [1, 2, 3, 4]
    outputs = SimpleNamespace(logits=logits, pred_masks=masks)
    (other,) = processor.post_process_panoptic_segmentation(outputs, label_ids_to_fuse={5})
    assert [s["id"] for s in other["segments_info"]] == [1, 2, 1, 2]


def test_padding_is_cut_off():
    """An image beside a larger one gives the map that it gives alone, but for borders."""
    masks = smooth(1, QUERIES, 16, 20)
    logits = torch.randn(1, QUERIES, CLASSES + 1) * 4
    padded = F.pad(masks, (0, 4, 0, 8), value=30.0)  # all claim what is not there
    alone = Batch(torch.zeros(1, 3, 64, 80), None, [(64, 80)], [(64, 80)])
    beside = Batch(torch.zeros(1, 3, 96, 96), torch.ones(1), [(64, 80)], [(64, 80)])
    thresholds = (0.3, 0.2, 0.1, ())
    (a,) = segments(Prediction(logits, torch.rand(1), masks=masks), alone, *thresholds)
    (b,) = segments(Prediction(logits, torch.rand(1), masks=padded), beside, *thresholds)
    assert len(a.labels) > 1
    inner = (slice(0, 60), slice(0, 76))
    assert (a.map[inner] == b.map[inner]).float().mean() > 0.99


def test_a_model_without_masks_is_refused():
    prediction = random_prediction(0)._replace(masks=None)
    with pytest.raises(ValueError, match="no mask head"):
        segments(prediction, whole_batch())


def test_a_model_gives_segments():
    model = detr.Detr(
        (1, 1, 1, 1),
        num_classes=CLASSES,
        num_queries=5,
        dim=32,
        heads=8,
        hidden=48,
        layers=(1, 1),
        masks=True,
    ).eval()
    photographs = [torch.randint(256, (3, 40, 50), dtype=torch.uint8) for _ in range(2)]
    batch = detr.preprocess(photographs, 64, 96)
    found = segments(model(batch.images, batch.padding_mask), batch, threshold=0.0)
    for one in found:
        assert one.map.shape == (40, 50)
        assert one.map.max() == len(one.labels) == len(one.scores)
