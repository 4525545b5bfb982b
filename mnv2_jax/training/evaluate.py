"""Evaluation: every image counts once, on any number of devices."""

from __future__ import annotations

import contextlib
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import numpy as np

from mnv2_jax.config import Config, differences
from mnv2_jax.data import streams
from mnv2_jax.data.images import DamagedImageError
from mnv2_jax.errors import UserError, plain
from mnv2_jax.ops.metrics import NO_ANSWER
from mnv2_jax.processes import together
from mnv2_jax.processes.supervisor import Stopped, Supervisor, supervise
from mnv2_jax.runs.checkpoint import digest, restore_variables, to_leaves
from mnv2_jax.runs.folder import read_run
from mnv2_jax.training import mesh as meshes
from mnv2_jax.training.experiment import Experiment, config_facts, open_experiment
from mnv2_jax.types import Variables
from mnv2_jax.weights.file import Weights, WeightsInfo

_MOST_MISTAKES = 24

Evaluate = Callable[[Variables], Mapping[str, Any] | None]


def make_evaluate(experiment: Experiment, supervisor: Supervisor | None = None) -> Evaluate:
    """Compiles lazily, and once.

    Returns:
      A function from variables to `Task.summarise`'s result and its `worst_mistakes`; None if the ``supervisor`` was
      for stopping on the way. With `data.skip_corrupt` the result has a line for each image that can't be decoded, as
      "skipped"; without, or where no image can be, it raises a `DamagedImageError`, in every process, that names them.
    """
    supervisor = supervisor or Supervisor()
    task, mesh = experiment.task, experiment.mesh
    metrics = jax.jit(task.metrics)  # so that its shapes are found without tracing the network again
    step = meshes.compile_eval_step(mesh, metrics)
    split, skips = experiment.dataset.eval, experiment.config.data.skip_corrupt
    batches = experiment.eval_batches(supervisor.should_stop)
    is_new = True

    def evaluate(variables: Variables) -> Mapping[str, Any]:
        nonlocal is_new
        sums, judged, throttle = None, [], meshes.make_throttle()
        damaged: dict[int, str] = {}
        for batch in supervisor.each(batches(damaged)):
            if supervisor.should_stop():
                raise Stopped
            with supervisor.compiling() if is_new else contextlib.nullcontext():
                if sums is None:
                    shapes, _ = jax.eval_shape(metrics, variables, batch)
                    sums = meshes.put(mesh, jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), shapes))
                sums, rows = step(sums, variables, batch)
                if is_new:
                    jax.block_until_ready(rows)
                throttle(rows)
            judged.append(rows)
            is_new = False
        rows = jax.device_get(judged)
        count = sum(int(batch["mask"].sum()) for batch in rows)
        if count < len(split):  # as all processes find, each of which knows what it has met itself
            told = together.exchange([[index, plain(line)] for index, line in damaged.items()])
            damaged = dict(sorted((index, line) for lines in told for index, line in lines))
            if not skips or not count:
                mend = "" if skips else streams.OR_SKIP
                raise DamagedImageError(f"{streams.damage(split, damaged)}{mend}")
        skipped = {"skipped": list(damaged.values())} if skips else {}
        return {**task.summarise(jax.device_get(sums)), "mistakes": worst_mistakes(rows), **skipped}

    def unless_stopped(variables: Variables) -> Mapping[str, Any] | None:
        try:
            return evaluate(variables)
        except Stopped:
            return None

    return unless_stopped


def worst_mistakes(judged: Sequence[Mapping[str, np.ndarray]]) -> list[dict[str, Any]]:
    """The wrongly classified images of highest loss: those of which the network was surest. It answered something.

    Args:
      judged: batches of index, label, mask, prediction, confidence and loss, each [b].

    Returns:
      At most 24, the worst first: index in the split, label, prediction, confidence (0 to 1) and loss.
    """
    rows = {name: np.concatenate([batch[name] for batch in judged]) for name in judged[0]}
    prediction = rows["prediction"]
    wrong = np.flatnonzero(rows["mask"] & (prediction != NO_ANSWER) & (prediction != rows["label"]))
    worst = wrong[np.argsort(-rows["loss"][wrong], kind="stable")][:_MOST_MISTAKES]
    names = ("index", "label", "prediction", "confidence", "loss")
    return [{name: rows[name][row].item() for name in names} for row in worst.tolist()]


def evaluate_weights(experiment: Experiment, weights: Weights) -> tuple[str, Mapping[str, Any]]:
    """Evaluates weights as they are, in an experiment that was opened with their classes.

    Returns:
      The name of the split, and `Task.summarise`'s result.

    Raises:
      Stopped: if a signal came first.
    """
    return experiment.dataset.eval.name, _evaluate(experiment, weights.variables)


def evaluate_run(
    config: Config,
    workdir: pathlib.Path,
    which: Literal["latest", "best"] | None,
    say: Callable[[str], None] = lambda line: None,
) -> tuple[int, str, Mapping[str, Any]]:
    """Evaluates a checkpoint of a run on the evaluation split of ``config``, which need not be the run's own.

    Args:
      config: the run's, perhaps with other data.
      workdir: the run's folder.
      which: of its checkpoints; None for `Config.usual_checkpoint`.
      say: called with what the data set says of itself (`Dataset.notes`).

    Returns:
      The checkpoint's step, the name of the split, and `Task.summarise`'s result.

    Raises:
      UserError: if there is no checkpoint, its model isn't that of the config, or it doesn't know a class of the data.
      Stopped: if a signal came first.
    """
    own, trained = read_run(workdir)
    step, variables = restore_variables(workdir, which or own.usual_checkpoint)
    together.agree(
        {"the checkpoint": [step, digest(to_leaves(variables))], **config_facts(config)}, config.faults.start_timeout_s
    )
    changed = [change for change in differences(own, config) if change.startswith(("model.", "norm."))]
    if changed:
        raise UserError(f"{workdir} holds another model: {changed[0]}; leave that out to evaluate it as it is")
    classes = str(workdir), WeightsInfo(labels=tuple(trained)), len(trained)
    experiment = open_experiment(config, evaluates=True, classes=classes)
    for note in experiment.dataset.notes:
        say(note)
    return step, experiment.dataset.eval.name, _evaluate(experiment, variables)


def _evaluate(experiment: Experiment, variables: Variables) -> Mapping[str, Any]:
    with supervise(experiment.config.faults) as supervisor:
        result = make_evaluate(experiment, supervisor)(meshes.put(experiment.mesh, variables))
    if result is None:
        raise Stopped
    return result
