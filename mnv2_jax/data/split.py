"""`Split`: labelled images with random access, and how a share of them is chosen."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np

from mnv2_jax.data.images import Picture


class Labels(Protocol):
    """int32 [n], or what `np.asarray` turns into it: labels that lie beside the pixels are read when asked for."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...

    def __array__(self) -> np.ndarray: ...


@dataclasses.dataclass(frozen=True)
class Split:
    """The labelled images of one split; it can be sent to worker processes."""

    name: str
    labels: Labels
    read: Callable[[int], Picture]
    """Image number i; a `UserError` naming the file where it can't be read, which may come as late as its pixels."""
    in_memory: bool = False
    """Reading costs no more than a copy, so that worker processes would gain nothing."""

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, keep: np.ndarray, name: str | None = None) -> Split:
        """The images where ``keep``, bool [n], is true, in their order."""
        indices = np.flatnonzero(keep)
        return dataclasses.replace(
            self, name=name or self.name, labels=np.asarray(self.labels)[indices], read=_Subset(self.read, indices)
        )


@dataclasses.dataclass(frozen=True)
class _Subset:
    read: Callable[[int], Picture]
    indices: np.ndarray

    def __call__(self, index: int) -> Picture:
        return self.read(int(self.indices[index]))


def stratified_share(labels: np.ndarray, count_of: Callable[[int], int]) -> np.ndarray:
    """Draws a share of every class, always the same one.

    Args:
      labels: int [n].
      count_of: how many to draw of a class that has so many images.

    Returns:
      bool [n], true for the images drawn.
    """
    rng = np.random.default_rng(0)
    drawn = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        drawn[rng.permutation(members)[: count_of(len(members))]] = True
    return drawn
