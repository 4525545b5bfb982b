"""The learning-rate range test: the loss of training batches while the rate grows from step to step.

Smith, arXiv:1506.01186, 3.3. It follows fastai's `lr_find` in the exponential growth and the smoothed loss.
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

from mnv2_jax.data.streams import naming_all_damaged
from mnv2_jax.processes.supervisor import Stopped, supervise
from mnv2_jax.training import mesh as meshes
from mnv2_jax.training.begin import fresh
from mnv2_jax.training.experiment import Experiment
from mnv2_jax.training.feeds import train_batches
from mnv2_jax.training.finetune import head_of, make_optimizers
from mnv2_jax.types import Array

SMOOTHING = 0.9
"""Share of the smoothed loss that each step keeps."""
DIVERGED = 4.0
"""The test ends when the smoothed loss is this many times its lowest value."""
_FIRST_SHARE = 0.1
"""Share of the steps, from the first on, that suggestions ignore: their smoothed loss averages too few batches."""


class Point(NamedTuple):
    """A step of the test."""

    lr: float
    loss: float
    """Loss of the batch before the step, as in training: with label smoothing, mixed images and the teacher's part."""
    smoothed: float


class RangeTest(NamedTuple):
    """Result of a range test."""

    points: Sequence[Point]
    diverged: bool
    """Whether the test ended before its last step."""


def range_test(
    experiment: Experiment,
    lowest: float,
    highest: float,
    steps: int,
    say: Callable[[str], None] = lambda line: None,
    advance: Callable[[], object] = lambda: None,
) -> RangeTest:
    """Trains a fresh state, which is then thrown away, with the config's own steps but a growing learning rate.

    If there are several stages of fine-tuning, the first is tested. `finetune.backbone_lr_factor` still applies.

    Args:
      experiment: the experiment to test; its schedule is ignored.
      lowest: learning rate of the first step, above 0.
      highest: learning rate of the last step.
      steps: number of steps, at least 2; the rate grows by the same factor at each.
      say: takes notes about the first state for the user.
      advance: called after each step.

    Raises:
      Stopped: if a signal came first.
      UserError: if `init.weights` can't be opened, or an image can't be decoded.
    """
    config, mesh, task = experiment.config, experiment.mesh, experiment.task
    rates = np.geomspace(lowest, highest, steps)

    def schedule(count: Array) -> Array:
        return jnp.asarray(rates, jnp.result_type(float))[count]

    stages, factor = experiment.plan.stages[:1], config.finetune.backbone_lr_factor
    experiment = dataclasses.replace(
        experiment,
        plan=dataclasses.replace(experiment.plan, stages=stages, total_steps=steps),
        optimizers=make_optimizers(config.optim, factor, schedule, stages, task.model.parts, head_of(task.model)),
    )
    points: list[Point] = []
    mean, least = 0.0, math.inf
    with supervise(config.faults) as supervisor:
        state, frozen = fresh(experiment, say), meshes.put(mesh, task.frozen)
        compiled = meshes.compile_train_step(mesh, experiment.train_step(0))
        with (
            naming_all_damaged(config.data, experiment.dataset.train),
            contextlib.closing(train_batches(experiment, should_stop=supervisor.should_stop)) as batches,
        ):
            for rate, batch in zip(rates, supervisor.each(batches), strict=False):
                if supervisor.should_stop():
                    raise Stopped
                state, metrics = compiled(state, frozen, batch)
                loss = float(jax.device_get(metrics["loss"]))
                mean = SMOOTHING * mean + (1 - SMOOTHING) * loss
                smoothed = mean / (1 - SMOOTHING ** (len(points) + 1))
                if not math.isfinite(smoothed):
                    return RangeTest(points, diverged=True)
                points.append(Point(float(rate), loss, smoothed))
                advance()
                least = min(least, smoothed)
                if smoothed > DIVERGED * least:
                    return RangeTest(points, diverged=True)
    return RangeTest(points, diverged=False)


class Advice(NamedTuple):
    """Learning rates that a range test suggests."""

    rates: dict[str, float]
    """Rates by the names of the rules; empty where the loss fell by no more than the losses of batches vary.

    tenth: a tenth of the rate with the lowest smoothed loss.
    steepest: the rate at which the smoothed loss falls fastest over the logarithm of the rate.
    valley: the rate half way through the longest descent (fastai's default). A descent is a sequence of steps, not
      necessarily neighbours, each with a lower smoothed loss than the one before. If the test has few steps, this rule
      follows the noise before the descent.
    """
    fall: float
    """Amount by which the smoothed loss fell."""
    noise: float
    """Standard deviation of the batches' losses around the smoothed loss during the fall."""


def advise(points: Sequence[Point]) -> Advice:
    """Reads suggested learning rates off the curve of a range test."""
    usable = np.array(points, float).reshape(-1, 3)[math.floor(len(points) * _FIRST_SHARE) :]
    if len(usable) == 0:
        return Advice({}, 0.0, 0.0)
    rates, losses, smoothed = usable.T
    lowest = int(smoothed.argmin())
    descent = slice(0, lowest + 1)
    fall, noise = float(smoothed[0] - smoothed[lowest]), float(np.std(losses[descent] - smoothed[descent]))
    if fall <= noise:
        return Advice({}, fall, noise)
    steepest = np.gradient(smoothed[descent], np.log(rates[descent])).argmin()
    suggested = {"tenth": rates[lowest] / 10, "steepest": rates[steepest], "valley": rates[_valley(smoothed)]}
    return Advice({rule: float(rate) for rule, rate in suggested.items()}, fall, noise)


def _valley(losses: np.ndarray) -> int:
    """Returns the index that fastai's rule "valley" chooses."""
    lengths = np.ones(len(losses), int)
    for place in range(1, len(losses)):
        higher = losses[:place] > losses[place]
        lengths[place] = 1 + (lengths[:place][higher].max() if higher.any() else 0)
    end = int(lengths.argmax())
    third = lengths[end] / 3
    return max(end - int(lengths[end]), 0) + int(third) + int(third / 2)
