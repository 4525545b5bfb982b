"""A data set of painted rectangles with their boxes, of several sizes, for tests of detection; no file is read.

config.data.name = "framed"
"""

from __future__ import annotations

import dataclasses

import numpy as np

from mnv2_jax.data.sources import Dataset, register_dataset
from mnv2_jax.data.split import Split

CLASSES = ("red", "blue")
SIZES = ((60, 80), (64, 64), (90, 70))


@dataclasses.dataclass(frozen=True)
class Framer:
    """Paints image number i, or tells its objects; every fifth image has none, and every seventh a crowd."""

    seed: int
    kind: str

    def __call__(self, index):
        rng = np.random.default_rng((self.seed, index))
        height, width = SIZES[index % len(SIZES)]
        count = 0 if index % 5 == 4 else int(rng.integers(1, 4))
        boxes, classes = np.zeros((count, 4), np.float32), rng.integers(0, 2, count).astype(np.int32)
        image = rng.integers(90, 130, (height, width, 3)).astype(np.uint8)
        for row in range(count):
            sides = rng.integers(16, 40, 2)
            top, left = int(rng.integers(height - sides[0])), int(rng.integers(width - sides[1]))
            boxes[row] = top, left, top + sides[0], left + sides[1]
            colour = (220, 30, 30) if classes[row] == 0 else (30, 30, 220)
            image[top : top + sides[0], left : left + sides[1]] = colour
        crowd = np.zeros(count, bool)
        if index % 7 == 6 and count:
            crowd[-1] = True
        return {"image": image, "boxes": boxes, "classes": classes, "crowd": crowd}[self.kind]


def split(name, seed, count):
    targets = {kind: Framer(seed, kind) for kind in ("boxes", "classes", "crowd")}
    return Split(name, np.zeros(count, np.int32), Framer(seed, "image"), in_memory=True, targets=targets)


def open_framed(data, evaluates):
    del data, evaluates
    return Dataset("framed", CLASSES, split("train", 0, 24), split("val", 1, 13))


register_dataset("framed", open_framed, num_classes=len(CLASSES))
