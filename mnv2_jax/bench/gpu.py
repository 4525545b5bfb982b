"""Everything that is to be measured on a GPU, part by part in order of worth: what a time-out cuts off costs nothing.

Each part is a process of its own (`bench.gpu_parts`) that prints rows as it measures them; they are written to
results.json and report.md as they come.
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
from collections.abc import Iterator, Mapping
from typing import Any

from mnv2_jax.bench import gpu_report
from mnv2_jax.errors import UserError
from mnv2_jax.json_files import write_bytes, write_json

RESULTS, REPORT = "results.json", "report.md"
_SPARE_SECONDS = 5.0
"""Left at the end to write in, and to end processes."""
_LEAST_SECONDS = 10.0
"""A part that would have less isn't begun."""


@dataclasses.dataclass(frozen=True)
class Part:
    """What is measured in one process."""

    name: str
    title: str
    limit_s: float


PARTS = (
    Part("checks", "Versions, the device, and the forms of the convolutions checked on it", 70),
    Part("depthwise", "Forms of the depthwise convolution, bfloat16", 80),
    Part("train", "The train step beside timm's, bfloat16", 160),
    Part("profile", "The profile of the train step", 45),
    Part("digits", "20 steps of digits, twice", 45),
    Part("infer", "Inference beside timm's, bfloat16", 60),
    Part("pointwise", "Forms of the 1×1 convolution and of the stem, bfloat16", 60),
    Part("batches", "The train step at other batch sizes", 90),
    Part("dilated", "Forms of the dilated depthwise convolution of dense tasks", 45),
    Part("families", "Forms of the depthwise convolution of the other families", 120),
    Part("float32", "Forms of the depthwise convolution, float32", 60),
)
CIFAR = Part("cifar", "CIFAR-10, MobileNetV2 1.0, the recipe `cifar`", 600)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What the command line asks for."""

    out: pathlib.Path
    minutes: float
    parts: tuple[str, ...] = ()
    """Names of the parts to measure; empty: all, and `CIFAR` where ``cifar`` is given."""
    cifar: pathlib.Path | None = None
    runs: pathlib.Path = pathlib.Path("runs/gpu")
    """Where the run on CIFAR-10 lies, which a later call goes on with."""
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


def measure(options: Options) -> bool:
    """Measures part after part until the minutes are over.

    Returns:
      Whether every part was measured to its end and every check passed.
    """
    parts = chosen(options)
    if options.minutes <= 0:
        raise UserError(f"--minutes={options.minutes:g} must be above 0")
    end = time.monotonic() + 60 * options.minutes - _SPARE_SECONDS
    options.out.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {"minutes": options.minutes, "parts": {}}
    for part in parts:
        found: dict[str, Any] = {"title": part.title, "state": "not begun: no time was left", "rows": []}
        results["parts"][part.name] = found
        remaining = min(part.limit_s, end - time.monotonic())
        if remaining >= _LEAST_SECONDS:
            found["state"] = "running"
            begun = time.monotonic()
            for row in _rows(part.name, options, results, remaining, found):
                found["rows"] = _with(found["rows"], row)
                found["seconds"] = round(time.monotonic() - begun, 1)
                _write(options.out, results)
            found["seconds"] = round(time.monotonic() - begun, 1)
        _write(options.out, results)
        print(f"{part.name}: {found['state']}, {len(found['rows'])} rows, {found.get('seconds', 0)} s", file=sys.stderr)
        if found["state"] == "refused":
            raise UserError(found["error"])
    return all(part["state"] == "done" for part in results["parts"].values()) and not gpu_report.failed(results)


def _with(rows: list[Any], row: Any) -> list[Any]:
    """The rows and the new one, which takes the place of an earlier one with its key."""
    key = row.get("key")
    place = next((place for place, other in enumerate(rows) if key and other.get("key") == key), len(rows))
    return [*rows[:place], row, *rows[place + 1 :]]


def _write(out: pathlib.Path, results: Mapping[str, Any]) -> None:
    write_json(out / RESULTS, results)
    write_bytes(out / REPORT, gpu_report.markdown(results).encode())


def _rows(
    name: str, options: Options, results: Mapping[str, Any], limit_s: float, found: dict[str, Any]
) -> Iterator[Any]:
    """The rows that a part prints, as they come; says in ``found`` how it ended."""
    process = subprocess.Popen(
        [sys.executable, "-m", "mnv2_jax.bench.gpu_parts"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # a part has processes of its own, which end with it
    )
    assert process.stdin is not None
    asked = {
        "part": name,
        "out": str(options.out.resolve()),
        "cifar": options.cifar and str(options.cifar.resolve()),
        "runs": str(options.runs.resolve()),
        "allow_cpu": options.allow_cpu,
        "limit_s": limit_s,
        "found": {name: part["rows"] for name, part in results["parts"].items()},
    }
    process.stdin.write(json.dumps(asked) + "\n")
    process.stdin.close()
    lines: queue.Queue[str | None] = queue.Queue()
    said: list[str] = []
    readers = [
        threading.Thread(target=_read, args=(process.stdout, lines.put), daemon=True),
        threading.Thread(target=lambda: said.extend(process.stderr or ()), daemon=True),
    ]
    for reader in readers:
        reader.start()
    end = time.monotonic() + limit_s
    try:
        while (line := lines.get(timeout=max(end - time.monotonic(), 0.01))) is not None:
            yield json.loads(line)
        code = process.wait(timeout=max(end - time.monotonic(), 1.0))
    except (queue.Empty, subprocess.TimeoutExpired):
        found["state"] = f"cut off after {limit_s:.0f} s"
        return
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    readers[1].join(timeout=1.0)
    found["state"] = "done" if code == 0 else "refused" if code == UserError.exit_code else f"failed: exit code {code}"
    if code:
        text = "".join(said).strip()
        found["error"] = text.rpartition("\n")[2].removeprefix("error: ")
        found["said"] = text[-4000:]


def _read(stream: Any, put: Any) -> None:
    for line in stream:
        put(line)
    put(None)
