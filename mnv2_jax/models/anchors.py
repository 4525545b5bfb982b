"""Anchors of SSD (Liu et al. 2016, arXiv 1512.02325, section 2.2): the boxes from which those of objects are told."""

from __future__ import annotations

import math
from typing import Literal, TypeAlias

import numpy as np

Rule: TypeAlias = Literal["tensorflow", "torchvision"]
NUM_MAPS = 6
"""Number of maps that SSDLite looks at."""
_SCALES = tuple(0.2 + 0.15 * number for number in range(NUM_MAPS))
"""Sides of the square anchors of each map, as shares of the image's: 0.2 to 0.95."""
_NEXT = (*_SCALES[1:], 1.0)


def _shape(scale: float, ratio: float) -> tuple[float, float]:
    """Returns height and width of an anchor; ``ratio`` is width over height."""
    return scale / math.sqrt(ratio), scale * math.sqrt(ratio)


def _tensorflow(number: int) -> list[tuple[float, float]]:
    """Shapes of TensorFlow's ssd_anchor_generator, whose first map has three."""
    scale = _SCALES[number]
    if number == 0:
        return [_shape(0.1, 1.0), _shape(scale, 2.0), _shape(scale, 0.5)]
    ratios = (1.0, 2.0, 0.5, 3.0, 0.3333)
    return [*(_shape(scale, ratio) for ratio in ratios), _shape(math.sqrt(scale * _NEXT[number]), 1.0)]


def _torchvision(number: int) -> list[tuple[float, float]]:
    """Shapes of torchvision's DefaultBoxGenerator with the ratios 2 and 3, which are cut at the image's sides."""
    scale = _SCALES[number]
    shapes = [_shape(scale, 1.0), _shape(math.sqrt(scale * _NEXT[number]), 1.0)]
    shapes += [_shape(scale, ratio) for base in (2.0, 3.0) for ratio in (base, 1 / base)]
    return [(min(height, 1.0), min(width, 1.0)) for height, width in shapes]


_RULES = {"tensorflow": _tensorflow, "torchvision": _torchvision}


def shapes_of(rule: Rule) -> tuple[np.ndarray, ...]:
    """Returns for each map the heights and widths of its anchors, float64 [n, 2], as shares of the image's sides."""
    return tuple(np.array(_RULES[rule](number)) for number in range(NUM_MAPS))


def map_sizes(height: int, width: int) -> tuple[tuple[int, int], ...]:
    """Returns the sizes of the maps for an image: the first at stride 16, each next of half the size, rounded up."""
    sizes = [(-(-height // 16), -(-width // 16))]
    while len(sizes) < NUM_MAPS:
        rows, columns = sizes[-1]
        sizes.append((-(-rows // 2), -(-columns // 2)))
    return tuple(sizes)


def anchors(rule: Rule, height: int, width: int) -> np.ndarray:
    """Makes the anchors for an image: float64 [a, 4], (y0, x0, y1, x1) as shares of its sides.

    They are in the order of the network's outputs: by map, row, column and shape. An anchor may reach beyond the image.
    """
    boxes = []
    for (rows, columns), shapes in zip(map_sizes(height, width), shapes_of(rule), strict=True):
        middles = np.meshgrid((np.arange(rows) + 0.5) / rows, (np.arange(columns) + 0.5) / columns, indexing="ij")
        centres = np.stack(middles, -1)[:, :, None]
        boxes.append(np.concatenate([centres - shapes / 2, centres + shapes / 2], -1).reshape(-1, 4))
    return np.concatenate(boxes)
