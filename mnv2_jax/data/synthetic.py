"""Images that are made of their number: as many and as large as ImageNet's, to try a machine or a pod without data."""

from __future__ import annotations

import dataclasses

import numpy as np

from mnv2_jax.data import imagenet
from mnv2_jax.data.split import Rows, Split, sha256_of

NUM_TRAIN, NUM_EVAL = 1_281_167, 50_000
"""Images of ImageNet's train and val."""
_MARGIN = 8 / 7
"""Side of an image over `data.resolution`: 256 px for 224, as evaluation resizes ImageNet."""
_NOISE = 64
"""Levels of noise on the colour of the class."""


def open_splits(resolution: int) -> tuple[Split, Split]:
    """Opens train and val: square images of ImageNet's classes in turn, larger than the resolution by a margin."""
    side = round(resolution * _MARGIN)
    classes = len(imagenet.class_ids())

    def split(name: str, size: int, first: int) -> Split:
        return Split(name, np.arange(size, dtype=np.int32) % classes, Colours(side, classes, first))

    return split("train", NUM_TRAIN, 0), split("val", NUM_EVAL, NUM_TRAIN)


@dataclasses.dataclass(frozen=True)
class Colours:
    """Makes an image: the colour of its class, which no other class has, under noise of its own."""

    side: int
    """Height and width in pixels."""
    classes: int
    first: int
    """Number of the first image among those of all splits: no two have the same noise."""

    def __call__(self, index: int) -> np.ndarray:
        """The image as uint8 [side, side, 3]."""
        label = index % self.classes
        levels = 10  # of each channel: 1,000 colours
        digits = np.array([label // levels**2 % levels, label // levels % levels, label % levels])
        colour = (digits * ((255 - _NOISE) // (levels - 1))).astype(np.uint8)
        noise = np.frombuffer(
            np.random.Generator(np.random.SFC64(self.first + index)).bytes(self.side**2 * 3), np.uint8
        )
        return colour + noise.reshape(self.side, self.side, 3) % _NOISE

    def digest(self, rows: Rows) -> dict[str, str]:
        """Digest of what the images follow from."""
        numbers = np.arange(NUM_TRAIN + NUM_EVAL)[self.first :][rows]
        return {"synthetic": sha256_of(np.array([self.side, self.classes, *numbers]))}
