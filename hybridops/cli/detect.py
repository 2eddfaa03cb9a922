"""`hybridops detect IMAGE… --out DIR`: what DETR sees on photographs, drawn as boxes."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from .. import models
from ..models import WeightsError, create_model, detr, load_weights
from ..optimize.gates import SEED
from . import UserError
from .images import open_photographs, sample_photographs
from .models import why_silent

if TYPE_CHECKING:
    from PIL import Image

_COLOURS = ("#e6194b", "#3cb44b", "#4363d8", "#f58231", "#911eb4", "#008080", "#9a6324", "#000075")


def run(arguments: argparse.Namespace) -> int:
    """Draw every photograph into arguments.out; exit code 0."""
    name = arguments.model.removeprefix("hybridops:")
    known = models.list_models("detr_*")
    if name not in known:
        raise UserError(f"unknown model {arguments.model!r}: one of {', '.join(known)}")
    if not 0 <= arguments.threshold <= 1:
        raise UserError(f"--threshold must be between 0 and 1, got {arguments.threshold:g}")
    photographs = open_photographs(arguments.images) if arguments.images else sample_photographs()
    folder = _writable(arguments.out)
    model, detail, trained = _load(name, arguments.weights)
    print(f"{name}: {detail}", flush=True)
    for index, (file, image) in enumerate(photographs, 1):
        begin = time.perf_counter()
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        batch = detr.preprocess([pixels])
        with torch.inference_mode():
            prediction = model(batch.images, batch.padding_mask)
        (found,) = detr.detections(prediction, batch, arguments.threshold)
        seconds = time.perf_counter() - begin
        path = folder / f"{index:02d}_{Path(file).stem}.png"
        draw(image, found, path)
        shown = ", ".join(f"{class_name(n)} {s:.2f}" for n, s in _pairs(found)[:5])
        more = f" and {len(found.labels) - 5} more" if len(found.labels) > 5 else ""
        print(
            f"[{index}/{len(photographs)}] {file}: {len(found.labels)} objects in {seconds:.2f} s"
            f"{': ' if shown else ''}{shown}{more} -> {path}",
            flush=True,
        )
    if not trained:
        print("boxes mean nothing: these weights were never trained (--threshold 0 draws them)")
    return 0


def class_name(label: int) -> str:
    """A COCO class; panoptic models also have classes beyond the 91."""
    return detr.COCO[label] if label < len(detr.COCO) else f"class {label}"


def draw(image: Image.Image, found: detr.Objects, path: Path) -> None:
    """The photograph with a box, a name and a score per object, as PNG."""
    from PIL import ImageDraw

    canvas = image.copy()
    pen = ImageDraw.Draw(canvas)
    width = max(2, round(max(image.size) / 400))
    for (label, score), box in reversed(list(zip(_pairs(found), found.boxes, strict=True))):
        colour = _COLOURS[label % len(_COLOURS)]
        limits = (image.width - 1, image.height - 1) * 2
        left, top, right, bottom = (
            min(max(v, 0.0), float(limit)) for v, limit in zip(box.tolist(), limits, strict=True)
        )
        pen.rectangle((left, top, right, bottom), outline=colour, width=width)
        text = f"{class_name(label)} {score:.2f}"
        x0, y0, x1, y1 = pen.textbbox((left, top), text)
        pen.rectangle((x0, y0, x1 + 4, y1 + 4), fill=colour)
        pen.text((left + 2, top + 2), text, fill="white")
    try:
        canvas.save(path)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}") from None


def _pairs(found):
    return list(zip(found.labels.tolist(), found.scores.tolist(), strict=True))


def _writable(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder} is no folder to write to: {error.strerror}") from None
    return folder


def _load(name: str, weights: Path | None) -> tuple[nn.Module, str, bool]:
    """(model in eval mode, where its weights are from, whether they were trained)"""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model = create_model(name).eval()
    if weights is not None:
        try:
            family = load_weights(model, weights)
        except WeightsError as error:
            raise UserError(str(error)) from None
        return model, f"weights of {weights} ({family})", True
    url = detr.PRETRAINED[name]
    why = "" if _is_cached(url) else why_silent(url)
    if not why:
        try:
            print(f"{name}: weights from {url}", flush=True)
            return create_model(name, pretrained=True).eval(), "the authors' weights", True
        except WeightsError as error:
            why = " ".join(str(error).split())
    return model, f"seeded random weights ({why}; --weights FILE takes your own)", False


def _is_cached(url: str) -> bool:
    return (Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]).is_file()
