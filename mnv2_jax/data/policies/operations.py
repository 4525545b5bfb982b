"""The image operations of augmentation policies: (uint8 [h, w, 3], argument, `Canvas`) -> uint8 [h, w, 3].

There are two sets of operations with the same names. `PILLOW` computes as torchvision and timm do on Pillow's images,
`TENSORFLOW` as the TensorFlow model garden (`official/vision/ops/augment.py`). The second keeps even what looks like a
mistake in that library, because its recipes were trained with it:

- rotation, shear and shift mirror the image at its edges, which is the default of Keras' `transform`; the grey with
  which the library means to fill is never used;
- solarize compares with its threshold as uint8, so that 256 becomes 0 and inverts the whole image;
- posterize to 0 bits keeps one bit, since TensorFlow shifts by at most 7;
- contrast blends with the grey h * w / 256, at most 255, whatever the image shows.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import TypeAlias

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

GREY = (128, 128, 128)
_LUMA = np.array([0.2989, 0.5870, 0.1140], np.float32)
"""Weights of red, green and blue in `tf.image.rgb_to_grayscale`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Canvas:
    """Options of an operation, in addition to the image and the argument."""

    fill: tuple[int, int, int]
    """RGB of the pixels that come from outside the image."""
    filters: tuple[Image.Resampling, ...]
    """Filters, of which one is drawn for each rotation, shear and shift."""
    rng: np.random.Generator


Operation: TypeAlias = Callable[[np.ndarray, float, Canvas], np.ndarray]


# --- operations in both sets --------------------------------------------------------------------------------


def identity(image: np.ndarray, *_: object) -> np.ndarray:
    """Returns the image unchanged."""
    return image


def invert(image: np.ndarray, *_: object) -> np.ndarray:
    """Replaces each value by 255 - value."""
    return 255 - image


def equalize(image: np.ndarray, *_: object) -> np.ndarray:
    """Makes the histogram of each channel as flat as possible."""
    return np.asarray(ImageOps.equalize(Image.fromarray(image)))


def brightness(image: np.ndarray, factor: float, *_: object) -> np.ndarray:
    """Blends black (factor 0) with the image (factor 1); like the next three, extrapolates for factors above 1."""
    return np.asarray(ImageEnhance.Brightness(Image.fromarray(image)).enhance(factor))


def solarize(image: np.ndarray, threshold: float, *_: object) -> np.ndarray:
    """Inverts the values that are at least the threshold."""
    return np.where(image < threshold, image, 255 - image)


def solarize_add(image: np.ndarray, addition: float, *_: object) -> np.ndarray:
    """Adds a whole number to the values below 128, up to 255."""
    return np.where(image < 128, np.minimum(image.astype(np.int16) + int(addition), 255), image).astype(np.uint8)


# --- Pillow -------------------------------------------------------------------------------------------------


def autocontrast(image: np.ndarray, *_: object) -> np.ndarray:
    """Stretches each channel to 0..255."""
    return np.asarray(ImageOps.autocontrast(Image.fromarray(image)))


def posterize(image: np.ndarray, bits: float, *_: object) -> np.ndarray:
    """Keeps the 0 to 8 highest bits of each value; 0 gives black, which Pillow's own function refuses."""
    return image & np.uint8(256 - 2 ** (8 - int(bits)))


def color(image: np.ndarray, factor: float, *_: object) -> np.ndarray:
    """Blends the greyscale image (factor 0) with the image (factor 1)."""
    return np.asarray(ImageEnhance.Color(Image.fromarray(image)).enhance(factor))


def contrast(image: np.ndarray, factor: float, *_: object) -> np.ndarray:
    """Blends the mean grey of the image (factor 0) with the image (factor 1)."""
    return np.asarray(ImageEnhance.Contrast(Image.fromarray(image)).enhance(factor))


def sharpness(image: np.ndarray, factor: float, *_: object) -> np.ndarray:
    """Blends the image smoothed by (1 1 1, 1 5 1, 1 1 1) / 13 (factor 0) with the image (factor 1)."""
    return np.asarray(ImageEnhance.Sharpness(Image.fromarray(image)).enhance(factor))


def rotate(image: np.ndarray, degrees: float, canvas: Canvas) -> np.ndarray:
    """Rotates counter-clockwise about the centre."""
    turned = Image.fromarray(image).rotate(degrees, resample=_drawn_filter(canvas), fillcolor=canvas.fill)
    return np.asarray(turned)


def _affine(image: np.ndarray, matrix: tuple[float, ...], canvas: Canvas) -> np.ndarray:
    """Warps the image: the pixel of the result at (x, y) is the image's at (a x + b y + c, d x + e y + f)."""
    source = Image.fromarray(image)
    return np.asarray(
        source.transform(
            source.size, Image.Transform.AFFINE, matrix, resample=_drawn_filter(canvas), fillcolor=canvas.fill
        )
    )


def _drawn_filter(canvas: Canvas) -> Image.Resampling:
    return canvas.filters[canvas.rng.integers(len(canvas.filters))]


PILLOW: Mapping[str, Operation] = {
    "Identity": identity,
    "AutoContrast": autocontrast,
    "Equalize": equalize,
    "Invert": invert,
    "Posterize": posterize,
    "Solarize": solarize,
    "SolarizeAdd": solarize_add,
    "Color": color,
    "Contrast": contrast,
    "Brightness": brightness,
    "Sharpness": sharpness,
    "Rotate": rotate,
    "ShearX": lambda image, by, canvas: _affine(image, (1, by, 0, 0, 1, 0), canvas),
    "ShearY": lambda image, by, canvas: _affine(image, (1, 0, 0, by, 1, 0), canvas),
    "TranslateX": lambda image, pixels, canvas: _affine(image, (1, 0, pixels, 0, 1, 0), canvas),
    "TranslateY": lambda image, pixels, canvas: _affine(image, (1, 0, 0, 0, 1, pixels), canvas),
}


# --- the TensorFlow model garden ----------------------------------------------------------------------------


def tf_autocontrast(image: np.ndarray, *_: object) -> np.ndarray:
    """Computes TensorFlow's `autocontrast`, in float32."""
    low, high = image.min((0, 1)).astype(np.float32), image.max((0, 1)).astype(np.float32)
    scale = np.float32(255) / np.maximum(high - low, 1)
    stretched = np.clip(image * scale - low * scale, 0, 255).astype(np.uint8)
    return np.where(high > low, stretched, image)


def tf_posterize(image: np.ndarray, bits: float, *_: object) -> np.ndarray:
    """Computes TensorFlow's `posterize`, which keeps one bit for 0 and for more than 8 bits."""
    shift = min((8 - int(bits)) % 256, 7)
    return image >> shift << shift


def tf_solarize(image: np.ndarray, threshold: float, *_: object) -> np.ndarray:
    """Computes TensorFlow's `solarize`, which takes the threshold modulo 256."""
    return solarize(image, int(threshold) % 256)


def tf_color(image: np.ndarray, factor: float, *_: object) -> np.ndarray:
    """Computes TensorFlow's `color`, with its grey: 255.5 times the luma in 0..1, truncated."""
    grey = ((image * np.float32(1 / 255)) @ _LUMA * np.float32(255.5)).astype(np.uint8)
    return _blend(np.repeat(grey[..., None], 3, axis=-1), image, factor)


def tf_contrast(image: np.ndarray, factor: float, *_: object) -> np.ndarray:
    """Blends a grey of the value h * w / 256, the mean count of the histogram (factor 0), with the image (factor 1)."""
    height, width = image.shape[:2]
    return _blend(np.full_like(image, min(height * width // 256, 255)), image, factor)


def tf_sharpness(image: np.ndarray, factor: float, *_: object) -> np.ndarray:
    """Computes TensorFlow's `sharpness`, which truncates the smoothed values instead of rounding them."""
    height, width = image.shape[:2]
    wide = image.astype(np.uint16)
    smooth = image.copy()
    if min(height, width) > 2:
        total = 4 * wide[1:-1, 1:-1]
        for y in range(3):
            for x in range(3):
                total += wide[y : y + height - 2, x : x + width - 2]
        smooth[1:-1, 1:-1] = total // 13
    return _blend(smooth, image, factor)


def tf_rotate(image: np.ndarray, degrees: float, *_: object) -> np.ndarray:
    """Computes TensorFlow's `rotate`, about the middle of the pixels' centres."""
    height, width = image.shape[:2]
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    x = ((width - 1) - (cos * (width - 1) - sin * (height - 1))) / 2
    y = ((height - 1) - (sin * (width - 1) + cos * (height - 1))) / 2
    return _mirrored_affine(image, (cos, -sin, x, sin, cos, y))


def cutout(image: np.ndarray, half: float, canvas: Canvas) -> np.ndarray:
    """Paints a grey square of 2 `half` px a side about a random pixel; it may be cut at an edge (arXiv:1708.04552)."""
    height, width = image.shape[:2]
    y, x = canvas.rng.integers(height), canvas.rng.integers(width)
    result = image.copy()
    result[max(0, y - int(half)) : y + int(half), max(0, x - int(half)) : x + int(half)] = GREY
    return result


def _blend(zero: np.ndarray, image: np.ndarray, factor: float) -> np.ndarray:
    # Pillow and TensorFlow both compute in float32 and truncate.
    return np.asarray(Image.blend(Image.fromarray(zero), Image.fromarray(image), factor))


def _mirrored_affine(image: np.ndarray, matrix: tuple[float, ...]) -> np.ndarray:
    """Does what `_affine` does with the nearest pixel, for an image mirrored at its edges: d c b a|a b c d|d c b a."""
    height, width = image.shape[:2]
    a, b, c, d, e, f = np.asarray(matrix, np.float32)
    y, x = np.mgrid[:height, :width].astype(np.float32)
    return image[_mirrored(d * x + e * y + f, height), _mirrored(a * x + b * y + c, width)]


def _mirrored(place: np.ndarray, size: int) -> np.ndarray:
    place = place % (2 * size)
    place = np.where(place < size, place, 2 * size - 1 - place)
    return np.floor(np.clip(place, 0, size - 1) + np.float32(0.5)).astype(np.intp)


TENSORFLOW: Mapping[str, Operation] = {
    "Identity": identity,
    "AutoContrast": tf_autocontrast,
    "Equalize": equalize,
    "Invert": invert,
    "Posterize": tf_posterize,
    "Solarize": tf_solarize,
    "SolarizeAdd": solarize_add,
    "Color": tf_color,
    "Contrast": tf_contrast,
    "Brightness": brightness,
    "Sharpness": tf_sharpness,
    "Rotate": tf_rotate,
    "ShearX": lambda image, by, _: _mirrored_affine(image, (1, by, 0, 0, 1, 0)),
    "ShearY": lambda image, by, _: _mirrored_affine(image, (1, 0, 0, by, 1, 0)),
    "TranslateX": lambda image, pixels, _: _mirrored_affine(image, (1, 0, pixels, 0, 1, 0)),
    "TranslateY": lambda image, pixels, _: _mirrored_affine(image, (1, 0, 0, 0, 1, pixels)),
    "Cutout": cutout,
}
