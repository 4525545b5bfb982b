"""The train loop, in the order in which things happen."""

from __future__ import annotations

import contextlib
import functools
import pathlib
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, TextIO

import jax
import numpy as np

from mnv2_jax.config import Config, spanning_groups
from mnv2_jax.data import streams
from mnv2_jax.data.images import DamagedImageError
from mnv2_jax.data.sources import Dataset
from mnv2_jax.errors import FaultError, UserError
from mnv2_jax.json_files import read_json, write_json
from mnv2_jax.ops.metrics import scalars
from mnv2_jax.processes import together
from mnv2_jax.processes.supervisor import Stopped, Supervisor, supervise
from mnv2_jax.report.page import NAME as REPORT
from mnv2_jax.report.page import save_pictures, write_report
from mnv2_jax.report.sections import absent_classes
from mnv2_jax.runs import folder as run_folder
from mnv2_jax.runs.checkpoint import Checkpoints, Restored, fingerprint, from_leaves
from mnv2_jax.runs.metrics_log import read_evaluations, read_metrics
from mnv2_jax.runs.weights import open_weights
from mnv2_jax.training import mesh as meshes
from mnv2_jax.training.evaluate import make_evaluate
from mnv2_jax.training.experiment import Experiment, best_of, check_training, config_facts
from mnv2_jax.training.finetune import stage_at
from mnv2_jax.training.initial import arranged, check_network, with_weights
from mnv2_jax.training.recorder import Recorder
from mnv2_jax.training.state import TrainState
from mnv2_jax.training.step import Metrics
from mnv2_jax.types import Batch
from mnv2_jax.weights.unfold import are_folded

SUMMARY, EVALUATION = "summary.json", "evaluation.json"

_LOCK_S = 120.0
_AGAIN = "start all again, without that machine if it happens twice"


def train(experiment: Experiment, workdir: pathlib.Path, stream: TextIO = sys.stdout) -> dict[str, Any] | None:
    """Trains to the end, from the newest checkpoint if the folder has one.

    SIGTERM, SIGHUP, SIGUSR1 and Ctrl-C save a checkpoint and return; the same call goes on from there, to the bit. Of
    several processes the first keeps the folder and the log, and the others need not see it.

    Args:
      experiment: what to train.
      workdir: the run's folder; made if need be.
      stream: where text goes; only the first process has something to say.

    Returns:
      What `summary.json` holds; None if a signal came first.

    Raises:
      UserError: if the config can't be trained on these devices and data, the folder is another run's or another
        process's, or an image can't be read.
      NonFiniteLossError: naming the step; no checkpoint holds it or what came after.
    """
    check_training(experiment)
    config = experiment.config
    together.agree({**config_facts(config), **experiment.facts()}, config.faults.start_timeout_s)
    with supervise(config.faults) as supervisor, contextlib.ExitStack() as stack:
        with supervisor.compiling():
            checkpoints, restored, found = None, None, None
            if together.is_first():
                checkpoints = stack.enter_context(_open_folder(experiment, workdir))
                restored = checkpoints.restore()
                found = _found(experiment, workdir, restored)
            found = Found(*together.from_first(found))
            if found.summary is not None:
                if together.is_first():
                    print(f"{workdir}: finished already, at step {found.step}; nothing to do", file=stream)
                return found.summary
            start, total = found.step or 0, experiment.total_steps
            recorder = Recorder(experiment, workdir if checkpoints else None, start, dict(found.top1_of), stream)
            stack.enter_context(contextlib.closing(recorder))
            recorder.say(f"{workdir}: {'going on at' if start else 'starting;'} step {start} of {total}")
            notes = *experiment.dataset.notes, _absent_classes(experiment.dataset)
            for line in filter(None, (*notes, spanning_groups(config, experiment.mesh.size))):
                recorder.say(line)
            state = _begin(experiment, found, restored, recorder)
            del restored  # its arrays would stay in the host's memory all through training
        try:
            result = _run(experiment, state, start, checkpoints, recorder, supervisor)
        except Stopped:  # before the first step: there is nothing new to save
            result = None
        with supervisor.compiling():
            summary = None
            if checkpoints is not None:
                checkpoints.wait()  # a run is finished when its last checkpoint is on disk
                if result is not None:
                    summary = _finish(experiment, workdir, recorder, *result)
            if result is None:
                recorder.say("stopped and saved; the same command goes on from here")
            return together.from_first(summary)


@contextlib.contextmanager
def _open_folder(experiment: Experiment, workdir: pathlib.Path) -> Iterator[Checkpoints]:
    """Locks the run's folder, and makes sure that it is of this run."""
    run_folder.refuse_foreign(workdir)
    # A machine that has died keeps its lock on a network's file system for a while.
    with run_folder.lock(workdir, _LOCK_S if together.are_several() else 0.0):
        run_folder.prepare(workdir, experiment.config, experiment.facts(), meshes.describe(experiment.mesh))
        with Checkpoints(workdir, experiment.config.checkpoint) as checkpoints:
            yield checkpoints


class Found(NamedTuple):
    """What process 0 tells the others of the run's folder."""

    step: int | None
    """Of the checkpoint that it goes on from; None: there is none."""
    top1_of: list[tuple[int, float]]
    """The evaluations up to there, with their steps."""
    summary: dict[str, Any] | None
    """Of a run that is finished."""


def _found(experiment: Experiment, workdir: pathlib.Path, restored: Restored | None) -> Found:
    step = restored.step if restored else None
    top1_of = {at: line["top1"] for at, line in read_evaluations(workdir).items() if at <= (step or 0)}
    done = experiment.is_over(step or 0, top1_of) and (workdir / SUMMARY).exists() and (workdir / REPORT).exists()
    return Found(step, list(top1_of.items()), read_json(workdir / SUMMARY) if done else None)


def _absent_classes(dataset: Dataset) -> str:
    """Says which classes won't be evaluated; "" where there are none, or only a pass over the files could tell."""
    labels, names = dataset.eval.labels, dataset.class_names
    if not isinstance(labels, np.ndarray):
        return ""
    return absent_classes(dataset.eval.name, names, np.bincount(labels, minlength=len(names)).tolist())


def _run(
    experiment: Experiment,
    state: TrainState,
    start: int,
    checkpoints: Checkpoints | None,
    recorder: Recorder,
    supervisor: Supervisor,
) -> tuple[int, Mapping[str, Any]] | None:
    """From the first step to the last; gives its number and its evaluation, or None if it was stopped."""
    config, stop = experiment.config, supervisor.should_stop
    take_step = _steps(experiment, recorder, supervisor)
    evaluate = make_evaluate(experiment, supervisor)
    result: Mapping[str, Any] | None = None

    def save(step: int, metric: float | None) -> None:
        recorder.read()  # a line of the log comes before the state that follows it, or a kill could lose the line
        recorder.check(state)  # what isn't finite is never kept
        recorder.share_skipped()
        with recorder.speed.stopped():
            if together.are_several():
                _agree_on(state, step, f"a machine computes wrongly, and nothing was saved; {_AGAIN}")
            if checkpoints is not None:
                checkpoints.save(step, state, metric)

    step, is_over = start, experiment.is_over(start, recorder.top1_of)
    # An evaluation that a signal cut short, or whose results a kill lost, is made up for.
    if experiment.evaluates_at(start) and (is_over or start not in recorder.top1_of):
        result = evaluate(state.variables)
        if result is not None and start not in recorder.top1_of:
            recorder.evaluated(start, result)
            if checkpoints is not None:
                checkpoints.note_metric(start, result["top1"])
            is_over = experiment.is_over(start, recorder.top1_of)

    batches = iter(()) if is_over else supervisor.each(experiment.train_batches(stop, recorder.skipped)(start))
    while not is_over and not stop():
        try:
            # A teacher may have to be compiled for it; one that is stuck here keeps the others waiting in a step.
            with recorder.speed.waiting(), supervisor.compiling():
                batch = next(batches)
        except Stopped:
            continue
        except UserError as error:  # an image that doesn't decode
            if not together.are_several():  # the others have theirs, and don't come to save with us
                save(step, None)
            if isinstance(error, DamagedImageError):
                all_of_them = streams.all_damage(config.data, experiment.dataset.train, error)
                raise UserError(f"{all_of_them}{streams.OR_SKIP}") from error
            raise
        state, metrics = take_step(step, state, batch)  # only dispatched: from here on the device is busy
        step += 1
        evaluates, is_over = experiment.evaluates_at(step), step == experiment.total_steps
        if evaluates or step % config.log.every_steps == 0:
            recorder.note(step, metrics)
        if evaluates:
            recorder.read()
            try:
                with recorder.speed.stopped():
                    result = evaluate(state.variables)
            except DamagedImageError:  # in all processes; a run that goes on makes up for the evaluation
                save(step, None)
                raise
            if result is not None:
                recorder.evaluated(step, result)
                is_over = experiment.is_over(step, recorder.top1_of)
                save(step, result["top1"])
        elif step % config.checkpoint.every_steps == 0:
            save(step, None)
    if stop():
        save(step, None)
        return None
    assert result is not None
    return step, result


def _steps(
    experiment: Experiment, recorder: Recorder, supervisor: Supervisor
) -> Callable[[int, TrainState, Batch], tuple[TrainState, Metrics]]:
    """The step after so many steps. One program for each stage of fine-tuning and each shape of a batch, compiled when
    it is first needed; that time is not counted as training.
    """
    compiled = functools.cache(lambda stage: meshes.compile_train_step(experiment.mesh, experiment.train_step(stage)))
    stages, shapes = experiment.stages, experiment.batch_shapes
    most = len(stages) * len(shapes)
    if len(shapes) > 1:
        listed = ", ".join(f"{resolution} px × {images}" for resolution, images in shapes)
        recorder.say(f"batches of {len(shapes)} shapes: {listed}")
    programs: set[tuple[int, tuple[int, ...]]] = set()
    throttle = meshes.make_throttle()

    def take_step(step: int, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        stage, shape = stage_at(stages, step), batch["image"].shape
        is_new = (stage, shape) not in programs
        with jax.transfer_guard("disallow"), contextlib.ExitStack() as first_time:
            if is_new:
                first_time.enter_context(recorder.speed.stopped())
                first_time.enter_context(supervisor.compiling())
            state, metrics = compiled(stage)(state, batch)
            if is_new:
                jax.block_until_ready(metrics)
        recorder.read()  # the metrics noted a step ago
        throttle(metrics)
        if is_new:
            if not programs:
                recorder.speed.restart()  # what came before the first step was no training
            programs.add((stage, shape))
            if most > 1:
                part = stages[stage].train_from
                recorder.say(
                    f"step {step + 1}: compiled program {len(programs)} of at most {most}: {shape[1]} px × {shape[0]},"
                    f" trained from {part} on"
                )
        else:
            recorder.speed.step_done(shape[0])
        return state, metrics

    return take_step


def _begin(experiment: Experiment, found: Found, restored: Restored | None, recorder: Recorder) -> TrainState:
    """A fresh state, or the saved one, which process 0 has restored; on the devices."""
    config = experiment.config
    if found.step is None:
        state = meshes.compile_init(experiment.mesh, experiment.init_state)()
        if config.init.weights is not None:
            weights = open_weights(config.init.weights, config.model, config.init.head)
            check_network(config, weights)
            if are_folded(weights.model, weights.variables):
                recorder.say("the norms of the weights are folded; their statistics are taken from training images")
                weights = experiment.unfolded(weights)
            if config.init.head == "load":
                weights = arranged(weights, experiment.dataset)
            state = together.broadcast(with_weights(state, weights, config.init.head))
            state = meshes.put(experiment.mesh, state)
        if together.are_several():
            _agree_on(state, 0, "start all with the same weights, on the same kind of machine")
        return state
    like = jax.eval_shape(experiment.init_state)
    empty = functools.partial(jax.tree.map, lambda leaf: np.zeros(leaf.shape, leaf.dtype))
    saved = empty(like) if restored is None else from_leaves(restored.leaves, like)
    state = meshes.put(experiment.mesh, together.broadcast(saved))
    recorder.say(f"restored the state {_agree_on(state, found.step, _AGAIN)[:16]}")
    return state


def _agree_on(state: TrainState, step: int, mend: str) -> str:
    """The fingerprint of a state, of which every process has the same copy."""
    copy = fingerprint(state)
    together.agree({f"the state after step {step}": copy}, mend=mend, kind=FaultError)
    return copy


def _finish(
    experiment: Experiment, workdir: pathlib.Path, recorder: Recorder, step: int, result: Mapping[str, Any]
) -> dict[str, Any]:
    """Writes evaluation.json, summary.json and the report."""
    model, config = experiment.model_summary(), experiment.config
    best_step, best_top1 = best_of(recorder.top1_of)
    summary = {
        "model": config.model.name,
        "width": config.model.width,
        "data": config.data.name,
        "resolution": config.data.seen_resolution,
        "params": model.params,
        "madds": model.madds,
        "steps": step,
        "seconds": round(recorder.seconds, 1),
        "images_per_second": _images_per_second(workdir),
        **_skipped(workdir, config),
        "eval_split": experiment.dataset.eval.name,
        **({"eval_skipped": len(result["skipped"])} if "skipped" in result else {}),
        "eval": scalars(result),
        "best": {"step": best_step, "top1": best_top1},
    }
    write_json(workdir / EVALUATION, {"step": step, **result})
    write_json(workdir / SUMMARY, summary)
    save_pictures(workdir, experiment.dataset.eval, [mistake["index"] for mistake in result["mistakes"]])
    write_report(workdir)
    stopped = "" if step == experiment.total_steps else f"; no better in {config.train.patience} evaluations, so ended"
    recorder.say(
        f"{summary['eval_split']} top-1 {result['top1']:.2%} on {result['count']} images"
        f" after {summary['seconds']:.0f} s (best: {best_top1:.2%} at step {best_step}{stopped})\n"
        f"  checkpoints  {workdir / 'checkpoints'}\n"
        f"  log          {workdir / 'metrics.jsonl'}\n"
        f"  summary      {workdir / SUMMARY}\n"
        f"  report       {workdir / REPORT}"
    )
    return summary


def _skipped(workdir: pathlib.Path, config: Config) -> dict[str, int]:
    """How often an image was skipped in training, over all sessions, where that is allowed."""
    if not config.data.skip_corrupt:
        return {}
    return {"skipped": sum(line.get("skipped") or 0 for line in read_metrics(workdir) if line["split"] == "data")}


def _images_per_second(workdir: pathlib.Path) -> float | None:
    """The median of the log's, over all sessions; None where no session took two steps."""
    train = (line for line in read_metrics(workdir) if line["split"] == "train")
    speeds = [line["images_per_second"] for line in train if line.get("images_per_second")]
    return statistics.median(speeds) if speeds else None
