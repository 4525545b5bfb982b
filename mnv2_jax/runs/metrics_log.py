"""metrics.jsonl, one JSON object a line: step, split and values; the same numbers go to TensorBoard.

A process may die in the middle of a line, so what isn't a sound line counts for nothing.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import pathlib
import socket
import statistics
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import psutil

from mnv2_jax.errors import UserError
from mnv2_jax.json_files import jsonable, reading, write_bytes, write_text, writing

NAME, DAMAGED, TENSORBOARD = "metrics.jsonl", "metrics.damaged.jsonl", "tensorboard"
SCORE = "score"
"""Key of an evaluation's line: the name of the value by which it is better than another."""
_SCORE_OF_0_4 = "top1"
"""Name of the score in lines that don't name it."""

_SPEEDS = ("images_per_second", "images_per_second_per_device")
_FLUSH_S = 10.0


def process_seconds() -> float:
    """Wall time since the operating system started this process: imports and compilation are part of a run."""
    return max(0.0, time.time() - psutil.Process().create_time())


class MetricsLog:
    """Appends to metrics.jsonl, and to TensorBoard's files where they are wanted."""

    seconds_before: float
    """Seconds of earlier sessions, lost steps included: the largest `seconds` that the log had."""

    def __init__(self, workdir: pathlib.Path, resume_step: int, *, tensorboard: bool = False):
        """Cuts the log back to what belongs to the restored state, and opens it.

        Args:
          workdir: of a run that this process has locked.
          resume_step: number of steps the restored state has taken; 0 for a new run. Lines of later steps are
            dropped, and a torn last one. If others are damaged, which no crash does, the log is first copied to
            metrics.damaged.jsonl.
          tensorboard: whether to write event files; what they hold of dropped steps is purged.
        """
        path = workdir / NAME
        with reading(path):
            old = path.read_bytes() if path.exists() else b""
        parsed = list(_parse(old))
        lines = [line for line in parsed if line is not None]
        if None in parsed[:-1]:
            aside = workdir / DAMAGED
            write_bytes(aside, old)
            print(
                f"warning: {path} has damaged lines; it is copied to {aside}, and goes on without them", file=sys.stderr
            )
        self.seconds_before = max((float(line.get("seconds") or 0) for line in lines), default=0.0)
        kept = "".join(json.dumps(line) + "\n" for line in lines if line["step"] <= resume_step)
        if kept.encode() != old:
            write_text(path, kept)
        self._path = path
        with writing(path):
            self._file = path.open("a", buffering=1)  # a line is written as soon as it ends
        self._events = _Events(workdir / TENSORBOARD, resume_step) if tensorboard else None

    @property
    def seconds(self) -> float:
        """Wall time of the run up to now, over all its sessions."""
        return self.seconds_before + process_seconds()

    def write(self, step: int, split: str, values: Mapping[str, Any]) -> None:
        """Writes one line: step, split, `seconds`, then the values (scalars; those that aren't finite as null)."""
        line = jsonable({"step": step, "split": split, "seconds": round(self.seconds, 3), **values})
        with writing(self._path):
            self._file.write(json.dumps(line, allow_nan=False) + "\n")
        if self._events is not None:
            numbers = {key: value for key, value in line.items() if isinstance(value, int | float) and key != "step"}
            self._events.write(step, {f"{split}/{key}": value for key, value in numbers.items()})

    def close(self) -> None:
        """Closes the files. What can't be written any more has been said."""
        for file in (self._file, self._events):
            with contextlib.suppress(OSError):
                if file is not None:
                    file.close()


class _Events:
    """A file for TensorBoard, without the thread of tensorboardX's own writer, for which we'd wait after its death."""

    def __init__(self, folder: pathlib.Path, resume_step: int):
        from tensorboardX.proto import event_pb2  # 0.1 s that a run without it saves
        from tensorboardX.record_writer import RecordWriter
        from tensorboardX.summary import scalar

        self._folder, self._scalar, self._event = folder, scalar, event_pb2.Event
        # TensorBoard knows them by the first words, and reads them in the order of the time; the rest keeps two apart.
        name = f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}.{os.getpid()}.{resume_step}"
        with writing(folder):
            resumed = folder.exists()
            folder.mkdir(exist_ok=True)
            self._writer = RecordWriter(str(folder / name))
            self._add(file_version="brain.Event:2")
            if resumed:  # what older files say of later steps no longer holds
                start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
                self._add(step=resume_step + 1, session_log=start)
            self._flush()

    def write(self, step: int, values: Mapping[str, float]) -> None:
        with writing(self._folder):
            for tag, value in values.items():
                self._add(step=step, summary=self._scalar(tag, value))
            if time.monotonic() - self._flushed > _FLUSH_S:  # which waits for the disk
                self._flush()

    def close(self) -> None:
        self._writer.close()

    def _flush(self) -> None:
        self._writer.flush()
        self._flushed = time.monotonic()

    def _add(self, **what: Any) -> None:
        self._writer.write(self._event(wall_time=time.time(), **what).SerializeToString())


def read_metrics(workdir: pathlib.Path) -> list[dict[str, Any]]:
    """The sound lines of a run's log; none where there is no log."""
    path = workdir / NAME
    with reading(path):
        return [line for line in _parse(path.read_bytes()) if line is not None] if path.exists() else []


def write_csv(workdir: pathlib.Path, path: pathlib.Path) -> None:
    """Writes a run's log as CSV: a row for each of its lines, a column for each key of any; "" where a line lacks it,
    or where the value wasn't finite.

    Raises:
      UserError: if there is no log yet, or the file can't be written.
    """
    lines = read_metrics(workdir)
    if not lines:
        raise UserError(
            f"{workdir}: nothing is logged there yet (no line in {NAME}); the first comes after log.every_steps steps"
        )
    file = io.StringIO()
    writer = csv.DictWriter(file, list({key: None for line in lines for key in line}), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    write_text(path, file.getvalue())


def read_scores(workdir: pathlib.Path) -> dict[int, float]:
    """How good the log's evaluations were, by their steps: the value that each says it is judged by."""
    lines = (line for line in read_metrics(workdir) if line["split"] == "eval")
    scores = ((line["step"], line.get(line.get(SCORE, _SCORE_OF_0_4))) for line in lines)
    return {step: float(score) for step, score in scores if isinstance(score, int | float)}


def speeds(lines: Iterable[Mapping[str, Any]]) -> dict[str, float | None]:
    """images_per_second and images_per_second_per_device: each the median of a log's steps, over all sessions; None
    where no session took two steps, or the log is of a version that didn't write it."""
    steps = [line for line in lines if line["split"] == "train"]
    found = {key: [line[key] for line in steps if line.get(key)] for key in _SPEEDS}
    return {key: statistics.median(values) if values else None for key, values in found.items()}


def _parse(content: bytes) -> Iterator[dict[str, Any] | None]:
    """Each line, None for one that isn't sound. What was cut short can't parse: an object's last byte is its brace."""
    for line in filter(None, content.split(b"\n")):
        try:
            parsed = json.loads(line.decode(), parse_constant=lambda _: None)  # as `write` has NaN
        except (ValueError, RecursionError):  # bad JSON, bad UTF-8
            parsed = None
        yield parsed if _is_sound(parsed) else None


def _is_sound(line: Any) -> bool:
    return (
        isinstance(line, dict)
        and type(line.get("step")) is int
        and isinstance(line.get("split"), str)
        and isinstance(line.get("seconds", 0), int | float | None)
    )
