"""What an evaluation of a classification has on the page."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from mnv2_jax.report.charts import Panel, reliability
from mnv2_jax.report.page import Facts, Page
from mnv2_jax.report.words import number, percent, table, text

_NAMED_CLASSES = 30
"""Up to so many the confusion matrix is a table with names; beyond that it is a picture."""
_WORST_CLASSES, _PAIRS = 20, 8
_ABSENT_CLASSES = 5


def _lead(summary: Facts, dataset: Facts) -> list[str]:
    """What was reached on how many images, and how sure so many images can make us."""
    scores, best, sentences = summary.get("eval", {}), summary.get("best", {}), []
    top1, count = scores.get("top1"), scores.get("count")
    if top1 is not None and count:
        low, high = _wilson(top1, int(count))
        split = f" of the {text(dataset['eval_split'])} split" if dataset.get("eval_split") else ""
        sentences.append(
            f"<strong>{percent(top1)}</strong> top-1 on {number(count)} images{split}"
            f" (95 % interval {100 * low:.1f} to {100 * high:.1f})."
        )
    if best and best["step"] != summary.get("steps"):
        sentences.append(f"The best evaluation was at step {number(best['step'])}: {percent(best['top1'])}.")
    return sentences


def _wilson(share: float, count: int, z: float = 1.96) -> tuple[float, float]:
    """Score interval of a proportion (Wilson 1927): unlike the normal one it stays within 0 to 1."""
    centre = share + z * z / (2 * count)
    spread = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    scale = 1 + z * z / count
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)


def _evaluation(evaluation: Facts, dataset: Facts, pictures: Mapping[int, str]) -> str:
    """Confusion, calibration and accuracy by class, and the worst mistakes."""
    names = list(dataset.get("class_names") or ()) or [str(row["label"]) for row in evaluation["per_class"]]
    counts = [row["count"] for row in evaluation["per_class"]]
    absent = absent_classes(dataset.get("eval_split", "the split"), names, counts)
    note = f"<p class=note>{text(absent)}.</p>" if absent else ""
    confusion = np.array(evaluation["confusion"], np.int64)
    few = len(names) <= _NAMED_CLASSES
    wide = _confusion_table(confusion, names) if few else _confusion_picture(confusion)
    return (
        f"<section><h2>Evaluation at step {number(evaluation.get('step'))}</h2>{note}"
        f"<div class=charts>{reliability(evaluation['calibration'])}{_pairs(confusion, names)}</div>"
        f"<h3>Confusion matrix</h3><p class=note>Rows are the true classes, columns the predicted ones; shades are"
        f" shares of the row.</p>{wide}"
        f"<h3>Accuracy by class</h3>{_classes(evaluation['per_class'], names)}</section>"
        f"{_mistakes(evaluation.get('examples', ()), names, pictures)}"
    )


def absent_classes(split: str, class_names: Sequence[str], counts: Iterable[int]) -> str:
    """Says which classes a split has no images of, at most 5 by name; "" where it has some of each.

    Args:
      split: its name.
      class_names: in the order of the labels.
      counts: the number of its images by label.
    """
    absent = [name for name, count in zip(class_names, counts, strict=True) if not count]
    if not absent:
        return ""
    more = f" and {len(absent) - _ABSENT_CLASSES:,} more" if len(absent) > _ABSENT_CLASSES else ""
    named = ", ".join(absent[:_ABSENT_CLASSES]) + more
    return f"{split} has no images of {len(absent):,} of {len(class_names):,} classes: {named}"


def _shades(confusion: np.ndarray) -> np.ndarray:
    """[k, k] in [0, 1]: square roots of row shares, so that one mistake in a hundred is seen."""
    return np.sqrt(confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1))


def _confusion_table(confusion: np.ndarray, names: Sequence[str]) -> str:
    shades = _shades(confusion)
    head = "".join(f"<th scope=col><span>{text(name)}</span></th>" for name in names)
    rows = []
    for true, name in enumerate(names):
        cells = []
        for predicted, count in enumerate(confusion[true]):
            colour = "--main" if true == predicted else "--second"
            style = f'style="--c:var({colour});--s:{65 * shades[true, predicted]:.0f}%"' if count else ""
            hint = f"{name} as {names[predicted]}: {count}"
            cells.append(f'<td {style} title="{text(hint)}">{count or ""}</td>')
        rows.append(f"<tr><th scope=row>{text(name)}</th>{''.join(cells)}</tr>")
    return (
        f"<div class=scroll><table class=confusion><thead><tr><th></th>{head}</tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _confusion_picture(confusion: np.ndarray) -> str:
    """One pixel a cell: ink of one colour and varying opacity, so that it suits any background."""
    shades = _shades(confusion)
    pixels = np.empty((*shades.shape, 4), np.uint8)
    pixels[...] = (202, 107, 47, 0)
    pixels[np.eye(len(shades), dtype=bool)] = (47, 124, 160, 0)
    pixels[..., 3] = np.round(255 * shades)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", optimize=True)
    data = base64.b64encode(file.getvalue()).decode()
    return f'<img class=matrix alt="Confusion matrix" src="data:image/png;base64,{data}">'


def _pairs(confusion: np.ndarray, names: Sequence[str]) -> str:
    """The most frequent mistakes."""
    mistakes = confusion * (1 - np.eye(len(confusion), dtype=np.int64))
    totals = np.maximum(confusion.sum(axis=1), 1)
    order = np.argsort(-mistakes, axis=None, kind="stable")[:_PAIRS]
    places = [divmod(int(place), len(confusion)) for place in order if mistakes.flat[place]]
    rows = (
        (
            f"{text(names[true])} <span class=arrow>→</span> {text(names[predicted])}",
            number(mistakes[true, predicted]),
            percent(mistakes[true, predicted] / totals[true]),
        )
        for true, predicted in places
    )
    pairs = table(("true → predicted", "images", "of the class"), rows) if places else "<p class=note>None.</p>"
    return f"<figure><figcaption>Most frequent mistakes</figcaption>{pairs}</figure>"


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
    seen = [i for i, row in enumerate(per_class) if row["count"]]
    worst = sorted(seen, key=lambda i: per_class[i]["accuracy"])[:_WORST_CLASSES]
    return (
        f"<p class=note>The {len(worst)} classes that did worst.</p>{table(head, (rows[i] for i in worst), 'classes')}"
        f"<details><summary>All {len(rows)} classes</summary>{table(head, rows, 'classes')}</details>"
    )


def _mistakes(mistakes: Iterable[Mapping[str, Any]], names: Sequence[str], pictures: Mapping[int, str]) -> str:
    """The pictures that are there, each with what it is and what it was taken for."""
    cards = [
        f"<figure>{pictures[mistake['index']]}"
        f"<figcaption>{text(names[mistake['label']])} <span class=arrow>→</span> {text(names[mistake['prediction']])}"
        f"<span class=note> {percent(mistake['confidence'])}, image {mistake['index']}</span></figcaption></figure>"
        for mistake in mistakes
        if mistake["index"] in pictures
    ]
    if not cards:
        return ""
    return (
        "<section><h2>Worst mistakes</h2><p class=note>The wrongly classified images of highest loss: true class →"
        f" prediction, with its confidence.</p><div class=pictures>{''.join(cards)}</div></section>"
    )


CLASSIFICATION = Page(
    lead=_lead,
    tiles={
        "top1": ("top-1", percent),
        "top5": ("top-5", percent),
        "loss": ("loss", lambda loss: number(loss, ".4f")),
        "ece": ("calibration error", percent),
        "count": ("images evaluated", number),
    },
    panels=(Panel("Top-1 accuracy", "top1", ("train", "eval"), "{:.4g} %", 100),),
    sections=_evaluation,
)
