"""The train loop, in the order in which things happen."""

from __future__ import annotations

import collections
import contextlib
import functools
import pathlib
import statistics
import sys
from collections.abc import Callable, Mapping
from typing import Any, TextIO

import jax
import numpy as np

from mnv2_jax.config import Config
from mnv2_jax.data.images import DamagedImageError
from mnv2_jax.data.sources import Dataset
from mnv2_jax.errors import UserError
from mnv2_jax.json_files import read_json, write_json
from mnv2_jax.models.unfold import are_folded
from mnv2_jax.ops.metrics import scalars
from mnv2_jax.training import mesh as meshes
from mnv2_jax.training import run_folder
from mnv2_jax.training.checkpoint import Checkpoints, Restored, from_leaves
from mnv2_jax.training.evaluate import make_evaluate
from mnv2_jax.training.experiment import Experiment, best_of, check_training
from mnv2_jax.training.finetune import stage_at
from mnv2_jax.training.initial import check_network, open_weights, with_weights
from mnv2_jax.training.metrics_log import read_evaluations, read_metrics
from mnv2_jax.training.recorder import Recorder
from mnv2_jax.training.report import NAME as REPORT
from mnv2_jax.training.report import absent_classes, save_pictures, write_report
from mnv2_jax.training.signals import Stopped, stop_requested
from mnv2_jax.training.state import TrainState
from mnv2_jax.training.step import Metrics
from mnv2_jax.types import Batch

SUMMARY, EVALUATION = "summary.json", "evaluation.json"


def train(experiment: Experiment, workdir: pathlib.Path, stream: TextIO = sys.stdout) -> dict[str, Any] | None:
    """Trains to the end, from the newest checkpoint if the folder has one.

    SIGTERM and Ctrl-C save a checkpoint and return; the same call goes on from there, to the bit.

    Args:
      experiment: what to train.
      workdir: the run's folder; made if need be.
      stream: where text goes.

    Returns:
      What `summary.json` holds; None if a signal came first.

    Raises:
      UserError: if the config can't be trained on these devices and data, the folder is another run's or another
        process's, or an image can't be read.
      NonFiniteLossError: naming the step; no checkpoint holds it or what came after.
    """
    check_training(experiment)
    run_folder.refuse_foreign(workdir)
    with run_folder.lock(workdir), stop_requested() as stop:
        run_folder.prepare(workdir, experiment.config, experiment.facts(), meshes.describe(experiment.mesh))
        with Checkpoints(workdir, experiment.config.checkpoint) as checkpoints:
            restored = checkpoints.restore()
            start, total = restored.step if restored else 0, experiment.total_steps
            top1_of = {step: line["top1"] for step, line in read_evaluations(workdir).items() if step <= start}
            if experiment.is_over(start, top1_of) and (workdir / SUMMARY).exists() and (workdir / REPORT).exists():
                print(f"{workdir}: finished already, at step {start}; nothing to do", file=stream)
                return read_json(workdir / SUMMARY)
            with contextlib.closing(Recorder(experiment, workdir, start, stream)) as recorder:
                recorder.say(f"{workdir}: {'going on at' if start else 'starting;'} step {start} of {total}")
                if absent := _absent_classes(experiment.dataset):
                    recorder.say(absent)
                state = _begin(experiment, restored, recorder)
                del restored  # its arrays would stay in the host's memory all through training
                try:
                    result = _run(experiment, state, start, checkpoints, recorder, stop)
                except Stopped:  # before the first step: there is nothing new to save
                    result = None
                checkpoints.wait()  # a run is finished when its last checkpoint is on disk
                if result is None:
                    recorder.say("stopped and saved; the same command goes on from here")
                    return None
                return _finish(experiment, workdir, recorder, *result)


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
    checkpoints: Checkpoints,
    recorder: Recorder,
    stop: Callable[[], bool],
) -> tuple[int, Mapping[str, Any]] | None:
    """From the first step to the last; gives its number and its evaluation, or None if it was stopped."""
    config = experiment.config
    take_step = _steps(experiment, recorder)
    evaluate = make_evaluate(experiment, stop)
    result: Mapping[str, Any] | None = None

    def save(step: int, metric: float | None) -> None:
        recorder.read()  # a line of the log comes before the state that follows it, or a kill could lose the line
        recorder.check(state)  # what isn't finite is never kept
        with recorder.speed.stopped():
            checkpoints.save(step, state, metric)

    step, is_over = start, experiment.is_over(start, recorder.top1_of)
    # An evaluation that a signal cut short, or whose results a kill lost, is made up for.
    if experiment.evaluates_at(start) and (is_over or start not in recorder.top1_of):
        result = evaluate(state.variables)
        if result is not None and start not in recorder.top1_of:
            recorder.evaluated(start, result)
            checkpoints.note_metric(start, result["top1"])
            is_over = experiment.is_over(start, recorder.top1_of)

    batches = iter(()) if is_over else experiment.train_batches(stop, recorder.skipped)(start)
    while not is_over and not stop():
        try:
            with recorder.speed.waiting():
                batch = next(batches)
        except UserError as error:  # an image that doesn't decode
            save(step, None)
            if isinstance(error, DamagedImageError):
                raise UserError(f"{error}; or go on without it: --config.data.skip_corrupt=True") from error
            raise
        state, metrics = take_step(step, state, batch)  # only dispatched: from here on the device is busy
        step += 1
        evaluates, is_over = experiment.evaluates_at(step), step == experiment.total_steps
        if evaluates or step % config.log.every_steps == 0:
            recorder.note(step, metrics)
        if evaluates:
            recorder.read()
            with recorder.speed.stopped():
                result = evaluate(state.variables)
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
    experiment: Experiment, recorder: Recorder
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
    in_flight: collections.deque[Metrics] = collections.deque()

    def take_step(step: int, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        stage, shape = stage_at(stages, step), batch["image"].shape
        is_new = (stage, shape) not in programs
        with jax.transfer_guard("disallow"), recorder.speed.stopped() if is_new else contextlib.nullcontext():
            state, metrics = compiled(stage)(state, batch)
            if is_new:
                jax.block_until_ready(metrics)
        recorder.read()  # the metrics noted a step ago
        in_flight.append(metrics)
        if len(in_flight) > 2:  # or batches that come faster than steps would fill the device's memory
            jax.block_until_ready(in_flight.popleft())
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


def _begin(experiment: Experiment, restored: Restored | None, recorder: Recorder) -> TrainState:
    """A fresh state, or the saved one; on the devices."""
    config = experiment.config
    if restored is None:
        state = meshes.compile_init(experiment.mesh, experiment.init_state)()
        if config.init.weights is not None:
            weights = open_weights(config.init.weights, config.model)
            check_network(config, weights)
            if are_folded(weights.model, weights.variables):
                recorder.say("the norms of the weights are folded; their statistics are taken from training images")
                weights = experiment.unfolded(weights)
            state = meshes.put(experiment.mesh, with_weights(state, weights, config.init.head))
        return state
    return meshes.put(experiment.mesh, from_leaves(restored.leaves, jax.eval_shape(experiment.init_state)))


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
    """How often an image was skipped, over all sessions, where that is allowed."""
    if not config.data.skip_corrupt:
        return {}
    return {"skipped": sum(line.get("skipped") or 0 for line in read_metrics(workdir) if line["split"] == "data")}


def _images_per_second(workdir: pathlib.Path) -> float | None:
    """The median of the log's, over all sessions; None where no session took two steps."""
    train = (line for line in read_metrics(workdir) if line["split"] == "train")
    speeds = [line["images_per_second"] for line in train if line.get("images_per_second")]
    return statistics.median(speeds) if speeds else None
