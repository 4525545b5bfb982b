"""`Split`: labelled images with random access, and how a share of them is chosen."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterable
from typing import Any, Protocol, TypeAlias, runtime_checkable

import numpy as np

from mnv2_jax.data.images import Picture


class Labels(Protocol):
    """int32 [n], or what `np.asarray` turns into it: labels that lie beside the pixels are read when asked for."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...

    def __array__(self) -> np.ndarray: ...


Rows: TypeAlias = slice | np.ndarray
"""Which of a reader's images: a slice, or int [n]."""


@runtime_checkable
class Identified(Protocol):
    """A reader that knows its images without opening a file of them."""

    def digest(self, rows: Rows) -> dict[str, str]:
        """SHA-256 of what it knows of some images, in their order, by the kind of it: names, sizes, pixels, …"""
        ...


def sha256_of(array: np.ndarray) -> str:
    """SHA-256 of a numeric array's type, shape and bytes, in hexadecimal."""
    digest = hashlib.sha256(f"{array.dtype.str}{array.shape}".encode())
    digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def sha256_of_names(names: Iterable[bytes]) -> str:
    """SHA-256 of names that hold no zero byte, in their order, in hexadecimal."""
    return hashlib.sha256(b"\0".join(names)).hexdigest()


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

    def digest(self) -> dict[str, str]:
        """SHA-256 of what is known of the images without opening a file, by the kind of it.

        labels: where they don't lie beside the pixels; names: of the files, below the top of the data set; sizes: of
        files in a tar; pixels: of arrays; shards, copy: of what others have written of the files. The same wherever the
        data lie.
        """
        labels = {"labels": sha256_of(self.labels)} if isinstance(self.labels, np.ndarray) else {}
        return labels | _digest(self.read, slice(len(self)))

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

    def digest(self, rows: Rows) -> dict[str, str]:
        return _digest(self.read, self.indices[rows])


def _digest(read: Callable[[int], Picture], rows: Rows) -> dict[str, str]:
    return read.digest(rows) if isinstance(read, Identified) else {}


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
