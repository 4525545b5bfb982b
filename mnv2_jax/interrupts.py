"""Signals that are heard while the main thread waits: a second Ctrl-C ends the process."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator

GRACE_S = 5.0
"""In which the first two can still do it in the usual way, which closes what is open."""

_watching = False
_listeners: list[Callable[[int], None]] = []


@contextlib.contextmanager
def listening(listener: Callable[[int], None]) -> Iterator[None]:
    """In here ``listener`` gets the number of each signal that arrives, at once and in a thread, where `second_ends`
    is on. Handlers run as well, but only when the main thread is back from a compiler or a device.
    """
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)


@contextlib.contextmanager
def second_ends(line: str, exit_code: int) -> Iterator[None]:
    """In here a second SIGINT ends the process, unless that has left before `GRACE_S` are over.

    Python tells the main thread only, and only once that is back from what it waits for: a device, a dead file system,
    a thread. This is told by the operating system. Nothing changes in an interactive session, whose user would lose
    more, and outside of the main thread.
    """
    global _watching
    if _watching or hasattr(sys, "ps1") or threading.current_thread() is not threading.main_thread():
        yield
        return
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    before = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    over, _watching = threading.Event(), True

    def watch() -> None:
        count = 0
        while number := os.read(reading, 1):
            if before >= 0:
                os.write(before, number)
            for listener in tuple(_listeners):
                listener(number[0])
            count += number[0] == signal.SIGINT
            if count >= 2 and not over.wait(GRACE_S):
                with contextlib.suppress(OSError):
                    os.write(2, f"{line}\n".encode())
                os._exit(exit_code)
        os.close(reading)

    threading.Thread(target=watch, daemon=True, name="interrupts").start()
    try:
        yield
    finally:
        over.set()
        _watching = False
        signal.set_wakeup_fd(before)
        os.close(writing)
