"""The contract of a view: a pure function from an example to a row of a batch, on the host."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol, Self, TypeAlias, runtime_checkable

import numpy as np

from mnv2_jax.data.split import Example, Split

Draw: TypeAlias = tuple[int, int, int]
"""(seed, epoch, index) of an example in training, the only source of its random numbers."""


class Array(NamedTuple):
    """Shape and type of one array in a row."""

    shape: tuple[int, ...]
    dtype: type[np.generic]

    @property
    def size_bytes(self) -> int:
        """Size of the array in one row, in bytes."""
        return int(np.prod(self.shape)) * np.dtype(self.dtype).itemsize


class View(Protocol):
    """A function from an example to a row of a batch.

    A view does the geometry, such as crops, once for the image and its targets, and everything that needs NumPy. The
    devices do what moves no target, such as colour changes and normalisation. A view must be picklable, since it is
    sent to workers. It makes all keys of a batch except the loop's own (`types.Batch`), among them "image", uint8
    [h, w, 3].
    """

    @property
    def varies(self) -> bool:
        """Whether an example has more than one view; if not, a split that fits is kept on the devices."""

    @property
    def spec(self) -> Mapping[str, Array]:
        """Shape and dtype of each array that an example gives, by name."""

    def at(self, resolution: int) -> Self:
        """Returns the same view with images of resolution × resolution pixels."""

    def __call__(self, example: Example, draw: Draw | None) -> Mapping[str, np.ndarray | int]:
        """Makes the row of an example, with the arrays of ``spec``.

        Args:
          example: see `data.split.Split.example`.
          draw: the source of random numbers; None where nothing is random, as in evaluation.

        Raises:
          DamagedImageError: if a picture can't be decoded.
        """


@runtime_checkable
class HasCanvases(Protocol):
    """A `View` of evaluation whose rows have a few shapes, each for some of the images."""

    def canvases(self, split: Split) -> Sequence[tuple[View, np.ndarray]]:
        """Returns a view for each shape, and the indices of its images, int [n]; every image is in one of them."""
        ...


def views_of(view: View, split: Split) -> Sequence[tuple[View, np.ndarray]]:
    """Returns the views with which the images of a split are evaluated, each with the indices of its images."""
    if isinstance(view, HasCanvases):
        return view.canvases(split)
    return [(view, np.arange(len(split)))]
