"""Resizing without antialiasing, which is TensorFlow's default.

A pixel is the weighted sum of the 2×2 (bilinear) or 4×4 (bicubic) pixels around its centre, however many pixels it
covers. No library that we depend on does this and rounds to the nearest level: Pillow's filters widen as an image
shrinks, and its transforms truncate.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

import numpy as np

_STRIP = 32
"""Rows computed at a time, so that the intermediate values stay in a core's cache."""


def sample(image: np.ndarray, height: int, width: int, interpolation: Literal["bilinear", "bicubic"]) -> np.ndarray:
    """Resizes an image as ``tf.image.resize(image, (height, width), interpolation)`` does, rounded to whole levels.

    Pixel centres lie at half-integers, Keys' cubic has a = -0.5, and pixels outside the image are left out of the sum.
    The result is the same to the bit on every machine.

    Args:
      image: uint8 [h, w, c].
      height: height of the result in pixels.
      width: width of the result in pixels.
      interpolation: bilinear or bicubic.

    Returns:
      uint8 [height, width, c].
    """
    channels = image.shape[2]
    rows, row_shares = _taps(image.shape[0], height, interpolation)
    places, column_shares = _taps(image.shape[1], width, interpolation)
    columns = (places[..., None] * channels + np.arange(channels)).reshape(len(places), -1)
    column_shares = column_shares.repeat(channels, axis=1)
    resized = np.empty((height, width * channels), np.uint8)
    for start in range(0, height, _STRIP):
        strip = slice(start, start + _STRIP)
        lines = [image[of].reshape(len(of), -1).astype(np.float32) for of in rows[:, strip]]
        blended = _blend(lines, row_shares[:, strip, None])
        pixels = _blend([blended.take(of, axis=1) for of in columns], column_shares)
        pixels += np.float32(0.5)
        resized[strip] = pixels.clip(0, 255, out=pixels)
    return resized.reshape(height, width, channels)


def _blend(parts: list[np.ndarray], shares: np.ndarray) -> np.ndarray:
    """Returns the weighted sum of the parts; overwrites them."""
    total, *weighted = (np.multiply(part, share, out=part) for part, share in zip(parts, shares, strict=True))
    for part in weighted:
        total += part
    return total


def _taps(size: int, target: int, interpolation: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns the pixels of a row or column that make each pixel of the result, and their weights.

    The indices are int [taps, target], the weights float32 [taps, target].
    """
    count, kernel = _KERNELS[interpolation]
    centres = (np.arange(target) + 0.5) * (size / target) - 0.5
    places = np.floor(centres).astype(np.int64) + np.arange(1 - count // 2, count // 2 + 1)[:, None]
    shares = kernel(np.abs(centres - places))
    shares[(places < 0) | (places >= size)] = 0
    return places.clip(0, size - 1), (shares / shares.sum(axis=0)).astype(np.float32)


def _triangle(distance: np.ndarray) -> np.ndarray:
    return 1 - distance


def _keys(distance: np.ndarray) -> np.ndarray:
    """Keys' cubic convolution (IEEE Transactions on Acoustics, Speech, and Signal Processing 29, 1981)."""
    near = (1.5 * distance - 2.5) * distance**2 + 1
    far = ((-0.5 * distance + 2.5) * distance - 4) * distance + 2
    return np.where(distance <= 1, near, far)


_KERNELS: Mapping[str, tuple[int, Callable[[np.ndarray], np.ndarray]]] = {
    "bilinear": (2, _triangle),
    "bicubic": (4, _keys),
}
"""The number of pixels along a side, and the weight of a pixel as a function of its distance."""
