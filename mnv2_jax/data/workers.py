"""Worker processes that make batches, in order, and end with the process that they work for.

A worker is a new interpreter (``spawn``), which multiprocessing has import the main script once more, for the functions
that are defined there. Here they come by value, so it is left out: a script needs no ``if __name__ == "__main__"``, and
may come from standard input or a notebook.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import mmap
import multiprocessing
import os
import resource
import signal
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Generator
from multiprocessing import reduction, resource_tracker, spawn, util
from typing import Any, TypeAlias

import cloudpickle
import grain
from absl import flags

from mnv2_jax.data import shared
from mnv2_jax.data.shared import NumpyBatch, Parcel
from mnv2_jax.errors import UserError

_OPEN_FILES = 2**14
_CLOSE_S = 2.0
"""In which a worker must have finished its batch once nobody wants it any more."""
_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
"""They reach the whole process group, but it is the main process that decides."""
_SOCKET_BYTES = 70
"""Longest path of the temporary folder; multiprocessing adds 33."""
_PREFIX = "grain-process-prefetch"
"""Prefix of the names that grain gives its processes."""

Batches: TypeAlias = Generator[NumpyBatch, None, None]
"""``close()`` ends its worker processes; so does dropping it."""


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
    _leave_out_main()
    _start_tracker()
    _shorten_temporary_folder()
    lent = _Lent(_Parcelled(make, stop))
    dataset = (
        grain.MapDataset.range(start, sys.maxsize)
        .map(lent)
        .to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))  # a process each is parallel enough
        .mp_prefetch(grain.MultiprocessingOptions(num_workers=num_workers), worker_init_fn=_start_worker)
    )
    receiver = shared.Receiver()
    with contextlib.closing(iter(dataset)) as iterator, lent:
        for _ in range(start, stop):
            try:
                batch = receiver.open(next(iterator))
            except (RuntimeError, ConnectionError, FileNotFoundError, EOFError) as error:
                if isinstance(error, RuntimeError) and "terminated unexpectedly" not in str(error):
                    raise
                raise UserError(_told_of_an_end(str(error).split(".")[0])) from error
            yield batch
            del batch  # its memory is filled again as soon as the caller has dropped it, too


def _told_of_an_end(reason: str) -> str:
    """Line for a reason such as ``Worker process was terminated unexpectedly with exit code -9``."""
    code = reason.rpartition(" ")[2]
    if not code.isdigit():  # of a signal, or of what a worker that is gone was to send
        return (
            f"a process that reads images was killed ({reason}), mostly for want of memory; lower data.num_workers, or"
            " give more of it"
        )
    return (
        f"a process that reads images has ended ({reason}); what it said of that stands above, and"
        " data.num_workers=0 does without such processes"
    )


class _Lent:
    """A function that workers fetch from memory, and the word that nobody needs them any more.

    Written into the pipe by which a process is started, a long list of images would take its time for each of them, and
    for ever for one that dies before it has read it. A context manager; leaving it ends the workers.
    """

    def __init__(self, function: Callable[[int], Parcel]):
        self._content = shared.nameless_file()
        self._size = self._content.write(cloudpickle.dumps(function))
        self._content.flush()
        self._over, self._open = os.pipe()

    def __call__(self, number: int) -> Parcel:
        raise NotImplementedError  # it is called in workers, as what it has become there

    def __reduce__(self) -> Any:
        return _fetched, (reduction.DupFd(self._content.fileno()), self._size, reduction.DupFd(self._over))

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        self._content.close()
        os.close(self._over)
        os.close(self._open)


def _fetched(content: Any, size: int, over: Any) -> Callable[[int], Parcel]:
    """In a worker: the function of a `_Lent`."""
    threading.Thread(target=_exit_when_over, args=(over.detach(),), daemon=True).start()
    number = content.detach()
    try:
        with mmap.mmap(number, size, access=mmap.ACCESS_READ) as memory:
            function: Callable[[int], Parcel] = cloudpickle.loads(memory)
    finally:
        os.close(number)
    return function


def _exit_when_over(pipe: int) -> None:
    """Grain waits for each of its workers by itself, for half a minute; one may be reading from a dead file system."""
    os.read(pipe, 1)
    time.sleep(_CLOSE_S)
    os._exit(1)


def _leave_out_main() -> None:
    """Has multiprocessing start grain's workers without the main script, and deaf until `_start_worker`."""
    original = spawn.get_preparation_data
    if original.__module__ == __name__:
        return

    def without_main(name: str) -> dict[str, Any]:
        told: dict[str, Any] = original(name)
        if name.startswith(_PREFIX):
            for key in ("init_main_from_name", "init_main_from_path"):
                told.pop(key, None)
            if threading.current_thread() is not threading.main_thread():  # grain has threads that start processes
                signal.pthread_sigmask(signal.SIG_BLOCK, _ENDING)
        return told

    spawn.get_preparation_data = without_main


def _start_tracker() -> None:
    """Starts multiprocessing's own process deaf to what reaches the whole group, as an ssh that is gone does by SIGHUP.

    Without it Python tells at length of each semaphore that it can't find.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _ENDING)
    try:
        resource_tracker.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _shorten_temporary_folder() -> None:
    """Processes pass files on through a socket in a temporary folder; a socket's path has at most about 100 bytes."""
    if len(os.fsencode(tempfile.gettempdir())) <= _SOCKET_BYTES:
        return
    too_long, tempfile.tempdir = tempfile.tempdir, "/tmp"
    try:
        util.get_temp_dir()  # from now on it is that one, here and in workers; removed at the end
    except OSError as error:
        raise UserError(f"TMPDIR={too_long!r} is too long for a socket's path; set it to a shorter one") from error
    finally:
        tempfile.tempdir = too_long


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
    # The main process saves a checkpoint and then closes us. Should it not, we are gone a minute later.
    for ending in _ENDING:
        if signal.getsignal(ending) != signal.SIG_IGN:  # as SIGHUP is under nohup, here and there
            signal.signal(ending, signal.SIG_IGN if ending == signal.SIGINT else lambda *_: signal.alarm(60))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _ENDING)
    threading.Thread(target=exit_with_parent, daemon=True).start()


def exit_with_parent() -> None:
    """For a thread of a worker: a main process that is killed can't end it, and it would work on or wait forever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
