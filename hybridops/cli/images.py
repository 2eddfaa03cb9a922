"""Photographs to normalised tensors, with pillow and torch alone."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import torch
from torch import Tensor

from . import UserError

if TYPE_CHECKING:
    from PIL import Image

Photograph: TypeAlias = "tuple[str, Image.Image]"  # file name, RGB pixels
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def sample_photographs() -> list[Photograph]:
    """scikit-learn's two sample photographs, china.jpg and flower.jpg, as (name, RGB image)."""
    _need_pillow()
    from PIL import Image

    try:
        from sklearn.datasets import load_sample_images
    except ImportError:
        raise UserError(
            "the sample photographs come with scikit-learn: pip install scikit-learn "
            "(or give image paths)"
        ) from None
    samples = load_sample_images()
    return [
        (Path(name).name, Image.fromarray(pixels))
        for name, pixels in zip(samples.filenames, samples.images, strict=True)
    ]


def open_photographs(paths: list[str]) -> list[Photograph]:
    """Image files as (file name, RGB image). Raises UserError for what cannot be read as one."""
    _need_pillow()
    return [(Path(path).name, _open(Path(path))) for path in paths]


def _need_pillow() -> None:
    try:
        import PIL.Image  # noqa: F401
    except ImportError:
        raise UserError("reading images needs pillow: pip install pillow") from None


def _open(path: Path) -> Image.Image:
    from PIL import Image, ImageOps, UnidentifiedImageError

    if path.is_dir():
        raise UserError(f"{path} is a directory, not an image file")
    try:
        with Image.open(path) as image:
            # EXIF says which way up the camera was held; convert() drops alpha and palettes.
            return _eight_bits(ImageOps.exif_transpose(image)).convert("RGB")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except UnidentifiedImageError:
        raise UserError(f"{path} is not an image that pillow can read") from None
    except (Image.DecompressionBombError, OSError, ValueError, SyntaxError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None


def _eight_bits(image: Image.Image) -> Image.Image:
    """16-bit grey scaled down: convert() alone would clip all of it to white."""
    from PIL import Image

    if not image.mode.startswith("I"):
        return image
    values = np.asarray(image).clip(0, 65535) >> 8
    return Image.fromarray(values.astype(np.uint8))


def to_tensor(
    image: Image.Image,
    size: int = 224,
    crop: float = 0.875,
    mean: tuple[float, ...] = IMAGENET_MEAN,
    std: tuple[float, ...] = IMAGENET_STD,
) -> Tensor:
    """RGB image -> (1, 3, size, size) fp32: shorter side resized to size / crop, centre cut out.

    Both at once: only the centre square is ever resized, so that a 1 x 50,000 image stays small.
    """
    from PIL import Image

    width, height = image.size
    side = crop * min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    box = (left, top, left + side, top + side)
    square = image.resize((size, size), Image.Resampling.BICUBIC, box=box)
    pixels = torch.from_numpy(np.array(square)).permute(2, 0, 1).float() / 255
    shape = (3, 1, 1)
    return ((pixels - torch.tensor(mean).view(shape)) / torch.tensor(std).view(shape))[None]
