"""Losses per example; the task takes the mean over a batch and its mask."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from mnv2_jax.types import Array


def softmax_cross_entropy(
    logits: Float[Array, "b k"], labels: Int[Array, " b"], label_smoothing: float = 0.0
) -> Float[Array, " b"]:
    """Computes the cross-entropy with labels smoothed over all k classes (Szegedy et al., arXiv:1512.00567, section 7).

    Args:
      logits: unnormalised, float32 or wider.
      labels: 0 to k - 1.
      label_smoothing: s in [0, 1); the target of the true class is 1 - s + s/k, that of every other class s/k.
    """
    log_probs = jax.nn.log_softmax(logits)
    nll = -jnp.take_along_axis(log_probs, labels[:, None], axis=-1)[:, 0]
    return (1 - label_smoothing) * nll - label_smoothing * log_probs.mean(axis=-1)
