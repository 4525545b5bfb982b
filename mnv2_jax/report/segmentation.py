"""Parts of the report for a segmentation: IoU by class, the confusion of pixels, overlays."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from mnv2_jax.data.split import Example
from mnv2_jax.report.charts import Panel
from mnv2_jax.report.examples import examples
from mnv2_jax.report.overlays import beside, overlay
from mnv2_jax.report.page import Facts, Page, Written, fitting
from mnv2_jax.report.sections import confusion_table
from mnv2_jax.report.words import number, percent, table, text

_NAMED_CLASSES = 30
"""Most classes for which the confusion of pixels is shown."""


def _lead(summary: Facts, dataset: Facts) -> Sequence[str]:
    scores = summary.get("eval", {})
    if "miou" not in scores:
        return []
    split = f" of the {text(dataset['eval_split'])} split" if dataset.get("eval_split") else ""
    best = summary.get("best", {})
    sentences = [f"<strong>{percent(scores['miou'])}</strong> mean IoU on {number(scores['count'])} images{split}."]
    if best and best["step"] != summary.get("steps"):
        sentences.append(f"The best evaluation was at step {number(best['step'])}: {percent(best['miou'])}.")
    return sentences


def _tiles(dataset: Facts) -> Written:
    del dataset
    return {
        "miou": ("mean IoU", percent),
        "pixel_accuracy": ("pixel accuracy", percent),
        "mean_accuracy": ("mean class accuracy", percent),
        "loss": ("loss", lambda loss: number(loss, ".4f")),
        "count": ("images evaluated", number),
    }


def _evaluation(evaluation: Facts, dataset: Facts, pictures: Mapping[int, str]) -> str:
    del dataset
    rows = evaluation["per_class"]
    names, total = [row["label"] for row in rows], max(sum(row["pixels"] for row in rows), 1)
    confusion = np.array(evaluation["confusion"], np.int64)
    matrix = ""
    if len(names) <= _NAMED_CLASSES:
        shares = np.rint(1000 * confusion / np.maximum(confusion.sum(1, keepdims=True), 1)).astype(np.int64)
        matrix = (
            "<h3>Confusion of pixels</h3><p class=note>Rows are the true classes and columns the predicted classes, in"
            f" thousandths of the row.</p>{confusion_table(shares, names)}"
        )
    return f"<section><h3>IoU by class</h3>{_classes(rows, total)}{matrix}{_examples(evaluation, pictures)}</section>"


def _classes(rows: Iterable[Mapping[str, Any]], total: int) -> str:
    cells = [
        (
            text(row["label"]),
            percent(row["pixels"] / total),
            f'<span class=meter style="--s:{100 * (row["iou"] or 0):.1f}%"></span>',
            percent(row["iou"]),
            percent(row["accuracy"]),
        )
        for row in rows
    ]
    return table(("class", "pixels", "", "IoU", "accuracy"), cells, "classes")


def _examples(evaluation: Facts, pictures: Mapping[int, str]) -> str:
    return examples(
        evaluation,
        pictures,
        "Image, true classes, predicted classes.",
        lambda example: f"mean IoU {percent(example['iou'])}",
    )


def draw(example: Example, class_map: np.ndarray | None) -> np.ndarray:
    """Draws an image, its true classes and, where they are known, its predicted classes beside each other."""
    image, mask = np.asarray(example["image"]), np.asarray(example["mask"])
    small = fitting(image)
    size = (small.shape[1], small.shape[0])

    def resized(classes: np.ndarray) -> np.ndarray:
        return np.asarray(Image.fromarray(classes).resize(size, Image.Resampling.NEAREST))

    maps = [mask] if class_map is None else [mask, class_map]
    return beside([small, *(overlay(small, resized(classes)) for classes in maps)])


SEGMENTATION = Page(
    lead=_lead,
    tiles=_tiles,
    panels=(
        Panel("Mean IoU", "miou", ("eval",), "{:.4g} %", 100),
        Panel("Pixel accuracy", "pixel_accuracy", ("train", "eval"), "{:.4g} %", 100),
    ),
    sections=_evaluation,
    draw=draw,
)
