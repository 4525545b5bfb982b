"""Standard output and standard error, which may be closed, full, or a pipe that nobody reads any more."""

from __future__ import annotations

import io
import os
import sys
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

STDOUT = "standard output"
"""The ``filename`` of an `OSError` from writing to standard output."""


class _Raw(io.FileIO):
    """The file of bytes below a text stream."""

    optional = False
    """Whether text that can't be written is dropped, instead of raising an error."""

    def write(self, content: ReadableBuffer, /) -> int:
        try:
            written = super().write(content)
        except OSError as error:
            if not self.optional:
                error.filename = STDOUT
                raise
            written = None
        # `written` is None, too, for a full pipe in non-blocking mode.
        return memoryview(content).nbytes if written is None and self.optional else written  # type: ignore[return-value]


def take_over() -> None:
    """Replaces the standard streams: standard error never raises, and errors of standard output name it (`STDOUT`).

    A closed stream (``>&-``) still can't be written to, but its descriptor is taken. Otherwise a file that is opened
    later would get that descriptor, and libraries would print into the file.
    """
    for number, flags in enumerate((os.O_WRONLY, os.O_RDONLY, os.O_RDONLY)):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, flags), True)  # takes the lowest free descriptor, this one
    if sys.stdout is sys.__stdout__:  # not the stream of a notebook or a test
        sys.stdout = open_descriptor(1, sys.stdout)
    if sys.stderr is sys.__stderr__:
        sys.stderr = open_descriptor(2, sys.stderr)
        drop_errors(sys.stderr)


def open_descriptor(number: int, like: TextIO | None) -> TextIO:
    """Opens a text stream over a file descriptor, with the settings of ``like``. Closing it keeps the descriptor."""
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
    """Makes a stream of `opened` drop text that can't be written, from now on; other streams stay as they are."""
    if (raw := _raw(stream)) is not None:
        raw.optional = True


def _raw(stream: TextIO | None) -> _Raw | None:
    raw = getattr(getattr(stream, "buffer", None), "raw", None)
    return raw if isinstance(raw, _Raw) else None
