"""Parts of the report for a segmentation: IoU by class, the confusion of pixels, overlays."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from mnv2_jax.data.split import Example
from mnv2_jax.report.charts import Panel
from mnv2_jax.report.overlays import beside, overlay
from mnv2_jax.report.page import Facts, Page, Written, fitting
from mnv2_jax.report.sections import confusion_table
from mnv2_jax.report.words import number, percent, place, table, text

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


_TITLES = {"worst": "Worst images", "typical": "Typical images"}


def _examples(evaluation: Facts, pictures: Mapping[int, str]) -> str:
    parts = []
    for why, title in _TITLES.items():
        cards = [
            f"<figure>{pictures[example['index']]}<figcaption>mean IoU {percent(example['iou'])}"
            f"<span class=note>{_place(example)}</span></figcaption></figure>"
            for example in evaluation.get("examples", ())
            if example["why"] == why and example["index"] in pictures
        ]
        if cards:
            note = "<p class=note>Image, true classes, predicted classes.</p>"
            parts.append(f'<h3>{title}</h3>{note}<div class="pictures wide">{"".join(cards)}</div>')
    return "".join(parts)


def _place(example: Mapping[str, Any]) -> str:
    return place(example["path"]) if "path" in example else f"image {example['index']}"


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
