"""Batches in memory shared by worker and main process: nothing is copied, and the memory is used again.

    worker:  empty(shape) ──► filled ──► parcel(batch) ──┐ the number of a segment, instead of the arrays
    main:    Receiver.open ◄─────────────────────────────┘
             used, dropped ──► the segment is free; the worker fills it again

A new segment of shared memory for each batch, as grain makes, would cost page faults in both processes and a copy; that
took a tenth of the time of decoding.

Segments have no names. They are file descriptors that are passed once, so nothing remains of them however a process
ends, and a container's small /dev/shm is no limit.
"""

from __future__ import annotations

import dataclasses
import math
import mmap
import os
import pickle
import tempfile
import weakref
from multiprocessing import reduction
from typing import Any, BinaryIO, TypeAlias

import numpy as np

from mnv2_jax.errors import UserError

_HEADER_BYTES = 64
"""Size of a segment's header: its first byte says whether the segment is in use, the rest aligns the array."""

NumpyBatch: TypeAlias = dict[str, np.ndarray]
"""The arrays of a `types.Batch`: index; epoch in training, mask in evaluation; the view's, such as image and label,
unless they are resident; skipped with `data.skip_corrupt`; damaged in an evaluation that met damaged images."""


@dataclasses.dataclass(frozen=True)
class _Place:
    """The place of an array in a segment."""

    segment: tuple[int, int]
    """The number of the worker, and the number of the segment among those of the worker."""
    shape: tuple[int, ...]
    handle: Any
    """A handle that gives the receiver the file descriptor of a new segment; None for one that it has already."""


@dataclasses.dataclass(frozen=True)
class _Content:
    """What a parcel holds."""

    small: NumpyBatch
    """Arrays that are sent themselves."""
    places: dict[str, _Place]
    """Arrays that lie in segments of their own."""
    error: UserError | None
    """An error that is sent instead of a batch."""


@dataclasses.dataclass(frozen=True)
class Parcel:
    """A batch on its way between processes.

    Its message is so short that the system writes it whole (`select.PIPE_BUF`). Of a longer one, a worker that is ended
    can leave the beginning in a full pipe, for the rest of which the main process would wait forever.
    """

    content: _Place | None
    """The pickled `_Content`; None: there is none, behind the end of a stream."""


# --- in a worker --------------------------------------------------------------------------------------------


class _Segments:
    """The segments of one worker: as many as are being filled, waiting or in use at the same time."""

    def __init__(self, worker: int) -> None:
        self._worker = worker
        self._segments: list[mmap.mmap] = []
        self._handles: dict[int, Any] = {}  # of the segments that were not sent yet
        self._messages: set[int] = set()  # numbers of the segments of messages, or all would grow as large as pictures
        self._filling: set[int] = set()  # numbers of the segments given out since the last parcel

    def empty(self, shape: tuple[int, ...], is_message: bool = False) -> np.ndarray:
        size_bytes = _HEADER_BYTES + math.prod(shape)
        free = [
            number
            for number, segment in enumerate(self._segments)
            if not segment[0] and (number in self._messages) == is_message
        ]
        fitting = [number for number in free if len(self._segments[number]) >= size_bytes]
        if fitting:
            number = fitting[0]
        elif free:
            number = free[0]
            self._segments[number], self._handles[number] = _make_segment(size_bytes)
        else:
            number = len(self._segments)
            segment, self._handles[number] = _make_segment(size_bytes)
            self._segments.append(segment)
            if is_message:
                self._messages.add(number)
        segment = self._segments[number]
        segment[0] = 1
        self._filling.add(number)
        return np.ndarray(shape, np.uint8, segment, _HEADER_BYTES)

    def parcel(self, batch: NumpyBatch | UserError) -> Parcel:
        if isinstance(batch, UserError):
            for number in self._filling:
                self._segments[number][0] = 0
            self._filling.clear()
            return self._packed(_Content({}, {}, batch))
        number_of = {id(self._segments[number]): number for number in self._filling}
        numbers = {key: number_of[id(array.base)] for key, array in batch.items() if id(array.base) in number_of}
        # The segment of an array that is left out, or sent in part or twice, would never be free again.
        assert sorted(numbers.values()) == sorted(self._filling), "send every array of empty(), whole and once"
        self._filling.clear()
        places = {key: self._place(number, batch[key].shape) for key, number in numbers.items()}
        return self._packed(_Content({key: x for key, x in batch.items() if key not in places}, places, None))

    def _packed(self, content: _Content) -> Parcel:
        message = np.frombuffer(pickle.dumps(content), np.uint8)
        self.empty(message.shape, is_message=True)[...] = message
        return Parcel(self._place(self._filling.pop(), message.shape))

    def _place(self, number: int, shape: tuple[int, ...]) -> _Place:
        return _Place((self._worker, number), shape, self._handles.pop(number, None))


def nameless_file() -> BinaryIO:
    """Opens a file without a name, which ceases to exist when it is closed; in memory, where the system allows it."""
    if hasattr(os, "memfd_create"):
        return open(os.memfd_create("mnv2_jax"), "rb+")
    return tempfile.TemporaryFile()


def _make_segment(size_bytes: int) -> tuple[mmap.mmap, Any]:
    """Makes a segment, and a handle from which another process gets its file descriptor."""
    try:
        with nameless_file() as file:
            if hasattr(os, "posix_fallocate"):
                # The memory is allocated now: a process that later writes to memory that isn't there is killed.
                os.posix_fallocate(file.fileno(), 0, size_bytes)
            else:
                os.ftruncate(file.fileno(), size_bytes)
            return mmap.mmap(file.fileno(), size_bytes), reduction.DupFd(file.fileno())
    except OSError as error:
        raise UserError(
            f"not enough memory for a batch of {size_bytes / 2**20:,.0f} MB ({error.strerror or error}); lower"
            " data.num_workers or data.batch_size"
        ) from error


_segments: _Segments | None = None


def share_from(worker: int) -> None:
    """Makes this process a worker, so that from now on `empty` allocates shared memory.

    Args:
      worker: the number of this worker among those of a `Receiver`.
    """
    global _segments
    _segments = _Segments(worker)


def empty(shape: tuple[int, ...]) -> np.ndarray:
    """Allocates a uint8 array to be filled; in a worker, one that `parcel` sends without a copy."""
    return np.empty(shape, np.uint8) if _segments is None else _segments.empty(shape)


def parcel(batch: NumpyBatch | UserError) -> Parcel:
    """Makes the message that a worker sends for a batch, or for an error instead of one.

    The worker must not change arrays from `empty` afterwards.
    """
    assert _segments is not None, "only a worker sends parcels"
    return _segments.parcel(batch)


# --- in the main process ------------------------------------------------------------------------------------


class Receiver:
    """Receives the parcels of workers in the main process."""

    def __init__(self) -> None:
        self._segments: dict[tuple[int, int], mmap.mmap] = {}

    def open(self, parcel: Parcel) -> NumpyBatch:
        """Returns the batch of a parcel.

        A segment becomes free when its array and everything that views or aliases the array are garbage-collected.

        Raises:
          UserError: the error of the parcel.
          OSError, EOFError: if the worker is gone, and its segment with it.
        """
        assert parcel.content is not None, "there is nothing behind the end of a stream"
        content: _Content = pickle.loads(self._array(parcel.content).data)
        if content.error is not None:
            raise content.error
        return content.small | {key: self._array(place) for key, place in content.places.items()}

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
    if os.getpid() == owner:  # a fork has its own copy of the array, but shares the memory
        segment[0] = 0
