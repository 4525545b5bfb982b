"""JSON and other files that are replaced whole or not at all, whenever the process dies."""

from __future__ import annotations

import codecs
import contextlib
import json
import math
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

from mnv2_jax.errors import UserError, machine_fault


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
      UserError: if the file isn't one, or can't be read.
    """
    try:
        with reading(path):
            tree = json.loads(path.read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{path}: not readable as JSON ({error}); restore it or give another file") from error
    if not isinstance(tree, dict):
        raise UserError(f"{path}: expected a JSON object, found {type(tree).__name__}; restore it or give another file")
    return tree


def read_text(path: str | os.PathLike[str]) -> str:
    """Reads a text that people wrote: in UTF-8, perhaps with a byte-order mark, or what Windows calls Unicode (UTF-16).

    Raises:
      UserError: if it isn't one, or can't be read.
    """
    try:
        content = pathlib.Path(path).read_bytes()
        is_utf16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        return content.decode("utf-16" if is_utf16 else "utf-8-sig")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"{path}: can't be read ({reason}); give a text file in UTF-8") from error


@contextlib.contextmanager
def reading(path: pathlib.Path) -> Iterator[None]:
    """Turns faults of the machine while a file or folder is read in here into a `UserError`.

    Raises:
      UserError: naming it and the reason, as missing permissions; what is said of its content goes through.
    """
    try:
        yield
    except (OSError, MemoryError) as error:
        if (fault := machine_fault(error)) is None:
            raise
        reason = fault.removeprefix(f"{path}: ")
        raise UserError(f"{path}: can't be read ({reason}); mend that and start again") from error


@contextlib.contextmanager
def writing(path: pathlib.Path) -> Iterator[None]:
    """Turns faults while a file or folder is written in here into a `UserError`.

    Raises:
      UserError: naming it and the reason, as a full disk.
    """
    try:
        yield
    except OSError as error:
        raise UserError(f"{path}: can't be written ({error.strerror or error}); mend that and start again") from error


def write_json(path: pathlib.Path, tree: Any) -> None:
    """Replaces a JSON file atomically: whoever reads it, and whenever we die, it is the old one or the new one.

    Args:
      path: in a folder that exists.
      tree: nested mappings and sequences of what JSON has; arrays become lists, NaN and infinities null.

    Raises:
      UserError: if it can't be written.
    """
    write_text(path, json.dumps(jsonable(tree), indent=2, allow_nan=False) + "\n")


def write_text(path: pathlib.Path, text: str) -> None:
    """Replaces a text file as `write_json` does."""
    write_bytes(path, text.encode(errors="backslashreplace"))  # a file name need not be Unicode


def write_bytes(path: pathlib.Path, content: bytes) -> None:
    """Replaces any file as `write_json` does."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with writing(path):
            with open(temporary, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())  # before the rename, which may otherwise reach the disk first
            os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):  # it is there only if we failed, or its name is impossible
            temporary.unlink(missing_ok=True)


def jsonable(value: Any) -> Any:
    """A value as JSON can hold it: JSON has no arrays, and no NaN though Python would write one."""
    if isinstance(value, Mapping):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(item) for item in value]
    if hasattr(value, "tolist"):
        return jsonable(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
