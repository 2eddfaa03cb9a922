"""DETR's matching and set loss against transformers', with gradients; targets that do not fit."""

from __future__ import annotations

import copy

import pytest
import torch
from check import accurate
from detr_pairs import batch, pair, pixel_mask, random_prediction, small, targets, theirs_of

from hybridops.models import detr
from hybridops.models.detr import Weights, keys, set_loss


@pytest.fixture
def hf(timm):
    return pytest.importorskip("transformers")


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
def test_loss_and_gradients(hf, padded):
    ours, theirs = (model.train() for model in pair(hf))
    images, mask = batch(padded)
    wanted = targets()
    exact = copy.deepcopy(theirs).double()

    def their_loss(model, dtype):
        labels = [
            {k: v.to(dtype) if v.is_floating_point() else v for k, v in theirs_of(t).items()}
            for t in wanted
        ]
        torch.set_default_dtype(dtype)  # their loss makes a tensor of class weights in it
        loss = model(images.to(dtype), pixel_mask(mask), labels=labels).loss
        torch.set_default_dtype(torch.float32)
        loss.backward()
        grads = {k: p.grad for k, p in model.named_parameters() if p.grad is not None}
        return loss.detach(), keys.own_keys("transformers", grads)

    torchs, torchs_grads = their_loss(theirs, torch.float32)
    exact_loss, exact_grads = their_loss(exact, torch.float64)
    prediction = ours(images, mask)
    assert len(prediction.auxiliary) == 1
    loss = set_loss(prediction._replace(auxiliary=()), wanted)["loss"]
    loss.backward()
    accurate(loss.detach(), torchs, exact_loss, "loss")
    grads = {k: p.grad for k, p in ours.named_parameters() if p.grad is not None}
    assert set(grads) == set(torchs_grads)
    scale = max(g.square().mean().sqrt().item() for g in exact_grads.values())
    for name, grad in grads.items():
        accurate(grad, torchs_grads[name], exact_grads[name], name, factor=3, scale=scale)


NAMES = {"classes": "loss_ce", "l1": "loss_bbox", "giou": "loss_giou"}
NAMES |= {"mask": "loss_mask", "dice": "loss_dice"}


@pytest.mark.parametrize("masks", [False, True], ids=["boxes", "masks"])
def test_every_part_of_the_loss_and_of_its_auxiliary_layers(hf, masks):
    from transformers.loss.loss_for_object_detection import (
        ForObjectDetectionLoss,
        ForSegmentationLoss,
    )

    config = hf.DetrConfig(num_labels=11, decoder_layers=3, auxiliary_loss=True)
    prediction, wanted = random_prediction(masks, layers=3), targets(masks)
    stack = (*prediction.auxiliary, prediction)
    outputs = (torch.stack([p.logits for p in stack]), torch.stack([p.boxes for p in stack]))
    labels = [theirs_of(t) for t in wanted]
    shown = (prediction.masks,) if masks else ()
    theirs = ForSegmentationLoss if masks else ForObjectDetectionLoss
    total, parts, _ = theirs(
        prediction.logits, labels, "cpu", prediction.boxes, *shown, config, *outputs
    )
    ours = set_loss(prediction, wanted)
    torch.testing.assert_close(ours["loss"], total)
    for name, value in ours.items():
        if name != "loss":
            stem, _, layer = name.partition("_")
            torch.testing.assert_close(value, parts[NAMES[stem] + (layer and f"_{layer}")])
    leaves = [t for p in stack for t in (p.logits, p.boxes)] + list(shown)
    mine = torch.autograd.grad(ours["loss"], leaves)
    for got, expected in zip(mine, torch.autograd.grad(total, leaves), strict=True):
        torch.testing.assert_close(got, expected)


def test_no_objects_and_broken_predictions_still_give_a_loss():
    empty = [{"labels": torch.zeros(0, dtype=torch.int64), "boxes": torch.zeros(0, 4)}] * 2
    loss = set_loss(random_prediction(), empty)
    assert loss["l1"] == 0
    assert loss["loss"] == loss["classes"] > 0
    prediction = random_prediction()
    boxes = prediction.boxes.detach().clone()
    boxes[0, 3] = torch.nan
    pairs = detr.match(prediction._replace(boxes=boxes), targets(), Weights())
    assert 3 not in pairs[0][0]


def test_what_does_not_fit_the_loss():
    prediction, (first, second) = random_prediction(), targets()
    with pytest.raises(ValueError, match="2 images need 2 targets, got 1"):
        set_loss(prediction, [first])
    with pytest.raises(ValueError, match=r"boxes of image 0 must be \(3, 4\), got \(2, 4\)"):
        set_loss(prediction, [first | {"boxes": first["boxes"][:2]}, second])
    with pytest.raises(ValueError, match="labels of image 0 must be in 0 ... 10"):
        set_loss(prediction, [first | {"labels": first["labels"] + 11}, second])


@pytest.mark.parametrize(
    ("error", "wrong", "match"),
    [
        (
            TypeError,
            {"labels": torch.tensor([1.0, 2.0, 3.0])},
            "labels .* int64, got torch.float32",
        ),
        (TypeError, {"labels": torch.tensor([True, False, True])}, "labels .* got torch.bool"),
        (ValueError, {"labels": torch.tensor([[1], [2], [3]])}, r"labels .* \(n,\), got \(3, 1\)"),
        (ValueError, {"labels": torch.tensor([1, -1, 3])}, r"0 ... 10, got \[1, -1, 3\]"),
        (TypeError, {"boxes": torch.ones(3, 4).int()}, "boxes .* floating-point, got torch.int32"),
        (ValueError, {"boxes": torch.full((3, 4), torch.nan)}, r"must be finite .*, got \[nan"),
        (ValueError, {"boxes": torch.tensor([[0.5, 0.5, -0.1, 0.1]] * 3)}, "width, height"),
        (ValueError, {"boxes": torch.tensor([[320.0, 240.0, 50.0, 50.0]] * 3)}, "fractions"),
        (ValueError, {"masks": torch.zeros(3, 8)}, r"masks .* \(3, H, W\), got \(3, 8\)"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_wrong_targets_are_refused_by_name(error, wrong, match):
    first, second = targets(masks=True)
    prediction = random_prediction(masks=True)
    with pytest.raises(error, match=match):
        set_loss(prediction, [first | wrong, second])
    with pytest.raises(ValueError, match="image 1 has no boxes"):
        set_loss(prediction, [first, {"labels": second["labels"]}])


def test_it_trains():
    torch.manual_seed(0)
    model = small(1, drop_rate=0.1, layers=(1, 2)).train()
    images, mask = batch(padded=True)
    images, mask = images[..., :96], mask[..., :96]
    wanted = targets()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = set_loss(model(images, mask), wanted)["loss"]
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
