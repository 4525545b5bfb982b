"""The train loop, in the order in which things happen."""

from __future__ import annotations

import contextlib
import pathlib
import statistics
import sys
from collections.abc import Callable, Mapping
from typing import Any, TextIO

import jax

from mnv2_jax.errors import UserError
from mnv2_jax.json_files import read_json, write_json
from mnv2_jax.ops.metrics import scalars
from mnv2_jax.training import mesh as meshes
from mnv2_jax.training import run_folder
from mnv2_jax.training.checkpoint import Checkpoints, Restored, from_leaves
from mnv2_jax.training.evaluate import make_evaluate
from mnv2_jax.training.experiment import Experiment, check_training
from mnv2_jax.training.initial import check_network, open_weights, with_weights
from mnv2_jax.training.metrics_log import read_metrics
from mnv2_jax.training.recorder import Recorder
from mnv2_jax.training.report import NAME as REPORT
from mnv2_jax.training.report import write_report
from mnv2_jax.training.signals import Stopped, stop_requested
from mnv2_jax.training.state import TrainState
from mnv2_jax.training.step import make_train_step

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
            if start == total and (workdir / SUMMARY).exists() and (workdir / REPORT).exists():
                print(f"{workdir}: finished already, at step {total}; nothing to do", file=stream)
                return read_json(workdir / SUMMARY)
            with contextlib.closing(Recorder(experiment, workdir, start, stream)) as recorder:
                recorder.say(f"{workdir}: {'going on at' if start else 'starting;'} step {start} of {total}")
                state = _begin(experiment, restored)
                del restored  # its arrays would stay in the host's memory all through training
                try:
                    result = _run(experiment, state, start, checkpoints, recorder, stop)
                except Stopped:  # before the first step: there is nothing new to save
                    result = None
                checkpoints.wait()  # a run is finished when its last checkpoint is on disk
                if result is None:
                    recorder.say("stopped and saved; the same command goes on from here")
                    return None
                return _finish(experiment, workdir, recorder, result)


def _run(
    experiment: Experiment,
    state: TrainState,
    start: int,
    checkpoints: Checkpoints,
    recorder: Recorder,
    stop: Callable[[], bool],
) -> Mapping[str, Any] | None:
    """From the first step to the last; gives the last evaluation, or None if it was stopped."""
    config, mesh, total = experiment.config, experiment.mesh, experiment.total_steps
    train_step = meshes.compile_train_step(mesh, make_train_step(experiment.task, experiment.optimizer, config))
    evaluate = make_evaluate(experiment, stop)
    result: Mapping[str, Any] | None = None

    def save(step: int, metric: float | None) -> None:
        recorder.read()  # a line of the log comes before the state that follows it, or a kill could lose the line
        recorder.check(state)  # what isn't finite is never kept
        with recorder.speed.stopped():
            checkpoints.save(step, state, metric)

    # An evaluation that a signal cut short, or whose results a kill lost, is made up for.
    if experiment.evaluates_at(start) and (start == total or not recorder.was_evaluated(start)):
        result = evaluate(state.variables)
        if result is not None and not recorder.was_evaluated(start):
            recorder.evaluated(start, result)
            checkpoints.note_metric(start, result["top1"])

    batches = experiment.train_batches(stop)(start) if start < total else iter(())
    step = start
    while step < total and not stop():
        try:
            with recorder.speed.waiting():
                batch = next(batches)
        except UserError:  # an image that doesn't decode
            save(step, None)
            raise
        with jax.transfer_guard("disallow"):
            state, metrics = train_step(state, batch)  # only dispatched: from here on the device is busy
        step += 1
        recorder.read()  # the metrics noted a step ago
        recorder.speed.step_done()
        if step == start + 1:
            jax.block_until_ready(metrics)
            recorder.speed.restart()  # compilation is not speed

        evaluates = experiment.evaluates_at(step)
        if evaluates or step % config.log.every_steps == 0:
            recorder.note(step, metrics)
        if evaluates:
            recorder.read()
            with recorder.speed.stopped():
                result = evaluate(state.variables)
            if result is not None:
                recorder.evaluated(step, result)
                save(step, result["top1"])
        elif step % config.checkpoint.every_steps == 0:
            save(step, None)
    if stop():
        save(step, None)
        return None
    return result


def _begin(experiment: Experiment, restored: Restored | None) -> TrainState:
    """A fresh state, or the saved one; on the devices."""
    config = experiment.config
    if restored is None:
        state = meshes.compile_init(experiment.mesh, experiment.init_state)()
        if config.init.weights is not None:
            weights = open_weights(config.init.weights, config.model)
            check_network(config, weights)
            state = meshes.put(experiment.mesh, with_weights(state, weights, config.init.head))
        return state
    return meshes.put(experiment.mesh, from_leaves(restored.leaves, jax.eval_shape(experiment.init_state)))


def _finish(
    experiment: Experiment, workdir: pathlib.Path, recorder: Recorder, result: Mapping[str, Any]
) -> dict[str, Any]:
    """Writes evaluation.json, summary.json and the report."""
    model, config = experiment.model_summary(), experiment.config
    summary = {
        "model": config.model.name,
        "width": config.model.width,
        "data": config.data.name,
        "resolution": config.data.resolution,
        "params": model.params,
        "madds": model.madds,
        "steps": experiment.total_steps,
        "seconds": round(recorder.seconds, 1),
        "images_per_second": _images_per_second(workdir),
        "eval_split": experiment.dataset.eval.name,
        "eval": scalars(result),
    }
    write_json(workdir / EVALUATION, {"step": experiment.total_steps, **result})
    write_json(workdir / SUMMARY, summary)
    write_report(workdir)
    recorder.say(
        f"{summary['eval_split']} top-1 {result['top1']:.2%} on {result['count']} images"
        f" after {summary['seconds']:.0f} s\n"
        f"  checkpoints  {workdir / 'checkpoints'}\n"
        f"  log          {workdir / 'metrics.jsonl'}\n"
        f"  summary      {workdir / SUMMARY}\n"
        f"  report       {workdir / REPORT}"
    )
    return summary


def _images_per_second(workdir: pathlib.Path) -> float | None:
    """The median of the log's, over all sessions; None where no session took two steps."""
    train = (line for line in read_metrics(workdir) if line["split"] == "train")
    speeds = [line["images_per_second"] for line in train if line.get("images_per_second")]
    return statistics.median(speeds) if speeds else None
