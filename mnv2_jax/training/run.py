"""One session of a run, as each process sees it: decisions that all processes share, and the timing of records."""

from __future__ import annotations

import contextlib
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, TextIO

import jax

from mnv2_jax.config import Config
from mnv2_jax.data import streams
from mnv2_jax.data.images import DamagedImageError
from mnv2_jax.errors import FaultError, NonFiniteLossError, UserError, plain
from mnv2_jax.json_files import read_json
from mnv2_jax.processes import together
from mnv2_jax.processes.supervisor import Supervisor
from mnv2_jax.report.page import NAME as REPORT
from mnv2_jax.runs import folder as run_folder
from mnv2_jax.runs.checkpoint import Checkpoints, Leaves, Restored, fingerprint
from mnv2_jax.runs.metrics_log import SCORE, read_scores
from mnv2_jax.tasks.base import Evaluation
from mnv2_jax.training import length
from mnv2_jax.training import mesh as meshes
from mnv2_jax.training.experiment import Experiment
from mnv2_jax.training.speed import Speed
from mnv2_jax.training.state import NEVER, TrainState
from mnv2_jax.training.step import Metrics
from mnv2_jax.training.writer import NoWriter, Writer, open_writer

RESTART_ALL = "restart all processes, and leave that machine out if it happens again"
_LOCK_S = 120.0


class FolderContent(NamedTuple):
    """Content of the run folder, which process 0 sends to the other processes."""

    step: int | None
    """Step of the checkpoint that the run resumes from; None if there is no checkpoint."""
    scores: list[tuple[int, float]]
    """Scores of the evaluations up to that step, as (step, score)."""
    summary: dict[str, Any] | None
    """Summary of a finished run; None if the run isn't finished."""


class Run:
    """A run as the loop sees it: decisions and records. It reads a step's metrics from the device one step later."""

    def __init__(self, experiment: Experiment, writer: Writer, content: FolderContent, restored: Restored | None):
        """Begins a session; see `open_run`."""
        self._experiment, self._plan, self._writer = experiment, experiment.plan, writer
        self._restored = restored
        self._unread: tuple[int, Metrics] | None = None
        self._unshared: list[tuple[int, int, list[str]]] = []
        self._evaluation: Evaluation | None = None
        self.has_checkpoint = content.step is not None
        self.start = content.step or 0
        """Steps done before this session."""
        self.scores: dict[int, float] = dict(content.scores)
        """Scores of the evaluations, by their steps."""
        self.summary = content.summary
        """Summary of a run that was finished before this session; otherwise None."""
        self.speed = Speed(experiment.mesh.size)

    def say(self, line: str) -> None:
        """Prints a line, in the first process only."""
        self._writer.say(line)

    def take_restored(self) -> Leaves | None:
        """Hands over the arrays of the checkpoint, None if this process didn't read it; the run keeps no reference."""
        leaves, self._restored = self._restored.leaves if self._restored else None, None
        return leaves

    # --- decisions, the same on all processes --------------------------------------------------------------

    def is_over(self, step: int) -> bool:
        """Whether the training ends at this step."""
        return self._plan.is_over(step, self.scores)

    @property
    def owes_evaluation(self) -> bool:
        """Whether the restored state must be evaluated before training goes on.

        It must if its evaluation was due but is not in the log, or if the run is over and its results must be written.
        """
        lost = self.start not in self.scores
        return self._plan.evaluates_at(self.start) and (lost or self.is_over(self.start))

    def saves_at(self, step: int) -> bool:
        """Whether a checkpoint is due: at regular intervals, and after each evaluation."""
        return self._plan.saves_at(step) or step in self.scores

    # --- a step's metrics ----------------------------------------------------------------------------------

    def note(self, step: int, metrics: Metrics) -> None:
        """Keeps a step's metrics for the next `read`, if that step is logged or traced."""
        if self._plan.logs_at(step) or "trace" in metrics:
            self._unread = step, metrics

    def read(self) -> None:
        """Logs the metrics that `note` kept, if any, and the trace; waits until their step is done.

        Raises:
          NonFiniteLossError: if a loss, gradient or weight up to that step was not finite.
        """
        if self._unread is None:
            return
        step, on_device = self._unread
        self._unread, on_host = None, jax.device_get(on_device)
        trace = on_host.pop("trace", None)
        metrics = {name: value.item() for name, value in on_host.items()}
        if trace is not None:
            self._writer.trace(step, metrics["loss"], trace)
        if not self._plan.logs_at(step):
            return
        bad, pace = metrics.pop("first_bad_step"), self.speed.lap()
        epoch = round(step / self._plan.steps_per_epoch, 4)
        self._writer.log(step, "train", {"epoch": epoch, **metrics, **pace._asdict()})
        self._check_finite(bad)
        self._writer.show(step, metrics["loss"], pace)

    def _check_finite(self, first_bad_step: int) -> None:
        if first_bad_step != NEVER:
            peak_lr = self._experiment.config.peak_lr
            raise NonFiniteLossError(
                f"the loss, gradient or weights of step {first_bad_step} are not finite; that step was not saved;"
                f" try a lower optim.peak_lr than {peak_lr:g}, or set optim.clip_grad_norm"
            )

    # --- images that can't be decoded ------------------------------------------------------------------------

    def skipped(self, step: int, count: int, lines: Mapping[int, str]) -> None:
        """Notes which images of this process's part of a batch couldn't be decoded, and how many rows they took."""
        self._unshared.append((step, count, [plain(lines[index]) for index in sorted(lines)]))

    def share_skipped(self) -> None:
        """Logs the images that all processes have skipped since the last call; names each image once.

        A kill loses only entries of steps that no checkpoint has; the resumed run meets those images again.
        """
        if not self._experiment.config.data.skip_corrupt:
            return
        reports = [tuple(report) for reports in together.exchange(self._unshared) for report in reports]
        self._unshared = []
        self._writer.skipped(line for _, _, lines in sorted(reports) for line in lines)
        for step in sorted({step for step, _, _ in reports}):
            self._writer.log(step, "data", {"skipped": sum(count for at, count, _ in reports if at == step)})

    @contextlib.contextmanager
    def fetching(self, step: int, state: TrainState) -> Iterator[None]:
        """Wraps the wait for a batch. If the batch can't be made, a run of one process saves its state first.

        A run of several processes doesn't: the other processes have their batch, and would not join in the saving.

        Raises:
          UserError: if an image can't be decoded; it names all images that can't.
        """
        with streams.naming_all_damaged(self._experiment.config.data, self._experiment.dataset.train):
            try:
                with self.speed.waiting():
                    yield
            except UserError:
                if not together.are_several():
                    self.save(step, state)
                raise

    @contextlib.contextmanager
    def evaluating(self, step: int, state: TrainState) -> Iterator[None]:
        """Wraps the evaluation of a state. If images can't be decoded, the state is saved first.

        All processes raise that error, so all join in the saving. A resumed run makes up for the evaluation.
        """
        self.read()  # in the log, the line of a step comes before the line of its evaluation
        try:
            with self.speed.stopped():
                yield
        except DamagedImageError:
            self.save(step, state)
            raise

    # --- evaluations and checkpoints ---------------------------------------------------------------------------

    def evaluated(self, step: int, evaluation: Evaluation) -> None:
        """Logs an evaluation, unless it is in the log already, and names the images that it skipped."""
        task, split = self._experiment.task, self._experiment.dataset.eval.name
        self._evaluation = evaluation
        if step in self.scores:
            return
        self.scores[step] = evaluation.scalars[task.score]
        self._writer.log(step, "eval", {SCORE: task.score, **evaluation.scalars})
        self._writer.skipped(evaluation.skipped)
        self._writer.evaluated(step, self.scores[step])
        for line in (f"step {step}: {split} {task.headline(evaluation.scalars)}", *evaluation.notes):
            self.say(line)

    def save(self, step: int, state: TrainState) -> None:
        """Begins to write a checkpoint. All processes must call this, and have the same state.

        Raises:
          NonFiniteLossError: if a loss, gradient or weight up to that step was not finite.
          FaultError: if the processes have different states.
          UserError: if the checkpoint before could not be written.
        """
        self.read()  # log the step before its state is saved, or a kill could lose the line of the log
        self._check_finite(int(jax.device_get(state.first_bad_step)))  # a state that isn't finite is never saved
        self.share_skipped()
        with self.speed.stopped():
            if together.are_several():
                agree_on(state, step, f"a machine computes wrongly, and nothing was saved; {RESTART_ALL}")
            self._writer.save(step, state, self.scores.get(step))

    def end(self, step: int) -> dict[str, Any] | None:
        """Ends the session. Returns the summary of a run that is over, and None for a run that was stopped."""
        self._writer.wait()  # a run is finished when its last checkpoint is on disk
        self._writer.note_memory(meshes.peak_memory(self._experiment.mesh))
        summary = None
        if self._evaluation is not None and self.is_over(step):
            summary = self._writer.finish(step, self._evaluation, self.scores)
        else:
            self.say(
                "stopped and saved; the same command goes on from here"
                if step
                else "stopped before the first step; the same command begins anew"
            )
        result: dict[str, Any] | None = together.from_first(summary)
        return result


def agree_on(state: TrainState, step: int, mend: str) -> str:
    """Returns the fingerprint of a state, after checking that all processes have the same one.

    Raises:
      FaultError: if a process has a different state; its text ends with ``mend``.
    """
    copy = fingerprint(state)
    together.agree({f"the state after step {step}": copy}, mend=mend, kind=FaultError)
    return copy


@contextlib.contextmanager
def open_run(experiment: Experiment, workdir: pathlib.Path, stream: TextIO, supervisor: Supervisor) -> Iterator[Run]:
    """Opens a session of a run. The first process locks the run folder, checks that it belongs to this run, and reads
    its newest checkpoint.

    Raises:
      UserError: if the folder belongs to another run, if another process uses it, or if it can't be used.
    """
    with contextlib.ExitStack() as stack:
        with supervisor.compiling():
            writer: Writer = NoWriter()
            checkpoints = restored = content = None
            if together.is_first():
                checkpoints = stack.enter_context(_open_folder(experiment, workdir))
                restored = checkpoints.restore()
                content = _read_content(experiment, workdir, restored)
            content = FolderContent(*together.from_first(content))
            if checkpoints is not None and content.summary is None:
                start = content.step or 0
                writer = stack.enter_context(open_writer(experiment, workdir, checkpoints, start, stream))
            elif checkpoints is not None:
                print(f"{workdir}: finished already, at step {content.step}; nothing to do", file=stream)
            run = Run(experiment, writer, content, restored)
            del restored  # otherwise its arrays would stay in host memory throughout training
        yield run


@contextlib.contextmanager
def _open_folder(experiment: Experiment, workdir: pathlib.Path) -> Iterator[Checkpoints]:
    run_folder.refuse_foreign(workdir)
    # On a network file system the lock of a machine that has died stays for a while.
    with run_folder.lock(workdir, _LOCK_S if together.are_several() else 0.0):
        devices = meshes.describe(experiment.mesh)

        def why_not(old: Config) -> str | None:
            steps_done = max(Checkpoints(workdir).steps(), default=0)
            scores = {at: score for at, score in read_scores(workdir).items() if at <= steps_done}
            return length.why_not(experiment, old, workdir, steps_done, scores)

        run_folder.begin_session(workdir, experiment.config, experiment.facts, devices, why_not)
        with Checkpoints(workdir, experiment.config.checkpoint) as checkpoints:
            yield checkpoints


def _read_content(experiment: Experiment, workdir: pathlib.Path, restored: Restored | None) -> FolderContent:
    step = restored.step if restored else None
    scores = {at: score for at, score in read_scores(workdir).items() if at <= (step or 0)}
    summary, report = workdir / run_folder.SUMMARY, workdir / REPORT
    is_finished = experiment.plan.is_over(step or 0, scores) and summary.exists() and report.exists()
    return FolderContent(step, list(scores.items()), read_json(summary) if is_finished else None)
