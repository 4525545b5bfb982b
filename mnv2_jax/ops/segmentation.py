"""Losses and metrics of segmentation. Counts are integers, so they don't depend on batches and devices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int, UInt8

from mnv2_jax.config import IGNORED
from mnv2_jax.types import Array

_WORD = 16
"""Bits of the lower word of a count; sums of two words are exact beyond what an int32 holds."""


def pixel_losses(logits: Float[Array, "b h w k"], mask: UInt8[Array, "b h w"]) -> Float[Array, "b h w"]:
    """Computes the cross-entropy of each pixel; 0 where the mask is `IGNORED`."""
    is_valid = mask != IGNORED
    classes = jnp.where(is_valid, mask, 0).astype(jnp.int32)
    highest = logits.max(-1, keepdims=True)
    total = jnp.log(jnp.exp(logits - highest).sum(-1)) + highest[..., 0]
    of_class = jnp.take_along_axis(logits, classes[..., None], axis=-1)[..., 0]
    return jnp.where(is_valid, total - of_class, 0)


def predictions(logits: Float[Array, "b h w k"]) -> Int[Array, "b h w"]:
    """Returns the class of the largest logit, or k, which is no class, where the maximum is NaN or infinite."""
    return jnp.where(jnp.isfinite(logits.max(-1)), logits.argmax(-1), logits.shape[-1])


def confusion(predicted: Int[Array, "b h w"], mask: UInt8[Array, "b h w"], num_classes: int) -> Int[Array, "b k m"]:
    """Counts the valid pixels of each image by true and predicted class, int32 [b, k, k + 1]; the last column is no
    class."""
    columns = num_classes + 1
    places = jnp.where(mask != IGNORED, mask.astype(jnp.int32) * columns + predicted, num_classes * columns)
    counts = jax.vmap(lambda place: jnp.bincount(place.reshape(-1), length=num_classes * columns + 1))(places)
    return counts[:, :-1].reshape(-1, num_classes, columns).astype(jnp.int32)


def small_maps(predicted: Int[Array, "b h w"], sizes: Int[Array, "b 2"], side: int) -> UInt8[Array, "b s s"]:
    """Samples the top left part [height, width] of each map at side × side places, whatever its shape."""

    def sample(classes: Array, size: Array) -> Array:
        rows, columns = (((jnp.arange(side) + 0.5) * (size[axis] / side)).astype(jnp.int32) for axis in (0, 1))
        return classes[rows[:, None], columns[None]].astype(jnp.uint8)

    return jax.vmap(sample)(predicted, sizes)


def split_counts(counts: Int[Array, ...]) -> dict[str, Array]:
    """Splits counts, int32, into two words, whose sums over up to 2^15 batches stay exact; see `join_counts`."""
    return {"low": counts & (2**_WORD - 1), "high": counts >> _WORD}


def join_counts(sums: Mapping[str, Any]) -> np.ndarray:
    """Joins sums of the words of `split_counts`, int64."""
    return np.asarray(sums["low"], np.int64) + (np.asarray(sums["high"], np.int64) << _WORD)


def image_ious(counts: Int[Array, "b k m"]) -> Float[Array, " b"]:
    """Computes for each image the mean IoU of the classes that it has or is predicted to have; 1 if there is none."""
    hits = jnp.diagonal(counts, axis1=1, axis2=2)
    unions = counts.sum(2) + counts[:, :, : counts.shape[1]].sum(1) - hits
    is_seen = unions > 0
    ious = jnp.where(is_seen, hits / jnp.maximum(unions, 1), 0)
    return jnp.where(is_seen.any(1), ious.sum(1) / jnp.maximum(is_seen.sum(1), 1), 1.0)


def summarise(counts: np.ndarray, class_names: Sequence[str]) -> dict[str, Any]:
    """Computes fractions from 0 to 1 from a confusion matrix [k, k + 1] over all images, as values for JSON.

    A class that no pixel has or is predicted to have has no IoU (None) and isn't in the mean.

    Returns:
      miou, pixel_accuracy, mean_accuracy; per_class: label, pixels, iou, accuracy; confusion [k, k].
    """
    counts = np.asarray(counts, np.int64)
    hits, true = counts.diagonal(), counts.sum(1)
    unions = true + counts[:, : len(counts)].sum(0) - hits
    ious = [int(hit) / int(union) if union else None for hit, union in zip(hits, unions, strict=True)]
    accuracies = [int(hit) / int(pixels) if pixels else None for hit, pixels in zip(hits, true, strict=True)]
    return {
        "miou": _mean(ious),
        "pixel_accuracy": int(hits.sum()) / max(int(true.sum()), 1),
        "mean_accuracy": _mean(accuracies),
        "per_class": [
            {"label": name, "pixels": int(pixels), "iou": iou, "accuracy": accuracy}
            for name, pixels, iou, accuracy in zip(class_names, true, ious, accuracies, strict=True)
        ],
        "confusion": counts[:, : len(counts)].tolist(),
    }


def _mean(values: Sequence[float | None]) -> float:
    known = [value for value in values if value is not None]
    return sum(known) / max(len(known), 1)


def masked(counts: Int[Array, "b k m"], mask: Bool[Array, " b"]) -> Int[Array, "k m"]:
    """Sums the counts of the images whose mask is True."""
    return jnp.where(mask[:, None, None], counts, 0).sum(0)
