"""Watches over the loop: whether to stop, and whether it still moves.

SIGTERM, SIGHUP, SIGUSR1 and Ctrl-C are a question that the loop asks, instead of an exception anywhere; only the wait
for a batch, which may never come, do they end. Whoever doesn't ask in time is stuck, mostly in a step whose other half
never comes, and is ended by a thread.
"""

from __future__ import annotations

import contextlib
import faulthandler
import math
import os
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any, TypeVar

from mnv2_jax import interrupts
from mnv2_jax.config import FaultsConfig
from mnv2_jax.errors import FaultError
from mnv2_jax.processes import together

_T = TypeVar("_T")

_STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
"""A scheduler, Ctrl-C, a terminal or an ssh that is gone, SLURM's --signal=USR1."""
_STEP_TIMEOUT_S = 600.0
_TICK_S = 1.0


_END: Any = object()


class Stopped(Exception):  # noqa: N818
    """A stop was requested where there is nothing to save."""


class Supervisor:
    """Asked by the loop, wherever it could stop, and watching how long it takes to ask."""

    def __init__(self, step_timeout_s: float = math.inf, compile_timeout_s: float = math.inf):
        """Watches nothing yet; `supervise` does."""
        self._compile_timeout_s, self._limit_s = compile_timeout_s, step_timeout_s
        self._alive = 0  # counted up here, and compared in the thread: neither undoes what the other does
        self._stopping = self.signalled = self._leaves_waiting = self._compiles = False

    def should_stop(self) -> bool:
        """Whether a stop was requested; of several processes, all get the same answer in the same place."""
        self._alive += 1
        if not self._stopping:
            self._stopping = together.reached_stop() if together.are_several() else self.signalled
        return self._stopping

    def each(self, batches: Iterator[_T]) -> Iterator[_T]:
        """The same batches. One process alone that is to stop doesn't wait for the next.

        Raises:
          Stopped: instead of that.
        """
        while True:
            self._leaves_waiting = not together.are_several()
            try:
                if self._leaves_waiting and self.signalled:
                    raise Stopped
                batch = next(batches, _END)
            finally:
                self._leaves_waiting = False
            if batch is _END:
                return
            yield batch

    def signal(self) -> None:
        """Notes in a handler that a stop was requested.

        Raises:
          Stopped: out of the wait in `each`.
        """
        self.signalled = True
        if self._leaves_waiting:
            self._leaves_waiting = False  # another signal doesn't disturb what the exception closes
            raise Stopped

    @contextlib.contextmanager
    def compiling(self) -> Iterator[None]:
        """In here something is compiled or read: it may take `faults.compile_timeout_s`."""
        before, self._limit_s = (self._limit_s, self._compiles), self._compile_timeout_s
        self._compiles = True
        try:
            yield
        finally:
            self._alive += 1
            self._limit_s, self._compiles = before

    def heard(self, number: int) -> None:
        """Says, in a thread, why a signal to stop has no effect yet."""
        if number in _STOPPING and self._compiles and not self._leaves_waiting:
            name = signal.Signals(number).name
            line = (
                f"{name}: stopping once what is being compiled, read or written is done; a second Ctrl-C ends at once"
            )
            print(line, file=sys.stderr, flush=True)

    def watch(self, over: threading.Event) -> None:
        """Ends the process once the loop has waited too long. Time in which the process itself stood still is none.

        One process has no limit, until it is asked to stop.
        """
        seen, waited_s = self._alive, 0.0
        while not over.wait(_TICK_S):
            limit_s = min(self._limit_s, _STEP_TIMEOUT_S) if self.signalled else self._limit_s
            seen, waited_s = (seen, waited_s + _TICK_S) if self._alive == seen else (self._alive, 0.0)
            if waited_s > limit_s:
                print("no step was finished in time; this is where each thread is:", file=sys.stderr, flush=True)
                faulthandler.dump_traceback(sys.__stderr__ or 2, all_threads=True)
                together.fail(
                    f"error: stuck for {limit_s:g} s (faults.step_timeout_s, compile_timeout_s where something may be"
                    f" compiled or read, {_STEP_TIMEOUT_S:g} s after a signal to stop); start again to go on from the"
                    " newest checkpoint",
                    FaultError.exit_code,
                )


@contextlib.contextmanager
def supervise(faults: FaultsConfig) -> Iterator[Supervisor]:
    """Takes over the signals that ask for a stop, and starts the watch.

    A second SIGINT is a KeyboardInterrupt, which ends the process even where nothing comes of that. What was ignored
    before, as SIGHUP under nohup, stays so.
    """
    several = together.are_several()
    limit_s = faults.step_timeout_s or (_STEP_TIMEOUT_S if several else math.inf)
    supervisor = Supervisor(limit_s, max(limit_s, faults.compile_timeout_s) if limit_s < math.inf else math.inf)
    wanted = [
        number
        for number in _STOPPING
        if signal.getsignal(number) != signal.SIG_IGN and not (several and number == signal.SIGTERM)  # that is JAX's
    ]
    if threading.current_thread() is not threading.main_thread():  # Python delivers signals to the main thread
        wanted = []

    def note(number: int, frame: Any) -> None:
        if signal.SIGINT in wanted:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        if several:
            os.kill(os.getpid(), signal.SIGTERM)  # which JAX tells the others of
        else:
            supervisor.signal()

    before = {number: signal.signal(number, note) for number in wanted}
    over = threading.Event()
    threading.Thread(target=supervisor.watch, args=(over,), daemon=True, name="watchdog").start()
    try:
        with interrupts.second_ends("interrupted", 130), interrupts.listening(supervisor.heard):
            yield supervisor
    finally:
        over.set()
        for number, handler in before.items():
            signal.signal(number, handler)
