"""Decides whether a run can be resumed with another number of steps, as if it had had that number from its start."""

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
"""Number of steps whose learning rates are computed at once."""


def why_not(
    experiment: Experiment, old: Config, workdir: pathlib.Path, steps_done: int, scores: Mapping[int, float]
) -> str | None:
    """Says why a run's length can't be changed, and what the user can do instead; None if it can be changed.

    It can if each step so far would have had the same learning rate, to the bit. Nothing else depends on the number of
    steps: data, augmentation, stages, averages and random numbers depend on the number of the step only.

    Args:
      experiment: the experiment with the new length.
      old: the config of the run so far; it differs from the experiment's in its length only.
      workdir: the run folder, which the message names.
      steps_done: steps of the newest checkpoint.
      scores: scores of the run's evaluations, by their steps.
    """
    config, plan = experiment.config, experiment.plan
    new_run = (
        f"to start a new run from its weights, give --config, --config.init.weights={workdir} and another --workdir"
    )
    if config.train.steps is not None and config.train.steps == old.train.steps:
        return f"train.steps={config.train.steps} sets the length, not train.epochs; give --config.train.steps=None too"
    if steps_done > plan.total_steps:
        return f"the run has already taken {steps_done} steps; {new_run}"
    if steps_done < plan.total_steps and plan.is_over(steps_done, scores):
        return f"train.patience={config.train.patience} has ended the run, and more steps don't change that; {new_run}"
    old_plan = make_plan(old, len(experiment.dataset.train), experiment.task.model.parts)
    old_rates, new_rates = (
        _rates(make_schedule(config.optim, config.peak_lr, plan.steps_per_epoch, total), steps_done)
        for total in (old_plan.total_steps, plan.total_steps)
    )
    if len(differing := np.flatnonzero(old_rates != new_rates)) == 0:
        return None
    first, key = differing[0], "schedule" if config.optim.schedule == "cosine" else "lr_noise"
    return (
        f"optim.{key}={getattr(config.optim, key)!r} makes the learning rate depend on the length: step {first + 1} was"
        f" taken at {old_rates[first]:.6g}, and would now be taken at {new_rates[first]:.6g}; {new_run}"
    )


def _rates(schedule: optax.Schedule, steps: int) -> np.ndarray:
    """Returns the learning rates of the first ``steps`` steps."""
    return np.asarray(jax.jit(lambda counts: jax.lax.map(schedule, counts, batch_size=_TOGETHER))(jnp.arange(steps)))
