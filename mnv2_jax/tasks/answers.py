"""Answers of a classification network: the most probable classes with their labels."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax

from mnv2_jax.types import Array, PyTree
from mnv2_jax.weights.file import Weights

TOP = 5
"""Default number of classes per image."""


@dataclasses.dataclass(frozen=True)
class TopClasses:
    """The `tasks.base.Answers` of a classification: the most probable classes, best first."""

    labels: tuple[str, ...]
    top: int

    def decode(self, outputs: Array) -> dict[str, Array]:
        """Returns probabilities, float [b, top], and classes, int32 [b, top], for logits [b, k]."""
        probabilities, classes = jax.lax.top_k(jax.nn.softmax(outputs), self.top)
        return {"class": classes, "probability": probabilities}

    def to_json(self, answer: PyTree) -> dict[str, Any]:
        """The answer for one image as ``{"top": [{"index", "label", "probability"}, ...]}``."""
        rows = zip(answer["class"].tolist(), answer["probability"].tolist(), strict=True)
        return {"top": [{"index": i, "label": self.labels[i], "probability": p} for i, p in rows]}

    def to_text(self, entries: Mapping[str, Any]) -> list[str]:
        """The entries of `to_json` as text, one line per class."""
        rows = entries["top"]
        width = max((len(row["label"]) for row in rows), default=0)
        return [f"{row['label']:<{width}}  {row['probability']:8.4f}" for row in rows]


def top_classes(weights: Weights, top: int | None) -> TopClasses:
    """Makes the answers for weights; classes without a name are labelled by their number."""
    num_classes = weights.model.num_classes
    labels = weights.info.labels or tuple(map(str, range(num_classes)))
    return TopClasses(labels, min(top or TOP, num_classes))
