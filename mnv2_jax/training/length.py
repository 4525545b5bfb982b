"""Whether a run can go on to another number of steps, as if it had had that number from its start."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mnv2_jax.config import Config
from mnv2_jax.training.experiment import Experiment
from mnv2_jax.training.plan import make_plan
from mnv2_jax.training.schedules import make_schedule

_TOGETHER = 4096
"""Steps whose learning rates are computed at a time."""


def why_not(
    experiment: Experiment, old: Config, workdir: pathlib.Path, taken: int, scores: Mapping[int, float]
) -> str | None:
    """Why a run can't become one of another length, and what can be done; None: it can.

    It can if each step so far would have had the same learning rate, to the bit: data, augmentation, stages, averages
    and what is random go by the number of the step, and nothing else by how many there are.

    Args:
      experiment: with the new length.
      old: what the run was, another length apart the same.
      workdir: the run's folder, to be named.
      taken: steps of its newest checkpoint.
      scores: of its evaluations, by their steps.
    """
    config, plan = experiment.config, experiment.plan
    anew = f"to begin another from its weights, give --config.init.weights={workdir} and another --workdir"
    if config.train.steps is not None and config.train.steps == old.train.steps:
        return f"train.steps={config.train.steps} decides, not train.epochs; give --config.train.steps=None, too"
    if taken > plan.total_steps:
        return f"{taken} steps are taken already; {anew}"
    if taken < plan.total_steps and plan.is_over(taken, scores):
        return f"it has ended by train.patience={config.train.patience}, which more steps don't change; {anew}"
    before = make_plan(old, len(experiment.dataset.train), experiment.task.model.parts)
    was, would_be = (
        _rates(make_schedule(config.optim, config.peak_lr, plan.steps_per_epoch, total), taken)
        for total in (before.total_steps, plan.total_steps)
    )
    if len(others := np.flatnonzero(was != would_be)) == 0:
        return None
    first, key = others[0], "schedule" if config.optim.schedule == "cosine" else "lr_noise"
    return (
        f"by optim.{key}={getattr(config.optim, key)!r} the learning rate goes by the length: that of step {first + 1}"
        f" was {was[first]:.6g}, and would be {would_be[first]:.6g}; {anew}"
    )


def _rates(schedule: optax.Schedule, steps: int) -> np.ndarray:
    """The learning rates of so many steps from the first on."""
    return np.asarray(jax.jit(lambda counts: jax.lax.map(schedule, counts, batch_size=_TOGETHER))(jnp.arange(steps)))
