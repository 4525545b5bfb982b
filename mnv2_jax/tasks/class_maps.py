"""Answers of a segmentation network: a class for each pixel, and the share of each class."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from mnv2_jax.config import DataConfig, ModelConfig, build
from mnv2_jax.data.views.segmentation import nearest, on_canvas, seen_size
from mnv2_jax.errors import UserError
from mnv2_jax.nn.resize import resize_bilinear
from mnv2_jax.ops.windows import Network, in_windows, with_mirror
from mnv2_jax.report.overlays import beside, legend, mask_png, overlay, png
from mnv2_jax.types import Array, PyTree
from mnv2_jax.weights.file import Weights


@dataclasses.dataclass(frozen=True)
class ClassMaps:
    """The `tasks.base.Answers` of a segmentation."""

    endings = (".png", "-overlay.png")

    labels: tuple[str, ...]
    stride: int
    """Pixels of the image between two positions of the logits."""
    align_corners: bool
    most: int
    """Most classes per image in `to_json`."""

    def decode(self, outputs: PyTree) -> dict[str, Array]:
        """Returns the classes, uint8 [b, h, w], of the pixels that the logits [b, p, q, k] cover."""
        logits = outputs["logits"]
        rows, columns = (
            (side - 1) * self.stride + 1 if self.align_corners else side * self.stride for side in logits.shape[1:3]
        )
        resized = resize_bilinear(logits, (rows, columns), align_corners=self.align_corners)
        return {"class": resized.argmax(-1).astype(jnp.uint8)}

    def to_json(self, answer: PyTree) -> dict[str, Any]:
        """The answer for one image as ``{"size": [h, w], "classes": [{"index", "label", "share"}, ...]}``.

        The share is that of the pixels, 0 to 1; the largest comes first.
        """
        class_map = np.asarray(answer["class"])
        counts = np.bincount(class_map.reshape(-1), minlength=len(self.labels))
        order = [int(i) for i in np.argsort(-counts, kind="stable")[: self.most] if counts[i]]
        rows = [{"index": i, "label": self.labels[i], "share": int(counts[i]) / class_map.size} for i in order]
        return {"size": list(class_map.shape), "classes": rows}

    def to_text(self, entries: Mapping[str, Any]) -> list[str]:
        """The entries of `to_json` as text, one line per class."""
        width = max((len(row["label"]) for row in entries["classes"]), default=0)
        return [f"{row['label']:<{width}}  {row['share']:7.2%}" for row in entries["classes"]]

    def files(self, image: np.ndarray, answer: PyTree, min_confidence: float = 0.0) -> dict[str, bytes]:
        """Files for one image, by their endings: the classes as a PNG of indices, and an overlay with its legend.

        Args:
          image: uint8 [h, w, 3].
          answer: the answer, of the image's size.
          min_confidence: 0; a class of a pixel has no probability.
        """
        assert not min_confidence
        class_map = np.asarray(answer["class"])
        seen = np.unique(class_map).tolist()
        picture = beside([overlay(image, class_map), legend(self.labels, seen)], gap_px=8)
        return {".png": mask_png(class_map), "-overlay.png": png(picture)}


@dataclasses.dataclass(frozen=True)
class Canvas:
    """The `tasks.base.Framing` of a segmentation: the whole image on its canvas."""

    data: DataConfig
    model: ModelConfig

    def __call__(self, image: np.ndarray) -> np.ndarray:
        """Puts an image, uint8 [h, w, 3], on its canvas."""
        return on_canvas(image, self.data, int(self.model.align_corners))

    def outputs(self, network: Callable[[Array], PyTree], images: Array) -> PyTree:
        """Computes the logits, as `config.DataConfig.eval_window` and `config.DataConfig.eval_mirror` say."""

        def logits(images: Array) -> Array:
            outputs: Mapping[str, Array] = network(images)
            return outputs["logits"]

        look: Network = logits
        if self.data.eval_window is not None:
            look = in_windows(look, self.data.eval_window, self.model.output_stride, stride_of(self.model))
        if self.data.eval_mirror:
            look = with_mirror(look)
        return {"logits": look(images)}

    def restore(self, answer: PyTree, size: tuple[int, int]) -> PyTree:
        """Cuts the answer for a canvas to what was seen of the image, and resizes that to the image's size."""
        rows, columns = seen_size(size, self.data)
        return {"class": nearest(answer["class"][:rows, :columns], *size)}


def framing(weights: Weights) -> Canvas:
    """Makes the framing for weights."""
    data = build({"data": dataclasses.asdict(weights.info.preprocessing)}).data
    return Canvas(data, weights.model.options)


def check_canvas(canvas: tuple[int, int], model: ModelConfig, key: str) -> None:
    """Refuses a canvas that the positions of the last map don't cover exactly.

    Raises:
      UserError: naming ``key`` and the nearest canvas that is allowed.
    """
    stride, extra = model.output_stride, int(model.align_corners)
    nearest_sides = tuple(max(round((side - extra) / stride), 1) * stride + extra for side in canvas)
    if nearest_sides != canvas:
        raise UserError(
            f"{key}={'x'.join(map(str, canvas))}: the sides must be multiples of the output stride, {stride}"
            f"{', plus 1' * extra}; the nearest is {'x'.join(map(str, nearest_sides))}"
        )


def at_size(weights: Weights, size: tuple[int, int] | None) -> tuple[Weights, tuple[int, int]]:
    """Returns the weights for images of one size, which are seen once and at once, and that size.

    Args:
      weights: the weights.
      size: height and width of the canvas; None: `DataConfig.eval_canvas` of the weights, or a square of about their
        resolution.

    Raises:
      UserError: if the network can't have images of this size.
    """
    info, model = weights.info, weights.model.options
    extra = int(model.align_corners)
    side = -(-(info.preprocessing.resolution - extra) // model.output_stride) * model.output_stride + extra
    canvas = size or info.preprocessing.eval_canvas or (side, side)
    check_canvas(canvas, model, "--resolution")
    preprocessing = dataclasses.replace(info.preprocessing, eval_canvas=canvas, eval_window=None, eval_mirror=False)
    return weights._replace(info=dataclasses.replace(info, preprocessing=preprocessing)), canvas


def stride_of(model: ModelConfig) -> int:
    """Returns the pixels of the image between two positions of a dense head's logits."""
    return 8 if model.head == "lraspp" else model.output_stride


def class_maps(weights: Weights, most: int | None) -> ClassMaps:
    """Makes the answers for weights; classes without a name are labelled by their number."""
    options, num_classes = weights.model.options, weights.model.num_classes
    labels = weights.info.labels or tuple(map(str, range(num_classes)))
    return ClassMaps(labels, stride_of(options), options.align_corners, min(most or num_classes, num_classes))
