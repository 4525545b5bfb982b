"""Standard output and standard error where they may be closed, full, or a pipe that nobody reads any more."""

from __future__ import annotations

import io
import os
import sys
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

STDOUT = "standard output"
"""The ``filename`` of an error of writing there."""


class _Raw(io.FileIO):
    """The bytes below a text stream."""

    optional = False
    """Whether what can't be written is dropped."""

    def write(self, content: ReadableBuffer, /) -> int:
        try:
            written = super().write(content)
        except OSError as error:
            if not self.optional:
                error.filename = STDOUT
                raise
            written = None
        # None, too, of a full pipe that was told not to wait.
        return memoryview(content).nbytes if written is None and self.optional else written  # type: ignore[return-value]


def take_over() -> None:
    """Makes the standard streams such that no error is raised by standard error, and one with a name by the other.

    A stream that is closed (``>&-``) stays one that can't be written, but its number is taken: a file that is opened
    later would get it, and what libraries print would be written there.
    """
    for number, flags in enumerate((os.O_WRONLY, os.O_RDONLY, os.O_RDONLY)):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, flags), True)  # the lowest number that is free
    if sys.stdout is sys.__stdout__:  # and not a notebook's or a test's
        sys.stdout = opened(1, sys.stdout)
    if sys.stderr is sys.__stderr__:
        sys.stderr = opened(2, sys.stderr)
        drop_errors(sys.stderr)


def opened(number: int, like: TextIO | None) -> TextIO:
    """A text stream over a file descriptor that stays open, as another was."""
    old = like if isinstance(like, io.TextIOWrapper) else None
    if old is not None:
        old.flush()
    stream = io.TextIOWrapper(
        io.BufferedWriter(_Raw(number, "wb", closefd=False)),
        encoding=old.encoding if old is not None else "utf-8",
        errors="backslashreplace",  # a file name can be any bytes, a terminal plain ASCII
        line_buffering=old is None or old.line_buffering or old.write_through,
    )
    if (raw := _raw(old)) is not None and raw.optional:
        drop_errors(stream)
    return stream


def drop_errors(stream: TextIO | None) -> None:
    """From here on what can't be written to a stream of `opened` goes nowhere, and nothing else changes."""
    if (raw := _raw(stream)) is not None:
        raw.optional = True


def _raw(stream: TextIO | None) -> _Raw | None:
    raw = getattr(getattr(stream, "buffer", None), "raw", None)
    return raw if isinstance(raw, _Raw) else None
