"""Times contenders in turns, each in its own process, and compares their times."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax

from mnv2_jax import config
from mnv2_jax.bench.contender import OURS, TORCH, TORCH_COMPILE
from mnv2_jax.config import Config
from mnv2_jax.errors import UserError
from mnv2_jax.models.registry import from_config, variable_shapes
from mnv2_jax.nn.forms import LIBRARY, Forms

TURN_SECONDS = 1.0
"""Approximate length of a turn; a turn is at least one step."""


@dataclasses.dataclass(frozen=True)
class Entry:
    """One contender of a benchmark: its name in the table and what it runs."""

    name: str
    implementation: str = OURS
    """`OURS`, `TORCH` or `TORCH_COMPILE`."""
    forms: Forms | None = None
    """Forms of the layers; None takes those that training uses."""
    answers: bool = False
    """Whether inference goes on from the network's outputs to the answers of the task."""


OUR_ENTRY = Entry("ours")
LIBRARY_ENTRY = Entry("XLA's forms", forms=LIBRARY)
RIVALS = {
    "torch": (Entry("torch eager", TORCH), Entry("torch.compile", TORCH_COMPILE)),
    "xla": (LIBRARY_ENTRY,),
    "answers": (Entry("with answers", answers=True),),
}
"""Entries of each rival that --against can name."""

_COMMAND: Sequence[str] = (sys.executable, "-m", "mnv2_jax.bench.contender")


class Contender:
    """A process of `bench.contender`, and the answers that it has given."""

    def __init__(self, entry: Entry, mode: str, settings: Config, params: int, environment: Mapping[str, str]):
        self.entry = entry
        self.seconds: list[float] = []
        """Seconds of a step or a batch, one value per turn."""
        self.peak_bytes: int | None = None
        self.facts: dict[str, Any] = {}
        self.unavailable: str | None = None
        self._repeat = 1
        # A file, since a pipe that nobody reads would fill up and block the process.
        self._stderr = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115  closed by `end`
        self._process = subprocess.Popen(
            _COMMAND,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            text=True,
            # Waiting processes must leave the device's memory to the one whose turn it is.
            env=os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", **environment},
        )
        forms = entry.forms and dataclasses.asdict(entry.forms)
        job = {"who": entry.implementation, "forms": forms, "params": params, "answers": entry.answers}
        self._send(job | {"what": mode, "config": config.to_dict(settings)})

    def wait_until_ready(self, limit_s: float | None) -> None:
        """Waits until the process has compiled, or marks it as unavailable if it can't or exceeds ``limit_s``.

        Raises:
          UserError: if the entry is ours and its config can't be used.
        """
        late = threading.Event()

        def stop() -> None:
            late.set()
            self._process.kill()

        timer = threading.Timer(limit_s or 0.0, stop)
        if limit_s is not None:
            timer.start()
        try:
            answer = self._receive()
        finally:
            timer.cancel()
        self.facts, self.unavailable = answer.get("ready", {}), answer.get("unavailable")
        if late.is_set():
            self.unavailable = f"not ready in time ({limit_s:.0f} s were left for it)"

    def take_turn(self) -> None:
        """Runs the steps that fill `TURN_SECONDS` by the previous turn; marks the entry as unavailable on a failure."""
        if self.unavailable is not None:
            return
        self._send({"repeat": self._repeat})
        answer = self._receive()
        if "unavailable" in answer:
            self.unavailable = answer["unavailable"]
            return
        step_seconds = answer["seconds"] / self._repeat
        self._repeat = max(1, math.ceil(TURN_SECONDS / step_seconds))
        self.seconds.append(step_seconds)

    def read_peak(self) -> None:
        """Asks the process for its peak memory and stores it in `peak_bytes`."""
        if self.unavailable is None:
            self._send({"peak": True})
            self.peak_bytes = self._receive().get("bytes")

    def end(self) -> None:
        """Ends the process."""
        self._process.kill()
        self._process.wait()
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # closing flushes a request to a process that has died
            self._process.stdin.close()
        self._process.stdout.close()
        self._stderr.close()

    def _send(self, content: Mapping[str, Any]) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # the next `_receive` reports why the process died
            self._process.stdin.write(json.dumps(content) + "\n")
            self._process.stdin.flush()

    def _receive(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if line.endswith("\n"):
            answer: dict[str, Any] = json.loads(line)
            return answer
        code = self._process.wait()
        self._stderr.seek(0)
        last = self._stderr.read().strip().rpartition("\n")[2].removeprefix("error: ") or "no error message"
        if code == UserError.exit_code and self.entry.implementation == OURS:
            raise UserError(last)
        return {"unavailable": f"its process ended with exit code {code}: {last}"[:300]}


@contextlib.contextmanager
def contenders(
    entries: Sequence[Entry],
    mode: str,
    settings: Config,
    *,
    environment: Mapping[str, str] | None = None,
    ready_s: float | None = None,
) -> Iterator[list[Contender]]:
    """Starts the processes, waits until they are ready, and ends them with the context.

    A process that isn't ready after ``ready_s`` is marked as unavailable. Processes start one after the other, or all
    at once on a machine with two cores per process and at least 8. If the first can't run, the later ones may be left
    out of the list.
    """
    at_once = (os.cpu_count() or 1) >= max(8, 2 * len(entries))
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # this process only counts parameters
    processes: list[Contender] = []
    params = variable_shapes(from_config(settings.model, settings.norm))["params"]
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
    start = time.monotonic()

    def remaining_s() -> float | None:
        return None if ready_s is None else max(start + ready_s - time.monotonic(), 0.1)

    try:
        for entry in entries:
            processes.append(Contender(entry, mode, settings, count, environment or {}))
            if not at_once:
                processes[-1].wait_until_ready(remaining_s())
            if processes[0].unavailable is not None:
                break  # without the first there is nothing to compare
        for contender in processes if at_once else ():
            contender.wait_until_ready(remaining_s())
        yield processes
    finally:
        for contender in processes:
            contender.end()


def turns(
    entries: Sequence[Entry], mode: str, settings: Config, repeats: int, *, ready_s: float | None = None
) -> Iterator[list[dict[str, Any]]]:
    """Times the entries turn by turn.

    Args:
      entries: contenders, ours first: the others are compared with it.
      mode: "train" times the whole step on a batch of uint8 images that stays on the devices; "infer" times inference
        from normalised float images to logits.
      settings: config with `model.num_classes` set.
      repeats: number of turns, at least 1, after a first turn that only finds out how many steps fill a turn.
      ready_s: seconds after which an entry that isn't ready is marked as unavailable.

    Yields:
      After every turn one row per entry, over all turns so far: name; milliseconds per batch as median, minimum and
      maximum (``ms``, ``ms_min``, ``ms_max``); ``images_per_second``; ``ratio``, ``ratio_min`` and ``ratio_max``, our
      milliseconds divided by the entry's, turn by turn; ``peak_bytes``, None if the device doesn't report it; and
      ``facts``. Or name and ``unavailable``, the reason.

    Raises:
      UserError: if our own network can't run.
    """
    with contenders(entries, mode, settings, ready_s=ready_s) as processes:
        for turn in range(repeats + 1):
            for contender in processes:
                contender.take_turn()
                if processes[0].unavailable is not None:
                    raise UserError(f"the config can't run on this device: {processes[0].unavailable}")
                if turn == 0:
                    contender.seconds.clear()
                else:
                    contender.read_peak()
            if turn:
                yield [_row(contender, processes[0], settings.data.batch_size) for contender in processes]


def compare(entries: Sequence[Entry], mode: str, settings: Config, repeats: int) -> list[dict[str, Any]]:
    """Runs `turns` to its end and returns the last rows; arguments and errors are those of `turns`."""
    *_, last = turns(entries, mode, settings, repeats)
    return last


def _row(contender: Contender, our_contender: Contender, batch_size: int) -> dict[str, Any]:
    if contender.unavailable is not None:
        return {"name": contender.entry.name, "unavailable": contender.unavailable}
    times = contender.seconds
    ratios = [our_s / rival_s for our_s, rival_s in zip(our_contender.seconds, times, strict=True)]
    return {
        "name": contender.entry.name,
        "ms": 1e3 * statistics.median(times),
        "ms_min": 1e3 * min(times),
        "ms_max": 1e3 * max(times),
        "images_per_second": batch_size / statistics.median(times),
        "ratio": statistics.median(ratios),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
        "peak_bytes": contender.peak_bytes,
        "facts": contender.facts,
    }


def describe(results: Mapping[str, Any]) -> str:
    """Describes the network and its batch in one phrase: name, width, resolution, batch size and dtype."""
    size, head = results["resolution"], results.get("head", "classifier")
    pixels = f"{size} px" if isinstance(size, int) else f"{size[0]}×{size[1]} px"
    network = f"{results['model']} {results['width']:g}" + (f" with {head}" if head != "classifier" else "")
    return f"{network}, {pixels}, batch {results['batch']}, {results['dtype']}"


def table(results: Mapping[str, Any]) -> str:
    """Formats the rows of `compare` and the roofline as a table."""
    is_training = results["what"] == "step"
    lines = [f"{'train step' if is_training else 'inference'} of {describe(results)}"]
    lines[0] += f", {results['optimizer']}" if is_training else ""
    lines.append(
        f"{'':<14} {'ms/batch':>11} {'(min to max)':>20} {'images/s':>9} {'ours / rival':>12} {'(min to max)':>15}"
    )
    shares = results.get("roofline", {}).get("shares", {})
    for row in results["rows"]:
        if "unavailable" in row:
            lines.append(f"{row['name']:<14} not measured: {row['unavailable']}")
            continue
        spread = f"({row['ms_min']:.2f} to {row['ms_max']:.2f})"
        ratios = f"({row['ratio_min']:.2f} to {row['ratio_max']:.2f})"
        share = f"  {shares[row['name']]:.1%} of the roofline" if row["name"] in shares else ""
        lines.append(
            f"{row['name']:<14} {row['ms']:>11.2f} {spread:>20} {row['images_per_second']:>9,.0f} {row['ratio']:>12.2f}"
            f" {ratios:>15}{share}"
        )
    if "roofline" in results:
        roofline = results["roofline"]
        lines.append(
            f"Roofline: an image needs at least {roofline['bytes_an_image'] / 1e6:.1f} MB and"
            f" {roofline['madds_an_image'] / 1e6:,.0f} M multiply-adds. This device reaches"
            f" {roofline['bandwidth'] / 1e9:,.1f} GB/s and {roofline['rate'] / 1e9:,.0f} G multiply-adds/s (measured),"
            f" so a batch takes at least {roofline['bound_ms']:.2f} ms."
        )
    return "\n".join(lines)
