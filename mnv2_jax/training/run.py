"""One session of a run, as every process has it: what is decided together, and when something is put down."""

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

AGAIN = "start all again, without that machine if it happens twice"
_LOCK_S = 120.0


class Found(NamedTuple):
    """Content of the run's folder as process 0 tells it to the others."""

    step: int | None
    """Step of the checkpoint that it goes on from; None: there is none."""
    scores: list[tuple[int, float]]
    """Scores of the evaluations up to there, by their steps."""
    summary: dict[str, Any] | None
    """Summary of a finished run."""


class Run:
    """A run as the loop sees it: decisions and records. Metrics are taken on the device, and read one step later."""

    def __init__(self, experiment: Experiment, writer: Writer, found: Found, restored: Restored | None):
        """Begins a session; see `open_run`."""
        self._experiment, self._plan, self._writer = experiment, experiment.plan, writer
        self._restored = restored
        self._unread: tuple[int, Metrics] | None = None
        self._unshared: list[tuple[int, int, list[str]]] = []
        self._evaluation: Evaluation | None = None
        self.has_checkpoint = found.step is not None
        self.start = found.step or 0
        """Steps done before this session."""
        self.scores: dict[int, float] = dict(found.scores)
        """Scores of the evaluations, by their steps."""
        self.summary = found.summary
        """Set once the run is finished."""
        self.speed = Speed(experiment.mesh.size)

    def say(self, line: str) -> None:
        """Prints a line; of several processes the first does."""
        self._writer.say(line)

    def take_restored(self) -> Leaves | None:
        """The arrays of the checkpoint, where this process has read it; they don't stay in memory here."""
        leaves, self._restored = self._restored.leaves if self._restored else None, None
        return leaves

    # --- decisions, the same on all processes --------------------------------------------------------------

    def is_over(self, step: int) -> bool:
        """Whether no step follows this one."""
        return self._plan.is_over(step, self.scores)

    @property
    def owes_evaluation(self) -> bool:
        """Whether the evaluation of the first state was cut short, or its results lost; or are to be written again."""
        lost = self.start not in self.scores
        return self._plan.evaluates_at(self.start) and (lost or self.is_over(self.start))

    def saves_at(self, step: int) -> bool:
        """Whether a checkpoint is due: in intervals, and of what was evaluated."""
        return self._plan.saves_at(step) or step in self.scores

    # --- a step's metrics ----------------------------------------------------------------------------------

    def note(self, step: int, metrics: Metrics) -> None:
        """Keeps a step's metrics for the next `read`, where they are to be logged."""
        if self._plan.logs_at(step):
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
        epoch = round(step / self._plan.steps_per_epoch, 4)
        self._writer.log(step, "train", {"epoch": epoch, **metrics, **pace._asdict()})
        self._refuse(bad)
        self._writer.show(step, metrics["loss"], pace)

    def _refuse(self, first_bad_step: int) -> None:
        if first_bad_step != NEVER:
            peak_lr = self._experiment.config.peak_lr
            raise NonFiniteLossError(
                f"the loss, gradient or weights of step {first_bad_step} are not finite; it was not saved;"
                f" try a lower optim.peak_lr than {peak_lr:g}, or optim.clip_grad_norm"
            )

    # --- images that can't be decoded ------------------------------------------------------------------------

    def skipped(self, step: int, count: int, lines: Mapping[int, str]) -> None:
        """Notes how many images of this process's part of a step's batch couldn't be decoded, and which."""
        self._unshared.append((step, count, [plain(lines[index]) for index in sorted(lines)]))

    def share_skipped(self) -> None:
        """Logs what all processes have skipped since the last time; names each image once.

        What a kill keeps of it is of a step that no checkpoint has, and will be met again.
        """
        if not self._experiment.config.data.skip_corrupt:
            return
        told = [tuple(entry) for entries in together.exchange(self._unshared) for entry in entries]
        self._unshared = []
        self._writer.skipped(line for _, _, lines in sorted(told) for line in lines)
        for step in sorted({step for step, _, _ in told}):
            self._writer.log(step, "data", {"skipped": sum(count for at, count, _ in told if at == step)})

    @contextlib.contextmanager
    def fetching(self, step: int, state: TrainState) -> Iterator[None]:
        """Inside, a batch is waited for. If it can't be made, the state is saved first, on one process alone: others
        have their batch, and don't come to save.

        Raises:
          UserError: naming all images that can't be decoded, where one can't.
        """
        try:
            with self.speed.waiting():
                yield
        except UserError as error:
            if not together.are_several():
                self.save(step, state)
            if not isinstance(error, DamagedImageError):
                raise
            data, split = self._experiment.config.data, self._experiment.dataset.train
            raise UserError(f"{streams.all_damage(data, split, error)}{streams.OR_SKIP}") from error

    @contextlib.contextmanager
    def evaluating(self, step: int, state: TrainState) -> Iterator[None]:
        """Inside, a state is evaluated. If that can't be done, which all processes find, it is saved first: a run that
        goes on makes up for it.
        """
        self.read()  # the line of a step comes before that of its evaluation
        try:
            with self.speed.stopped():
                yield
        except DamagedImageError:
            self.save(step, state)
            raise

    # --- evaluations and checkpoints ---------------------------------------------------------------------------

    def evaluated(self, step: int, evaluation: Evaluation) -> None:
        """Logs an evaluation, unless it is in the log already, and names what it has left out."""
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
        """Begins to write a checkpoint. All processes must come, and have the same state.

        Raises:
          NonFiniteLossError: if a loss up to there was not finite.
          FaultError: if the processes don't agree.
          UserError: if the checkpoint before could not be written.
        """
        self.read()  # a line of the log comes before the state that follows it, or a kill could lose the line
        self._refuse(int(jax.device_get(state.first_bad_step)))  # what isn't finite is never kept
        self.share_skipped()
        with self.speed.stopped():
            if together.are_several():
                agree_on(state, step, f"a machine computes wrongly, and nothing was saved; {AGAIN}")
            self._writer.save(step, state, self.scores.get(step))

    def end(self, step: int) -> dict[str, Any] | None:
        """Ends the session: of a run that is over with its summary, of one that was stopped with None."""
        self._writer.wait()  # a run is finished when its last checkpoint is on disk
        self._writer.needed(meshes.peak_memory(self._experiment.mesh))
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
    """The fingerprint of a state, of which every process must have the same copy.

    Raises:
      FaultError: if one has another, with the ``mend``.
    """
    copy = fingerprint(state)
    together.agree({f"the state after step {step}": copy}, mend=mend, kind=FaultError)
    return copy


@contextlib.contextmanager
def open_run(experiment: Experiment, workdir: pathlib.Path, stream: TextIO, supervisor: Supervisor) -> Iterator[Run]:
    """Locks the run's folder, makes sure that it is of this run, and reads how far it is; the first process does.

    Raises:
      UserError: if the folder is another run's or another process's, or can't be used.
    """
    with contextlib.ExitStack() as stack:
        with supervisor.compiling():
            writer: Writer = NoWriter()
            checkpoints = restored = found = None
            if together.is_first():
                checkpoints = stack.enter_context(_open_folder(experiment, workdir))
                restored = checkpoints.restore()
                found = _found(experiment, workdir, restored)
            found = Found(*together.from_first(found))
            if checkpoints is not None and found.summary is None:
                start = found.step or 0
                writer = stack.enter_context(open_writer(experiment, workdir, checkpoints, start, stream))
            elif checkpoints is not None:
                print(f"{workdir}: finished already, at step {found.step}; nothing to do", file=stream)
            run = Run(experiment, writer, found, restored)
            del restored  # its arrays would stay in the host's memory all through training
        yield run


@contextlib.contextmanager
def _open_folder(experiment: Experiment, workdir: pathlib.Path) -> Iterator[Checkpoints]:
    run_folder.refuse_foreign(workdir)
    # A machine that has died keeps its lock on a network's file system for a while.
    with run_folder.lock(workdir, _LOCK_S if together.are_several() else 0.0):
        devices = meshes.describe(experiment.mesh)

        def why_not(old: Config) -> str | None:
            taken = max(Checkpoints(workdir).steps(), default=0)
            scores = {at: score for at, score in read_scores(workdir).items() if at <= taken}
            return length.why_not(experiment, old, workdir, taken, scores)

        run_folder.begin_session(workdir, experiment.config, experiment.facts, devices, why_not)
        with Checkpoints(workdir, experiment.config.checkpoint) as checkpoints:
            yield checkpoints


def _found(experiment: Experiment, workdir: pathlib.Path, restored: Restored | None) -> Found:
    step = restored.step if restored else None
    scores = {at: score for at, score in read_scores(workdir).items() if at <= (step or 0)}
    summary, report = workdir / run_folder.SUMMARY, workdir / REPORT
    done = experiment.plan.is_over(step or 0, scores) and summary.exists() and report.exists()
    return Found(step, list(scores.items()), read_json(summary) if done else None)
