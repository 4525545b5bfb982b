"""Checks that a training is reproducible: takes its first steps in several ways, and compares the traces."""

from __future__ import annotations

import argparse
import contextlib
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

from mnv2_jax import config
from mnv2_jax.errors import UserError
from mnv2_jax.flags import Parser, folder_type
from mnv2_jax.json_files import read_json
from mnv2_jax.runs import trace_log
from mnv2_jax.runs.folder import PROVENANCE, read_run
from mnv2_jax.study.trace import Difference, common_steps, comparison, first_difference, read_trace

STEPS, FEWEST_STEPS = 8, 4
_DEVICES = "--xla_force_host_platform_device_count="
_POLL_S, _PATIENCE_S = 0.02, 60.0

_HELP_AFTER = """\
With --config: takes the first steps of that training on the CPU, each time in a process of its own: twice in the same
way; on 2 and on 4 devices; killed once it has a checkpoint, and resumed; in another working directory; with another
number of worker processes. With two run folders: compares these. Either way a line says whether two runs are equal, or
names the first step and the first thing that differs. The exit code is 1 if anything differs.

On the same layout of devices all must be equal to the bit. On another one sums are added in another order: there the
batches must be equal, and losses and norms up to rounding.

examples:
  python -m mnv2_jax.study check --config=w0_35:data=digits --steps=8
  python -m mnv2_jax.study check runs/one runs/other
"""


class Comparison(NamedTuple):
    """The comparison of two runs."""

    steps: int
    """Number of steps that both have."""
    difference: Difference | None
    made: str
    """Which comparison was made; see `trace.comparison`."""

    def __str__(self) -> str:
        if self.difference is not None:
            return self.difference.sentence
        return f"equal over {self.steps} steps ({self.made})"


def main(argv: Sequence[str]) -> None:
    """Reads the flags, and checks a config or compares two runs; exits with code 1 if there is a difference."""
    parser = Parser("Checks that a training is reproducible, or compares the traces of two runs.", _HELP_AFTER)
    parser.add_argument("runs", nargs="*", type=folder_type, metavar="RUN", help="two run folders with traces")
    parser.add_config_flags("data.batch_size=64")
    parser.add_argument("--steps", type=_steps, help=f"number of steps (default: {STEPS})")
    parser.add_argument(
        "--out", type=folder_type, metavar="DIR", help="new folder for the runs (default: removed unless some differ)"
    )
    args, overrides = parser.parse(argv)
    if (args.config is None) == (len(args.runs) != 2):
        raise UserError("give either --config=NAME or two run folders")
    if args.config is None:
        if args.steps or args.out or overrides:
            raise UserError("--steps, --out and --config.KEY are used with --config only; leave them out")
        compared = compare(*args.runs)
        print(compared)
        is_equal = compared.difference is None
    else:
        if args.out is not None and args.out.exists():
            raise UserError(f"--out={args.out} exists; give a new folder, or a run there would go on")
        folder = args.out or pathlib.Path(tempfile.mkdtemp(prefix="mnv2_check_"))
        is_equal = check(args.config, overrides, folder, args.steps or STEPS)
        if is_equal and args.out is None:
            shutil.rmtree(folder)
        else:
            print(f"the runs are in {folder}")
    if not is_equal:
        sys.exit(1)


def compare(a: pathlib.Path, b: pathlib.Path, last_step: int | None = None) -> Comparison:
    """Compares the traces of two run folders, up to a step; whether the layout is the same is in their provenance.

    Raises:
      UserError: if a folder holds no run or no trace, or the traces have no step in common.
    """
    dtypes = {read_run(folder)[0].model.dtype for folder in (a, b)}
    if len(dtypes) > 1:
        raise UserError(f"{a} and {b} compute in {' and '.join(sorted(dtypes))}; compare runs of one model.dtype")
    (dtype,) = dtypes
    layouts = [session["devices"] for folder in (a, b) for session in read_json(folder / PROVENANCE)["sessions"]]
    same_layout = all(layout == layouts[0] for layout in layouts)
    one, other = (
        [line for line in read_trace(folder) if last_step is None or line["step"] <= last_step] for folder in (a, b)
    )
    difference = first_difference(one, other, same_layout=same_layout, dtype=dtype)
    return Comparison(len(common_steps(one, other)), difference, comparison(same_layout=same_layout, dtype=dtype))


def check(
    spec: str,
    overrides: Sequence[str],
    folder: pathlib.Path,
    steps: int = STEPS,
    say: Callable[[str], None] = lambda line: print(line, flush=True),
) -> bool:
    """Takes the first steps of a training in several ways, and says a line for each comparison with the first run.

    A way that this training can't go, such as on more devices than divide its batch, is named with the reason.

    Args:
      spec: value of ``--config``.
      overrides: changes of the config, each as ``a.b=value``.
      folder: gets a run folder, and what it printed, for each way.
      steps: number of steps, at least `FEWEST_STEPS`.
      say: takes the lines.

    Returns:
      Whether all comparisons that were made found their runs equal.

    Raises:
      UserError: if the config can't be used, or the first run fails.
    """
    runs = _Runs(spec, overrides, folder.absolute(), steps)
    first = runs.run("first")
    workers = 1 if runs.config.data.num_workers != 1 else 2
    ways: Mapping[str, Callable[[], pathlib.Path]] = {
        "the same again": lambda: runs.run("again"),
        "on 2 devices": lambda: runs.run("2_devices", devices=2),
        "on 4 devices": lambda: runs.run("4_devices", devices=4),
        "killed and resumed": lambda: runs.run_and_kill("killed"),
        "in another working directory": lambda: runs.run_elsewhere("elsewhere", first),
        f"with data.num_workers={workers}": lambda: runs.run("workers", f"--config.data.num_workers={workers}"),
    }
    found = []
    for name, run in ways.items():
        try:
            found.append(compare(first, run(), steps))
            say(f"{name}: {found[-1]}")
        except UserError as error:
            say(f"{name}: not compared: {error}")
    return all(compared.difference is None for compared in found)


class _Runs:
    """Runs the first steps of a config in other processes, each in a folder of its own."""

    def __init__(self, spec: str, overrides: Sequence[str], folder: pathlib.Path, steps: int):
        self.config = config.load(spec, overrides).config
        self._arguments = [f"--config={spec}", *(f"--config.{override}" for override in overrides)]
        self._folder, self._steps = folder, steps

    def run(self, name: str, *arguments: str, devices: int = 1) -> pathlib.Path:
        """Takes the steps, and returns the run folder."""
        with self._started(name, [*self._arguments, *arguments], devices=devices) as process:
            self._stop_at(process, name, self._steps)
        return self._folder / name

    def run_elsewhere(self, name: str, first: pathlib.Path) -> pathlib.Path:
        """Takes the steps of the ``first`` run in another working directory."""
        elsewhere = self._folder / "cwd"
        elsewhere.mkdir()
        arguments, data = [f"--config={first / 'config.json'}"], self.config.data.path
        if data is not None and os.path.exists(data):  # it may be relative
            arguments.append(f"--config.data.path={os.path.abspath(data)}")
        with self._started(name, arguments, cwd=elsewhere) as process:
            self._stop_at(process, name, self._steps)
        return self._folder / name

    def run_and_kill(self, name: str) -> pathlib.Path:
        """Takes the steps with a kill between them, as soon as there is a checkpoint."""
        workdir = self._folder / name
        arguments = [*self._arguments, f"--config.checkpoint.every_steps={max(self._steps // 4, 1)}"]
        with self._started(name, arguments) as process:
            while process.poll() is None and not _checkpoints(workdir):
                time.sleep(_POLL_S / 10)
            process.kill()
        self._check_end(process, name)
        begun, lines = max(_checkpoints(workdir), default=0), _count_lines(workdir)
        if process.returncode == 0 or begun >= self._steps:
            raise UserError(f"the kill came too late, with a checkpoint of step {begun}; give more --steps")
        # The session first cuts the lines back that no checkpoint has, so more lines than before are new ones.
        with self._started(name, arguments) as process:
            self._stop_at(process, name, max(self._steps, lines + 1))
        return workdir

    @contextlib.contextmanager
    def _started(
        self, name: str, arguments: Sequence[str], devices: int = 1, cwd: pathlib.Path | None = None
    ) -> Iterator[subprocess.Popen[bytes]]:
        command = [sys.executable, "-m", "mnv2_jax.main", *arguments, "--config.log.trace=True"]
        self._folder.mkdir(parents=True, exist_ok=True)
        with (
            self._log(name).open("wb") as log,
            subprocess.Popen(
                [*command, f"--workdir={self._folder / name}"],
                env=self._environment(devices),
                cwd=cwd,
                stdout=log,
                stderr=subprocess.STDOUT,
            ) as process,
        ):
            try:
                yield process
            finally:
                process.kill()  # does nothing to one that has ended

    def _environment(self, devices: int) -> dict[str, str]:
        flags = [flag for flag in os.environ.get("XLA_FLAGS", "").split() if not flag.startswith(_DEVICES)]
        path = [os.getcwd(), *filter(None, [os.environ.get("PYTHONPATH")])]  # the config's modules, from anywhere
        return {
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": " ".join([*flags, f"{_DEVICES}{devices}"]),
            "PYTHONPATH": os.pathsep.join(path),
            **({"JAX_ENABLE_X64": "1"} if self.config.model.dtype == "float64" else {}),
        }

    def _stop_at(self, process: subprocess.Popen[bytes], name: str, lines: int) -> None:
        """Asks a run to stop once its trace has so many lines; it then ends as it does at a signal, or at its end."""
        while process.poll() is None and _count_lines(self._folder / name) < lines:
            time.sleep(_POLL_S)
        process.terminate()
        try:
            process.wait(_PATIENCE_S)
        except subprocess.TimeoutExpired:
            process.kill()  # what it has traced stays
            process.wait()
        self._check_end(process, name)

    def _check_end(self, process: subprocess.Popen[bytes], name: str) -> None:
        """Raises a `UserError` with a run's own error, if it has failed."""
        if process.returncode not in (0, -signal.SIGKILL):
            lines = self._log(name).read_text(errors="replace").splitlines()
            errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")] or lines
            reason = errors[-1] if errors else f"it ended with code {process.returncode}"
            raise UserError(f"the run can't be made: {reason}")

    def _log(self, name: str) -> pathlib.Path:
        return self._folder / f"{name}.log"


def _steps(text: str) -> int:
    if not text.isdecimal() or int(text) < FEWEST_STEPS:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number, at least {FEWEST_STEPS}")
    return int(text)


def _checkpoints(workdir: pathlib.Path) -> list[int]:
    """Returns the steps of the finished checkpoints."""
    folder = workdir / "checkpoints"
    return [int(path.name) for path in folder.iterdir() if path.name.isdigit()] if folder.is_dir() else []


def _count_lines(workdir: pathlib.Path) -> int:
    path = workdir / trace_log.NAME
    return path.read_bytes().count(b"\n") if path.exists() else 0
