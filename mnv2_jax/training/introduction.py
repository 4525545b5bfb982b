"""The lines that a run prints before it trains."""

from __future__ import annotations

import math
import pathlib
import shlex
from collections.abc import Iterator

import jax

from mnv2_jax.config import spanning_groups
from mnv2_jax.models.plan import part_of
from mnv2_jax.models.registry import variable_shapes
from mnv2_jax.processes.runtime import idle_devices
from mnv2_jax.runs.metrics_log import TENSORBOARD
from mnv2_jax.training import mesh as meshes
from mnv2_jax.training.experiment import Experiment
from mnv2_jax.weights.file import describe


def introduce(experiment: Experiment, workdir: pathlib.Path, start: int) -> Iterator[str]:
    """Yields lines: the run folder and its step; data, model, batch and devices; then notes for the user.

    Args:
      experiment: the experiment to train.
      workdir: the run folder.
      start: steps done.
    """
    config, plan, data, model = experiment.config, experiment.plan, experiment.dataset, experiment.task.model
    yield f"{workdir}: {'going on at' if start else 'starting;'} step {start} of {plan.total_steps}"
    yield (
        f"  data     {data.name}: {len(data.class_names):,} classes, {len(data.train):,} images to train on,"
        f" {len(data.eval):,} of {data.eval.name} to evaluate on"
    )
    params, resolutions = _parameters(experiment, start), _resolutions(experiment)
    yield f"  model    {describe(model)}: {params}, {resolutions} px, {config.model.dtype}"
    accumulated = f" in {config.optim.accumulate_steps} parts" if config.optim.accumulate_steps > 1 else ""
    yield (
        f"  batch    {config.data.batch_size} images{accumulated}, norm groups of {config.norm.group_size};"
        f" {config.optim.name}, learning rate {config.peak_lr:g}"
    )
    devices = meshes.describe(experiment.mesh)
    processes = f" of {devices['processes']} processes" if devices["processes"] > 1 else ""
    yield f"  devices  {devices['count']} × {devices['kind']}{processes}"
    if config.log.tensorboard:
        yield f"  watch    tensorboard --logdir={shlex.quote(str(workdir / TENSORBOARD))}"
    yield from data.notes
    yield from experiment.task.notes
    yield from filter(None, (spanning_groups(config, experiment.mesh.size), idle_devices(devices["platform"])))


def _parameters(experiment: Experiment, start: int) -> str:
    """Counts the parameters, and those that the next step trains if it doesn't train all."""
    plan, model = experiment.plan, experiment.task.model
    train_from = plan.stages[plan.stage_of(start + 1)].train_from
    trained_parts = model.parts[model.parts.index(train_from) :]
    counts = {
        name: sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(branch))
        for name, branch in variable_shapes(model)["params"].items()
    }
    trained = sum(count for name, count in counts.items() if part_of(name) in trained_parts)
    total = sum(counts.values())
    return f"{total:,} parameters" if trained == total else f"{trained:,} of {total:,} parameters trained"


def _resolutions(experiment: Experiment) -> str:
    data = experiment.config.data
    if data.size is not None:
        return "×".join(map(str, data.size))
    trained = sorted({resolution for resolution, _ in experiment.plan.batch_shapes})
    text = f"{trained[0]} to {trained[-1]}" if len(trained) > 1 else f"{trained[0]}"
    return text if trained == [data.seen_resolution] else f"{text} (evaluated at {data.seen_resolution})"
