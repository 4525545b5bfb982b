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


@jax.named_scope(RESIZE)
def resize_each(
    x: Float[Array, "b h w c"], scales: Float[Array, "b 2"], size: tuple[int, int], *, align_corners: bool
) -> Array:
    """Resizes each map by factors of its own, of rows and of columns, as `resize_bilinear` does.

    Args:
      x: maps of any float type.
      scales: factors, which may be traced.
      size: height and width of the results, which a map fills from the top left; what lies beyond the map is 0.
      align_corners: see `resize_bilinear`; a factor is then that of the distances between centres.

    Returns:
      [b, *size, c].
    """

    def resize(one: Array, scale: Array) -> Array:
        shift = 0.5 - 0.5 * scale if align_corners else jnp.zeros_like(scale)
        shape = (*size, one.shape[-1])
        return jax.image.scale_and_translate(one, shape, (0, 1), scale, shift, "linear", antialias=False)

    return jax.vmap(resize)(x, scales.astype(x.dtype))


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
