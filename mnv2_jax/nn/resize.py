"""Bilinear resizing of maps, as products with two small matrices, which every device and every runtime computes."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from mnv2_jax.types import Array

RESIZE = "resize_bilinear"
"""Name of the scope in which a map is resized."""


@jax.named_scope(RESIZE)
def resize_bilinear(x: Float[Array, "b h w c"], size: tuple[int, int], *, align_corners: bool) -> Array:
    """Resizes the rows and columns of maps without smoothing, as logits are upsampled.

    Args:
      x: maps of any float type; sums are in float32 at least.
      size: new height and width.
      align_corners: whether the centres of the corner pixels coincide (TensorFlow 1, CoreNet), rather than the corners
        of the corner pixels (PyTorch's ``align_corners=False``, TensorFlow's half-pixel centres).

    Returns:
      [b, *size, c], of the type of ``x``.
    """
    for axis, new in zip((1, 2), size, strict=True):
        if x.shape[axis] == new:
            continue
        weights = jnp.asarray(weights_of(x.shape[axis], new, align_corners).T, x.dtype)
        # Rows of [b, …, old] by [old, new]: a dense layer, which every runtime has, and the batch stays in front.
        rows = jnp.moveaxis(x, axis, -1)
        x = jnp.moveaxis(jnp.matmul(rows, weights, precision=jax.lax.Precision.HIGHEST), -1, axis)
    return x


@functools.cache
def weights_of(old: int, new: int, align_corners: bool) -> np.ndarray:
    """Returns the weights of the old positions for each new one, float64 [new, old]; rows sum to 1."""
    place = np.arange(new)
    if align_corners:
        source = place * ((old - 1) / (new - 1) if new > 1 else 0.0)
    else:
        source = ((place + 0.5) * (old / new) - 0.5).clip(0, old - 1)
    below = np.floor(source).astype(np.int64).clip(0, old - 1)
    above = np.minimum(below + 1, old - 1)
    share = source - below
    weights = np.zeros((new, old))
    np.add.at(weights, (place, below), 1 - share)
    np.add.at(weights, (place, above), share)
    return weights
