"""The log metrics.jsonl, one JSON object per line: step, split and values; the same numbers go to TensorBoard."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import pathlib
import socket
import statistics
import time
from collections.abc import Iterable, Mapping
from typing import Any

import psutil

from mnv2_jax.errors import UserError
from mnv2_jax.json_files import jsonable, write_text, writing
from mnv2_jax.runs.json_lines import cut_back, read_lines

NAME, TENSORBOARD = "metrics.jsonl", "tensorboard"
SCORE = "score"
"""Key in the line of an evaluation that holds the name of its score, the value by which evaluations are ranked."""
_SCORE_OF_0_4 = "top1"
"""Name of the score in lines that don't name it, which version 0.4 wrote."""

_SPEEDS = ("images_per_second", "images_per_second_per_device")
_FLUSH_S = 10.0


def process_seconds() -> float:
    """Returns the wall time since this process started: imports and compilation are part of a run."""
    return max(0.0, time.time() - psutil.Process().create_time())


class MetricsLog:
    """Appends to metrics.jsonl, and with ``tensorboard`` to TensorBoard's files."""

    seconds_before: float
    """Seconds of earlier sessions, including lost steps: the largest `seconds` in the log."""

    def __init__(self, workdir: pathlib.Path, resume_step: int, *, tensorboard: bool = False):
        """Cuts the log back to the lines that belong to the restored state, and opens it; see `cut_back`.

        Args:
          workdir: folder of a run that this process has locked.
          resume_step: number of steps that the restored state has taken; 0 for a new run.
          tensorboard: whether to write event files; TensorBoard then drops the values of later steps too.
        """
        path = workdir / NAME
        lines = cut_back(path, resume_step, _is_sound)
        self.seconds_before = max((float(line.get("seconds") or 0) for line in lines), default=0.0)
        self._path = path
        with writing(path):
            self._file = path.open("a", buffering=1)  # a line is written as soon as it ends
        self._events = _Events(workdir / TENSORBOARD, resume_step) if tensorboard else None

    @property
    def seconds(self) -> float:
        """Wall time of the run until now, over all its sessions."""
        return self.seconds_before + process_seconds()

    def write(self, step: int, split: str, values: Mapping[str, Any]) -> None:
        """Writes one line: step, split, `seconds`, then the values (scalars; null for a value that isn't finite)."""
        line = jsonable({"step": step, "split": split, "seconds": round(self.seconds, 3), **values})
        with writing(self._path):
            self._file.write(json.dumps(line, allow_nan=False) + "\n")
        if self._events is not None:
            numbers = {key: value for key, value in line.items() if isinstance(value, int | float) and key != "step"}
            self._events.write(step, {f"{split}/{key}": value for key, value in numbers.items()})

    def close(self) -> None:
        """Closes the files. Errors are ignored here, because `write` has raised them already."""
        for file in (self._file, self._events):
            with contextlib.suppress(OSError):
                if file is not None:
                    file.close()


class _Events:
    """An event file for TensorBoard. tensorboardX's own writer waits for its thread, even a dead one."""

    def __init__(self, folder: pathlib.Path, resume_step: int):
        from tensorboardX.proto import event_pb2  # 0.1 s that a run without it saves
        from tensorboardX.record_writer import RecordWriter
        from tensorboardX.summary import scalar

        self._folder, self._scalar, self._event = folder, scalar, event_pb2.Event
        # TensorBoard recognises event files by the first words and reads them in the order of the time; the rest makes
        # the name unique.
        name = f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}.{os.getpid()}.{resume_step}"
        with writing(folder):
            resumed = folder.exists()
            folder.mkdir(exist_ok=True)
            self._writer = RecordWriter(str(folder / name))
            self._add(file_version="brain.Event:2")
            if resumed:  # tells TensorBoard to drop later steps that older files hold
                start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
                self._add(step=resume_step + 1, session_log=start)
            self._flush()

    def write(self, step: int, values: Mapping[str, float]) -> None:
        with writing(self._folder):
            for tag, value in values.items():
                self._add(step=step, summary=self._scalar(tag, value))
            if time.monotonic() - self._flushed > _FLUSH_S:  # not each time: a flush waits for the disk
                self._flush()

    def close(self) -> None:
        self._writer.close()

    def _flush(self) -> None:
        self._writer.flush()
        self._flushed = time.monotonic()

    def _add(self, **fields: Any) -> None:
        self._writer.write(self._event(wall_time=time.time(), **fields).SerializeToString())


def read_metrics(workdir: pathlib.Path) -> list[dict[str, Any]]:
    """Reads the sound lines of a run's log; returns an empty list if there is no log."""
    return read_lines(workdir / NAME, _is_sound)


def write_csv(workdir: pathlib.Path, path: pathlib.Path) -> None:
    """Writes a run's log as CSV: a row for each line, and a column for each key that any line has.

    A cell is "" where the line lacks the key, or where the value wasn't finite.

    Raises:
      UserError: if there is no log yet, or the file can't be written.
    """
    lines = read_metrics(workdir)
    if not lines:
        raise UserError(
            f"{workdir}: nothing is logged yet (no line in {NAME}); the first line comes after log.every_steps steps"
        )
    file = io.StringIO()
    writer = csv.DictWriter(file, list({key: None for line in lines for key in line}), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    write_text(path, file.getvalue())


def read_scores(workdir: pathlib.Path) -> dict[int, float]:
    """Reads the scores of the log's evaluations, by their steps; each line names the value that is its score."""
    lines = (line for line in read_metrics(workdir) if line["split"] == "eval")
    scores = ((line["step"], line.get(line.get(SCORE, _SCORE_OF_0_4))) for line in lines)
    return {step: float(score) for step, score in scores if isinstance(score, int | float)}


def speeds(lines: Iterable[Mapping[str, Any]]) -> dict[str, float | None]:
    """Returns the medians of images_per_second and images_per_second_per_device over all training lines of a log.

    A value is None if no session took two steps, or if the version that wrote the log didn't record it.
    """
    steps = [line for line in lines if line["split"] == "train"]
    values_of = {key: [line[key] for line in steps if line.get(key)] for key in _SPEEDS}
    return {key: statistics.median(values) if values else None for key, values in values_of.items()}


def _is_sound(line: Any) -> bool:
    return (
        isinstance(line, dict)
        and type(line.get("step")) is int
        and isinstance(line.get("split"), str)
        and isinstance(line.get("seconds", 0), int | float | None)
    )
