"""Runs all GPU measurements part by part, the most important first, within a time limit.

Each part runs in its own process (`bench.gpu_parts`) and prints rows as it measures them. The rows are written to
results.json and report.md as they come, so a time-out loses nothing that was measured. A part is stopped at its time
limit or when this process ends, together with all processes that it has started.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pathlib
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from mnv2_jax.bench import gpu_report
from mnv2_jax.errors import UserError
from mnv2_jax.json_files import write_json, write_text, writing

RESULTS, REPORT = "results.json", "report.md"
_SPARE_SECONDS = 5.0
"""Reserved at the end for writing results and stopping processes."""
_LEAST_SECONDS = 10.0
"""A part with less time than this isn't started."""
_NOT_BEGUN = "not begun"


@dataclasses.dataclass(frozen=True)
class Part:
    """A group of measurements that run in one process."""

    name: str
    title: str
    limit_s: float


PARTS = (
    Part("checks", "Versions, device, and checks of the convolution forms", 100),
    Part("digits", "80 training steps on digits, run twice", 60),
    Part("depthwise", "Forms of the depthwise convolution, bfloat16", 80),
    Part("train", "Train step compared with timm's, bfloat16", 140),
    Part("profile", "Profile of the train step", 40),
    Part("layers", "Train step with one kind of layer in another form", 120),
    Part("infer", "Inference compared with timm's, bfloat16", 60),
    Part("pointwise", "Forms of the 1×1 convolution and of the stem, bfloat16", 60),
    Part("batches", "Train step at other batch sizes", 90),
    Part("dilated", "Forms of the dilated depthwise convolution of dense prediction", 45),
    Part("families", "Forms of the depthwise convolution of the other MobileNets", 120),
    Part("float32", "Forms of the depthwise convolution, float32", 60),
)
CIFAR = Part("cifar", "CIFAR-10, MobileNetV2 1.0, the recipe `cifar`", 600)


_COMMAND: Sequence[str] = (sys.executable, "-m", "mnv2_jax.bench.gpu_parts")


class NotMeasuredError(UserError):
    """Raised if there is no GPU, or if a part or a check failed or ran out of time. The results so far are written."""

    exit_code = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Options of ``bench gpu`` from the command line."""

    out: pathlib.Path
    minutes: float
    parts: tuple[str, ...] = ()
    """Names of the parts to run; empty runs all `PARTS`, and `CIFAR` if ``cifar`` is given."""
    cifar: pathlib.Path | None = None
    runs: pathlib.Path = pathlib.Path("runs/gpu")
    """Folder of the CIFAR-10 run; a later call resumes the run in it."""
    allow_cpu: bool = False


def select_parts(options: Options) -> list[Part]:
    """Returns the parts to run, in order.

    Raises:
      UserError: for an unknown part, or if the images of CIFAR-10 are missing.
    """
    parts = {part.name: part for part in (*PARTS, CIFAR)}
    for name in options.parts:
        if name not in parts:
            raise UserError(f"--parts={','.join(options.parts)}: no part {name!r}; choose from {', '.join(parts)}")
    if CIFAR.name in options.parts and options.cifar is None:
        raise UserError("--parts=cifar needs the images: give --cifar=FOLDER_OR_NPZ")
    if options.cifar is not None and not options.cifar.exists():
        raise UserError(f"--cifar={options.cifar} doesn't exist; give a folder of CIFAR-10 or a cifar10.npz")
    if options.parts:
        return [parts[name] for name in options.parts]
    return [*PARTS, *([CIFAR] if options.cifar else [])]


def measure(options: Options) -> None:
    """Runs one part after the other until ``options.minutes`` are over.

    Raises:
      UserError: for invalid options.
      NotMeasuredError: at once if there is no GPU; at the end if a part did not finish or a check failed.
    """
    parts = select_parts(options)
    if not options.minutes > 0:
        raise UserError(f"--minutes={options.minutes:g} must be above 0")
    end = time.monotonic() + 60 * options.minutes - _SPARE_SECONDS
    with writing(options.out):
        options.out.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {
        "minutes": options.minutes,
        "parts": {part.name: {"title": part.title, "state": _NOT_BEGUN, "rows": []} for part in parts},
    }
    for part in parts:
        record = results["parts"][part.name]
        remaining = min(part.limit_s, end - time.monotonic())
        if remaining < _LEAST_SECONDS:
            continue
        record["state"] = "running"
        start = time.monotonic()
        for row in _rows(part.name, options, remaining, record):
            record["rows"] = _with_row(record["rows"], row)
            record["seconds"] = round(time.monotonic() - start, 1)
            _write(options.out, results)
        record["seconds"] = round(time.monotonic() - start, 1)
        _write(options.out, results)
        if record["state"] == "refused":
            raise NotMeasuredError(record["error"])
        print(f"{part.name}: {record['state']}, {len(record['rows'])} rows, {record['seconds']} s", file=sys.stderr)
    _write(options.out, results)
    unfinished = [name for name, part in results["parts"].items() if part["state"] != "done"]
    if unfinished or gpu_report.failed_checks(results):
        reason = f"unfinished parts: {', '.join(unfinished)}" if unfinished else "a check failed"
        raise NotMeasuredError(f"{reason}; see {options.out / REPORT}")


def _with_row(rows: list[Any], row: Any) -> list[Any]:
    """Returns the rows with the new one added; it replaces an earlier row of the same key."""
    key = row.get("key")
    place = next((place for place, other in enumerate(rows) if key and other.get("key") == key), len(rows))
    return [*rows[:place], row, *rows[place + 1 :]]


def _write(out: pathlib.Path, results: Mapping[str, Any]) -> None:
    write_json(out / RESULTS, results)
    write_text(out / REPORT, gpu_report.markdown(results))


def _rows(name: str, options: Options, limit_s: float, record: dict[str, Any]) -> Iterator[Any]:
    """Runs a part and yields its rows as they come; writes how it ended into ``record``."""
    end = time.monotonic() + limit_s
    process = subprocess.Popen(
        _COMMAND,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,  # so that the part's child processes can be stopped with it
    )
    request = {
        "part": name,
        "out": str(options.out.resolve()),
        "cifar": options.cifar and str(options.cifar.resolve()),
        "runs": str(options.runs.resolve()),
        "allow_cpu": options.allow_cpu,
        "limit_s": limit_s,
    }
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError):  # a process that has died has written the reason to standard error
        process.stdin.write(json.dumps(request) + "\n")
        process.stdin.flush()  # standard input stays open: the part ends when it is closed
    lines: queue.Queue[str | None] = queue.Queue()
    stderr_lines: list[str] = []
    readers = [
        threading.Thread(target=_read, args=(process.stdout, lines.put), daemon=True),
        threading.Thread(
            target=_read, args=(process.stderr, lambda line: stderr_lines.append(line or "")), daemon=True
        ),
    ]
    for reader in readers:
        reader.start()
    code = None
    try:
        while (line := lines.get(timeout=_seconds_until(end))) is not None:
            if not line.endswith("\n"):
                continue  # a process that dies may leave half a line
            row = json.loads(line)
            if "refused" in row:
                record |= {"state": "refused", "error": row["refused"]}
                return
            yield row
        code = process.wait(timeout=_seconds_until(end))
        record["state"] = "done" if code == 0 else f"failed: exit code {code}"
    except (queue.Empty, subprocess.TimeoutExpired):
        record["state"] = f"cut off after {limit_s:.0f} s"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        for reader in readers:
            reader.join(timeout=1.0)
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()
    if code != 0:
        text = "".join(stderr_lines).strip()
        record["said"] = text[-4000:]
        if code is not None:
            record["error"] = text.rpartition("\n")[2].removeprefix("error: ")


def _seconds_until(end: float) -> float:
    """Returns the remaining seconds.

    Raises:
      queue.Empty: if none remain. The queue raises the same when nothing comes, so a part that prints without end is
        cut off like one that prints nothing.
    """
    if (remaining := end - time.monotonic()) <= 0:
        raise queue.Empty
    return remaining


def _read(stream: Any, put: Callable[[str | None], Any]) -> None:
    """Passes every line of the stream to ``put``, and None after the last."""
    with stream:
        for line in stream:
            put(line)
    put(None)
