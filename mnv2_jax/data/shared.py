"""Batches that a worker process fills where the main process reads them: nothing is copied, no memory is new each time.

    worker:  empty(shape) ──► filled ──► parcel(batch) ──┐ which segments, instead of the arrays
    main:    Receiver.open ◄─────────────────────────────┘
             used, dropped ──► the segment is free; the worker fills it again

A segment of shared memory for each batch, as grain has them, costs the page faults of both processes and a copy, which
took a tenth of the time that decoding takes.
"""

from __future__ import annotations

import dataclasses
import errno
import math
import mmap
import os
import pathlib
import shutil
import tempfile
import weakref
from typing import TypeAlias

import numpy as np

from mnv2_jax.errors import UserError

_SHARED_MEMORY = pathlib.Path("/dev/shm")
_HEADER_BYTES = 64
"""The first byte says whether the segment is in use; the array begins where vector instructions like it to."""

NumpyBatch: TypeAlias = dict[str, np.ndarray]
"""See `types.Batch`: index; epoch in training, mask in evaluation; image and label unless they are resident; skipped
with `data.skip_corrupt`."""


@dataclasses.dataclass(frozen=True)
class _Place:
    """An array in a segment."""

    segment: str
    size_bytes: int
    """Of the segment, which is made anew under its name when an array doesn't fit."""
    shape: tuple[int, ...]

    def file(self, folder: pathlib.Path) -> pathlib.Path:
        return folder / f"{self.segment}-{self.size_bytes}"


@dataclasses.dataclass(frozen=True)
class Parcel:
    """A batch on its way between processes."""

    small: NumpyBatch
    places: dict[str, _Place]


# --- in a worker --------------------------------------------------------------------------------------------


class _Segments:
    """Those of one worker: as many as are filled, waiting, or in use at a time."""

    def __init__(self, folder: pathlib.Path, worker: int) -> None:
        self._folder, self._worker = folder, worker
        self._segments: list[mmap.mmap] = []

    def empty(self, shape: tuple[int, ...]) -> np.ndarray:
        size_bytes = _HEADER_BYTES + math.prod(shape)
        number = next((n for n, segment in enumerate(self._segments) if not segment[0]), len(self._segments))
        if number == len(self._segments):
            self._segments.append(self._made(number, size_bytes))
        elif len(self._segments[number]) < size_bytes:
            self._segments[number] = self._made(number, size_bytes)
        segment = self._segments[number]
        segment[0] = 1
        return np.ndarray(shape, np.uint8, segment, _HEADER_BYTES)

    def place(self, array: np.ndarray) -> _Place | None:
        """Where an array of `empty` lies; None for any other."""
        for number, segment in enumerate(self._segments):
            if array.base is segment:
                return _Place(self._name(number), len(segment), array.shape)
        return None

    def _name(self, number: int) -> str:
        return f"{self._worker}-{number}"

    def _made(self, number: int, size_bytes: int) -> mmap.mmap:
        path = _Place(self._name(number), size_bytes, ()).file(self._folder)
        try:
            with path.open("xb+") as file:
                # Taken now: memory that is only promised ends the process when it is written to.
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(file.fileno(), 0, size_bytes)
                else:
                    os.ftruncate(file.fileno(), size_bytes)
                return mmap.mmap(file.fileno(), size_bytes)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            raise UserError(
                f"{self._folder.parent}: no room for a batch of {size_bytes / 2**20:,.0f} MB; lower data.num_workers or"
                " data.batch_size, or give more shared memory (docker run --shm-size=8g)"
            ) from error


_segments: _Segments | None = None


def share_from(folder: pathlib.Path, worker: int) -> None:
    """From now on this process is a worker: `empty` is in shared memory.

    Args:
      folder: the Receiver's.
      worker: its number among those of the Receiver.
    """
    global _segments
    _segments = _Segments(folder, worker)


def empty(shape: tuple[int, ...]) -> np.ndarray:
    """An array to be filled, uint8; in a worker, one that `parcel` sends without a copy."""
    return np.empty(shape, np.uint8) if _segments is None else _segments.empty(shape)


def parcel(batch: NumpyBatch) -> Parcel:
    """What a worker sends instead of a batch. Its arrays of `empty` must not be touched any more."""
    assert _segments is not None
    found = {key: _segments.place(array) for key, array in batch.items()}
    places = {key: place for key, place in found.items() if place}
    return Parcel({key: array for key, array in batch.items() if key not in places}, places)


# --- in the main process ------------------------------------------------------------------------------------


class Receiver:
    """Of the parcels of some workers. ``close()`` it once they are gone; opened batches stay as they are."""

    def __init__(self) -> None:
        self.folder = pathlib.Path(
            tempfile.mkdtemp(prefix="mnv2_jax_", dir=_SHARED_MEMORY if _SHARED_MEMORY.is_dir() else None)
        )
        self._segments: dict[str, mmap.mmap] = {}

    def open(self, parcel: Parcel) -> NumpyBatch:
        """The batch. A segment is given back when its array, and all that views or aliases it, is dropped."""
        return parcel.small | {key: self._array(place) for key, place in parcel.places.items()}

    def _array(self, place: _Place) -> np.ndarray:
        segment = self._segments.get(place.segment)
        if segment is None or len(segment) != place.size_bytes:
            path = place.file(self.folder)
            with path.open("rb+") as file:
                segment = mmap.mmap(file.fileno(), place.size_bytes)
            path.unlink()  # both have it now, and it ends with them, however they end
            self._segments[place.segment] = segment
        array = np.ndarray(place.shape, np.uint8, segment, _HEADER_BYTES)
        weakref.finalize(array, _give_back, segment).atexit = False
        return array

    def close(self) -> None:
        """Removes what was never opened."""
        shutil.rmtree(self.folder, ignore_errors=True)


def _give_back(segment: mmap.mmap) -> None:
    segment[0] = 0
