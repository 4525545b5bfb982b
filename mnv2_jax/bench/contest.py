"""Lets contenders, each in a process of its own, take turns, and says how their times compare."""

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
"""A turn takes about so long, and one step at least."""


@dataclasses.dataclass(frozen=True)
class Entry:
    """Somebody who takes part."""

    name: str
    who: str = OURS
    forms: Forms | None = None
    """Unset: those that training takes."""


OUR_ENTRY = Entry("ours")
LIBRARY_ENTRY = Entry("XLA's forms", forms=LIBRARY)
RIVALS = {"torch": (Entry("torch eager", TORCH), Entry("torch.compile", TORCH_COMPILE)), "xla": (LIBRARY_ENTRY,)}
"""Rivals that --against can name."""

_COMMAND: Sequence[str] = (sys.executable, "-m", "mnv2_jax.bench.contender")


class Contender:
    """A process of `bench.contender`, and what it has said."""

    def __init__(self, entry: Entry, what: str, settings: Config, params: int, environment: Mapping[str, str]):
        self.entry = entry
        self.seconds: list[float] = []
        """Seconds of a step or a batch, one value a turn."""
        self.peak_bytes: int | None = None
        self.facts: dict[str, Any] = {}
        self.unavailable: str | None = None
        self._repeat = 1
        # A pipe that nobody reads would fill and stop it.
        self._said = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115  closed by `end`
        self._process = subprocess.Popen(
            _COMMAND,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            text=True,
            # Those who wait leave the device's memory to the one whose turn it is.
            env=os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", **environment},
        )
        asked = {"who": entry.who, "forms": entry.forms and dataclasses.asdict(entry.forms), "params": params}
        self._ask(asked | {"what": what, "config": config.to_dict(settings)})

    def wait_until_ready(self, limit_s: float | None) -> None:
        """Returns once it has compiled, or has said why it can't; who isn't ready in time is out.

        Raises:
          UserError: if it is ours, and the config can't be used.
        """
        late = threading.Event()

        def stop() -> None:
            late.set()
            self._process.kill()

        timer = threading.Timer(limit_s or 0.0, stop)
        if limit_s is not None:
            timer.start()
        try:
            told = self._answer()
        finally:
            timer.cancel()
        self.facts, self.unavailable = told.get("ready", {}), told.get("unavailable")
        if late.is_set():
            self.unavailable = f"not ready after {limit_s:.0f} s"

    def take_turn(self) -> None:
        """Runs for about `TURN_SECONDS`, as often as the turns before say; it may be its last."""
        if self.unavailable is not None:
            return
        self._ask({"repeat": self._repeat})
        told = self._answer()
        if "unavailable" in told:
            self.unavailable = told["unavailable"]
            return
        each = told["seconds"] / self._repeat
        self._repeat = max(1, math.ceil(TURN_SECONDS / each))
        self.seconds.append(each)

    def read_peak(self) -> None:
        """Asks how much memory it has used."""
        if self.unavailable is None:
            self._ask({"peak": True})
            self.peak_bytes = self._answer().get("bytes")

    def end(self) -> None:
        """Ends the process."""
        self._process.kill()
        self._process.wait()
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # what was asked of one that was dead
            self._process.stdin.close()
        self._process.stdout.close()
        self._said.close()

    def _ask(self, content: Mapping[str, Any]) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # what it died of is said when it is to answer
            self._process.stdin.write(json.dumps(content) + "\n")
            self._process.stdin.flush()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if line.endswith("\n"):
            told: dict[str, Any] = json.loads(line)
            return told
        code = self._process.wait()
        self._said.seek(0)
        last = self._said.read().strip().rpartition("\n")[2].removeprefix("error: ") or "it said nothing"
        if code == UserError.exit_code and self.entry.who == OURS:
            raise UserError(last)
        return {"unavailable": f"its process ended with exit code {code}: {last}"[:300]}


@contextlib.contextmanager
def contenders(
    entries: Sequence[Entry],
    what: str,
    settings: Config,
    *,
    environment: Mapping[str, str] | None = None,
    ready_s: float | None = None,
) -> Iterator[list[Contender]]:
    """The processes, ready; they end with the context. After ``ready_s`` who isn't ready is out.

    They are made ready one after the other, unless there are two cores for each beside a GPU's. Where the first can't
    be, the others may be missing.
    """
    at_once = (os.cpu_count() or 1) >= max(8, 2 * len(entries))
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # this process only counts
    found: list[Contender] = []
    params = variable_shapes(from_config(settings.model, settings.norm))["params"]
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
    begun = time.monotonic()

    def remaining_s() -> float | None:
        return None if ready_s is None else max(begun + ready_s - time.monotonic(), 0.1)

    try:
        for entry in entries:
            found.append(Contender(entry, what, settings, count, environment or {}))
            if not at_once:
                found[-1].wait_until_ready(remaining_s())
            if found[0].unavailable is not None:
                break  # without the first there is nothing to compare
        for contender in found if at_once else ():
            contender.wait_until_ready(remaining_s())
        yield found
    finally:
        for contender in found:
            contender.end()


def turns(
    entries: Sequence[Entry], what: str, settings: Config, repeats: int, *, ready_s: float | None = None
) -> Iterator[list[dict[str, Any]]]:
    """Times the entries turn by turn.

    Args:
      entries: who takes part, ours first: the others are measured against it.
      what: "train": the whole step on a batch of uint8 images that stays on the devices; "infer": from normalised
        float images to logits.
      settings: with `model.num_classes` set.
      repeats: turns, at least 1, after one that says how many steps fill it.
      ready_s: who isn't ready after so many seconds is out.

    Yields:
      After every turn, of all turns so far, a row an entry: name; milliseconds of a batch as the median, the least and
      the most (``ms``, ``ms_min``, ``ms_max``), ``images_per_second``; ``ratio``, ``ratio_min`` and ``ratio_max``: our
      milliseconds over its, turn by turn; ``peak_bytes``, None where the device doesn't say; and ``facts``. Or name and
      ``unavailable``, the reason.

    Raises:
      UserError: if ours can't be run.
    """
    with contenders(entries, what, settings, ready_s=ready_s) as found:
        for turn in range(repeats + 1):
            for contender in found:
                contender.take_turn()
                if found[0].unavailable is not None:
                    raise UserError(f"the config can't be run here: {found[0].unavailable}")
                if turn == 0:
                    contender.seconds.clear()
                else:
                    contender.read_peak()
            if turn:
                yield [_row(contender, found[0], settings.data.batch_size) for contender in found]


def compare(entries: Sequence[Entry], what: str, settings: Config, repeats: int) -> list[dict[str, Any]]:
    """The rows of `turns` after the last; arguments and errors as there."""
    *_, last = turns(entries, what, settings, repeats)
    return last


def _row(contender: Contender, ours: Contender, batch_size: int) -> dict[str, Any]:
    if contender.unavailable is not None:
        return {"name": contender.entry.name, "unavailable": contender.unavailable}
    times = contender.seconds
    ratios = [mine / its for mine, its in zip(ours.seconds, times, strict=True)]
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


def described(found: Mapping[str, Any]) -> str:
    """The network and its batch, in words."""
    return f"{found['model']} {found['width']:g}, {found['resolution']} px, batch {found['batch']}, {found['dtype']}"


def table(found: Mapping[str, Any]) -> str:
    """Table of the results of `compare` and the roofline."""
    is_training = found["what"] == "step"
    lines = [f"{'the train step' if is_training else 'inference'} of {described(found)}"]
    lines[0] += f", {found['optimizer']}" if is_training else ""
    lines.append(
        f"{'':<14} {'ms a batch':>11} {'(least to most)':>20} {'images/s':>9} {'ours / it':>10} {'(spread)':>15}"
    )
    shares = found.get("roofline", {}).get("shares", {})
    for row in found["rows"]:
        if "unavailable" in row:
            lines.append(f"{row['name']:<14} not measured: {row['unavailable']}")
            continue
        spread = f"({row['ms_min']:.2f} to {row['ms_max']:.2f})"
        ratios = f"({row['ratio_min']:.2f} to {row['ratio_max']:.2f})"
        share = f"  {shares[row['name']]:.1%} of the roofline" if row["name"] in shares else ""
        lines.append(
            f"{row['name']:<14} {row['ms']:>11.2f} {spread:>20} {row['images_per_second']:>9,.0f} {row['ratio']:>10.2f}"
            f" {ratios:>15}{share}"
        )
    if "roofline" in found:
        line = found["roofline"]
        lines.append(
            f"The roofline: at least {line['bytes_an_image'] / 1e6:.1f} MB and {line['madds_an_image'] / 1e6:,.0f} M"
            f" multiply-adds an image, of {line['bandwidth'] / 1e9:,.1f} GB/s and {line['rate'] / 1e9:,.0f} G"
            f" multiply-adds/s as measured here: {line['bound_ms']:.2f} ms a batch."
        )
    return "\n".join(lines)
