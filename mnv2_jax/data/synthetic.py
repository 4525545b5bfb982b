"""Images that are made of their number: as many and as large as ImageNet's, to try a machine or a pod without data.

Each class has a picture of twelve areas, each of one colour; an image is that of its class under noise of its own. So a
loss falls, and what it falls to says nothing of a network. Images are cropped and resized as photos are, and take a
tenth of a millisecond to make, so that what isn't measured is reading and decoding, and that alone.
"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np

from mnv2_jax.config import DataConfig
from mnv2_jax.data import imagenet
from mnv2_jax.data.split import Rows, Split, sha256_of

_DOWN, _ACROSS, _SIDE = 3, 4, 125
"""Areas of a picture, and the side of each in pixels: most photos of ImageNet have 375 × 500."""
_BYTES = _DOWN * _SIDE * _ACROSS * _SIDE * 3
_NOISE = 64
"""Levels of noise, a power of two; colours leave room for it."""
_BEGINNINGS = 2**22
"""Places in the noise where an image's begins: so many images all differ."""
_STRIDE = 2_654_435_761
"""From the beginning of an image's noise to the next one's; odd, so that none begins where another does."""


def open_splits(data: DataConfig) -> tuple[Split, Split]:
    """Opens train and val, the first of ImageNet's classes in turn.

    Args:
      data: `synthetic_classes` and `synthetic_images` are read.
    """
    num_train, num_eval = data.synthetic_images

    def split(name: str, size: int, first: int) -> Split:
        labels = np.arange(size, dtype=np.int32) % data.synthetic_classes
        return Split(name, labels, Pictures(data.synthetic_classes, first))

    return split("train", num_train, 0), split("val", num_eval, num_train)


@dataclasses.dataclass(frozen=True)
class Pictures:
    """Makes the images of a split."""

    classes: int
    first: int
    """Number of the split's first image among those of all splits."""

    def __call__(self, index: int) -> np.ndarray:
        """The image as uint8 [375, 500, 3]."""
        begin = (self.first + index) * _STRIDE % _BEGINNINGS
        noise = _noise()[begin : begin + _BYTES].reshape(_DOWN, _SIDE, -1)
        # All lines of an area are the same: NumPy adds whole lines, ten times as fast as pixel by pixel.
        lines = np.repeat(_colours()[index % self.classes], _SIDE, axis=1).reshape(_DOWN, 1, -1)
        return (noise + lines).reshape(_DOWN * _SIDE, _ACROSS * _SIDE, 3)

    def digest(self, rows: Rows) -> dict[str, str]:
        """Digest of an image: what the others are follows from the labels and the places."""
        del rows
        return {"synthetic": sha256_of(self(0))}


@functools.cache
def _noise() -> np.ndarray:
    """The noise of all images, uint8 [n]."""
    return _random_bytes(0, _BEGINNINGS + _BYTES) & (_NOISE - 1)


@functools.cache
def _colours() -> np.ndarray:
    """Colours of the areas, uint8 [1000, 3, 4, 3], for each class of ImageNet."""
    shape = (len(imagenet.class_ids()), _DOWN, _ACROSS, 3)
    drawn = _random_bytes(1, int(np.prod(shape))).astype(np.int32)
    return (drawn * (256 - _NOISE) // 256).astype(np.uint8).reshape(shape)


def _random_bytes(seed: int, count: int) -> np.ndarray:
    """Random bytes, the same under every NumPy, which promises never to change the words of a bit generator."""
    return np.random.PCG64(seed).random_raw(-(-count // 8)).astype("<u8").view(np.uint8)[:count]
