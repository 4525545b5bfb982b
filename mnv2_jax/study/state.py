"""The state of a study's runs, as their folders tell it; nothing else is kept.

STUDY/runs/NAME/        a run folder; its lock says that somebody trains there
STUDY/logs/NAME.2.log   what its second training printed
STUDY/failed/NAME.json  the exit code and the last line of a training that failed
"""

from __future__ import annotations

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

from mnv2_jax import config as configs
from mnv2_jax.config import Config
from mnv2_jax.errors import UserError
from mnv2_jax.json_files import read_json
from mnv2_jax.runs.folder import CONFIG, SUMMARY, is_locked
from mnv2_jax.runs.metrics_log import read_metrics
from mnv2_jax.study.design import Run

Name: TypeAlias = Literal["waiting", "running", "stopped", "done", "failed"]
"""waiting: not begun; running: a process holds the folder; stopped: begun, and nobody is at it."""


class State(NamedTuple):
    """How far a run is."""

    run: Run
    name: Name
    share: float
    """Share of its epochs that is trained, 0 to 1."""
    seconds: float
    """Seconds of training so far."""
    summary: Mapping[str, Any]
    """Content of summary.json; {} before the end."""
    failure: Mapping[str, Any]
    """Exit code and last line of a training that failed; {} if none did."""
    evaluation: Mapping[str, Any]
    """Line of the log of the last evaluation so far; {} before the first."""


def run_folder(study: pathlib.Path, run: Run) -> pathlib.Path:
    """Returns the folder of a run."""
    return study / "runs" / run.name


def log_file(study: pathlib.Path, run: Run, number: int) -> pathlib.Path:
    """Returns the file with what a run's first (1), second, ... training printed."""
    return study / "logs" / f"{run.name}.{number}.log"


def failure_file(study: pathlib.Path, run: Run) -> pathlib.Path:
    """Returns the file that says how a run failed."""
    return study / "failed" / f"{run.name}.json"


def read_state(study: pathlib.Path, run: Run) -> State:
    """Reads the state of a run.

    Raises:
      UserError: if its folder holds a run with other settings, as after a change of the study.
    """
    folder, failure = run_folder(study, run), failure_file(study, run)
    failed = read_json(failure) if failure.is_file() else {}
    if not (folder / CONFIG).is_file():
        name: Name = "failed" if failed else "running" if is_locked(folder) else "waiting"
        return State(run, name, 0.0, 0.0, {}, failed, {})
    config = planned_config(run)
    found = configs.build(read_json(folder / CONFIG))
    changed = [change for change in configs.differences(found, config) if not change.startswith(_FREE)]
    if changed:
        raise UserError(f"{folder}: it was trained with other settings: {changed[0]}; give another --workdir")
    summary = read_json(folder / SUMMARY) if (folder / SUMMARY).is_file() else {}
    log = read_metrics(folder)
    evaluation: Mapping[str, Any] = next((line for line in reversed(log) if line["split"] == "eval"), {})
    lines = [line for line in log if "epoch" in line]
    epochs = lines[-1]["epoch"] if lines else 0.0
    seconds = float(summary.get("seconds", lines[-1]["seconds"] if lines else 0.0))
    if summary:
        return State(run, "done", 1.0, seconds, summary, {}, evaluation)
    share = min(1.0, epochs / config.train.epochs) if config.train.epochs else 0.0
    name = "running" if is_locked(folder) else "failed" if failed else "stopped"
    return State(run, name, share, seconds, {}, failed, evaluation)


_FREE = ("data.num_workers:", "log.", "faults.", "modules:")
"""Keys that change no number of a run."""


def planned_config(run: Run) -> Config:
    """Returns the config that a run has by its study."""
    return configs.load(run.config, run.overrides).config


def seconds_left(states: Sequence[State]) -> float | None:
    """Estimates the seconds until all runs are done, at the pace of those that are trained; None if none is yet.

    It is that of as many trainings at once as run now, or of one.
    """
    trained = sum(state.share for state in states)
    if not trained:
        return None
    at_once = max(1, sum(state.name == "running" for state in states))
    left = sum(1 - state.share for state in states if state.name not in ("done", "failed"))
    return left * sum(state.seconds for state in states) / trained / at_once
