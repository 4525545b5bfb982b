"""Logits of an image from several looks at it: in windows, and mirrored."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from mnv2_jax.types import Array

Network: TypeAlias = Callable[[Array], Array]
"""A function from images [b, h, w, 3] to logits [b, p, q, k], of any height and width that it can have."""


def starts(side: int, window: int, step: int) -> list[int]:
    """Returns where windows begin that cover a side, each with a third at least of its neighbour, all in pixels.

    Args:
      side: length of the side.
      window: length of a window, at most that of the side.
      step: starts are multiples of it, as is what ``side`` is longer than ``window``.
    """
    rest = (side - window) // step
    most = max(2 * window // 3 // step, 1)
    gaps = -(-rest // most)
    return [rest * place // gaps * step for place in range(gaps + 1)] if gaps else [0]


def in_windows(network: Network, window: tuple[int, int], step: int, stride: int) -> Network:
    """Makes a network that sees an image in windows, one after the other, and has the mean of their logits.

    Args:
      network: the network.
      window: height and width of the windows, which end at those of an image.
      step: windows begin at multiples of it, in pixels.
      stride: pixels between two positions of the logits, a divisor of ``step``.
    """

    def whole(images: Float[Array, "b h w 3"]) -> Array:
        sizes = images.shape[1:3]
        height, width = (min(side, own) for side, own in zip(window, sizes, strict=True))
        rows, columns = starts(sizes[0], height, step), starts(sizes[1], width, step)
        corners = np.array([(row, column) for row in rows for column in columns])
        if len(corners) == 1:
            return network(images)

        def look(corner: Array) -> Array:
            first = (0, corner[0], corner[1], 0)
            return network(jax.lax.dynamic_slice(images, first, (len(images), height, width, images.shape[-1])))

        logits = jax.lax.map(look, jnp.asarray(corners))  # one after the other, so that their maps don't take memory
        _, batch, high, wide, classes = logits.shape
        shape = (rows[-1] // stride + high, columns[-1] // stride + wide)
        sums, counts = jnp.zeros((batch, *shape, classes), logits.dtype), np.zeros((1, *shape, 1))
        for seen, (row, column) in zip(logits, corners // stride, strict=True):
            place = np.s_[row : row + high, column : column + wide]
            sums = sums.at[:, place[0], place[1]].add(seen)
            counts[:, place[0], place[1]] += 1
        return sums / counts.astype(logits.dtype)

    return whole


def with_mirror(network: Network) -> Network:
    """Makes a network that also sees the mirror image; its logits are logarithms of the mean of both probabilities."""

    def both(images: Float[Array, "b h w 3"]) -> Array:
        own, mirrored = (jax.nn.log_softmax(network(view)) for view in (images, images[:, :, ::-1]))
        return jnp.logaddexp(own, mirrored[:, :, ::-1]) - np.log(2).astype(own.dtype)

    return both
