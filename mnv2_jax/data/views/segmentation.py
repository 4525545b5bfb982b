"""The views of segmentation: image and mask, scaled and cropped together in training, whole in evaluation."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from PIL import Image

from mnv2_jax.config import IGNORED, DataConfig
from mnv2_jax.data.images import DamagedImageError, resized
from mnv2_jax.data.split import Example, Split
from mnv2_jax.data.views.base import Array, Draw

_CROPS = 10
"""Crops that are tried until none of the classes has too large a share."""
_CANVAS = 128
"""Sides of a canvas are multiples of this, so that there are few canvases, each of which is compiled once."""


@dataclasses.dataclass(frozen=True)
class TrainView:
    """The `View` of training: image uint8 [h, w, 3] and class_map uint8 [h, w], of `DataConfig.train_size`."""

    data: DataConfig
    rotation_degrees: float = 0.0
    """See `config.AugmentConfig`; the corners that turn in have the mean colour and are ignored."""

    @property
    def varies(self) -> bool:
        """Whether an example has more than one view: flips are made here, since they move the mask."""
        return self.data.crop == "scale" or self.data.flip or self.rotation_degrees > 0

    @property
    def spec(self) -> Mapping[str, Array]:
        """Shape and dtype of each array that an example gives, by name."""
        return _spec(self.data.train_size)

    def at(self, resolution: int) -> TrainView:
        """Returns the same view with square images of another size; with `DataConfig.size` set, the same view."""
        return dataclasses.replace(self, data=dataclasses.replace(self.data, resolution=resolution))

    def __call__(self, example: Example, draw: Draw | None) -> Mapping[str, np.ndarray | int]:
        """Makes the row of an example; without a draw, the whole image is resized."""
        data, (image, mask) = self.data, _pixels(example, self.data)
        if draw is None or data.crop != "scale":
            image, mask = _to_size(image, mask, data.train_size, data)
        if draw is not None:
            rng = np.random.default_rng(draw)
            if data.crop == "scale":
                image, mask = _scaled_crop(image, mask, data, rng)
            if data.flip and rng.random() < 0.5:
                image, mask = image[:, ::-1], mask[:, ::-1]
            if self.rotation_degrees:
                image, mask = _rotated(image, mask, rng.uniform(-1, 1) * self.rotation_degrees, data)
        return {"image": image, "class_map": mask}


def canvas_of(height: int, width: int, extra: int = 0) -> tuple[int, int]:
    """Returns the canvas on which an image is evaluated: its sides rounded up to multiples of 128, plus ``extra``.

    It depends on the image alone, so that an answer doesn't depend on other images. An extra pixel suits networks whose
    corners are aligned: a map of n positions at stride s then covers (n - 1) * s + 1 pixels.
    """
    rows, columns = (max(-(-(side - extra) // _CANVAS), 1) * _CANVAS + extra for side in (height, width))
    return rows, columns


class Canvases(NamedTuple):
    """Height and width of the arrays that hold images and masks of several sizes."""

    image: tuple[int, int]
    mask: tuple[int, int]


@dataclasses.dataclass(frozen=True)
class EvalView:
    """The `View` of evaluation: the image on a canvas, top left, with its class_map on another.

    The image has the size ``seen``, int32 [2], which may differ from that of the mask, ``size``, where
    `DataConfig.eval_short_side` or `DataConfig.eval_canvas` is set. The rest of the image's canvas has the mean colour;
    that of the mask is ignored. Without canvases, image and mask are resized to `DataConfig.train_size`.
    """

    data: DataConfig
    extra: int = 0
    """See `canvas_of`."""
    held: Canvases | None = None
    varies = False

    @property
    def spec(self) -> Mapping[str, Array]:
        """Shape and dtype of each array that an example gives, by name."""
        held, pair = self._canvases, Array((2,), np.int32)
        return {
            "image": Array((*held.image, 3), np.uint8),
            "class_map": Array(held.mask, np.uint8),
            "size": pair,
            "seen": pair,
        }

    @property
    def _canvases(self) -> Canvases:
        return self.held or Canvases(self.data.train_size, self.data.train_size)

    def at(self, resolution: int) -> EvalView:
        """Returns the view that resizes to another size."""
        return EvalView(dataclasses.replace(self.data, resolution=resolution), self.extra)

    def canvases(self, split: Split) -> list[tuple[EvalView, np.ndarray]]:
        """Returns the views with which the images of a split are evaluated, each with the indices of its images.

        The files' headers are read.
        """
        groups: dict[Canvases, list[int]] = {}
        for index in range(len(split)):
            size = _size_of(split, index)
            seen = seen_size(size, self.data)
            image = image_canvas(seen, self.data, self.extra)
            canvases = Canvases(image, image if seen == size else canvas_of(*size, self.extra))
            groups.setdefault(canvases, []).append(index)
        return [(dataclasses.replace(self, held=held), np.array(groups[held])) for held in sorted(groups)]

    def __call__(self, example: Example, draw: Draw | None) -> Mapping[str, np.ndarray | int]:
        """Makes the row of an example; ignores the draw."""
        del draw
        image, mask = _pixels(example, self.data)
        if self.held is None:
            image, mask = _to_size(image, mask, self.data.train_size, self.data)
        else:
            image = _resized_to_see(image, self.data)
        return {
            "image": _padded_image(image, self._canvases.image, self.data.mean),
            "class_map": _padded_mask(mask, self._canvases.mask),
            "size": np.array(mask.shape, np.int32),
            "seen": np.array(image.shape[:2], np.int32),
        }


def seen_size(size: tuple[int, int], data: DataConfig) -> tuple[int, int]:
    """Returns the size at which an evaluation sees an image of a size.

    See `DataConfig.eval_short_side` and `DataConfig.eval_canvas`.
    """
    factor = 1.0 if data.eval_short_side is None else data.eval_short_side / min(size)
    if data.eval_canvas is not None:
        factor = min(factor, *(side / own for side, own in zip(data.eval_canvas, size, strict=True)))
    return max(round(size[0] * factor), 1), max(round(size[1] * factor), 1)


def image_canvas(seen: tuple[int, int], data: DataConfig, extra: int = 0) -> tuple[int, int]:
    """Returns the canvas of an image that is seen at a size: `DataConfig.eval_canvas`, or that of `canvas_of`."""
    return data.eval_canvas or canvas_of(*seen, extra)


def _resized_to_see(image: np.ndarray, data: DataConfig) -> np.ndarray:
    height, width = seen_size((image.shape[0], image.shape[1]), data)
    return image if image.shape[:2] == (height, width) else resized(image, height, width, data)


def on_canvas(image: np.ndarray, data: DataConfig, extra: int = 0) -> np.ndarray:
    """Puts an image, uint8 [h, w, 3], on its canvas, as in evaluation."""
    image = _resized_to_see(image, data)
    return _padded_image(image, image_canvas((image.shape[0], image.shape[1]), data, extra), data.mean)


def _spec(size: tuple[int, int]) -> Mapping[str, Array]:
    return {"image": Array((*size, 3), np.uint8), "class_map": Array(size, np.uint8)}


def _size_of(split: Split, index: int) -> tuple[int, int]:
    try:
        height, width = split.targets["mask"](index).shape
    except DamagedImageError:  # found again, and reported, where it is decoded
        return 1, 1
    return height, width


def _pixels(example: Example, data: DataConfig) -> tuple[np.ndarray, np.ndarray]:
    """Decodes image and mask; where their sizes differ, the image is resized, since a mask has no values in between."""
    image, mask = np.asarray(example["image"]), np.asarray(example["mask"])
    if image.shape[:2] != mask.shape:
        height, width = mask.shape
        image = resized(image, height, width, data)
    return image, mask


def _to_size(
    image: np.ndarray, mask: np.ndarray, size: tuple[int, int], data: DataConfig
) -> tuple[np.ndarray, np.ndarray]:
    if mask.shape == size:
        return image, mask
    return resized(image, *size, data), nearest(mask, *size)


def nearest(mask: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resizes a mask [h, w] by taking the value at the centre of each new pixel."""
    sides = zip(mask.shape, (height, width), strict=True)
    rows, columns = (((np.arange(new) + 0.5) * (old / new)).astype(np.int64) for old, new in sides)
    return mask[rows[:, None], columns]


def _scaled_crop(
    image: np.ndarray, mask: np.ndarray, data: DataConfig, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Scales by a random factor and crops `DataConfig.train_size` at random."""
    factor = _draw_factor(mask.shape, data, rng)
    height, width = (max(round(side * factor), 1) for side in mask.shape)
    image, mask = _to_size(image, mask, (height, width), data)
    rows, columns = data.train_size
    for _ in range(_CROPS):
        top, left = (int(rng.integers(max(side - new, 0) + 1)) for side, new in ((height, rows), (width, columns)))
        window = np.s_[top : top + rows, left : left + columns]
        if data.crop_class_share == 1 or _largest_share(mask[window]) <= data.crop_class_share:
            break
    return _padded(image[window], mask[window], (rows, columns), data)


def _draw_factor(size: tuple[int, ...], data: DataConfig, rng: np.random.Generator) -> float:
    if data.crop_short_side is None:
        return float(rng.uniform(*data.crop_scale))
    low, high = data.crop_short_side
    factor = int(rng.integers(low, high + 1)) / min(size)
    return min(factor, data.crop_long_side / max(size)) if data.crop_long_side else factor


def _rotated(image: np.ndarray, mask: np.ndarray, degrees: float, data: DataConfig) -> tuple[np.ndarray, np.ndarray]:
    """Rotates about the centre, the image bilinearly."""
    turned = Image.fromarray(image).rotate(degrees, Image.Resampling.BILINEAR, fillcolor=mean_colour(data.mean))
    return np.asarray(turned), np.asarray(Image.fromarray(mask).rotate(degrees, fillcolor=IGNORED))


def mean_colour(mean: tuple[float, ...]) -> tuple[int, ...]:
    """Returns the mean colour as pixels."""
    return tuple(np.clip(np.rint(255 * np.array(mean)), 0, 255).astype(int).tolist())


def _largest_share(mask: np.ndarray) -> float:
    """Returns the share of the most frequent class among the valid pixels; 1 if there are none."""
    counts = np.bincount(mask.reshape(-1), minlength=IGNORED + 1)[:IGNORED]
    return float(counts.max() / counts.sum()) if counts.any() else 1.0


def _padded(
    image: np.ndarray, mask: np.ndarray, size: tuple[int, int], data: DataConfig
) -> tuple[np.ndarray, np.ndarray]:
    """Pads at the bottom and at the right: the image with the mean colour, the mask with `IGNORED`."""
    return _padded_image(image, size, data.mean), _padded_mask(mask, size)


def _padded_mask(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    if mask.shape == size:
        return mask
    canvas = np.full(size, IGNORED, np.uint8)
    canvas[: mask.shape[0], : mask.shape[1]] = mask
    return canvas


def _padded_image(image: np.ndarray, size: tuple[int, int], mean: tuple[float, ...]) -> np.ndarray:
    if image.shape[:2] == size:
        return image
    canvas = np.empty((*size, 3), np.uint8)
    canvas[...] = mean_colour(mean)
    canvas[: image.shape[0], : image.shape[1]] = image
    return canvas
