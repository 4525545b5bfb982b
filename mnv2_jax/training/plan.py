"""When a training does what: pure numbers, made once of a config and the number of images."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from mnv2_jax.config import Config, batch_shapes
from mnv2_jax.errors import UserError
from mnv2_jax.training.finetune import Stage, make_stages, stage_at

_MOST_STEPS = 2**31 - 1
"""Largest number that `TrainState.step` can count."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """The timetable of a training. A step's number is the number of steps taken once it is done, from 1 on."""

    total_steps: int
    """Without `patience`, of which evaluations decide."""
    steps_per_epoch: float
    """Not rounded: batches cross the end of an epoch. Of several batch sizes the mean counts."""
    batch_shapes: tuple[tuple[int, int], ...]
    """(resolution, images) of the batches, each once in as many steps; each is compiled by itself."""
    stages: tuple[Stage, ...]
    """Stages: the parts that are trained, and from which step on."""
    log_every_steps: int
    save_every_steps: int
    eval_every_steps: float
    """Not rounded; 0: at the end only."""
    patience: int | None
    """Evaluations without a better score that end the training; None: it takes all steps."""

    def stage_of(self, step: int) -> int:
        """The number of the stage that a step belongs to."""
        return stage_at(self.stages, step - 1)

    def logs_at(self, step: int) -> bool:
        """Whether the metrics of a step are logged."""
        return step % self.log_every_steps == 0 or self.evaluates_at(step)

    def saves_at(self, step: int) -> bool:
        """Whether a checkpoint is due after a step, evaluated or not."""
        return step % self.save_every_steps == 0

    def evaluates_at(self, step: int) -> bool:
        """Whether an evaluation is due after a step; none is before the first."""
        every = self.eval_every_steps
        due = every > 0 and step // every > (step - 1) // every
        return step > 0 and (due or step == self.total_steps)

    def is_over(self, step: int, scores: Mapping[int, float]) -> bool:
        """Whether no step follows: this is the last, or `patience` evaluations have not bettered the best.

        Args:
          step: steps taken.
          scores: of the evaluations so far, by their steps. What isn't due, at what was the end once, doesn't count.
        """
        if step == self.total_steps or self.patience is None:
            return step == self.total_steps
        due = {at: score for at, score in scores.items() if self.evaluates_at(at)}
        return sum(other > best_of(due)[0] for other in due) >= self.patience


def make_plan(config: Config, num_images: int, parts: Sequence[str]) -> Plan:
    """The plan of a config.

    Args:
      config: `train`, `finetune`, `data`, `log` and `checkpoint` are read.
      num_images: to train on, at least 1.
      parts: of the network, in order (`Model.parts`).

    Raises:
      UserError: for a stage that doesn't unfreeze anything.
    """
    train, shapes = config.train, batch_shapes(config)
    steps_per_epoch = num_images / (sum(images for _, images in shapes) / len(shapes))
    return Plan(
        total_steps=train.steps or max(round(train.epochs * steps_per_epoch), 1),
        steps_per_epoch=steps_per_epoch,
        batch_shapes=shapes,
        stages=make_stages(config.finetune, steps_per_epoch, parts),
        log_every_steps=config.log.every_steps,
        save_every_steps=config.checkpoint.every_steps,
        eval_every_steps=train.eval_every_epochs * steps_per_epoch,
        patience=train.patience,
    )


def check_plan(plan: Plan, config: Config) -> None:
    """Refuses what doesn't go into so many steps.

    Raises:
      UserError: if the last stage or the warm-up lies behind the end, or there are more steps than can be counted.
    """
    total, optim = plan.total_steps, config.optim
    if plan.stages[-1].first_step >= total:
        raise UserError(
            f"finetune.unfreeze_epochs={list(config.finetune.unfreeze_epochs)}: the last stage begins at step"
            f" {plan.stages[-1].first_step}, and the training ends at {total}; begin it earlier"
        )
    if total > _MOST_STEPS:
        raise UserError(
            f"train.epochs={config.train.epochs:g} are {total} steps; {_MOST_STEPS} are the most, so lower it"
        )
    if (optim.warmup_steps or 0) > total:
        raise UserError(
            f"optim.warmup_steps={optim.warmup_steps} is longer than the training's {total} steps;"
            f" the most it can be: {total}"
        )
    warmup_steps = round(optim.warmup_epochs * plan.steps_per_epoch)
    if optim.warmup_steps is None and warmup_steps > total:
        raise UserError(
            f"optim.warmup_epochs={optim.warmup_epochs:g} is {warmup_steps} steps, longer than the training's"
            f" {total}; the most it can be: {total / plan.steps_per_epoch:g}"
        )


def best_of(scores: Mapping[int, float]) -> tuple[int, float]:
    """Step and score of the best evaluation, the first where several are; (0, 0) where there is none."""
    return max(scores.items(), key=lambda item: (item[1], -item[0]), default=(0, 0.0))
