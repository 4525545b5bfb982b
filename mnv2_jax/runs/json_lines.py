"""Files with one JSON object per line, which a run appends to, and cuts back when it resumes from an earlier step.

A process may die in the middle of a line, so readers ignore lines that aren't sound.
"""

from __future__ import annotations

import json
import pathlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

from mnv2_jax.json_files import reading, write_bytes, write_text

IsSound = Callable[[Any], bool]
"""Whether a parsed line is one that we write; it then has a "step", an int."""


def read_lines(path: pathlib.Path, is_sound: IsSound) -> list[dict[str, Any]]:
    """Reads the sound lines of a file; returns an empty list if there is no file."""
    with reading(path):
        return [line for line in _parse(path.read_bytes(), is_sound) if line is not None] if path.exists() else []


def cut_back(path: pathlib.Path, resume_step: int, is_sound: IsSound) -> list[dict[str, Any]]:
    """Cuts a file back to the lines that belong to a restored state, and returns all sound lines that it had.

    Args:
      path: the file, which need not exist, in the folder of a run that this process has locked.
      resume_step: number of steps that the restored state has taken; 0 for a new run. Lines of later steps are dropped,
        and so is a torn last line. If other lines are damaged, which no crash causes, the file is first copied to
        NAME.damaged.jsonl.
      is_sound: see `IsSound`.
    """
    with reading(path):
        old = path.read_bytes() if path.exists() else b""
    parsed = list(_parse(old, is_sound))
    lines = [line for line in parsed if line is not None]
    if None in parsed[:-1]:
        aside = path.with_suffix(f".damaged{path.suffix}")
        write_bytes(aside, old)
        print(
            f"warning: {path} has damaged lines; they are dropped, and {aside} keeps a copy of the whole file",
            file=sys.stderr,
        )
    shortened = "".join(json.dumps(line) + "\n" for line in lines if line["step"] <= resume_step)
    if shortened.encode() != old:
        write_text(path, shortened)
    return lines


def _parse(content: bytes, is_sound: IsSound) -> Iterator[dict[str, Any] | None]:
    """Yields each line, or None if it isn't sound. A line that was cut off can't parse: it lacks its closing brace."""
    for line in filter(None, content.split(b"\n")):
        try:
            parsed = json.loads(line.decode(), parse_constant=lambda _: None)  # NaN is read as it is written: null
        except (ValueError, RecursionError):  # bad JSON, bad UTF-8
            parsed = None
        yield parsed if is_sound(parsed) else None
