"""Errors that users can mend. Each is one line, which says what was wrong, the value, and what to do."""

from __future__ import annotations

import difflib
import errno
import os
import sys
from collections.abc import Callable, Iterable

from mnv2_jax import interrupts, outputs


class UserError(Exception):
    """A config, data, a checkpoint or a flag that the user gave can't be used. The message is one line."""

    exit_code = 2


class NonFiniteLossError(UserError):
    """The loss of some step was NaN or infinite; nothing after it was saved."""

    exit_code = 1


class FaultError(UserError):
    """A machine or another process failed. The same command, started again, resumes from the newest checkpoint."""

    exit_code = 75  # EX_TEMPFAIL of sysexits.h: a scheduler may try again


def plain(text: str) -> str:
    """Escapes line breaks and what isn't Unicode, both of which a file name may hold, so that a text is one line."""
    return text.encode(errors="backslashreplace").decode().replace("\n", "\\n")


_MAX_CHOICES, _CANDIDATES = 30, 5
"""An error lists all of up to 30 choices, and the nearest 5 of more than that."""


def nearest(word: str, choices: Iterable[str]) -> str:
    """Returns ``; did you mean 'x'?`` if a choice is close to ``word``, or else a list of the choices to try."""
    names = sorted(choices)
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.5)
    if close:
        return f"; did you mean {close[0]!r}?"
    if len(names) <= _MAX_CHOICES:
        return f"; one of: {', '.join(names)}"
    candidates = difflib.get_close_matches(word, names, n=_CANDIDATES, cutoff=0.0)
    return f"; the nearest of {len(names)}: {', '.join(candidates)}"


_CONTENT_ERRNOS = (errno.ENOENT, errno.ENOTDIR, errno.EINVAL)
"""Numbers of errors whose cause is a path or a file's content, and not the machine."""
_MACHINE_PREFIXES = (
    "PERMISSION_DENIED",
    "RESOURCE_EXHAUSTED",
    "UNAVAILABLE",
    "DEADLINE_EXCEEDED",
    "ABORTED",
    "CANCELLED",
)
"""First words of tensorstore's messages for errors whose cause is the machine."""


def machine_fault(error: BaseException) -> str | None:
    """Returns why the machine failed, such as "Permission denied"; None where the content of a file is the cause.

    Follows the chain of causes, and searches the messages of libraries for those of the operating system.
    """
    chain: BaseException | None = error
    while chain is not None:
        if isinstance(chain, MemoryError):
            return "not enough memory"
        if isinstance(chain, OSError) and chain.errno is not None and chain.errno not in _CONTENT_ERRNOS:
            return f"{chain.filename}: {chain.strerror}" if chain.filename else chain.strerror
        chain = chain.__cause__ or chain.__context__
    text = " ".join(str(error).split())
    reasons = (os.strerror(number) for number in errno.errorcode if number not in _CONTENT_ERRNOS)
    quoted = next((reason for reason in reasons if f'": {reason}' in text), None)
    return quoted or (text[:200] if text.startswith(_MACHINE_PREFIXES) else None)


_FULL_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def line_and_code(error: BaseException) -> tuple[str, int] | None:
    """Returns the line to print and the exit code for an error that isn't a bug; None for a bug."""
    if isinstance(error, UserError):
        return "error: " + " ".join(str(error).split()), error.exit_code
    if isinstance(error, KeyboardInterrupt):
        return "interrupted", 130
    if isinstance(error, OSError) and (error.errno in _FULL_ERRNOS or error.filename == outputs.STDOUT):
        file, mend = error.filename or "a file", "make room" if error.errno in _FULL_ERRNOS else "mend that"
        return f"error: {file}: can't be written ({error.strerror}); {mend} and start again", UserError.exit_code
    if isinstance(error, OSError) and error.filename and (fault := machine_fault(error)):
        return f"error: {fault}; mend that or correct the path", UserError.exit_code
    return None


def exit_on_user_error(verb: Callable[[], None]) -> None:
    """Runs a command-line verb, and turns a `UserError` into one line on standard error and its exit code."""
    outputs.take_over()
    with interrupts.ending_at_second_interrupt("interrupted", 130):
        try:
            try:
                verb()
            except SystemExit:  # --help
                sys.stdout.flush()
                raise
            sys.stdout.flush()
        except BaseException as error:
            outputs.drop_errors(sys.stdout)  # Python flushes the rest at exit, which may fail as well
            if isinstance(error, BrokenPipeError) and error.filename == outputs.STDOUT:
                return  # the reader of the pipe, such as `head`, has left, which is no error
            report = line_and_code(error)
            if report is None:
                raise
            line, exit_code = report
            print(line, file=sys.stderr, flush=True)
            sys.exit(exit_code)
