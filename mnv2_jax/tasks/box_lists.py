"""Answers of a detection network: boxes with their classes and probabilities."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mnv2_jax.config import DataConfig, ModelConfig, build
from mnv2_jax.data.images import resized
from mnv2_jax.data.views.detection import overlaps
from mnv2_jax.models.anchors import anchors
from mnv2_jax.ops import boxes as ops
from mnv2_jax.report.boxes import drawn
from mnv2_jax.report.overlays import beside, legend, png
from mnv2_jax.tasks.base import Likeness, Once
from mnv2_jax.types import Array, PyTree
from mnv2_jax.weights.file import Weights

SHOWN = 0.5
"""Least probability of a box that is printed or drawn by itself, and that counts as a mistake where there is none."""
_SIDES = ("x0", "y0", "x1", "y1")
_CANDIDATES = 300
"""Most probable boxes of a class among which overlapping ones are dropped (torchvision's topk_candidates)."""
_STEPS = 16
"""Turns of the search for overlapping boxes where there is no loop; see `ops.boxes.nms`."""
_SAME_IOU, _SAME_PROBABILITY = 0.9, 0.25
"""Least overlap and largest difference in probability of two boxes that are the same in two computations."""
_UNSURE = 0.01
"""Share of the boxes, weighed by probability, that rounding may drop or keep at the threshold of overlap."""


def scores_of(logits: Array, model: ModelConfig) -> Array:
    """Returns the probabilities [..., k] of the classes from the logits [..., k + 1] of anchors."""
    if model.box_scores == "softmax":
        return jax.nn.softmax(logits)[..., 1:]
    return jax.nn.sigmoid(logits[..., 1:])


@dataclasses.dataclass(frozen=True)
class BoxLists:
    """The `tasks.base.Answers` of a detection."""

    endings = ("-boxes.png",)
    usual_confidence = SHOWN

    labels: tuple[str, ...]
    model: ModelConfig
    data: DataConfig
    """Size of the images, and how boxes are chosen."""
    steps: int | None = None
    """Turns of the search for overlapping boxes; None: as many as it takes, in a loop."""

    def decode(self, outputs: PyTree) -> dict[str, Array]:
        """Chooses boxes from codes [b, a, 4] and logits [b, a, k + 1].

        Returns:
          boxes [b, n, 4], (y0, x0, y1, x1) as shares of the image's sides, the most probable first; class int32 [b, n];
          probability [b, n], 0 where there is no box. n is `config.DataConfig.eval_max_boxes`.
        """
        codes, logits = outputs["boxes"], outputs["logits"]
        resolution = self.data.seen_resolution
        at = jnp.asarray(anchors(self.model.anchors, resolution, resolution), codes.dtype)

        def choose(codes: Array, logits: Array) -> dict[str, Array]:
            boxes, classes, scores = ops.detections(
                jnp.clip(ops.decode(codes, at), 0, 1),
                scores_of(logits, self.model),
                score_threshold=self.data.eval_min_score,
                iou_threshold=self.data.eval_nms_iou,
                candidates=_CANDIDATES,
                most=self.data.eval_max_boxes,
                steps=self.steps,
            )
            return {"box": boxes, "class": classes, "probability": scores}

        if self.steps is not None:
            return jax.vmap(choose)(codes, logits)
        # One image after the other: the overlaps of all candidates are large
        return jax.lax.map(lambda image: choose(*image), (codes, logits))

    def without_loops(self) -> BoxLists:
        """Returns the answers whose `decode` has no loops, and chooses boxes of all images at once."""
        return dataclasses.replace(self, steps=_STEPS)

    def compare(self, expected: Mapping[str, np.ndarray], actual: Mapping[str, np.ndarray]) -> Likeness:
        """Compares by the boxes that both have: of one class, nearly the same place and probability.

        Each box counts as much as it is probable: hundreds of each image's are hardly so, and rounding chooses some of
        them.
        """
        difference, sums = 0.0, list[Any]()
        for row in range(len(expected["box"])):
            one, other = ({name: array[row] for name, array in answers.items()} for answers in (expected, actual))
            overlap = overlaps(one["box"], other["box"])
            apart = abs(one["probability"][:, None] - other["probability"])
            same = (overlap >= _SAME_IOU) & (one["class"][:, None] == other["class"]) & (apart <= _SAME_PROBABILITY)
            mine = same.any(1)
            yours = np.where(same, overlap, 0).argmax(1)[mine]
            for name in ("box", "probability"):
                difference = max(difference, float(abs(one[name][mine] - other[name][yours]).max(initial=0)))
            pairs = ((one["probability"], mine), (other["probability"], same.any(0)))
            sums.append([[each.sum(), each[is_found].sum()] for each, is_found in pairs])
        shares = [found / whole if whole else 1.0 for whole, found in np.sum(sums, axis=0)]
        return Likeness(difference, float(np.min(shares)), _UNSURE)

    def to_json(self, answer: PyTree) -> dict[str, Any]:
        """The answer for one image as ``{"boxes": [{"x0", "y0", "x1", "y1", "index", "label", "probability"}, ...]}``.

        Boxes are in pixels of the image, the most probable first.
        """
        rows = []
        for box, index, probability in zip(
            *(np.asarray(answer[name]).tolist() for name in ("box", "class", "probability")), strict=True
        ):
            if probability > 0:
                sides = {name: round(side, 2) for name, side in zip(("y0", "x0", "y1", "x1"), box, strict=True)}
                facts = {"index": index, "label": self.labels[index], "probability": probability}
                rows.append({**{name: sides[name] for name in _SIDES}, **facts})
        return {"boxes": rows}

    def to_text(self, entries: Mapping[str, Any]) -> list[str]:
        """The entries of `to_json` as text, one line per box."""
        width = max((len(row["label"]) for row in entries["boxes"]), default=0)
        return [
            f"{row['label']:<{width}}  {row['probability']:7.2%}  "
            + " ".join(f"{name}={row[name]:.0f}" for name in _SIDES)
            for row in entries["boxes"]
        ]

    def files(self, image: np.ndarray, answer: PyTree, min_confidence: float = SHOWN) -> dict[str, bytes]:
        """The boxes over the image, with a legend, by the ending of the file.

        Args:
          image: uint8 [h, w, 3].
          answer: the answer, in pixels of the image.
          min_confidence: least probability of the boxes.
        """
        is_box = np.asarray(answer["probability"]) >= min_confidence
        is_box &= np.asarray(answer["probability"]) > 0
        classes = np.asarray(answer["class"])[is_box]
        picture = drawn(image, np.asarray(answer["box"])[is_box], classes)
        return {"-boxes.png": png(beside([picture, legend(self.labels, np.unique(classes).tolist())], gap_px=8))}


@dataclasses.dataclass(frozen=True)
class Squeezed(Once):
    """The `tasks.base.Framing` of a detection: the whole image, resized to a square."""

    data: DataConfig

    def __call__(self, image: np.ndarray) -> np.ndarray:
        """Resizes an image, uint8 [h, w, 3]."""
        return resized(image, self.data.seen_resolution, self.data.seen_resolution, self.data)

    def restore(self, answer: PyTree, size: tuple[int, int]) -> PyTree:
        """Turns shares of the sides into pixels of the image."""
        return {**answer, "box": np.asarray(answer["box"]) * (*size, *size)}


def framing(weights: Weights) -> Squeezed:
    """Makes the framing for weights."""
    return Squeezed(build({"data": dataclasses.asdict(weights.info.preprocessing)}).data)


def box_lists(weights: Weights, most: int | None) -> BoxLists:
    """Makes the answers for weights, with at most so many boxes.

    Classes without a name are labelled by their number.
    """
    info, model = weights.info, weights.model
    data = build({"data": dataclasses.asdict(info.preprocessing)}).data
    if most is not None:
        data = dataclasses.replace(data, eval_max_boxes=most)
    labels = info.labels or tuple(map(str, range(model.num_classes)))
    return BoxLists(labels, model.options, data)
