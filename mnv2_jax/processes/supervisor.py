"""Tells the training loop when to stop, and ends the process when the loop is stuck.

SIGTERM, SIGHUP, SIGUSR1 and Ctrl-C raise no exception: the loop asks whether one has arrived (`should_stop`). They
interrupt only the wait for a batch, which may never come. A loop that doesn't ask in time is stuck, mostly in a step
that waits for another process. A thread then ends this process.
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
"""Signals that ask for a stop. They come from a scheduler, Ctrl-C, a closed terminal or ssh, SLURM's --signal=USR1."""
_STEP_TIMEOUT_S = 600.0
_TICK_S = 1.0


_END: Any = object()


class Stopped(Exception):  # noqa: N818
    """A stop was requested where there is nothing to save."""


class Supervisor:
    """Answers the loop, which asks wherever it could stop, and measures how long it takes to ask again."""

    def __init__(self, step_timeout_s: float = math.inf, compile_timeout_s: float = math.inf):
        """Stores the limits. The watch begins in `supervise`."""
        self._compile_timeout_s, self._limit_s = compile_timeout_s, step_timeout_s
        self._alive = 0  # only the loop counts it up, and the thread only reads it, so they need no lock
        self._stopping = self.signalled = self._leaves_waiting = self._compiles = False

    def should_stop(self) -> bool:
        """Tells whether a stop was requested. All processes get the same answer at the same point of the loop."""
        self._alive += 1
        if not self._stopping:
            self._stopping = together.reached_stop() if together.are_several() else self.signalled
        return self._stopping

    def each(self, batches: Iterator[_T]) -> Iterator[_T]:
        """Iterates over batches. If there is only one process, a request to stop ends the wait for the next batch.

        Raises:
          Stopped: in that case.
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
        """Records that a stop was requested; a signal handler calls this.

        Raises:
          Stopped: while `each` waits for a batch.
        """
        self.signalled = True
        if self._leaves_waiting:
            self._leaves_waiting = False  # a second signal must not interrupt what the exception closes
            raise Stopped

    @contextlib.contextmanager
    def compiling(self) -> Iterator[None]:
        """Allows `faults.compile_timeout_s` in this context, in which something is compiled or read."""
        before, self._limit_s = (self._limit_s, self._compiles), self._compile_timeout_s
        self._compiles = True
        try:
            yield
        finally:
            self._alive += 1
            self._limit_s, self._compiles = before

    def on_signal(self, number: int) -> None:
        """Prints, from a thread, why a signal to stop has no effect yet."""
        if number in _STOPPING and self._compiles and not self._leaves_waiting:
            name = signal.Signals(number).name
            line = f"{name}: stops when the current compilation, read or write is done; a second Ctrl-C ends at once"
            print(line, file=sys.stderr, flush=True)

    def watch(self, over: threading.Event) -> None:
        """Ends the process if the loop doesn't ask in time. Time in which the process was suspended doesn't count.

        A single process has no limit until it is asked to stop.
        """
        last_alive, waited_s = self._alive, 0.0
        while not over.wait(_TICK_S):
            limit_s = min(self._limit_s, _STEP_TIMEOUT_S) if self.signalled else self._limit_s
            is_waiting = self._alive == last_alive
            last_alive, waited_s = (last_alive, waited_s + _TICK_S) if is_waiting else (self._alive, 0.0)
            if waited_s > limit_s:
                print("no step was finished in time; these are the stacks of all threads:", file=sys.stderr, flush=True)
                faulthandler.dump_traceback(sys.__stderr__ or 2, all_threads=True)
                together.fail(
                    f"error: stuck for {limit_s:g} s (limits: faults.step_timeout_s; faults.compile_timeout_s where"
                    f" something may be compiled or read; {_STEP_TIMEOUT_S:g} s after a signal to stop); start again"
                    " to resume from the newest checkpoint",
                    FaultError.exit_code,
                )


@contextlib.contextmanager
def supervise(faults: FaultsConfig) -> Iterator[Supervisor]:
    """Handles the signals that ask for a stop, and watches the loop, in this context.

    A second SIGINT raises KeyboardInterrupt, and ends the process even if the main thread doesn't get to that. Signals
    that were ignored before, such as SIGHUP under nohup, stay ignored.
    """
    is_several = together.are_several()
    limit_s = faults.step_timeout_s or (_STEP_TIMEOUT_S if is_several else math.inf)
    supervisor = Supervisor(limit_s, max(limit_s, faults.compile_timeout_s) if limit_s < math.inf else math.inf)
    handled = [
        number
        for number in _STOPPING
        # JAX handles SIGTERM where there are several processes.
        if signal.getsignal(number) != signal.SIG_IGN and not (is_several and number == signal.SIGTERM)
    ]
    if threading.current_thread() is not threading.main_thread():  # Python delivers signals to the main thread
        handled = []

    def request_stop(number: int, frame: Any) -> None:
        if signal.SIGINT in handled:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        if is_several:
            os.kill(os.getpid(), signal.SIGTERM)  # JAX tells the other processes of it
        else:
            supervisor.signal()

    before = {number: signal.signal(number, request_stop) for number in handled}
    over = threading.Event()
    threading.Thread(target=supervisor.watch, args=(over,), daemon=True, name="watchdog").start()
    try:
        with interrupts.ending_at_second_interrupt("interrupted", 130), interrupts.listening(supervisor.on_signal):
            yield supervisor
    finally:
        over.set()
        for number, handler in before.items():
            signal.signal(number, handler)
