"""The image operations of augmentation policies: (uint8 [h, w, 3], argument, `Canvas`) -> uint8 [h, w, 3].

Two sets with the same names. `PILLOW` computes as torchvision and timm do on Pillow's images, `TENSORFLOW` as the
TensorFlow model garden (`official/vision/ops/augment.py`). The second keeps what that library does, be it meant or
not, because its recipes were trained with it:

- rotation, shear and shift mirror the image at its edges: `transform` of Keras does so unless told otherwise, and the
  grey that the library would fill with never comes in;
- solarize compares with its threshold as uint8, so that 256 is 0 and inverts the whole image;
- posterize keeps one bit where none was asked for: TensorFlow shifts by at most 7;
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
    """Options of an operation beside its image and its argument."""

    fill: tuple[int, int, int]
    """RGB of what comes in from outside the image."""
    filters: tuple[Image.Resampling, ...]
    """One of them is drawn for each rotation, shear and shift."""
    rng: np.random.Generator


Operation: TypeAlias = Callable[[np.ndarray, float, Canvas], np.ndarray]


# --- both ---------------------------------------------------------------------------------------------------


def identity(image: np.ndarray, *_: object) -> np.ndarray:
    """The image itself."""
    return image


def invert(image: np.ndarray, *_: object) -> np.ndarray:
    """255 - value."""
    return 255 - image


def equalize(image: np.ndarray, *_: object) -> np.ndarray:
    """Each channel's histogram is made as flat as can be."""
    return np.asarray(ImageOps.equalize(Image.fromarray(image)))


def brightness(image: np.ndarray, factor: float, *_: object) -> np.ndarray:
    """Factor 0: black, 1: the image; beyond 1 it goes on in that direction, as do the other three."""
    return np.asarray(ImageEnhance.Brightness(Image.fromarray(image)).enhance(factor))


def solarize(image: np.ndarray, threshold: float, *_: object) -> np.ndarray:
    """Values from the threshold on are inverted."""
    return np.where(image < threshold, image, 255 - image)


def solarize_add(image: np.ndarray, addition: float, *_: object) -> np.ndarray:
    """A whole number is added to values below 128; the sum is at most 255."""
    return np.where(image < 128, np.minimum(image.astype(np.int16) + int(addition), 255), image).astype(np.uint8)


# --- Pillow -------------------------------------------------------------------------------------------------


def autocontrast(image: np.ndarray, *_: object) -> np.ndarray:
    """Each channel is stretched to 0..255."""
    return np.asarray(ImageOps.autocontrast(Image.fromarray(image)))


def posterize(image: np.ndarray, bits: float, *_: object) -> np.ndarray:
    """The highest bits of each value are kept, 0 to 8 of them; Pillow's own refuses 0, which gives black."""
    return image & np.uint8(256 - 2 ** (8 - int(bits)))


def color(image: np.ndarray, factor: float, *_: object) -> np.ndarray:
    """Factor 0: grey, 1: the image."""
    return np.asarray(ImageEnhance.Color(Image.fromarray(image)).enhance(factor))


def contrast(image: np.ndarray, factor: float, *_: object) -> np.ndarray:
    """Factor 0: the mean grey everywhere, 1: the image."""
    return np.asarray(ImageEnhance.Contrast(Image.fromarray(image)).enhance(factor))


def sharpness(image: np.ndarray, factor: float, *_: object) -> np.ndarray:
    """Factor 0: smoothed by (1 1 1, 1 5 1, 1 1 1) / 13, 1: the image."""
    return np.asarray(ImageEnhance.Sharpness(Image.fromarray(image)).enhance(factor))


def rotate(image: np.ndarray, degrees: float, canvas: Canvas) -> np.ndarray:
    """Counter-clockwise about the centre."""
    turned = Image.fromarray(image).rotate(degrees, resample=_drawn_filter(canvas), fillcolor=canvas.fill)
    return np.asarray(turned)


def _affine(image: np.ndarray, matrix: tuple[float, ...], canvas: Canvas) -> np.ndarray:
    """A pixel of the result at (x, y) is that of the image at (a x + b y + c, d x + e y + f)."""
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
    """TensorFlow's `autocontrast`, in float32."""
    low, high = image.min((0, 1)).astype(np.float32), image.max((0, 1)).astype(np.float32)
    scale = np.float32(255) / np.maximum(high - low, 1)
    stretched = np.clip(image * scale - low * scale, 0, 255).astype(np.uint8)
    return np.where(high > low, stretched, image)


def tf_posterize(image: np.ndarray, bits: float, *_: object) -> np.ndarray:
    """TensorFlow's `posterize`; no bit, and more than 8, are one bit."""
    shift = min((8 - int(bits)) % 256, 7)
    return image >> shift << shift


def tf_solarize(image: np.ndarray, threshold: float, *_: object) -> np.ndarray:
    """TensorFlow's `solarize`, modulo 256."""
    return solarize(image, int(threshold) % 256)


def tf_color(image: np.ndarray, factor: float, *_: object) -> np.ndarray:
    """TensorFlow's `color`, with its grey: truncated at 255.5 times its share."""
    grey = ((image * np.float32(1 / 255)) @ _LUMA * np.float32(255.5)).astype(np.uint8)
    return _blend(np.repeat(grey[..., None], 3, axis=-1), image, factor)


def tf_contrast(image: np.ndarray, factor: float, *_: object) -> np.ndarray:
    """Factor 0: the grey that has the value of the histogram's mean count."""
    height, width = image.shape[:2]
    return _blend(np.full_like(image, min(height * width // 256, 255)), image, factor)


def tf_sharpness(image: np.ndarray, factor: float, *_: object) -> np.ndarray:
    """TensorFlow's `sharpness`: the smoothed values are truncated, not rounded."""
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
    """TensorFlow's `rotate`, about the middle of the pixels' centres."""
    height, width = image.shape[:2]
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    x = ((width - 1) - (cos * (width - 1) - sin * (height - 1))) / 2
    y = ((height - 1) - (sin * (width - 1) + cos * (height - 1))) / 2
    return _mirrored_affine(image, (cos, -sin, x, sin, cos, y))


def cutout(image: np.ndarray, half: float, canvas: Canvas) -> np.ndarray:
    """A grey square of twice `half` px about a random pixel; it may reach beyond the image (arXiv:1708.04552)."""
    height, width = image.shape[:2]
    y, x = canvas.rng.integers(height), canvas.rng.integers(width)
    result = image.copy()
    result[max(0, y - int(half)) : y + int(half), max(0, x - int(half)) : x + int(half)] = GREY
    return result


def _blend(zero: np.ndarray, image: np.ndarray, factor: float) -> np.ndarray:
    # In float32 and truncated, here as there.
    return np.asarray(Image.blend(Image.fromarray(zero), Image.fromarray(image), factor))


def _mirrored_affine(image: np.ndarray, matrix: tuple[float, ...]) -> np.ndarray:
    """`_affine` at the nearest pixel, of an image continued by its mirror image: d c b a | a b c d | d c b a."""
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
