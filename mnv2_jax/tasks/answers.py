"""Meaning of the outputs of a classification to people."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from mnv2_jax.types import Array, PyTree
from mnv2_jax.weights.file import Weights

TOP = 5
"""Classes an image where nothing else is asked for."""


@dataclasses.dataclass(frozen=True)
class TopClasses:
    """`tasks.base.Answers`: the most probable classes, the best first."""

    labels: tuple[str, ...]
    top: int

    def decode(self, outputs: Array) -> dict[str, Array]:
        """Probabilities, float [b, top], and classes, int32 [b, top], of logits [b, k]."""
        probabilities, classes = jax.lax.top_k(jax.nn.softmax(outputs), self.top)
        return {"class": classes, "probability": probabilities}

    def to_json(self, answer: PyTree) -> dict[str, Any]:
        """``{"top": [{"index", "label", "probability"}, ...]}``."""
        rows = zip(answer["class"].tolist(), answer["probability"].tolist(), strict=True)
        return {"top": [{"index": i, "label": self.labels[i], "probability": p} for i, p in rows]}

    def to_text(self, answer: PyTree) -> list[str]:
        """A line a class."""
        rows = self.to_json(answer)["top"]
        width = max(len(row["label"]) for row in rows)
        return [f"{row['label']:<{width}}  {row['probability']:8.4f}" for row in rows]


def top_classes(weights: Weights, top: int | None) -> TopClasses:
    """The answers of weights; classes that have no name are called by their number."""
    num_classes = weights.model.num_classes
    labels = weights.info.labels or tuple(map(str, range(num_classes)))
    return TopClasses(labels, min(top or TOP, num_classes))
