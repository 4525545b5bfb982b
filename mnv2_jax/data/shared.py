"""Batches that a worker process fills where the main process reads them: nothing is copied, no memory is new each time.

    worker:  empty(shape) ──► filled ──► parcel(batch) ──┐ which segments, instead of the arrays
    main:    Receiver.open ◄─────────────────────────────┘
             used, dropped ──► the segment is free; the worker fills it again

A segment of shared memory for each batch, as grain has them, costs the page faults of both processes and a copy, which
took a tenth of the time that decoding takes.

Segments have no names: they are file descriptors, handed over once, so that nothing is left of them however a process
ends, and a container's small /dev/shm is no limit.
"""

from __future__ import annotations

import dataclasses
import math
import mmap
import os
import tempfile
import weakref
from multiprocessing import reduction
from typing import Any, BinaryIO, TypeAlias

import numpy as np

from mnv2_jax.errors import UserError

_HEADER_BYTES = 64
"""The first byte says whether the segment is in use; the array begins where vector instructions like it to."""

NumpyBatch: TypeAlias = dict[str, np.ndarray]
"""See `types.Batch`: index; epoch in training, mask in evaluation; image and label unless they are resident; skipped
with `data.skip_corrupt`; damaged in an evaluation with such images."""


@dataclasses.dataclass(frozen=True)
class _Place:
    """An array in a segment."""

    segment: tuple[int, int]
    """Numbers of the worker, and of the segment among its own."""
    shape: tuple[int, ...]
    handle: Any
    """Handle from which the receiver gets the file descriptor of a segment that it doesn't know yet."""


@dataclasses.dataclass(frozen=True)
class Parcel:
    """A batch on its way between processes."""

    small: NumpyBatch
    places: dict[str, _Place]
    error: UserError | None = None
    """Instead of a batch."""


# --- in a worker --------------------------------------------------------------------------------------------


class _Segments:
    """Those of one worker: as many as are filled, waiting, or in use at a time."""

    def __init__(self, worker: int) -> None:
        self._worker = worker
        self._segments: list[mmap.mmap] = []
        self._handles: dict[int, Any] = {}  # of segments that were not sent yet
        self._taken: set[int] = set()  # since the last parcel

    def empty(self, shape: tuple[int, ...]) -> np.ndarray:
        size_bytes = _HEADER_BYTES + math.prod(shape)
        free = [number for number, segment in enumerate(self._segments) if not segment[0]]
        fitting = [number for number in free if len(self._segments[number]) >= size_bytes]
        if fitting:
            number = fitting[0]
        elif free:
            number = free[0]
            self._segments[number], self._handles[number] = _made(size_bytes)
        else:
            number = len(self._segments)
            segment, self._handles[number] = _made(size_bytes)
            self._segments.append(segment)
        segment = self._segments[number]
        segment[0] = 1
        self._taken.add(number)
        return np.ndarray(shape, np.uint8, segment, _HEADER_BYTES)

    def parcel(self, batch: NumpyBatch) -> Parcel:
        lying = {id(self._segments[number]): number for number in self._taken}
        numbers = {key: lying[id(array.base)] for key, array in batch.items() if id(array.base) in lying}
        # What is left out, or sent in part or twice, would never be free again.
        assert sorted(numbers.values()) == sorted(self._taken), "send every array of empty(), whole and once"
        self._taken.clear()
        places = {
            key: _Place((self._worker, number), batch[key].shape, self._handles.pop(number, None))
            for key, number in numbers.items()
        }
        return Parcel({key: array for key, array in batch.items() if key not in places}, places)


def nameless_file() -> BinaryIO:
    """A file that is gone with the last who has it open; in memory, where the system has such files."""
    if hasattr(os, "memfd_create"):
        return open(os.memfd_create("mnv2_jax"), "rb+")
    return tempfile.TemporaryFile()


def _made(size_bytes: int) -> tuple[mmap.mmap, Any]:
    """A new segment, and what another process gets it by."""
    try:
        with nameless_file() as file:
            if hasattr(os, "posix_fallocate"):
                # Taken now: a process is killed that writes to memory which was only promised.
                os.posix_fallocate(file.fileno(), 0, size_bytes)
            else:
                os.ftruncate(file.fileno(), size_bytes)
            return mmap.mmap(file.fileno(), size_bytes), reduction.DupFd(file.fileno())
    except OSError as error:
        raise UserError(
            f"no memory for a batch of {size_bytes / 2**20:,.0f} MB ({error.strerror or error}); lower data.num_workers"
            " or data.batch_size"
        ) from error


_segments: _Segments | None = None


def share_from(worker: int) -> None:
    """From now on this process is a worker: `empty` is in shared memory.

    Args:
      worker: its number among those of a Receiver.
    """
    global _segments
    _segments = _Segments(worker)


def empty(shape: tuple[int, ...]) -> np.ndarray:
    """An array to be filled, uint8; in a worker, one that `parcel` sends without a copy."""
    return np.empty(shape, np.uint8) if _segments is None else _segments.empty(shape)


def parcel(batch: NumpyBatch) -> Parcel:
    """Makes the message that a worker sends for a batch, whose arrays are those of `empty` and aren't touched again."""
    return Parcel(batch, {}) if _segments is None else _segments.parcel(batch)


# --- in the main process ------------------------------------------------------------------------------------


class Receiver:
    """Receiver of the parcels of some workers."""

    def __init__(self) -> None:
        self._segments: dict[tuple[int, int], mmap.mmap] = {}

    def open(self, parcel: Parcel) -> NumpyBatch:
        """The batch. A segment is given back when its array, and all that views or aliases it, is dropped.

        Raises:
          UserError: the parcel's.
          OSError, EOFError: if the worker is gone, and its segment with it.
        """
        if parcel.error is not None:
            raise parcel.error
        return parcel.small | {key: self._array(place) for key, place in parcel.places.items()}

    def _array(self, place: _Place) -> np.ndarray:
        if place.handle is not None:
            number = place.handle.detach()
            try:
                self._segments[place.segment] = mmap.mmap(number, 0)
            finally:
                os.close(number)
        segment = self._segments[place.segment]
        array = np.ndarray(place.shape, np.uint8, segment, _HEADER_BYTES)
        weakref.finalize(array, _give_back, segment, os.getpid()).atexit = False
        return array


def _give_back(segment: mmap.mmap, owner: int) -> None:
    if os.getpid() == owner:  # and not a fork of it, which has its own copy of the array but the same memory
        segment[0] = 0
