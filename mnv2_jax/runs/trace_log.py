"""The trace of a training, trace.jsonl: a line per step, with hashes of the batch, the gradients and the new state."""

from __future__ import annotations

import contextlib
import json
import pathlib
from collections.abc import Mapping
from typing import Any

from mnv2_jax.json_files import jsonable, writing
from mnv2_jax.runs.json_lines import cut_back, read_lines

NAME = "trace.jsonl"


class TraceLog:
    """Appends to trace.jsonl."""

    def __init__(self, workdir: pathlib.Path, resume_step: int):
        """Cuts the trace back to the lines that belong to the restored state, and opens it; see `cut_back`."""
        self._path = workdir / NAME
        cut_back(self._path, resume_step, _is_sound)
        with writing(self._path):
            self._file = self._path.open("a")

    def write(self, line: Mapping[str, Any]) -> None:
        """Writes the line of a step; numbers that aren't finite become null."""
        with writing(self._path):
            self._file.write(json.dumps(jsonable(line), allow_nan=False) + "\n")
            self._file.flush()  # lines are longer than the buffer: without this a reader sees parts of them

    def close(self) -> None:
        """Closes the file. Errors are ignored here, because `write` has raised them already."""
        with contextlib.suppress(OSError):
            self._file.close()


def read_trace(workdir: pathlib.Path) -> list[dict[str, Any]]:
    """Reads the sound lines of a run's trace; returns an empty list if there is none."""
    return read_lines(workdir / NAME, _is_sound)


def _is_sound(line: Any) -> bool:
    return (
        isinstance(line, dict)
        and type(line.get("step")) is int
        and {"batch", "loss"} <= line.keys()
        and all(isinstance(line.get(kind), dict) for kind in ("gradients", "state"))
    )
