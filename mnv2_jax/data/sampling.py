"""Resizing without antialiasing, as TensorFlow resizes unless it is asked for more.

A pixel is the weighted sum of the 2×2 (bilinear) or 4×4 (bicubic) pixels around its centre, however many it covers. No
library that we depend on does so to the nearest level: Pillow's filters widen as an image shrinks, and its transforms
cut off what is behind the comma.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

import numpy as np

_STRIP = 32
"""Rows at a time, so that what is computed with stays in a core's cache."""


def sample(image: np.ndarray, height: int, width: int, interpolation: Literal["bilinear", "bicubic"]) -> np.ndarray:
    """Resizes an image as ``tf.image.resize(image, (height, width), interpolation)`` does, rounded to whole levels.

    Centres of pixels lie at halves, Keys' cubic has a = -0.5, and what would lie outside of the image is left out of
    the sum. The result is the same to the bit on every machine.

    Args:
      image: uint8 [h, w, c].
      height: of the result, in pixels.
      width: likewise.
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
    """The weighted sum, in the memory of the parts."""
    total, *others = (np.multiply(part, share, out=part) for part, share in zip(parts, shares, strict=True))
    for part in others:
        total += part
    return total


def _taps(size: int, target: int, interpolation: str) -> tuple[np.ndarray, np.ndarray]:
    """Which pixels of a row or column make each of the result's, int [taps, target], and their shares, float32."""
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
"""How many pixels count a side, and the share of each by its distance."""
