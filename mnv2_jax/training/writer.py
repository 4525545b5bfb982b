"""Writes the records of a run: log, checkpoints, list of skipped images, summary and report, and lines on the terminal.

Only the first process writes. The others have a `NoWriter`, so that no other code has to ask which process it runs in.
"""

from __future__ import annotations

import contextlib
import functools
import pathlib
import shlex
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Protocol, TextIO

import jax

from mnv2_jax.json_files import write_json, write_text, writing
from mnv2_jax.models.counting import count_layers
from mnv2_jax.report.page import NAME as REPORT
from mnv2_jax.report.page import write_report
from mnv2_jax.runs.checkpoint import Checkpoints
from mnv2_jax.runs.folder import EVALUATION, SKIPPED, SUMMARY, note_memory, origin, read_skipped
from mnv2_jax.runs.metrics_log import MetricsLog, read_metrics, speeds
from mnv2_jax.runs.progress import Progress
from mnv2_jax.runs.trace_log import TraceLog
from mnv2_jax.tasks.base import Evaluation
from mnv2_jax.training import results
from mnv2_jax.training.experiment import Experiment
from mnv2_jax.training.plan import best_of
from mnv2_jax.training.speed import Pace
from mnv2_jax.training.state import TrainState
from mnv2_jax.training.tracing import Traced, TraceLines


class Writer(Protocol):
    """Where the records of a run go."""

    def say(self, line: str) -> None:
        """Prints a line."""

    def log(self, step: int, split: str, values: Mapping[str, Any]) -> None:
        """Appends to the log."""

    def trace(self, step: int, loss: float, traced: Traced) -> None:
        """Appends to the trace."""

    def show(self, step: int, loss: float, pace: Pace) -> None:
        """Shows the progress of the training."""

    def skipped(self, lines: Iterable[str]) -> None:
        """Prints and lists images that can't be decoded, except those that are listed already."""

    def evaluated(self, step: int, score: float) -> None:
        """Remembers the score of a step, whether its checkpoint was saved before or will be saved later."""

    def save(self, step: int, state: TrainState, score: float | None) -> None:
        """Begins to write a checkpoint."""

    def note_memory(self, memory: Mapping[str, int]) -> None:
        """Records the most memory that the session has used, in bytes; see `mesh.peak_memory`."""

    def finish(self, step: int, evaluation: Evaluation, scores: Mapping[int, float]) -> dict[str, Any] | None:
        """Writes evaluation.json, summary.json and the report; returns the summary."""

    def wait(self) -> None:
        """Returns when every checkpoint is on disk."""


class NoWriter:
    """The `Writer` of a process that writes nothing: all its methods do nothing."""

    def say(self, line: str) -> None:
        """Does nothing."""

    def log(self, step: int, split: str, values: Mapping[str, Any]) -> None:
        """Does nothing."""

    def trace(self, step: int, loss: float, traced: Traced) -> None:
        """Does nothing."""

    def show(self, step: int, loss: float, pace: Pace) -> None:
        """Does nothing."""

    def skipped(self, lines: Iterable[str]) -> None:
        """Does nothing."""

    def evaluated(self, step: int, score: float) -> None:
        """Does nothing."""

    def save(self, step: int, state: TrainState, score: float | None) -> None:
        """Does nothing."""

    def note_memory(self, memory: Mapping[str, int]) -> None:
        """Does nothing."""

    def finish(self, step: int, evaluation: Evaluation, scores: Mapping[int, float]) -> None:
        """Does nothing."""

    def wait(self) -> None:
        """Does nothing."""


class FolderWriter:
    """A `Writer` to a run folder, which must be locked."""

    def __init__(
        self,
        experiment: Experiment,
        workdir: pathlib.Path,
        checkpoints: Checkpoints,
        log: MetricsLog,
        progress: Progress,
        trace_log: TraceLog | None,
    ):
        """Takes the open files of the folder; see `open_writer`."""
        self._experiment, self._workdir = experiment, workdir
        self._checkpoints, self._log, self._progress, self._trace_log = checkpoints, log, progress, trace_log
        if (workdir / SKIPPED).exists():  # drops a line that was cut off: the run will meet its image again
            write_text(workdir / SKIPPED, "".join(f"{line}\n" for line in read_skipped(workdir)))

    def say(self, line: str) -> None:
        """Prints a line, above the bar where there is one."""
        self._progress.line(line)

    def log(self, step: int, split: str, values: Mapping[str, Any]) -> None:
        """Appends to metrics.jsonl, and to TensorBoard's files."""
        self._log.write(step, split, values)

    def trace(self, step: int, loss: float, traced: Traced) -> None:
        """Appends to trace.jsonl."""
        if self._trace_log is not None:
            self._trace_log.write(self._trace_lines.line(step, loss, traced))

    @functools.cached_property
    def _trace_lines(self) -> TraceLines:
        experiment = self._experiment
        layers = count_layers(experiment.task.model, experiment.config.data.seen_size).layers
        return TraceLines(jax.eval_shape(experiment.init_state), [layer.name for layer in layers])

    def show(self, step: int, loss: float, pace: Pace) -> None:
        """Moves the bar, or prints a line."""
        self._progress.update(step, loss, *pace)

    def skipped(self, lines: Iterable[str]) -> None:
        """Appends new images to the list of skipped images, and prints them."""
        listed = set(read_skipped(self._workdir))
        new = list(dict.fromkeys(line for line in lines if line not in listed))
        if new:
            with writing(self._workdir / SKIPPED), (self._workdir / SKIPPED).open("ab") as file:
                file.write("".join(f"{line}\n" for line in new).encode())
        for line in new:
            self.say(f"skipped: {line}")

    def evaluated(self, step: int, score: float) -> None:
        """Passes the score on to the checkpoints."""
        self._checkpoints.note_metric(step, score)

    def save(self, step: int, state: TrainState, score: float | None) -> None:
        """Begins to write a checkpoint, once the one before it is written."""
        self._checkpoints.save(step, state, score)

    def wait(self) -> None:
        """Returns when every checkpoint is on disk."""
        self._checkpoints.wait()

    def note_memory(self, memory: Mapping[str, int]) -> None:
        """Adds the memory to the provenance."""
        note_memory(self._workdir, memory)

    def finish(self, step: int, evaluation: Evaluation, scores: Mapping[int, float]) -> dict[str, Any]:
        """Writes evaluation.json, summary.json and the report."""
        experiment, workdir = self._experiment, self._workdir
        config, split, task = experiment.config, experiment.dataset.eval, experiment.task
        costs = count_layers(task.model, config.data.seen_size)
        best_step, best_score = best_of(scores)
        usual = config.usual_checkpoint
        skips, metrics = config.data.skip_corrupt, read_metrics(workdir)
        summary = {
            "model": config.model.name,
            "width": config.model.width,
            "data": config.data.name,
            "resolution": config.data.seen_size,
            "seed": config.seed,
            **origin(workdir),
            "params": costs.params,
            "madds": costs.madds,
            "steps": step,
            "seconds": round(self._log.seconds, 1),
            **speeds(metrics),
            **({"skipped": _skipped(metrics)} if skips else {}),
            "eval_split": split.name,
            **({"eval_skipped": len(evaluation.skipped)} if skips else {}),
            "eval": dict(evaluation.scalars),  # of the last step
            "best": {"step": best_step, task.score: best_score},
            # used by commands that name no checkpoint
            "checkpoint": {"taken": usual, "step": self._checkpoints.step_of(usual)},
        }
        located = results.with_paths(evaluation, split)
        results.save_evaluation(workdir / EVALUATION, experiment, located, step=step, checkpoint="latest")
        # A run counts as finished when it has a summary and a report, so a report of the unfinished run must go first.
        with writing(workdir / REPORT):
            (workdir / REPORT).unlink(missing_ok=True)
        write_json(workdir / SUMMARY, summary)
        write_report(workdir, experiment.kind.page)
        self._say_end(summary, scores, task.headline(evaluation.scalars), is_early=step < experiment.plan.total_steps)
        return summary

    def _say_end(
        self, summary: Mapping[str, Any], scores: Mapping[int, float], headline: str, *, is_early: bool
    ) -> None:
        config, workdir, (best_step, best_score) = self._experiment.config, self._workdir, best_of(scores)
        early = f"; ended because {config.train.patience} evaluations brought no better score" if is_early else ""
        usual = f"used by default: the {config.usual_checkpoint}, step {summary['checkpoint']['step']}"
        skipped = read_skipped(workdir) if config.data.skip_corrupt else ()
        rows = {
            "checkpoints": f"{workdir / 'checkpoints'} ({usual})",
            "log": workdir / "metrics.jsonl",
            "summary": workdir / SUMMARY,
            "report": workdir / REPORT,
            "skipped": f"{len(skipped):,} images that can't be decoded, listed in {workdir / SKIPPED}"
            if skipped
            else "",
            "next": f"mnv2 predict --workdir={shlex.quote(str(workdir))} IMAGES",
        }
        self.say(
            f"step {summary['steps']}, the last: {summary['eval_split']} {headline}, after {summary['seconds']:.0f} s"
            f" (best {self._experiment.task.score}: {best_score:.4f} at step {best_step}{early})"
        )
        for name, row in rows.items():
            if row:
                self.say(f"  {name:<11}  {row}")


@contextlib.contextmanager
def open_writer(
    experiment: Experiment, workdir: pathlib.Path, checkpoints: Checkpoints, start: int, stream: TextIO
) -> Iterator[FolderWriter]:
    """Opens the log and the trace, cut back to ``start`` steps, and the progress bar.

    Args:
      experiment: the experiment that is trained.
      workdir: the run folder, locked.
      checkpoints: the checkpoints of the run.
      start: steps done.
      stream: where text is printed.
    """
    options, closing = experiment.config.log, contextlib.closing
    with contextlib.ExitStack() as stack:
        log = stack.enter_context(closing(MetricsLog(workdir, start, tensorboard=options.tensorboard)))
        trace_log = stack.enter_context(closing(TraceLog(workdir, start))) if options.trace else None
        progress = stack.enter_context(closing(Progress(experiment.plan.total_steps, start, stream)))
        yield FolderWriter(experiment, workdir, checkpoints, log, progress, trace_log)


def _skipped(metrics: Iterable[Mapping[str, Any]]) -> int:
    """Counts how often an image was skipped in training, over all sessions."""
    return sum(line.get("skipped") or 0 for line in metrics if line["split"] == "data")
