"""Errors that are the user's to mend: one line saying what was wrong, the value, and what to do."""

from __future__ import annotations

import difflib
import errno
import os
import sys
from collections.abc import Callable, Iterable

from mnv2_jax import interrupts, outputs


class UserError(Exception):
    """Something the user gave (config, data, checkpoint, flag) can't be used. The message is one line."""

    exit_code = 2


class NonFiniteLossError(UserError):
    """The loss of some step was NaN or infinite; nothing after it was saved."""

    exit_code = 1


class FaultError(UserError):
    """A machine or another process failed; the same command, started again, goes on from the newest checkpoint."""

    exit_code = 75  # EX_TEMPFAIL of sysexits.h: a scheduler may try again


def plain(text: str) -> str:
    """A text as one line of Unicode: a file name may hold what isn't, and line breaks."""
    return text.encode(errors="backslashreplace").decode().replace("\n", "\\n")


_MOST_CHOICES, _CANDIDATES = 30, 5
"""Most choices that an error lists whole, and the number of candidates that it lists of more."""


def nearest(word: str, choices: Iterable[str]) -> str:
    """Returns ``; did you mean 'x'?`` for the choice closest to ``word``, or some of the choices: all of a few."""
    names = sorted(choices)
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.5)
    if close:
        return f"; did you mean {close[0]!r}?"
    if len(names) <= _MOST_CHOICES:
        return f"; one of: {', '.join(names)}"
    some = difflib.get_close_matches(word, names, n=_CANDIDATES, cutoff=0.0)
    return f"; of {len(names)}, these come nearest: {', '.join(some)}"


_OF_CONTENT = (errno.ENOENT, errno.ENOTDIR, errno.EINVAL)
"""Numbers of errors that are about a path or a file's content, and not about the machine."""
_OF_MACHINE = ("PERMISSION_DENIED", "RESOURCE_EXHAUSTED", "UNAVAILABLE", "DEADLINE_EXCEEDED", "ABORTED", "CANCELLED")
"""Words with which tensorstore begins errors of the machine."""


def machine_fault(error: BaseException) -> str | None:
    """The machine's reason for a failure, such as "Permission denied"; None where the content of a file is the reason.

    Looks through causes, and through the texts of libraries that pass the operating system's on.
    """
    chain: BaseException | None = error
    while chain is not None:
        if isinstance(chain, MemoryError):
            return "not enough memory"
        if isinstance(chain, OSError) and chain.errno is not None and chain.errno not in _OF_CONTENT:
            return f"{chain.filename}: {chain.strerror}" if chain.filename else chain.strerror
        chain = chain.__cause__ or chain.__context__
    text = " ".join(str(error).split())
    said = (os.strerror(number) for number in errno.errorcode if number not in _OF_CONTENT)
    passed_on = next((reason for reason in said if f'": {reason}' in text), None)
    return passed_on or (text[:200] if text.startswith(_OF_MACHINE) else None)


_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def line_and_code(error: BaseException) -> tuple[str, int] | None:
    """The line and the exit code of an error that isn't a bug; None for a bug."""
    if isinstance(error, UserError):
        return "error: " + " ".join(str(error).split()), error.exit_code
    if isinstance(error, KeyboardInterrupt):
        return "interrupted", 130
    if isinstance(error, OSError) and (error.errno in _FULL or error.filename == outputs.STDOUT):
        where, mend = error.filename or "a file", "make room" if error.errno in _FULL else "mend that"
        return f"error: {where}: can't be written ({error.strerror}); {mend} and start again", UserError.exit_code
    if isinstance(error, OSError) and error.filename and (fault := machine_fault(error)):
        return f"error: {fault}; mend that or correct the path", UserError.exit_code
    return None


def exit_on_user_error(verb: Callable[[], None]) -> None:
    """Runs a command-line verb; a `UserError` becomes one line on stderr and its exit code."""
    outputs.take_over()
    with interrupts.second_ends("interrupted", 130):
        try:
            try:
                verb()
            except SystemExit:  # --help
                sys.stdout.flush()
                raise
            sys.stdout.flush()
        except BaseException as error:
            outputs.drop_errors(sys.stdout)  # what is still to be flushed
            if isinstance(error, BrokenPipeError) and error.filename == outputs.STDOUT:
                return  # the reader, as `head`, has had enough
            told = line_and_code(error)
            if told is None:
                raise
            print(told[0], file=sys.stderr, flush=True)
            sys.exit(told[1])
