"""Reads JSON and text files, and writes files atomically: a reader sees the old file or the new one, and no part."""

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
      UserError: if the file can't be read, or doesn't hold a JSON object.
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
    """Reads a text file that a person wrote: UTF-8, with or without a byte-order mark, or UTF-16 with one (Windows).

    Raises:
      UserError: if the file can't be read, or is not such a text.
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
    """Turns machine faults, while this context reads a file or folder, into a `UserError`.

    Raises:
      UserError: naming the path and the reason, such as missing permissions. Errors about the content of the file are
        raised unchanged.
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
    """Turns errors of the operating system, while this context writes a file or folder, into a `UserError`.

    Raises:
      UserError: naming the path and the reason, such as a full disk.
    """
    try:
        yield
    except OSError as error:
        raise UserError(f"{path}: can't be written ({error.strerror or error}); mend that and start again") from error


def write_json(path: pathlib.Path, tree: Any) -> None:
    """Replaces a JSON file atomically: if the process dies at any moment, the old file or the new one is there.

    Args:
      path: path of the file, in a folder that exists.
      tree: nested mappings and sequences of JSON values; arrays become lists, NaN and infinities become null.

    Raises:
      UserError: if the file can't be written.
    """
    write_text(path, json.dumps(jsonable(tree), indent=2, allow_nan=False) + "\n")


def write_text(path: pathlib.Path, text: str) -> None:
    """Replaces a text file atomically, as `write_json` does."""
    write_bytes(path, text.encode(errors="backslashreplace"))  # a file name need not be Unicode


def write_bytes(path: pathlib.Path, content: bytes) -> None:
    """Replaces a file atomically, as `write_json` does."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with writing(path):
            with open(temporary, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())  # before the rename, which may otherwise reach the disk first
            os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):  # the file exists only after a failure; its name may be impossible
            temporary.unlink(missing_ok=True)


def jsonable(value: Any) -> Any:
    """Converts a value to JSON types: arrays to lists, and NaN and infinities, which JSON doesn't have, to None."""
    if isinstance(value, Mapping):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(item) for item in value]
    if hasattr(value, "tolist"):
        return jsonable(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
