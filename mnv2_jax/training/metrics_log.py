"""metrics.jsonl, one JSON object a line: step, split and values; the same numbers go to TensorBoard.

A process may die in the middle of a line, so the log is read as far as it is sound.
"""

from __future__ import annotations

import json
import os
import pathlib
import time
from collections.abc import Iterator, Mapping
from typing import Any

import psutil

from mnv2_jax.json_files import jsonable, write_text

NAME, TENSORBOARD = "metrics.jsonl", "tensorboard"


def process_seconds() -> float:
    """Wall time since the operating system started this process: imports and compilation are part of a run."""
    return max(0.0, time.time() - psutil.Process().create_time())


class MetricsLog:
    """Appends to metrics.jsonl, and to TensorBoard's files where they are wanted."""

    seconds_before: float
    """What earlier sessions took, their lost steps included: the largest `seconds` that the log had."""

    def __init__(self, workdir: pathlib.Path, resume_step: int, *, tensorboard: bool = False):
        """Cuts the log back to what belongs to the restored state, and opens it.

        Args:
          workdir: of a run that this process has locked.
          resume_step: number of steps the restored state has taken; 0 for a new run. Lines of later steps are
            dropped, and everything from the first line on that doesn't parse.
          tensorboard: whether to write event files; what they hold of dropped steps is purged.
        """
        path = workdir / NAME
        old = path.read_bytes() if path.exists() else b""
        lines = list(_parse(old))
        self.seconds_before = max((float(line.get("seconds") or 0) for line in lines), default=0.0)
        kept = "".join(json.dumps(line) + "\n" for line in lines if line["step"] <= resume_step)
        if kept.encode() != old:
            write_text(path, kept)
        self._file = path.open("a", buffering=1)  # a line is written as soon as it ends
        self._events = None
        if tensorboard:
            from tensorboardX import SummaryWriter  # 0.1 s that a run without it saves

            folder = workdir / TENSORBOARD
            # Event files are named by the second; the suffix keeps two quick sessions apart.
            self._events = SummaryWriter(
                str(folder),
                purge_step=resume_step + 1 if folder.exists() else None,
                flush_secs=10,
                filename_suffix=f".{os.getpid()}.{resume_step}",
            )

    @property
    def seconds(self) -> float:
        """Wall time of the run up to now, over all its sessions."""
        return self.seconds_before + process_seconds()

    def write(self, step: int, split: str, values: Mapping[str, Any]) -> None:
        """Writes one line: step, split, `seconds`, then the values (scalars; those that aren't finite as null)."""
        line = jsonable({"step": step, "split": split, "seconds": round(self.seconds, 3), **values})
        self._file.write(json.dumps(line, allow_nan=False) + "\n")
        if self._events is not None:
            for key, value in line.items():
                if isinstance(value, int | float) and key != "step":
                    self._events.add_scalar(f"{split}/{key}", value, step)

    def close(self) -> None:
        """Flushes and closes the files."""
        self._file.close()
        if self._events is not None:
            self._events.close()


def read_metrics(workdir: pathlib.Path) -> list[dict[str, Any]]:
    """The lines of a run's log, up to the first that is torn; none where there is no log."""
    path = workdir / NAME
    return list(_parse(path.read_bytes())) if path.exists() else []


def read_evaluations(workdir: pathlib.Path) -> dict[int, dict[str, Any]]:
    """The log's evaluations by step."""
    return {line["step"]: line for line in read_metrics(workdir) if line["split"] == "eval"}


def _parse(content: bytes) -> Iterator[dict[str, Any]]:
    """The sound lines at the start of a log. What was cut short can't parse: an object's last byte is its brace."""
    for line in content.split(b"\n"):
        try:
            parsed = json.loads(line.decode(), parse_constant=lambda _: None)  # as `write` has NaN
        except ValueError:  # bad JSON, bad UTF-8, or the empty end
            return
        if not isinstance(parsed, dict) or type(parsed.get("step")) is not int:
            return
        yield parsed
