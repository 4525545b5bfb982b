"""Sections of the report page for evaluations of a classification."""

from __future__ import annotations

import base64
import csv
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from mnv2_jax.report.charts import Panel, reliability
from mnv2_jax.report.page import Facts, Page, Written
from mnv2_jax.report.words import number, percent, place, table, text

_NAMED_CLASSES, _LABELLED_CLASSES = 30, 128
"""Most classes for which the confusion matrix is a table of numbers; and a table of shades, which shows the numbers on
hovering. For more classes it is a picture."""
_WIDTH_REM = 47
"""Width of the page without the row names of the matrix."""
_WORST_CLASSES, _PAIRS, _MORE_PAIRS = 20, 10, 200
_ABSENT_CLASSES = 5
_FEW_CLASSES = 10


def has_top5(num_classes: int) -> bool:
    """Whether top-5 accuracy is meaningful: with 10 classes or fewer, guessing reaches half of it or more."""
    return num_classes > _FEW_CLASSES


def _lead(summary: Facts, dataset: Facts) -> list[str]:
    """Sentences with the accuracy, the number of images and the confidence interval; and on the best evaluation."""
    best, sentences = summary.get("best", {}), _accuracy(summary.get("eval", {}), dataset)
    if best and best["step"] != summary.get("steps"):
        sentences.append(f"The best evaluation was at step {number(best['step'])}: {percent(best['top1'])}.")
    return sentences


def _accuracy(scores: Facts, dataset: Facts) -> list[str]:
    top1, count = scores.get("top1"), scores.get("count")
    if top1 is None or not count:
        return []
    low, high = _wilson(top1, int(count))
    split = f" of the {text(dataset['eval_split'])} split" if dataset.get("eval_split") else ""
    return [
        f"<strong>{percent(top1)}</strong> top-1 on {number(count)} images{split}"
        f" (95 % interval {100 * low:.1f} to {100 * high:.1f})."
    ]


def _wilson(share: float, count: int, z: float = 1.96) -> tuple[float, float]:
    """Score interval of a proportion (Wilson 1927). Unlike the normal interval, it stays within 0 to 1."""
    centre = share + z * z / (2 * count)
    spread = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    scale = 1 + z * z / count
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)


def _evaluation(evaluation: Facts, dataset: Facts, pictures: Mapping[int, str]) -> str:
    """HTML with calibration, confusion matrix, accuracy by class and the worst mistakes."""
    names = list(dataset.get("class_names") or ()) or [str(row["label"]) for row in evaluation["per_class"]]
    counts = [row["count"] for row in evaluation["per_class"]]
    split = dataset.get("eval_split", "the split")
    absent = absent_classes(split, names, counts)
    note = f"<p class=note>{text(absent)}.</p>" if absent else ""
    confusion = np.array(evaluation["confusion"], np.int64)
    matrix = confusion_table(confusion, names) if len(names) <= _LABELLED_CLASSES else _confusion_picture(confusion)
    pairs = _pairs(confusion, names)
    return (
        f"<section>{note}<p>{' '.join(_accuracy(evaluation, dataset))}</p>"
        f"<div class=charts>{reliability(evaluation['calibration'])}"
        f"<figure><figcaption>Most frequent mistakes</figcaption>{_pairs_table(pairs[:_PAIRS])}</figure></div>"
        f"<h3>Confusion matrix</h3><p class=note>Rows are the true classes and columns the predicted classes. Shades"
        f" show the share of the row. {_download(pairs, confusion, names, f'confusion-{split}.csv')}</p>{matrix}"
        f"{_more_pairs(pairs)}"
        f"<h3>Accuracy by class</h3>{_classes(evaluation['per_class'], names)}"
        f"{_mistakes(evaluation.get('examples', ()), names, pictures)}</section>"
    )


def absent_classes(split: str, class_names: Sequence[str], counts: Iterable[int]) -> str:
    """Sentence on the classes without images in a split, at most 5 by name; "" if all classes have images.

    Args:
      split: name of the split.
      class_names: names by label.
      counts: number of images by label.
    """
    absent = [name for name, count in zip(class_names, counts, strict=True) if not count]
    if not absent:
        return ""
    more = f" and {len(absent) - _ABSENT_CLASSES:,} more" if len(absent) > _ABSENT_CLASSES else ""
    named = ", ".join(absent[:_ABSENT_CLASSES]) + more
    return f"{split} has no images of {len(absent):,} of {len(class_names):,} classes: {named}"


def _shades(confusion: np.ndarray) -> np.ndarray:
    """Shades of the matrix, [k, k] in [0, 1]: square roots of row shares, so that 1 mistake in 100 is visible."""
    return np.sqrt(confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1))


def confusion_table(confusion: np.ndarray, names: Sequence[str]) -> str:
    """Table with one cell per pair of classes, which shows its numbers on hovering.

    With many classes the cells are small, and empty cells show nothing.
    """
    shades, totals = _shades(confusion), np.maximum(confusion.sum(axis=1), 1)
    is_small = len(names) > _NAMED_CLASSES
    head = "".join(f"<th scope=col><span>{text(name)}</span></th>" for name in names)
    rows = []
    for true, name in enumerate(names):
        cells = []
        for predicted, count in enumerate(confusion[true]):
            colour = "--main" if true == predicted else "--second"
            if is_small and not count:
                cells.append("<td></td>")
                continue
            strength = 20 + 80 * shades[true, predicted] if is_small else 65 * shades[true, predicted]
            style = f'style="--c:var({colour});--s:{strength:.0f}%"' if count else ""
            hint = f"{name} as {names[predicted]}: {count} ({percent(count / totals[true])})"
            cells.append(f'<td {style} title="{text(hint)}">{"" if is_small else count or ""}</td>')
        rows.append(f"<tr><th scope=row>{text(name)}</th>{''.join(cells)}</tr>")
    kind = f'class="confusion small" style="--cell:{min(0.85, _WIDTH_REM / len(names)):.2f}rem"'
    return (
        f"<div class=scroll><table {kind if is_small else 'class=confusion'}><thead>"
        f"<tr><th></th>{head}</tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _confusion_picture(confusion: np.ndarray) -> str:
    """Picture with one pixel per cell. Its opacity varies, not its colour, so that it fits any background."""
    shades = _shades(confusion)
    pixels = np.empty((*shades.shape, 4), np.uint8)
    pixels[...] = (202, 107, 47, 0)
    pixels[np.eye(len(shades), dtype=bool)] = (47, 124, 160, 0)
    pixels[..., 3] = np.round(255 * shades)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", optimize=True)
    data = base64.b64encode(file.getvalue()).decode()
    return f'<img class=matrix alt="Confusion matrix" src="data:image/png;base64,{data}">'


class _Pair(NamedTuple):
    """Number of images of one class that were predicted as another class, or as their own."""

    true: str
    predicted: str
    images: int
    share: float
    """Share of the images of the true class."""


def _pair(confusion: np.ndarray, names: Sequence[str], true: int, predicted: int) -> _Pair:
    count = int(confusion[true, predicted])
    return _Pair(names[true], names[predicted], count, count / int(confusion[true].sum()))


def _pairs(confusion: np.ndarray, names: Sequence[str]) -> list[_Pair]:
    """Mistakes, most frequent first."""
    mistakes = confusion * (1 - np.eye(len(confusion), dtype=np.int64))
    order = np.argsort(-mistakes, axis=None, kind="stable")[: np.count_nonzero(mistakes)]
    return [_pair(confusion, names, *divmod(place, len(confusion))) for place in order.tolist()]


def _pairs_table(pairs: Sequence[_Pair]) -> str:
    if not pairs:
        return "<p class=note>None.</p>"
    rows = (
        (
            f"{text(pair.true)} <span class=arrow>→</span> {text(pair.predicted)}",
            number(pair.images),
            percent(pair.share),
        )
        for pair in pairs
    )
    return table(("true → predicted", "images", "of the class"), rows)


def _more_pairs(pairs: Sequence[_Pair]) -> str:
    if len(pairs) <= _PAIRS:
        return ""
    more = f" (the first {_MORE_PAIRS} here, all in the CSV)" if len(pairs) > _MORE_PAIRS else ""
    return (
        f"<details><summary>All {number(len(pairs))} confusions, most frequent first{more}</summary>"
        f"{_pairs_table(pairs[:_MORE_PAIRS])}</details>"
    )


def _download(pairs: Iterable[_Pair], confusion: np.ndarray, names: Sequence[str], name: str) -> str:
    """Link that contains the matrix as CSV: one line per cell that isn't zero; mistakes first, most frequent first."""
    right = (_pair(confusion, names, place, place) for place in np.flatnonzero(confusion.diagonal()).tolist())
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(_Pair._fields)
    writer.writerows((pair.true, pair.predicted, pair.images, f"{pair.share:.6g}") for pair in (*pairs, *right))
    data = base64.b64encode(file.getvalue().encode(errors="backslashreplace")).decode()
    return f'<a download="{text(name)}" href="data:text/csv;charset=utf-8;base64,{data}">CSV</a>'


def _classes(per_class: Sequence[Mapping[str, Any]], names: Sequence[str]) -> str:
    rows = [
        (
            text(name),
            number(row["count"]),
            f'<span class=meter style="--s:{100 * (row["accuracy"] or 0):.1f}%"></span>',
            percent(row["accuracy"] if row["count"] else None),
        )
        for name, row in zip(names, per_class, strict=True)
    ]
    head = ("class", "images", "", "accuracy")
    if len(rows) <= _NAMED_CLASSES:
        return table(head, rows, "classes")
    with_images = [i for i, row in enumerate(per_class) if row["count"]]
    worst = sorted(with_images, key=lambda i: per_class[i]["accuracy"])[:_WORST_CLASSES]
    return (
        f"<p class=note>The {len(worst)} classes with the lowest accuracy.</p>"
        f"{table(head, (rows[i] for i in worst), 'classes')}"
        f"<details><summary>All {len(rows)} classes</summary>{table(head, rows, 'classes')}</details>"
    )


def _mistakes(mistakes: Iterable[Mapping[str, Any]], names: Sequence[str], pictures: Mapping[int, str]) -> str:
    """Section with the existing pictures of mistakes, each with true class, prediction, confidence and path."""

    def image_place(mistake: Mapping[str, Any]) -> str:
        return place(mistake["path"]) if "path" in mistake else f"image {mistake['index']}"

    cards = [
        f"<figure>{pictures[mistake['index']]}"
        f"<figcaption>{text(names[mistake['label']])} <span class=arrow>→</span> {text(names[mistake['prediction']])}"
        f"<span class=note>{percent(mistake['confidence'])}, loss {number(mistake['loss'], '.2f')},"
        f" {image_place(mistake)}</span></figcaption></figure>"
        for mistake in mistakes
        if mistake["index"] in pictures
    ]
    if not cards:
        return ""
    return (
        "<h3>Worst mistakes</h3><p class=note>The wrongly classified images with the highest loss: true class →"
        f" prediction, with its confidence and loss.</p><div class=pictures>{''.join(cards)}</div>"
    )


def _tiles(dataset: Facts) -> Written:
    tiles: Written = {
        "top1": ("top-1", percent),
        "top5": ("top-5", percent),
        "loss": ("loss", lambda loss: number(loss, ".4f")),
        "ece": ("calibration error", percent),
        "count": ("images evaluated", number),
    }
    has = has_top5(len(dataset.get("class_names") or ()))
    return {name: tile for name, tile in tiles.items() if has or name != "top5"}


CLASSIFICATION = Page(
    lead=_lead,
    tiles=_tiles,
    panels=(Panel("Top-1 accuracy", "top1", ("train", "eval"), "{:.4g} %", 100),),
    sections=_evaluation,
)
