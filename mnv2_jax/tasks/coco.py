"""COCO's scores of detections, computed by pycocotools (Lin et al. 2014, https://cocodataset.org/#detection-eval)."""

from __future__ import annotations

import collections
import contextlib
import importlib
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mnv2_jax.errors import UserError

_NAMES = (
    *("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large"),
    *("ar1", "ar10", "ar100", "ar_small", "ar_medium", "ar_large"),
)
"""Names of COCOeval's twelve numbers, in its order."""


def check_installed() -> None:
    """Refuses to go on without pycocotools.

    Raises:
      UserError: if it isn't installed.
    """
    try:
        for name in ("coco", "cocoeval"):
            importlib.import_module(f"pycocotools.{name}")
    except ImportError as error:
        raise UserError("COCO's scores need pycocotools; run pip install 'mnv2_jax[detection]'") from error


def coco_scores(
    image_ids: Sequence[int],
    truths: Sequence[Mapping[str, np.ndarray]],
    boxes: np.ndarray,
    classes: np.ndarray,
    scores: np.ndarray,
    class_names: Sequence[str],
) -> dict[str, Any]:
    """Computes average precision and recall, as values for JSON.

    COCO counts the 100 best detections of an image and a class. Of equal scores the image with the lowest number comes
    first, then the lowest place, so the results don't depend on the order of images.

    Args:
      image_ids: number of each image, [m].
      truths: for each image boxes [n, 4] (y0, x0, y1, x1, in pixels), classes [n] and crowd [n], True for a region of
        many objects, in which detections count neither as right nor as wrong. Objects are small, medium or large by
        their boxes' areas, or by areas [n], where given: square pixels within the outlines, as in COCO's own files.
      boxes: detections of each image, in pixels of the same image, [m, d, 4].
      classes: their classes, [m, d].
      scores: their scores, [m, d]; 0 and NaN are empty places.
      class_names: names of the classes.

    Returns:
      Fractions from 0 to 1, or None where no object counts:
      ap (mean over IoU 0.5, 0.55, … 0.95 and classes), ap50, ap75, ap_small (below 32² px), ap_medium, ap_large (above
      96² px); ar1, ar10, ar100 (recall with as many detections an image and class), ar_small, ar_medium, ar_large;
      per_class: label, boxes (number of objects, without crowds), ap, ap50, and curve50, the precision at the 101
      recalls 0, 0.01, … 1 for IoU 0.5. A class without objects has None and isn't in the means.

    Raises:
      UserError: if pycocotools isn't installed.
      ValueError: if two images have one number.
    """
    check_installed()
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    if len(set(image_ids)) < len(image_ids):
        raise ValueError("image_ids: two images have one number")

    def dataset(annotations: list[dict[str, Any]]) -> Any:
        made = COCO()
        made.dataset = {
            "images": [{"id": int(number)} for number in image_ids],
            "categories": [{"id": number} for number in range(len(class_names))],
            "annotations": [{**annotation, "id": place} for place, annotation in enumerate(annotations, 1)],
        }  # pycocotools takes an annotation 0 for none
        made.createIndex()
        return made

    objects, found = _objects(image_ids, truths), _found(image_ids, boxes, classes, scores)
    with contextlib.redirect_stdout(io.StringIO()):  # it prints as it goes
        evaluation = COCOeval(dataset(objects), dataset(found), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    counts = collections.Counter(each["category_id"] for each in objects if not each["iscrowd"])
    curves = evaluation.eval["precision"][..., 0, -1]  # [IoU, recall, class], of objects of any size; -1 for none
    return {
        **{name: _known(value) for name, value in zip(_NAMES, evaluation.stats, strict=True)},
        "per_class": [
            {
                "label": name,
                "boxes": counts[number],
                "ap": _known(curve.mean()),
                "ap50": _known(curve[0].mean()),
                "curve50": curve[0].tolist() if counts[number] else None,
            }
            for number, (name, curve) in enumerate(zip(class_names, np.moveaxis(curves, -1, 0), strict=True))
        ],
    }


def _known(value: float) -> float | None:
    return None if value < 0 else float(value)


def _objects(image_ids: Sequence[int], truths: Sequence[Mapping[str, np.ndarray]]) -> list[dict[str, Any]]:
    """Lists the objects as pycocotools' annotations."""
    annotations = []
    for image, truth in zip(image_ids, truths, strict=True):
        sides = _sides(truth["boxes"])
        areas = np.asarray(truth["areas"] if "areas" in truth else sides[:, 2] * sides[:, 3])
        for box, area, number, crowd in zip(
            sides.tolist(), areas.tolist(), truth["classes"], truth["crowd"], strict=True
        ):
            annotations.append({**_annotation(image, box, number), "area": area, "iscrowd": int(crowd)})
    return annotations


def _found(
    image_ids: Sequence[int], boxes: np.ndarray, classes: np.ndarray, scores: np.ndarray
) -> list[dict[str, Any]]:
    """Lists the detections as pycocotools' annotations."""
    annotations = []
    for image, own, own_classes, own_scores in zip(image_ids, boxes, classes, scores, strict=True):
        is_there = own_scores > 0
        for box, number, score in zip(
            _sides(own[is_there]).tolist(), own_classes[is_there], own_scores[is_there].tolist(), strict=True
        ):
            annotations.append({**_annotation(image, box, number), "area": box[2] * box[3], "score": score})
    return annotations


def _annotation(image: int, box: list[float], number: int) -> dict[str, Any]:
    return {"image_id": int(image), "category_id": int(number), "bbox": box}


def _sides(boxes: np.ndarray) -> np.ndarray:
    """Returns x, y, width and height of boxes (y0, x0, y1, x1), float64 [n, 4]."""
    boxes = np.asarray(boxes, np.float64).reshape(-1, 4)
    return np.concatenate([boxes[:, 1::-1], boxes[:, :1:-1] - boxes[:, 1::-1]], 1)
