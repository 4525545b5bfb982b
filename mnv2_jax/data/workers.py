"""What makes batches in other processes, in order, and ends with whom it works for."""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import multiprocessing
import os
import resource
import signal
import sys
import threading
import weakref
from collections.abc import Callable, Generator
from typing import TypeAlias

import grain
from absl import flags

from mnv2_jax.data import shared
from mnv2_jax.data.shared import NumpyBatch, Parcel
from mnv2_jax.errors import UserError

_OPEN_FILES = 2**14

Batches: TypeAlias = Generator[NumpyBatch, None, None]
"""``close()`` ends its worker processes; so does dropping it."""


def num_cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_order(make: Callable[[int], NumpyBatch], start: int, stop: int, num_workers: int) -> Batches:
    """``make(start)``, ``make(start + 1)``, ... in this order, made by worker processes where there are any."""
    if num_workers == 0:
        return (make(step) for step in range(start, stop))
    batches = _from_workers(make, start, stop, num_workers)
    _OPEN.add(batches)
    return batches


_OPEN: weakref.WeakSet[Batches] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    """Ends the workers of a stream that was left open, before the interpreter takes apart what they need to end."""
    for batches in list(_OPEN):
        with contextlib.suppress(ValueError):  # it is being read from by another thread
            batches.close()


def _from_workers(make: Callable[[int], NumpyBatch], start: int, stop: int, num_workers: int) -> Batches:
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # grain reads a flag of absl; under app.run they are parsed already
    _allow_open_files()
    dataset = (
        grain.MapDataset.range(start, sys.maxsize)
        .map(_Parcelled(make, stop))
        .to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))  # a process each is parallel enough
        .mp_prefetch(grain.MultiprocessingOptions(num_workers=num_workers), worker_init_fn=_start_worker)
    )
    receiver = shared.Receiver()
    with contextlib.closing(iter(dataset)) as iterator:
        for _ in range(start, stop):
            try:
                batch = receiver.open(next(iterator))
            except (RuntimeError, ConnectionError, FileNotFoundError, EOFError) as error:
                if isinstance(error, RuntimeError) and "terminated unexpectedly" not in str(error):
                    raise
                raise UserError(
                    f"a process that reads images was killed ({str(error).split('.')[0]}), mostly for want of memory;"
                    " lower data.num_workers, or give more of it"
                ) from error
            yield batch
            del batch  # its memory is filled again as soon as the caller has dropped it, too


@dataclasses.dataclass(frozen=True)
class _Parcelled:
    """Batch number -> parcel; what a worker process is sent.

    Neither the end nor a user's error is an exception in a worker: grain would end the process as soon as it reads of
    it, ahead of need, and with the process what is on its way and not yet opened.
    """

    make: Callable[[int], NumpyBatch]
    stop: int

    def __call__(self, number: int) -> Parcel:
        if number >= self.stop:
            return Parcel({}, {})
        try:
            return shared.parcel(self.make(number))
        except UserError as error:
            return Parcel({}, {}, error)


def _allow_open_files() -> None:
    """A worker takes about 15 file descriptors of this process: with the usual 1,024, 64 cores would be too many."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, _OPEN_FILES)
    if soft not in (resource.RLIM_INFINITY, wanted) and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _start_worker(number: int, count: int) -> None:
    """Runs first in a worker: it shall live exactly as long as it is needed."""
    del count
    shared.share_from(number)
    # Ctrl-C and a scheduler's SIGTERM reach the whole process group, but it is the main process that decides: it takes
    # the batch it waits for, saves a checkpoint, and then closes us. Should it not, we are gone a minute later.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(60))
    threading.Thread(target=exit_with_parent, daemon=True).start()


def exit_with_parent() -> None:
    """For a thread of a worker: a main process that is killed can't end it, and it would work on or wait forever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
