"""What a run says about itself while it trains: the log, the screen, the clock, and the check for finite losses."""

from __future__ import annotations

import pathlib
from collections.abc import Iterable, Mapping
from typing import Any, TextIO

import jax

from mnv2_jax.errors import NonFiniteLossError, plain
from mnv2_jax.json_files import write_text, writing
from mnv2_jax.ops.metrics import scalars
from mnv2_jax.processes import together
from mnv2_jax.runs.folder import SKIPPED, read_skipped
from mnv2_jax.runs.metrics_log import MetricsLog
from mnv2_jax.runs.progress import Progress
from mnv2_jax.training.experiment import Experiment
from mnv2_jax.training.speed import Speed
from mnv2_jax.training.state import NEVER, TrainState
from mnv2_jax.training.step import Metrics


class Recorder:
    """Takes a step's metrics as they are, on the device, and reads them one step later: nobody waits.

    Every process keeps one; that of the first writes the log and the screen.
    """

    def __init__(
        self,
        experiment: Experiment,
        workdir: pathlib.Path | None,
        start: int,
        top1_of: Mapping[int, float],
        stream: TextIO,
    ):
        """Opens the log, cut back to ``start`` steps; without ``workdir`` nothing is written and said."""
        config = experiment.config
        self._experiment, self._workdir = experiment, workdir
        self.top1_of = dict(top1_of)
        """Of each evaluation, by its step."""
        self.speed = Speed()
        self._unread: tuple[int, Metrics] | None = None
        self._unshared: list[tuple[int, int, list[str]]] = []
        self._log: MetricsLog | None = None
        self._progress: Progress | None = None
        if workdir is not None:
            self._log = MetricsLog(workdir, start, tensorboard=config.log.tensorboard)
            self._progress = Progress(experiment.total_steps, start, stream)
            if (workdir / SKIPPED).exists():  # without a line that was cut off: its image will be met again
                write_text(workdir / SKIPPED, "".join(f"{line}\n" for line in read_skipped(workdir)))

    @property
    def seconds(self) -> float:
        """Wall time of the run, over all its sessions; of the process that logs."""
        assert self._log is not None
        return self._log.seconds

    def say(self, text: str) -> None:
        """Prints a line."""
        if self._progress is not None:
            self._progress.line(text)

    def skipped(self, step: int, count: int, lines: Mapping[int, str]) -> None:
        """Notes how many images of this process's part of a step's batch couldn't be decoded, and which."""
        self._unshared.append((step, count, [plain(lines[index]) for index in sorted(lines)]))

    def share_skipped(self) -> None:
        """Logs what all processes have skipped since the last time; names each image once, here and in a file.

        To be called before each checkpoint: what a kill keeps from the file is of a step that no checkpoint has, and
        will be met again.
        """
        if not self._experiment.config.data.skip_corrupt:
            return
        told = [tuple(entry) for entries in together.exchange(self._unshared) for entry in entries]
        self._unshared = []
        if self._log is None:
            return
        self._name(line for _, _, lines in sorted(told) for line in lines)
        for step in sorted({step for step, _, _ in told}):
            self._log.write(step, "data", {"skipped": sum(count for at, count, _ in told if at == step)})

    def _name(self, lines: Iterable[str]) -> None:
        """Names images that were skipped, but for those that are named already."""
        if self._workdir is None:
            return
        known = set(read_skipped(self._workdir))
        new = list(dict.fromkeys(line for line in lines if line not in known))
        if new:
            with writing(self._workdir / SKIPPED), (self._workdir / SKIPPED).open("ab") as file:
                file.write("".join(f"{line}\n" for line in new).encode())
        for line in new:
            self.say(f"skipped: {line}")

    def note(self, step: int, metrics: Metrics) -> None:
        """Keeps a step's metrics for the next `read`."""
        self._unread = step, metrics

    def read(self) -> None:
        """Logs what was noted, if anything was; waits for that step to be done.

        Raises:
          NonFiniteLossError: if a loss up to there was not finite.
        """
        if self._unread is None:
            return
        step, on_device = self._unread
        self._unread, metrics = None, {name: value.item() for name, value in jax.device_get(on_device).items()}
        bad, pace = metrics.pop("first_bad_step"), self.speed.lap()
        epoch = round(step / self._experiment.steps_per_epoch, 4)
        if self._log is not None:
            self._log.write(step, "train", {"epoch": epoch, **metrics, **pace._asdict()})
        self._refuse(bad)
        if self._progress is not None:
            self._progress.update(step, metrics["loss"], *pace)

    def check(self, state: TrainState) -> None:
        """Waits for a state and makes sure that it came of finite losses only.

        Raises:
          NonFiniteLossError: naming the first step that was not.
        """
        self._refuse(int(jax.device_get(state.first_bad_step)))

    def _refuse(self, first_bad_step: int) -> None:
        if first_bad_step != NEVER:
            peak_lr = self._experiment.config.peak_lr
            raise NonFiniteLossError(
                f"the loss, gradient or weights of step {first_bad_step} are not finite; it was not saved;"
                f" try a lower optim.peak_lr than {peak_lr:g}, or optim.clip_grad_norm"
            )

    def evaluated(self, step: int, result: Mapping[str, Any]) -> None:
        """Logs an evaluation, and names what it has left out."""
        if self._log is not None:
            self._log.write(step, "eval", scalars(result))
        self._name(result.get("skipped", ()))
        self.top1_of[step] = result["top1"]
        self.say(
            f"step {step}: {self._experiment.dataset.eval.name} top-1 {result['top1']:.2%}, top-5 {result['top5']:.2%},"
            f" loss {result['loss']:.4f}, {result['count']} images"
        )

    def close(self) -> None:
        """Closes the log and the bar."""
        for part in (self._log, self._progress):
            if part is not None:
                part.close()
