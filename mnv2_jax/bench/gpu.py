"""Everything that is to be measured on a GPU, part by part in order of worth: what a time-out cuts off costs nothing.

Each part is a process of its own (`bench.gpu_parts`) that prints rows as it measures them; they are written to
results.json and report.md as they come. It ends with the processes that it has started, at its limit or with this one.
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
"""Left at the end to write in, and to end processes."""
_LEAST_SECONDS = 10.0
"""A part that would have less isn't begun."""
_NOT_BEGUN = "not begun"


@dataclasses.dataclass(frozen=True)
class Part:
    """Measurements that are made in one process."""

    name: str
    title: str
    limit_s: float


PARTS = (
    Part("checks", "Versions, the device, and the forms of the convolutions checked on it", 100),
    Part("digits", "80 steps of digits, twice", 60),
    Part("depthwise", "Forms of the depthwise convolution, bfloat16", 80),
    Part("train", "The train step beside timm's, bfloat16", 140),
    Part("profile", "The profile of the train step", 40),
    Part("layers", "The train step with one kind of layer in another form", 120),
    Part("infer", "Inference beside timm's, bfloat16", 60),
    Part("pointwise", "Forms of the 1×1 convolution and of the stem, bfloat16", 60),
    Part("batches", "The train step at other batch sizes", 90),
    Part("dilated", "Forms of the dilated depthwise convolution of dense tasks", 45),
    Part("families", "Forms of the depthwise convolution of the other families", 120),
    Part("float32", "Forms of the depthwise convolution, float32", 60),
)
CIFAR = Part("cifar", "CIFAR-10, MobileNetV2 1.0, the recipe `cifar`", 600)


_COMMAND: Sequence[str] = (sys.executable, "-m", "mnv2_jax.bench.gpu_parts")


class NotMeasuredError(UserError):
    """There is no GPU, or a part failed or was cut off; what was measured is written."""

    exit_code = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Options of the command line."""

    out: pathlib.Path
    minutes: float
    parts: tuple[str, ...] = ()
    """Names of the parts to measure; empty: all, and `CIFAR` where ``cifar`` is given."""
    cifar: pathlib.Path | None = None
    runs: pathlib.Path = pathlib.Path("runs/gpu")
    """Folder of the run on CIFAR-10, which a later call goes on with."""
    allow_cpu: bool = False


def chosen(options: Options) -> list[Part]:
    """The parts that are to be measured, in order.

    Raises:
      UserError: for a name that is none, or CIFAR-10 without its images.
    """
    known = {part.name: part for part in (*PARTS, CIFAR)}
    for name in options.parts:
        if name not in known:
            raise UserError(f"--parts={','.join(options.parts)}: no part {name!r}; there are {', '.join(known)}")
    if CIFAR.name in options.parts and options.cifar is None:
        raise UserError("--parts=cifar needs the images: give --cifar=FOLDER_OR_NPZ")
    if options.cifar is not None and not options.cifar.exists():
        raise UserError(f"--cifar={options.cifar}: nothing is there; give a folder of CIFAR-10 or a cifar10.npz")
    if options.parts:
        return [known[name] for name in options.parts]
    return [*PARTS, *([CIFAR] if options.cifar else [])]


def measure(options: Options) -> None:
    """Measures part after part until the minutes are over.

    Raises:
      UserError: for options that can't be.
      NotMeasuredError: if there is no GPU; at the end, if a part wasn't measured to its end or a check failed.
    """
    parts = chosen(options)
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
        found = results["parts"][part.name]
        remaining = min(part.limit_s, end - time.monotonic())
        if remaining < _LEAST_SECONDS:
            continue
        found["state"] = "running"
        begun = time.monotonic()
        for row in _rows(part.name, options, remaining, found):
            found["rows"] = _with(found["rows"], row)
            found["seconds"] = round(time.monotonic() - begun, 1)
            _write(options.out, results)
        found["seconds"] = round(time.monotonic() - begun, 1)
        _write(options.out, results)
        if found["state"] == "refused":
            raise NotMeasuredError(found["error"])
        print(f"{part.name}: {found['state']}, {len(found['rows'])} rows, {found['seconds']} s", file=sys.stderr)
    _write(options.out, results)
    missing = [name for name, part in results["parts"].items() if part["state"] != "done"]
    if missing or gpu_report.failed(results):
        what = f"not measured to the end: {', '.join(missing)}" if missing else "a check failed"
        raise NotMeasuredError(f"{what}; see {options.out / REPORT}")


def _with(rows: list[Any], row: Any) -> list[Any]:
    """The rows and the new one, which takes the place of an earlier one with its key."""
    key = row.get("key")
    place = next((place for place, other in enumerate(rows) if key and other.get("key") == key), len(rows))
    return [*rows[:place], row, *rows[place + 1 :]]


def _write(out: pathlib.Path, results: Mapping[str, Any]) -> None:
    write_json(out / RESULTS, results)
    write_text(out / REPORT, gpu_report.markdown(results))


def _rows(name: str, options: Options, limit_s: float, found: dict[str, Any]) -> Iterator[Any]:
    """The rows that a part prints, as they come; says in ``found`` how it ended."""
    end = time.monotonic() + limit_s
    process = subprocess.Popen(
        _COMMAND,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,  # a part has processes of its own, which end with it
    )
    asked = {
        "part": name,
        "out": str(options.out.resolve()),
        "cifar": options.cifar and str(options.cifar.resolve()),
        "runs": str(options.runs.resolve()),
        "allow_cpu": options.allow_cpu,
        "limit_s": limit_s,
    }
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError):  # what it died of it has said
        process.stdin.write(json.dumps(asked) + "\n")
        process.stdin.flush()  # and stays open: at its end the part ends, too
    lines: queue.Queue[str | None] = queue.Queue()
    said: list[str] = []
    readers = [
        threading.Thread(target=_read, args=(process.stdout, lines.put), daemon=True),
        threading.Thread(target=_read, args=(process.stderr, lambda line: said.append(line or "")), daemon=True),
    ]
    for reader in readers:
        reader.start()
    code = None
    try:
        while (line := lines.get(timeout=_until(end))) is not None:
            if not line.endswith("\n"):
                continue  # who dies may leave half of one
            row = json.loads(line)
            if "refused" in row:
                found |= {"state": "refused", "error": row["refused"]}
                return
            yield row
        code = process.wait(timeout=_until(end))
        found["state"] = "done" if code == 0 else f"failed: exit code {code}"
    except (queue.Empty, subprocess.TimeoutExpired):
        found["state"] = f"cut off after {limit_s:.0f} s"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        for reader in readers:
            reader.join(timeout=1.0)
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()
    if code != 0:
        text = "".join(said).strip()
        found["said"] = text[-4000:]
        if code is not None:
            found["error"] = text.rpartition("\n")[2].removeprefix("error: ")


def _until(end: float) -> float:
    """Seconds that are left.

    Raises:
      queue.Empty: if there are none, as if there had been nothing to read: who prints without end is cut off, too.
    """
    if (left := end - time.monotonic()) <= 0:
        raise queue.Empty
    return left


def _read(stream: Any, put: Callable[[str | None], Any]) -> None:
    """Every line, and None behind the last."""
    with stream:
        for line in stream:
            put(line)
    put(None)
