"""Times the train steps of a study's cells on this machine, and what all its steps would take here."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from mnv2_jax.study.design import Run


class Measured(NamedTuple):
    """The train step of a cell on this machine."""

    cell: str
    ms: float | None = None
    """Milliseconds of a step; None where the cell can't be trained here."""
    images_per_second: float | None = None
    device: str = ""
    """Number and kind of the devices."""
    why: str = ""
    """Why there is no time."""


def first_runs(runs: Sequence[Run]) -> list[Run]:
    """Returns one run of each cell: its seeds take the same time."""
    return list({run.cell.name: run for run in reversed(runs)}.values())[::-1]


def command_of(run: Run) -> list[str]:
    """Returns the command that times the train step of a run, on noise: it needs no data."""
    return [sys.executable, "-m", "mnv2_jax.bench", "step", *run.arguments, "--repeats=1", "--json"]


def measure(run: Run) -> Measured:
    """Times the train step of a run in a process of its own, so that no cell leaves memory or threads to the next."""
    process = subprocess.run(command_of(run), capture_output=True, text=True, errors="replace")
    if process.returncode:
        lines = [line for line in process.stderr.splitlines() if line.strip()] or ["no error message"]
        why = f"exit code {process.returncode}: {lines[-1].removeprefix('error: ')}"
        return Measured(run.cell.name, why=why[:500])
    row = json.loads(process.stdout)["rows"][0]
    device = f"{row['facts']['devices']} × {row['facts']['device']}"
    return Measured(run.cell.name, row["ms"], row["images_per_second"], device)


def seconds_of(run: Run, steps: float | None, measured: Mapping[str, Measured]) -> float | None:
    """Returns the seconds of the steps of a run; None where their number or their time isn't known.

    Args:
      run: the run.
      steps: number of its steps.
      measured: the cells' times by name.
    """
    ms = measured[run.cell.name].ms
    return None if steps is None or ms is None else steps * ms / 1e3
