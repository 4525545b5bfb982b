"""SIGTERM and Ctrl-C as a question that the loop asks, instead of an exception anywhere."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any


class Stopped(Exception):  # noqa: N818
    """A stop was requested where there is nothing to save."""


@contextlib.contextmanager
def stop_requested() -> Iterator[Callable[[], bool]]:
    """Gives a function that says whether SIGTERM or SIGINT has come. A second SIGINT ends the process as usual."""
    came: list[int] = []

    def note(signum: int, frame: Any) -> None:
        came.append(signum)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    if threading.current_thread() is not threading.main_thread():  # Python delivers signals to the main thread
        yield lambda: False
        return
    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield lambda: bool(came)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
