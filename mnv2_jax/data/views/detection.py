"""The views of detection: an image and its boxes, expanded and cropped together in training, resized whole after it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np

from mnv2_jax.config import DataConfig
from mnv2_jax.data.images import resized
from mnv2_jax.data.split import Example
from mnv2_jax.data.views.base import Array, Draw
from mnv2_jax.data.views.segmentation import mean_colour

_EXPANDED_SHARE = 0.5
"""Share of the training images that are expanded."""
_LEAST_OVERLAPS = (0.0, 0.1, 0.3, 0.5, 0.7, 0.9, None)
"""Least IoU of a crop with some box, of which one is drawn; None: the image isn't cropped."""
_CROP_SIDES, _CROP_RATIOS, _CROPS = (0.3, 1.0), (0.5, 2.0), 40
"""Sides of crops as shares of the image's, their width over their height, and how many are tried for one overlap."""
_DRAWS = 50
"""Overlaps that are drawn until one has a crop."""


@dataclasses.dataclass(frozen=True)
class Targets:
    """The objects of one image."""

    boxes: np.ndarray
    """float64 [n, 4], (y0, x0, y1, x1) in pixels."""
    classes: np.ndarray
    """int32 [n]."""
    ignored: np.ndarray
    """bool [n]: whether it neither trains nor counts, such as a crowd."""

    def at(self, rows: np.ndarray, boxes: np.ndarray) -> Targets:
        """Returns some of the objects, bool [n], with other boxes [n, 4]."""
        return Targets(boxes[rows], self.classes[rows], self.ignored[rows])


@dataclasses.dataclass(frozen=True)
class TrainView:
    """The `View` of training: a square image with its boxes as shares of its sides.

    Arrays: image uint8 [r, r, 3], boxes float32 [n, 4] as (y0, x0, y1, x1), classes int32 [n], -1 where there is no
    box, and ignored bool [n]; n is `DataConfig.max_boxes`. Of more boxes the largest are kept.
    """

    data: DataConfig

    @property
    def varies(self) -> bool:
        """Whether an example has more than one view: flips are made here, since they move the boxes."""
        return self.data.crop == "iou" or self.data.flip or self.data.expand > 1

    @property
    def spec(self) -> Mapping[str, Array]:
        """Shape and dtype of each array that an example gives, by name."""
        return _spec(self.data, self.data.resolution)

    def at(self, resolution: int) -> TrainView:
        """Returns the same view with images of another size."""
        return dataclasses.replace(self, data=dataclasses.replace(self.data, resolution=resolution))

    def __call__(self, example: Example, draw: Draw | None) -> Mapping[str, np.ndarray | int]:
        """Makes the row of an example; without a draw, the whole image."""
        data, image, targets = self.data, np.asarray(example["image"]), targets_of(example)
        if draw is not None:
            rng = np.random.default_rng(draw)
            if data.expand > 1 and rng.random() < _EXPANDED_SHARE:
                image, targets = expanded(image, targets, data, rng)
            if data.crop == "iou":
                image, targets = overlapping_crop(image, targets, rng)
            if data.flip and rng.random() < 0.5:
                image, targets = flipped(image, targets)
        return _row(image, targets, data, data.resolution)


@dataclasses.dataclass(frozen=True)
class EvalView:
    """The `View` of evaluation: the whole image, resized to a square, and its own size, int32 [2]."""

    data: DataConfig
    varies = False

    @property
    def spec(self) -> Mapping[str, Array]:
        """Shape and dtype of each array that an example gives, by name."""
        return {**_spec(self.data, self.data.seen_resolution), "size": Array((2,), np.int32)}

    def at(self, resolution: int) -> EvalView:
        """Returns the same view with images of another size."""
        return EvalView(dataclasses.replace(self.data, resolution=resolution, eval_resolution=None))

    def __call__(self, example: Example, draw: Draw | None) -> Mapping[str, np.ndarray | int]:
        """Makes the row of an example; ignores the draw."""
        del draw
        image = np.asarray(example["image"])
        row = _row(image, targets_of(example), self.data, self.data.seen_resolution)
        return {**row, "size": np.array(image.shape[:2], np.int32)}


def targets_of(example: Example) -> Targets:
    """Returns the objects of an example."""
    return Targets(example["boxes"].astype(np.float64), example["classes"], example["crowd"])


def _spec(data: DataConfig, resolution: int) -> Mapping[str, Array]:
    return {
        "image": Array((resolution, resolution, 3), np.uint8),
        "boxes": Array((data.max_boxes, 4), np.float32),
        "classes": Array((data.max_boxes,), np.int32),
        "ignored": Array((data.max_boxes,), np.bool_),
    }


def _row(image: np.ndarray, targets: Targets, data: DataConfig, resolution: int) -> Mapping[str, np.ndarray | int]:
    height, width = image.shape[:2]
    kept = np.sort(np.argsort(-areas(targets.boxes), kind="stable")[: data.max_boxes])
    boxes = np.zeros((data.max_boxes, 4), np.float32)
    classes, ignored = np.full(data.max_boxes, -1, np.int32), np.zeros(data.max_boxes, bool)
    boxes[: len(kept)] = targets.boxes[kept] / (height, width, height, width)
    classes[: len(kept)], ignored[: len(kept)] = targets.classes[kept], targets.ignored[kept]
    return {
        "image": resized(image, resolution, resolution, data),
        "boxes": boxes,
        "classes": classes,
        "ignored": ignored,
    }


def areas(boxes: np.ndarray) -> np.ndarray:
    """Returns the areas [n] of boxes [n, 4]."""
    return np.prod(np.maximum(boxes[:, 2:] - boxes[:, :2], 0), 1)


def flipped(image: np.ndarray, targets: Targets) -> tuple[np.ndarray, Targets]:
    """Mirrors an image and its boxes left to right."""
    y0, x0, y1, x1 = targets.boxes.T
    width = image.shape[1]
    boxes = np.stack([y0, width - x1, y1, width - x0], 1)
    return image[:, ::-1], dataclasses.replace(targets, boxes=boxes)


def expanded(
    image: np.ndarray, targets: Targets, data: DataConfig, rng: np.random.Generator
) -> tuple[np.ndarray, Targets]:
    """Puts an image at random into one of the mean colour, whose sides are up to `DataConfig.expand` times its own."""
    height, width = image.shape[:2]
    factor = rng.uniform(1, data.expand)
    rows, columns = int(height * factor), int(width * factor)
    top, left = int(rng.integers(rows - height + 1)), int(rng.integers(columns - width + 1))
    canvas = np.empty((rows, columns, 3), np.uint8)
    canvas[...] = mean_colour(data.mean)
    canvas[top : top + height, left : left + width] = image
    return canvas, dataclasses.replace(targets, boxes=targets.boxes + np.array([top, left, top, left]))


def overlapping_crop(image: np.ndarray, targets: Targets, rng: np.random.Generator) -> tuple[np.ndarray, Targets]:
    """Crops an image so that some box overlaps the crop by a drawn IoU at least (SSD's paper, section 2.2).

    Boxes whose centre lies in the crop are kept, and cut at its sides. Torchvision's RandomIoUCrop: sides of 0.3 to 1,
    aspect ratios of 1/2 to 2, 40 tries for each drawn IoU. An image without objects isn't cropped. Of an ignored region
    every visible part is kept, so that it doesn't train as background.
    """
    height, width = image.shape[:2]
    if targets.ignored.all():
        return image, targets
    for _ in range(_DRAWS):
        least = _LEAST_OVERLAPS[rng.integers(len(_LEAST_OVERLAPS))]
        if least is None:
            break
        for _ in range(_CROPS):
            rows, columns = (int(side * rng.uniform(*_CROP_SIDES)) for side in (height, width))
            if not rows or not columns or not _CROP_RATIOS[0] <= columns / rows <= _CROP_RATIOS[1]:
                continue
            top, left = int((height - rows) * rng.random()), int((width - columns) * rng.random())
            crop = np.array([top, left, top + rows, left + columns], np.float64)
            middles = (targets.boxes[:, :2] + targets.boxes[:, 2:]) / 2
            inside = ((middles > crop[:2]) & (middles < crop[2:])).all(1) & ~targets.ignored
            if not inside.any() or overlaps(targets.boxes[inside], crop[None]).max() < least:
                continue
            low, high = np.tile(crop[:2], 2), np.tile(crop[2:], 2)
            boxes = np.clip(targets.boxes, low, high) - low
            kept = inside | (targets.ignored & (areas(boxes) > 0))
            return image[top : top + rows, left : left + columns], targets.at(kept, boxes)
    return image, targets


def overlaps(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Returns the IoU [n, m] of boxes [n, 4] with others [m, 4]; 0 where neither has an area."""
    common = _common_areas(boxes, others)
    union = areas(boxes)[:, None] + areas(others) - common
    return np.divide(common, union, out=np.zeros_like(common), where=union > 0)


def shares_within(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Returns the share [n, m] of the area of others [m, 4] that lies in boxes [n, 4]; 0 for one without area."""
    common = _common_areas(boxes, others)
    return np.divide(common, areas(others), out=np.zeros_like(common), where=areas(others) > 0)


def _common_areas(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
    low, high = np.maximum(boxes[:, None, :2], others[:, :2]), np.minimum(boxes[:, None, 2:], others[:, 2:])
    common: np.ndarray = np.prod(np.maximum(high - low, 0), -1)
    return common
