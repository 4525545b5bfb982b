"""A data set of painted rectangles with masks, of several sizes, for tests of segmentation; no image file is read.

config.data.name = "painted"
"""

from __future__ import annotations

import dataclasses

import numpy as np

from mnv2_jax.data.sources import Dataset, register_dataset
from mnv2_jax.data.split import Split

CLASSES = ("sky", "wall", "door")
SIZES = ((40, 56), (36, 48), (56, 40), (140, 60))


@dataclasses.dataclass(frozen=True)
class Painter:
    """Paints image number i, or its mask."""

    seed: int
    is_mask: bool

    def __call__(self, index):
        rng = np.random.default_rng((self.seed, index))
        height, width = SIZES[index % len(SIZES)]
        mask = np.zeros((height, width), np.uint8)
        for value in (1, 2, 255):
            top, left = rng.integers(height), rng.integers(width)
            mask[top : top + height // 3, left : left + width // 3] = value
        if self.is_mask:
            return mask
        colours = np.array([[40, 90, 200], [200, 60, 40], [60, 200, 80]] + [[0, 0, 0]] * 253, np.uint8)
        noise = rng.integers(-30, 30, (height, width, 3))
        return np.clip(colours[mask].astype(int) + noise, 0, 255).astype(np.uint8)


def split(name, seed, count):
    return Split(
        name,
        np.zeros(count, np.int32),
        Painter(seed, False),
        in_memory=True,
        targets={"mask": Painter(seed, True)},
    )


def open_painted(data, evaluates):
    del data, evaluates
    return Dataset("painted", CLASSES, split("train", 0, 24), split("val", 1, 13))


register_dataset("painted", open_painted, num_classes=len(CLASSES))
