"""Classification metrics: sums that merge by addition, and the fractions computed from them.

Counts are integers, so a result doesn't depend on how the images were split into batches or spread over devices.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from mnv2_jax.types import Array, PyTree

NUM_CALIBRATION_BINS = 15
"""Number of bins of equal width in `ece`, as in Guo et al., arXiv:1706.04599, section 3."""


NO_ANSWER = -1
"""The prediction if the logits have no finite maximum."""


def predictions(logits: Float[Array, "b k"]) -> Int[Array, " b"]:
    """Returns the class of the largest logit, or `NO_ANSWER` if the maximum is NaN or infinite.

    `NO_ANSWER` is not a label, so such a prediction is never right.
    """
    return jnp.where(jnp.isfinite(logits.max(axis=-1)), logits.argmax(axis=-1), NO_ANSWER)


def classification_sums(
    logits: Float[Array, "b k"], labels: Int[Array, " b"], losses: Float[Array, " b"], mask: Bool[Array, " b"]
) -> dict[str, Array]:
    """Computes the sums that a batch adds to each metric; rows whose mask is False add nothing, whatever they hold.

    Returns:
      loss: float []; count, top5: int32 []; confusion: int32 [k, k + 1], where rows are true classes and the last
      column is `NO_ANSWER`; and for each bin of confidence bin_count, bin_correct: int32 [15], bin_confidence: float
      [15].
    """
    num_classes = logits.shape[-1]
    labels = jnp.where(mask, labels, 0)
    prediction = predictions(logits)
    _, best = jax.lax.top_k(logits, min(5, num_classes))
    in_top5 = (best == labels[:, None]).any(axis=-1) & (prediction != NO_ANSWER)
    confidence = jax.nn.softmax(logits).max(axis=-1)
    # Bin i is (i/15, (i+1)/15]; a confidence that is NaN counts as 0.
    place = jnp.ceil(jnp.nan_to_num(confidence) * NUM_CALIBRATION_BINS).astype(jnp.int32) - 1
    place = jnp.clip(place, 0, NUM_CALIBRATION_BINS - 1)
    ones = mask.astype(jnp.int32)
    bins = jnp.zeros(NUM_CALIBRATION_BINS, jnp.int32)
    return {
        "loss": jnp.where(mask, losses, 0).sum(),
        "count": ones.sum(),
        "top5": (in_top5 & mask).sum(dtype=jnp.int32),
        "confusion": jnp.zeros((num_classes, num_classes + 1), jnp.int32).at[labels, prediction].add(ones),
        "bin_count": bins.at[place].add(ones),
        "bin_correct": bins.at[place].add(((prediction == labels) & mask).astype(jnp.int32)),
        "bin_confidence": bins.astype(confidence.dtype).at[place].add(jnp.where(mask, confidence, 0)),
    }


def merge(a: PyTree, b: PyTree) -> PyTree:
    """Adds two trees of sums."""
    return jax.tree.map(jnp.add, a, b)


def summarise_classification(sums: Mapping[str, Any], class_names: tuple[str, ...]) -> dict[str, Any]:
    """Computes fractions from 0 to 1 from `classification_sums`, as values for JSON.

    Returns:
      top1, top5, loss (nats), ece, count; per_class: label, count and accuracy (None for a class without images);
      confusion [k, k], without predictions `NO_ANSWER`; calibration: confidence, accuracy and count of each bin.
    """
    sums = {key: np.asarray(value) for key, value in sums.items()}
    count, confusion = int(sums["count"]), sums["confusion"]
    assert count > 0, "an evaluation split is never empty"
    images, right = confusion.sum(axis=1), confusion.diagonal()
    in_bin = np.maximum(sums["bin_count"], 1)
    confidence, accuracy = sums["bin_confidence"] / in_bin, sums["bin_correct"] / in_bin
    return {
        "top1": int(right.sum()) / count,
        "top5": int(sums["top5"]) / count,
        "loss": float(sums["loss"]) / count,
        "ece": float((np.abs(confidence - accuracy) * sums["bin_count"]).sum() / count),
        "count": count,
        "per_class": [
            {"label": name, "count": int(n), "accuracy": int(r) / int(n) if n else None}
            for name, n, r in zip(class_names, images, right, strict=True)
        ],
        "confusion": confusion[:, :NO_ANSWER].tolist(),
        "calibration": [
            {"confidence": float(c), "accuracy": float(a), "count": int(n)}
            for c, a, n in zip(confidence, accuracy, sums["bin_count"], strict=True)
        ],
    }
