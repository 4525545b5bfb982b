"""The range test of learning rates: the loss of training batches while the rate grows from step to step.

Smith, arXiv:1506.01186, 3.3; with the exponential growth and the smoothed loss of fastai, whose `lr_find` it follows.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mnv2_jax.processes.supervisor import Stopped, supervise
from mnv2_jax.training import mesh as meshes
from mnv2_jax.training.begin import fresh
from mnv2_jax.training.experiment import Experiment
from mnv2_jax.training.feeds import train_batches
from mnv2_jax.training.finetune import make_optimizers
from mnv2_jax.types import Array

SMOOTHING = 0.9
"""How much of the smoothed loss stays in each step."""
DIVERGED = 4.0
"""A smoothed loss of so many times the least ends the test."""
_FIRST_SHARE = 0.1
"""Share of the steps, from the first, that no suggestion goes by: their smoothed loss is of few batches."""


class Point(NamedTuple):
    """A step of the test."""

    lr: float
    loss: float
    """Loss of its batch before the step, as in training: smoothed labels, mixed images, a teacher's part."""
    smoothed: float


class Found(NamedTuple):
    """Result of a test."""

    points: Sequence[Point]
    diverged: bool
    """Whether it ended before its last step."""


def range_test(
    experiment: Experiment,
    lowest: float,
    highest: float,
    steps: int,
    say: Callable[[str], None] = lambda line: None,
    advance: Callable[[], object] = lambda: None,
) -> Found:
    """Trains a fresh state that is thrown away, in the config's own steps, but for the learning rate.

    Of several stages of fine-tuning the first is tried. Rates of parts of the network keep their proportions.

    Args:
      experiment: what is to be trained; of its schedule nothing counts.
      lowest: learning rate of the first step, above 0.
      highest: of the last.
      steps: in whose course the rate grows, by the same factor each; at least 2.
      say: takes what is to be noticed of the first state.
      advance: called after each step.

    Raises:
      Stopped: if a signal came first.
      UserError: if `init.weights` can't be had.
    """
    config, mesh, task = experiment.config, experiment.mesh, experiment.task
    rates = np.geomspace(lowest, highest, steps)

    def schedule(count: Array) -> Array:
        return jnp.asarray(rates, jnp.result_type(float))[count]

    stages, factor = experiment.plan.stages[:1], config.finetune.backbone_lr_factor
    experiment = dataclasses.replace(
        experiment,
        plan=dataclasses.replace(experiment.plan, stages=stages, total_steps=steps),
        optimizers=make_optimizers(config.optim, factor, schedule, stages, task.model.parts),
    )
    points: list[Point] = []
    mean, least = 0.0, math.inf
    with supervise(config.faults) as supervisor:
        state, frozen = fresh(experiment, say), meshes.put(mesh, task.frozen)
        compiled = meshes.compile_train_step(mesh, experiment.train_step(0))
        with contextlib.closing(train_batches(experiment, should_stop=supervisor.should_stop)) as batches:
            for rate, batch in zip(rates, supervisor.each(batches), strict=False):
                if supervisor.should_stop():
                    raise Stopped
                state, metrics = compiled(state, frozen, batch)
                loss = float(jax.device_get(metrics["loss"]))
                mean = SMOOTHING * mean + (1 - SMOOTHING) * loss
                smoothed = mean / (1 - SMOOTHING ** (len(points) + 1))
                if not math.isfinite(smoothed):
                    return Found(points, diverged=True)
                points.append(Point(float(rate), loss, smoothed))
                advance()
                least = min(least, smoothed)
                if smoothed > DIVERGED * least:
                    return Found(points, diverged=True)
    return Found(points, diverged=False)


class Advice(NamedTuple):
    """Suggestions of a test."""

    rates: dict[str, float]
    """Rates by the names of the rules; none where the loss fell by no more than batches differ.

    tenth: a tenth of the rate with the least smoothed loss.
    steepest: where it falls fastest over the logarithm of the rate.
    valley: half way through the longest descent, a sequence of steps, not all of them neighbours, each with a lower
      smoothed loss than the one before (fastai's default). In few steps it goes by the noise before the descent.
    """
    fall: float
    """How far the smoothed loss fell."""
    noise: float
    """Standard deviation of the batches' losses from the smoothed loss on the way."""


def advise(points: Sequence[Point]) -> Advice:
    """Reads learning rates off a test's curve."""
    counting = np.array(points, float).reshape(-1, 3)[math.floor(len(points) * _FIRST_SHARE) :]
    if len(counting) == 0:
        return Advice({}, 0.0, 0.0)
    rates, losses, smoothed = counting.T
    lowest = int(smoothed.argmin())
    descent = slice(0, lowest + 1)
    fall, noise = float(smoothed[0] - smoothed[lowest]), float(np.std(losses[descent] - smoothed[descent]))
    if fall <= noise:
        return Advice({}, fall, noise)
    steepest = np.gradient(smoothed[descent], np.log(rates[descent])).argmin()
    found = {"tenth": rates[lowest] / 10, "steepest": rates[steepest], "valley": rates[_valley(smoothed)]}
    return Advice({rule: float(rate) for rule, rate in found.items()}, fall, noise)


def _valley(losses: np.ndarray) -> int:
    """Place that fastai's rule of that name gives."""
    lengths = np.ones(len(losses), int)
    for place in range(1, len(losses)):
        higher = losses[:place] > losses[place]
        lengths[place] = 1 + (lengths[:place][higher].max() if higher.any() else 0)
    end = int(lengths.argmax())
    third = lengths[end] / 3
    return max(end - int(lengths[end]), 0) + int(third) + int(third / 2)
