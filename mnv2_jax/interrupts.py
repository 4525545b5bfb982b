"""Handles signals while the main thread waits: a second Ctrl-C ends the process."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator

GRACE_S = 5.0
"""Seconds that the first two signals have to end the process in the usual way, which closes open files."""

_watching = False
_listeners: list[Callable[[int], None]] = []


@contextlib.contextmanager
def listening(listener: Callable[[int], None]) -> Iterator[None]:
    """Calls ``listener`` with the number of each signal that arrives in this context, at once and in a thread.

    It does so only within `ending_at_second_interrupt`. Python's signal handlers run as well, but only when the main
    thread returns from a compiler or a device.
    """
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)


@contextlib.contextmanager
def ending_at_second_interrupt(line: str, exit_code: int) -> Iterator[None]:
    """Ends the process at a second SIGINT in this context, unless the context is left within `GRACE_S` seconds.

    Python reports a signal to the main thread only, and only when that returns from what it waits for: a device, a dead
    file system, a thread. Here the operating system wakes a thread instead. Interactive sessions, whose users would
    lose their variables, and other threads than the main one are left as they are.
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
