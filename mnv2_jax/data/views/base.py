"""The contract of a view: a pure function from an example to a row of a batch, on the host."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, Protocol, Self, TypeAlias

import numpy as np

from mnv2_jax.data.split import Example

Draw: TypeAlias = tuple[int, int, int]
"""(seed, epoch, index) of an example in training: all that its random numbers may come from."""


class Array(NamedTuple):
    """Shape and type of an array of a row."""

    shape: tuple[int, ...]
    dtype: type[np.generic]

    @property
    def size_bytes(self) -> int:
        """Bytes of one row."""
        return int(np.prod(self.shape)) * np.dtype(self.dtype).itemsize


class View(Protocol):
    """Geometry happens here, once for the image and what belongs to its places; so does whatever needs NumPy.

    A view is picklable: workers are sent it. All of a batch's keys but the loop's (`types.Batch`) are a view's, and
    "image" is among them, uint8 [h, w, 3]. What moves no target, as colours and normalisation, is left to the devices.
    """

    @property
    def varies(self) -> bool:
        """Whether an example has more than one view; if not, a split that fits is kept on the devices."""

    @property
    def spec(self) -> Mapping[str, Array]:
        """The arrays of a row."""

    def at(self, resolution: int) -> Self:
        """The same view of images of resolution × resolution pixels."""

    def __call__(self, example: Example, draw: Draw | None) -> Mapping[str, np.ndarray | int]:
        """The row of an example, as ``spec`` says.

        Args:
          example: see `data.split.Split.example`.
          draw: None where nothing is random, as in evaluation.

        Raises:
          DamagedImageError: if a picture can't be decoded.
        """
