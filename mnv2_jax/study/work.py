"""A worker: trains the runs of a study that nobody has trained or is training, until none is left.

A run is a process of `mnv2_jax.main` in its own folder. The lock of that folder is the claim on the run, so any number
of workers, on any machines that share the folder, may work on a study. Who is killed leaves nothing to clear: the
kernel unlocks the folder, and the next worker resumes the run from its checkpoint.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, BinaryIO

from mnv2_jax.errors import FaultError
from mnv2_jax.json_files import write_json, writing
from mnv2_jax.runs.folder import CONFIG, HELD, SUMMARY
from mnv2_jax.study.design import Run
from mnv2_jax.study.state import State, failure_file, log_file, read_state, run_folder

_TRIES = 3
"""Trainings of a run that may be killed, or end with exit code 75, a machine's fault, before it counts as failed."""
_POLL_S = 2.0
"""Seconds between two looks at runs that others train."""


def work(
    study: pathlib.Path,
    runs: Sequence[Run],
    say: Callable[[str], None],
    command: Callable[[Run, pathlib.Path], Sequence[str]] | None = None,
) -> list[State]:
    """Trains what is missing, and waits for what others train.

    Args:
      study: the study's folder.
      runs: its runs.
      say: called with a line when a training begins or ends.
      command: makes the command of a run from its folder; None: that of `mnv2_jax.main`.

    Returns:
      The states at the end: all done or failed, or, after a signal, as they are then.
    """
    make = command or command_of
    with _forwarding() as forward:
        while not forward.stopped:
            states = [read_state(study, run) for run in runs]
            free = next((state for state in states if state.name in ("stopped", "waiting")), None)
            if free is not None:
                _train(study, free.run, make(free.run, run_folder(study, free.run)), say, forward)
            elif any(state.name == "running" for state in states):
                time.sleep(_POLL_S)
            else:
                break
    return [read_state(study, run) for run in runs]


def command_of(run: Run, folder: pathlib.Path) -> list[str]:
    """Returns the command that trains a run."""
    return [sys.executable, "-m", "mnv2_jax.main", *run.arguments, f"--workdir={folder}", "--json"]


class _Forward:
    """The training that signals are sent on to."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[bytes] | None = None
        self.stopped = False

    def on_signal(self, number: int, frame: Any) -> None:
        """Ends the training with a checkpoint, and the worker after it."""
        self.stopped = True
        if self.process is not None:
            self.process.send_signal(number)


@contextlib.contextmanager
def _forwarding() -> Iterator[_Forward]:
    forward = _Forward()
    before = {number: signal.signal(number, forward.on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield forward
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _train(
    study: pathlib.Path, run: Run, command: Sequence[str], say: Callable[[str], None], forward: _Forward
) -> None:
    folder = run_folder(study, run)
    begin = time.monotonic()
    for number in range(1, _TRIES + 1):
        is_resumed = (folder / CONFIG).is_file()
        with _new_log(study, run) as output:
            log = pathlib.Path(output.name)
            say(f"{run.name}: {'resumed' if is_resumed else 'started'}; log in {log}")
            # In a session of its own: Ctrl-C at a terminal goes to the worker alone, which sends it on once
            process = subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True)
            forward.process = process
            if forward.stopped:  # by a signal that came before there was a process to send it on to
                process.terminate()
            code = process.wait()
            forward.process = None
        line = _last_line(log)
        is_refused = bool(code) and HELD in line  # another worker was faster
        if is_refused:
            log.unlink()
        may_pass = code == FaultError.exit_code or code < 0
        if is_refused or not may_pass or number == _TRIES or forward.stopped:
            break
        say(f"{run.name}: exit code {code}; it is tried again")
    took = f"after {time.monotonic() - begin:.0f} s"
    if (folder / SUMMARY).is_file():
        failure_file(study, run).unlink(missing_ok=True)
        say(f"{run.name}: done {took}")
    elif code and not is_refused and not forward.stopped:
        line = line[:500]
        failure_file(study, run).parent.mkdir(exist_ok=True)
        write_json(failure_file(study, run), {"exit_code": code, "line": line, "command": list(command)})
        say(f"{run.name}: failed {took} with exit code {code}: {line}")
    elif forward.stopped:
        say(f"{run.name}: stopped; the same command goes on")


def _new_log(study: pathlib.Path, run: Run) -> BinaryIO:
    """Opens a log that no other training writes to, or else one's last line could be taken for that of the other."""
    numbers = itertools.count(1)
    with writing(log_file(study, run, 1).parent):
        log_file(study, run, 1).parent.mkdir(parents=True, exist_ok=True)
        while True:
            with contextlib.suppress(FileExistsError):
                return log_file(study, run, next(numbers)).open("xb")


def _last_line(log: pathlib.Path) -> str:
    lines = log.read_text(errors="replace").splitlines()
    return next((line for line in reversed(lines) if line.strip()), "")


def retry(study: pathlib.Path, runs: Sequence[Run]) -> None:
    """Forgets that runs failed, so that they are trained again from their checkpoints."""
    for run in runs:
        with contextlib.suppress(FileNotFoundError):
            os.remove(failure_file(study, run))
