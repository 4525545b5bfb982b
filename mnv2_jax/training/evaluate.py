"""Evaluation of a split: every image counts once, on any number of devices."""

from __future__ import annotations

import contextlib
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import jax
import numpy as np

from mnv2_jax.config import Config, differences
from mnv2_jax.data import streams
from mnv2_jax.data.images import DamagedImageError
from mnv2_jax.errors import UserError, plain
from mnv2_jax.processes import together
from mnv2_jax.processes.supervisor import Stopped, Supervisor, supervise
from mnv2_jax.runs.checkpoint import digest, restore_variables, to_leaves
from mnv2_jax.runs.folder import read_run
from mnv2_jax.tasks.base import Evaluation
from mnv2_jax.training import mesh as meshes
from mnv2_jax.training.experiment import Setup, config_facts, open_setup
from mnv2_jax.training.feeds import eval_parts
from mnv2_jax.types import Array, Variables
from mnv2_jax.weights.file import Weights, WeightsInfo


def make_evaluate(setup: Setup, supervisor: Supervisor | None = None) -> Callable[[Variables], Evaluation]:
    """Makes a function that evaluates variables on the evaluation split and returns the result of `Task.summarise`.

    It is compiled once, at its first call. It raises `Stopped` if the ``supervisor`` asks it to stop on the way. With
    `data.skip_corrupt` it leaves out the images that can't be decoded, as long as some can. Otherwise every process
    raises a `DamagedImageError` that names these images.
    """
    supervisor = supervisor or Supervisor()
    task, mesh = setup.task, setup.mesh
    metrics = jax.jit(task.metrics)  # so that its shapes are found without tracing the network again
    step = meshes.compile_eval_step(mesh, metrics)
    split, skips = setup.dataset.eval, setup.config.data.skip_corrupt
    parts = eval_parts(setup, supervisor.should_stop)
    compiled: set[int] = set()  # numbers of the parts for whose shapes the step was compiled

    def evaluate(variables: Variables) -> Evaluation:
        sums, throttle = None, meshes.make_throttle()
        judged: list[tuple[np.ndarray, dict[str, Array]]] = []
        damaged: dict[int, str] = {}
        for number, part in enumerate(parts):
            with contextlib.closing(part.batches(damaged)) as following:
                for batch in supervisor.each(following):
                    if supervisor.should_stop():
                        raise Stopped
                    is_new = number not in compiled
                    with supervisor.compiling() if is_new else contextlib.nullcontext():
                        if sums is None:
                            shapes, _ = jax.eval_shape(metrics, variables, batch)
                            sums = meshes.put(mesh, jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), shapes))
                        sums, rows = step(sums, variables, batch)
                        if is_new:
                            jax.block_until_ready(rows)
                        throttle(rows)
                    judged.append((part.indices, rows))
                    compiled.add(number)
        columns = _columns(jax.device_get(judged))
        counts = columns.pop("mask", np.zeros(0, bool))
        # All processes see the same mask, so all take this branch. Each knows only the damaged images that it has met.
        if counts.sum() < len(split):
            reports = together.exchange([[index, plain(line)] for index, line in damaged.items()])
            damaged = dict(sorted((index, line) for lines in reports for index, line in lines))
            if not skips or not counts.any():
                mend = "" if skips else streams.OR_SKIP
                raise DamagedImageError(f"{streams.damage_error(split, damaged)}{mend}")
        evaluation = task.summarise(jax.device_get(sums), {name: array[counts] for name, array in columns.items()})
        return evaluation._replace(skipped=list(damaged.values()))

    return evaluate


def _columns(judged: Sequence[tuple[np.ndarray, Mapping[str, np.ndarray]]]) -> dict[str, np.ndarray]:
    """Joins the rows of batches, each with the indices of its part, in the order of the split."""
    if not judged:
        return {}
    located = [{**rows, "index": indices[rows["index"]].astype(np.int32)} for indices, rows in judged]
    columns = {name: np.concatenate([rows[name] for rows in located]) for name in located[0]}
    order = np.argsort(columns["index"], kind="stable")
    return {name: array[order] for name, array in columns.items()}


def evaluate_weights(setup: Setup, weights: Weights) -> Evaluation:
    """Evaluates weights without training them, in a setup that was opened with their classes.

    Raises:
      Stopped: if a signal came first.
    """
    return _evaluate(setup, weights.variables)


def evaluate_run(
    config: Config,
    workdir: pathlib.Path,
    checkpoint: Literal["latest", "best"] | None,
    say: Callable[[str], None] = lambda line: None,
) -> tuple[Literal["latest", "best"], int, Setup, Evaluation]:
    """Evaluates a checkpoint of a run on the evaluation split of ``config``, which need not be the run's own split.

    Args:
      config: the config of the run, perhaps with other data.
      workdir: the run folder.
      checkpoint: which checkpoint of the run; None for `Config.usual_checkpoint`.
      say: called with each of `Dataset.notes`.

    Returns:
      The checkpoint's name and step, the setup that it was evaluated in, and the evaluation.

    Raises:
      UserError: if there is no checkpoint, if its model differs from the config's, or if the data have a class that the
        run wasn't trained on.
      Stopped: if a signal came first.
    """
    run_config, class_names = read_run(workdir)
    checkpoint = checkpoint or run_config.usual_checkpoint
    step, variables = restore_variables(workdir, checkpoint)
    together.agree(
        {"the checkpoint": [step, digest(to_leaves(variables))], **config_facts(config)}, config.faults.start_timeout_s
    )
    changed = [change for change in differences(run_config, config) if change.startswith(("model.", "norm."))]
    if changed:
        raise UserError(
            f"{workdir} holds a different model: {changed[0]}; leave that option out to evaluate the model as trained"
        )
    classes = str(workdir), WeightsInfo(labels=tuple(class_names)), len(class_names)
    setup = open_setup(config, classes=classes)
    for note in setup.dataset.notes:
        say(note)
    return checkpoint, step, setup, _evaluate(setup, variables)


def _evaluate(setup: Setup, variables: Variables) -> Evaluation:
    with supervise(setup.config.faults) as supervisor:
        return make_evaluate(setup, supervisor)(meshes.put(setup.mesh, variables))
