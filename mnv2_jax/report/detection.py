"""Parts of the report for a detection: average precision by class, precision over recall, drawn boxes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from mnv2_jax.data.split import Example
from mnv2_jax.report.boxes import drawn
from mnv2_jax.report.charts import Panel, precision_recall
from mnv2_jax.report.examples import examples
from mnv2_jax.report.overlays import beside
from mnv2_jax.report.page import Facts, Page, Written, fitting
from mnv2_jax.report.words import number, percent, table, text

_PICTURE_PX = 240
_SIZES = ("small", "medium", "large")
_CURVES = 10
"""Most classes whose curves are drawn: those with the most boxes."""


def _lead(summary: Facts, dataset: Facts) -> Sequence[str]:
    scores = summary.get("eval", {})
    if "ap" not in scores:
        return []
    split = f" of the {text(dataset['eval_split'])} split" if dataset.get("eval_split") else ""
    sentences = [
        f"<strong>{percent(scores['ap'])}</strong> mean average precision (COCO's), {percent(scores['ap50'])} at an"
        f" IoU of 0.5, on {number(scores['count'])} images{split} with {number(scores['boxes'])} boxes."
    ]
    best = summary.get("best", {})
    if best and best["step"] != summary.get("steps"):
        sentences.append(f"The best evaluation was at step {number(best['step'])}: {percent(best['ap'])}.")
    return sentences


def _tiles(dataset: Facts) -> Written:
    del dataset
    return {
        "ap": ("mean AP", percent),
        "ap50": ("AP at IoU 0.5", percent),
        "ap75": ("AP at IoU 0.75", percent),
        "loss": ("loss", lambda loss: number(loss, ".4f")),
        "boxes": ("boxes", number),
        "count": ("images evaluated", number),
    }


def _evaluation(evaluation: Facts, dataset: Facts, pictures: Mapping[int, str]) -> str:
    del dataset
    sizes = table(
        ("boxes", "AP", "recall"),
        [(size, percent(evaluation[f"ap_{size}"]), percent(evaluation[f"ar_{size}"])) for size in _SIZES],
    )
    drawn_classes = sorted(evaluation["per_class"], key=lambda row: -row["boxes"])[:_CURVES]
    curves = {row["label"]: row["curve50"] for row in drawn_classes if row["curve50"]}
    is_part = len(evaluation["per_class"]) > _CURVES
    note = f"<p class=note>The {_CURVES} classes with the most boxes.</p>" if is_part else ""
    return (
        f"<section><h3>AP by class</h3>{_classes(evaluation['per_class'])}<h3>AP by size</h3>"
        f"<p class=note>Small: below 32² pixels; large: above 96².</p>{sizes}{precision_recall(curves)}{note}"
        f"{_examples(evaluation, pictures)}</section>"
    )


def _classes(rows: Iterable[Mapping[str, Any]]) -> str:
    cells = [
        (
            text(row["label"]),
            number(row["boxes"]),
            f'<span class=meter style="--s:{100 * (row["ap"] or 0):.1f}%"></span>',
            percent(row["ap"]),
            percent(row["ap50"]),
        )
        for row in rows
    ]
    return table(("class", "boxes", "", "AP", "AP at 0.5"), cells, "classes")


def _examples(evaluation: Facts, pictures: Mapping[int, str]) -> str:
    return examples(
        evaluation,
        pictures,
        "True boxes, broken lines; found boxes of a probability of one half or more.",
        lambda row: f"{number(row['missed'])} missed, {number(row['wrong'])} wrong of {number(row['boxes'])} boxes",
    )


def draw(example: Example, found: np.ndarray | None) -> np.ndarray:
    """Draws the true boxes and, where they are known, the found ones over an image, beside each other.

    Args:
      example: the image and its boxes.
      found: [n, 5], (y0, x0, y1, x1) in pixels of the image, and the class.
    """
    image = np.asarray(example["image"])
    small = fitting(image, _PICTURE_PX)
    scale = np.tile(np.array(small.shape[:2]) / image.shape[:2], 2)
    pictures = [drawn(small, example["boxes"] * scale, example["classes"], is_dashed=True)]
    if found is not None:
        pictures.append(drawn(small, found[:, :4] * scale, found[:, 4].astype(int)))
    return beside(pictures)


DETECTION = Page(
    lead=_lead,
    tiles=_tiles,
    panels=(
        Panel("Mean AP", "ap", ("eval",), "{:.4g} %", 100),
        Panel("Loss of boxes", "box_loss", ("train",), "{:.3g}", 1),
        Panel("Loss of classes", "class_loss", ("train",), "{:.3g}", 1),
    ),
    sections=_evaluation,
    draw=draw,
)
"""The report's parts for a detection."""
