"""Worker processes that make batches, in order, and end with the main process.

A worker is a new interpreter (``spawn``). By default, multiprocessing imports the main script in it again, for the
functions defined there. Here functions are sent by value and that import is left out, so a script needs no
``if __name__ == "__main__"``, and may come from standard input or a notebook.
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
"""Seconds that a worker has to finish its batch once the stream is closed."""
_END_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
"""Signals that reach the whole process group, while only the main process decides when to end."""
_SOCKET_BYTES = 70
"""Longest path of the temporary folder in bytes; multiprocessing adds 33."""
_PREFIX = "grain-process-prefetch"
"""Prefix of the names that grain gives its processes."""

Batches: TypeAlias = Generator[NumpyBatch, None, None]
"""A stream of batches; ``close()`` or garbage collection ends its worker processes."""


def in_order(make: Callable[[int], NumpyBatch], start: int, stop: int, num_workers: int) -> Batches:
    """Yields ``make(start)`` to ``make(stop - 1)`` in order, made by worker processes unless there are 0."""
    if num_workers == 0:
        return (make(step) for step in range(start, stop))
    batches = _from_workers(make, start, stop, num_workers)
    _OPEN.add(batches)
    return batches


_OPEN: weakref.WeakSet[Batches] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    """Ends the workers of streams that were left open, before the interpreter unloads the modules that this needs."""
    for batches in list(_OPEN):
        with contextlib.suppress(ValueError):  # another thread is reading from it
            batches.close()


def _from_workers(make: Callable[[int], NumpyBatch], start: int, stop: int, num_workers: int) -> Batches:
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # grain reads an absl flag; only absl's app.run would have parsed the flags
    _allow_open_files()
    _leave_out_main()
    _start_tracker()
    _shorten_temporary_folder()
    lent = _LentFunction(_ParcelMaker(make, stop))
    dataset = (
        grain.MapDataset.range(start, sys.maxsize)
        .map(lent)
        .to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))  # the processes are parallel enough
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
                raise UserError(_describe_end(str(error).split(".")[0])) from error
            yield batch
            del batch  # its memory is reused as soon as the caller has dropped it too


def _describe_end(reason: str) -> str:
    """Returns the error for a reason such as ``Worker process was terminated unexpectedly with exit code -9``."""
    code = reason.rpartition(" ")[2]
    if not code.isdigit():  # a signal's number is negative; other errors come from what a killed worker didn't send
        return (
            f"a process that reads images was killed ({reason}), usually for lack of memory; lower data.num_workers, or"
            " provide more memory"
        )
    return (
        f"a process that reads images has ended ({reason}); see its own error above, or set data.num_workers=0 to read"
        " without such processes"
    )


class _LentFunction:
    """A function that workers load from shared memory, with a pipe that tells them to end.

    Multiprocessing would write the function, with its long list of images, into the pipe that starts a process. That
    takes time for every process, and never returns for one that dies before it has read everything. This is a context
    manager; leaving it ends the workers.
    """

    def __init__(self, function: Callable[[int], Parcel]):
        self._content = shared.nameless_file()
        self._size = self._content.write(cloudpickle.dumps(function))
        self._content.flush()
        self._end_pipe, self._open_end = os.pipe()

    def __call__(self, number: int) -> Parcel:
        raise NotImplementedError  # unpickling it in a worker gives the function itself, which is called there

    def __reduce__(self) -> Any:
        return _load_function, (reduction.DupFd(self._content.fileno()), self._size, reduction.DupFd(self._end_pipe))

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        self._content.close()
        os.close(self._end_pipe)
        os.close(self._open_end)


def _load_function(content: Any, size: int, end_pipe: Any) -> Callable[[int], Parcel]:
    """Loads the function of a `_LentFunction` in a worker."""
    threading.Thread(target=_exit_when_closed, args=(end_pipe.detach(),), daemon=True).start()
    number = content.detach()
    try:
        with mmap.mmap(number, size, access=mmap.ACCESS_READ) as memory:
            function: Callable[[int], Parcel] = cloudpickle.loads(memory)
    finally:
        os.close(number)
    return function


def _exit_when_closed(pipe: int) -> None:
    """Ends a worker soon after the main process has closed the pipe.

    Grain would wait half a minute for each worker in turn, and a worker may be reading from a dead file system.
    """
    os.read(pipe, 1)
    time.sleep(_CLOSE_S)
    os._exit(1)


def _leave_out_main() -> None:
    """Makes multiprocessing start grain's workers without the main script, and with signals blocked.

    `_start_worker` unblocks the signals.
    """
    original = spawn.get_preparation_data
    if original.__module__ == __name__:
        return

    def without_main(name: str) -> dict[str, Any]:
        preparation: dict[str, Any] = original(name)
        if name.startswith(_PREFIX):
            for key in ("init_main_from_name", "init_main_from_path"):
                preparation.pop(key, None)
            if threading.current_thread() is not threading.main_thread():  # grain starts processes in threads
                signal.pthread_sigmask(signal.SIG_BLOCK, _END_SIGNALS)
        return preparation

    spawn.get_preparation_data = without_main


def _start_tracker() -> None:
    """Starts multiprocessing's resource tracker with signals blocked that reach the whole process group.

    A lost ssh connection sends such a SIGHUP. Without the tracker, Python prints a warning for each missing semaphore.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _END_SIGNALS)
    try:
        resource_tracker.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _shorten_temporary_folder() -> None:
    """Makes multiprocessing use /tmp where the temporary folder has a long path.

    Processes pass file descriptors through a socket in that folder, and a socket's path has about 100 bytes at most.
    """
    if len(os.fsencode(tempfile.gettempdir())) <= _SOCKET_BYTES:
        return
    too_long, tempfile.tempdir = tempfile.tempdir, "/tmp"
    try:
        util.get_temp_dir()  # multiprocessing keeps this folder, also for its workers, and removes it at the end
    except OSError as error:
        raise UserError(f"TMPDIR={too_long!r} is too long for a socket's path; set it to a shorter one") from error
    finally:
        tempfile.tempdir = too_long


@dataclasses.dataclass(frozen=True)
class _ParcelMaker:
    """The function from a batch's number to its parcel, which worker processes receive.

    Neither the end of the stream nor a user's error is raised in a worker. Grain would end the process as soon as it
    reads of an exception, which is ahead of time, and the parcels that are still on their way would be lost.
    """

    make: Callable[[int], NumpyBatch]
    stop: int

    def __call__(self, number: int) -> Parcel:
        if number >= self.stop:
            return Parcel(None)
        try:
            return shared.parcel(self.make(number))
        except UserError as error:
            return shared.parcel(error)


def _allow_open_files() -> None:
    """Raises the limit of open files: a worker takes about 15, so the usual 1,024 wouldn't suffice for 64 workers."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = _OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, _OPEN_FILES)
    if soft not in (resource.RLIM_INFINITY, limit) and soft < limit:
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))


def _start_worker(number: int, count: int) -> None:
    """Prepares a worker before anything else runs in it, so that it lives exactly as long as it is needed."""
    del count
    shared.share_from(number)
    # The main process saves a checkpoint and then ends its workers. If it doesn't, they end a minute after the signal.
    for end_signal in _END_SIGNALS:
        if signal.getsignal(end_signal) != signal.SIG_IGN:  # nohup ignores SIGHUP, also for the main process
            is_interrupt = end_signal == signal.SIGINT
            signal.signal(end_signal, signal.SIG_IGN if is_interrupt else lambda *_: signal.alarm(60))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _END_SIGNALS)
    threading.Thread(target=exit_with_parent, daemon=True).start()


def exit_with_parent() -> None:
    """Ends a worker once the main process is gone; runs in a thread of the worker.

    A main process that is killed can't end its workers, which would work on or wait forever.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
