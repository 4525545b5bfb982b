"""Pictures of a class for each pixel: colours, overlays on the image, a legend."""

from __future__ import annotations

import colorsys
import functools
import io
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from mnv2_jax.config import IGNORED

_GOLDEN = (5**0.5 - 1) / 2
_SHARE = 0.55
"""Share of the class colour in an overlay; the rest is the image in grey."""
_ROW_PX = 16


@functools.cache
def palette() -> np.ndarray:
    """Returns the colours of class numbers, uint8 [256, 3].

    Hues go round by the golden ratio, so that neighbouring numbers differ most, and none is as dark as what is ignored.
    """
    colours = [
        colorsys.hsv_to_rgb(0.58 + number * _GOLDEN % 1, (0.75, 0.5, 1.0)[number % 3], (0.95, 0.8)[number % 2])
        for number in range(IGNORED)
    ]
    return np.rint(255 * np.array([*colours, (0.0, 0.0, 0.0)])).astype(np.uint8)


def colour_of(number: int) -> tuple[int, ...]:
    """Returns the colour of a class of any number; colours come again after 255 classes."""
    return tuple(palette()[number % IGNORED].tolist())


def overlay(image: np.ndarray, class_map: np.ndarray) -> np.ndarray:
    """Lays the colours of the classes over an image; ignored pixels stay grey.

    Args:
      image: uint8 [h, w, 3].
      class_map: uint8 [h, w].
    """
    grey = np.asarray(Image.fromarray(image).convert("L"), np.float32)[..., None]
    mixed = (1 - _SHARE) * grey + _SHARE * palette()[class_map].astype(np.float32)
    return np.where((class_map == IGNORED)[..., None], grey, mixed).astype(np.uint8)


def legend(names: Sequence[str], numbers: Sequence[int]) -> np.ndarray:
    """Draws the colours of some classes with numbers and names below each other, uint8 [h, w, 3] on white.

    The numbers are those of the classes in masks; they also tell names apart whose letters the font lacks.

    Args:
      names: names by class.
      numbers: the classes to show.
    """
    texts = [f"{number} {names[number]}" for number in numbers]
    draw = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    width = max([round(draw.textlength(text)) for text in texts], default=0) + 2 * _ROW_PX
    image = Image.new("RGB", (width, max(len(texts), 1) * _ROW_PX + 4), "white")
    draw = ImageDraw.Draw(image)
    for row, (number, text) in enumerate(zip(numbers, texts, strict=True)):
        top = row * _ROW_PX + 4
        draw.rectangle((4, top, 4 + _ROW_PX - 6, top + _ROW_PX - 6), fill=colour_of(number), outline="grey")
        draw.text((_ROW_PX + 4, top - 1), text, fill="black")
    return np.asarray(image)


def beside(pictures: Sequence[np.ndarray], gap_px: int = 2) -> np.ndarray:
    """Puts pictures, uint8 [h, w, 3] of any sizes, beside each other on white."""
    height = max(picture.shape[0] for picture in pictures)
    width = sum(picture.shape[1] for picture in pictures) + gap_px * (len(pictures) - 1)
    canvas, left = np.full((height, width, 3), 255, np.uint8), 0
    for picture in pictures:
        canvas[: picture.shape[0], left : left + picture.shape[1]] = picture
        left += picture.shape[1] + gap_px
    return canvas


def png(pixels: np.ndarray) -> bytes:
    """Encodes an image, uint8 [h, w, 3], as a PNG."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def mask_png(class_map: np.ndarray) -> bytes:
    """Encodes class numbers, uint8 [h, w], as a PNG of indices with the colours of `palette`."""
    image = Image.fromarray(class_map)
    image.putpalette(palette().tobytes())
    file = io.BytesIO()
    image.save(file, "PNG", optimize=True)
    return file.getvalue()
