"""Synthetic images, as many and as large as ImageNet's, to measure a machine or a pod without data.

Each class has a picture of twelve areas of one colour each. An image is the picture of its class plus noise given by
the number of the image. So a loss falls, but its value says nothing about a network. Images are cropped and resized as
photos are, and take a tenth of a millisecond to make; a measurement leaves out only reading and decoding.
"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np

from mnv2_jax.config import DataConfig
from mnv2_jax.data import imagenet
from mnv2_jax.data.split import Rows, Split, sha256_of

_DOWN, _ACROSS, _SIDE = 3, 4, 125
"""Areas down and across a picture, and the side of an area in pixels: most photos of ImageNet have 375 × 500."""
_BYTES = _DOWN * _SIDE * _ACROSS * _SIDE * 3
_NOISE = 64
"""Number of noise levels, a power of two; colours leave room for them."""
_OFFSETS = 2**22
"""Number of offsets at which the noise of an image may begin; so many images have different noise."""
_STRIDE = 2_654_435_761
"""Distance between the offsets of consecutive images; odd, so that no two images share an offset."""


def open_splits(data: DataConfig) -> tuple[Split, Split]:
    """Opens train and val; their labels go through the first of ImageNet's classes in turn.

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
    """Number of the split's first image among the images of both splits."""

    def __call__(self, index: int) -> np.ndarray:
        """Makes an image, uint8 [375, 500, 3]."""
        offset = (self.first + index) * _STRIDE % _OFFSETS
        noise = _noise()[offset : offset + _BYTES].reshape(_DOWN, _SIDE, -1)
        # All lines of an area are equal, so NumPy adds whole lines, ten times as fast as pixel by pixel.
        lines = np.repeat(_colours()[index % self.classes], _SIDE, axis=1).reshape(_DOWN, 1, -1)
        return (noise + lines).reshape(_DOWN * _SIDE, _ACROSS * _SIDE, 3)

    def digest(self, rows: Rows) -> dict[str, str]:
        """Returns the digest of the first image; the others follow from the labels and their numbers."""
        del rows
        return {"synthetic": sha256_of(self(0))}


@functools.cache
def _noise() -> np.ndarray:
    """Returns the noise of which all images take a part, uint8 [n]."""
    return _random_bytes(0, _OFFSETS + _BYTES) & (_NOISE - 1)


@functools.cache
def _colours() -> np.ndarray:
    """Returns the colours of the areas for each class of ImageNet, uint8 [1000, 3, 4, 3]."""
    shape = (len(imagenet.class_ids()), _DOWN, _ACROSS, 3)
    drawn = _random_bytes(1, int(np.prod(shape))).astype(np.int32)
    return (drawn * (256 - _NOISE) // 256).astype(np.uint8).reshape(shape)


def _random_bytes(seed: int, count: int) -> np.ndarray:
    """Returns random bytes, the same in every NumPy, which promises never to change the words of a bit generator."""
    return np.random.PCG64(seed).random_raw(-(-count // 8)).astype("<u8").view(np.uint8)[:count]
