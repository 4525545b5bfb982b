"""The timetable of a training: pure numbers, computed once from a config and the number of images."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from mnv2_jax.config import Config, batch_shapes
from mnv2_jax.errors import UserError
from mnv2_jax.training.finetune import Stage, make_stages, stage_at

_MOST_STEPS = 2**31 - 1
"""Largest number of steps that `TrainState.step`, an int32, can count."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """The timetable of a training. Steps are numbered from 1: step n is done when n steps have been taken."""

    total_steps: int
    """Number of steps of the training, unless `patience` ends it earlier."""
    steps_per_epoch: float
    """Not rounded, because batches cross the end of an epoch. If there are several batch sizes, their mean counts."""
    batch_shapes: tuple[tuple[int, int], ...]
    """(resolution, images) of the batches. n shapes come once each in every n steps, and each has its own program."""
    stages: tuple[Stage, ...]
    """Stages of fine-tuning: the parts that are trained, and from which step on."""
    log_every_steps: int
    save_every_steps: int
    eval_every_steps: float
    """Not rounded; 0: evaluate at the end only."""
    patience: int | None
    """Number of evaluations without a better score that ends the training; None: the training takes all steps."""

    def stage_of(self, step: int) -> int:
        """Returns the index of the stage that a step belongs to."""
        return stage_at(self.stages, step - 1)

    def logs_at(self, step: int) -> bool:
        """Whether the metrics of a step are logged."""
        return step % self.log_every_steps == 0 or self.evaluates_at(step)

    def saves_at(self, step: int) -> bool:
        """Whether a checkpoint is due after a step, evaluated or not."""
        return step % self.save_every_steps == 0

    def evaluates_at(self, step: int) -> bool:
        """Whether an evaluation is due after a step; none is due before the first step."""
        every = self.eval_every_steps
        due = every > 0 and step // every > (step - 1) // every
        return step > 0 and (due or step == self.total_steps)

    def is_over(self, step: int, scores: Mapping[int, float]) -> bool:
        """Whether the training ends here: this is the last step, or `patience` evaluations have not beaten the best.

        Args:
          step: steps taken.
          scores: scores of the evaluations so far, by their steps. An evaluation that isn't due doesn't count: it was
            made at the end of a run that was made longer since.
        """
        if step == self.total_steps or self.patience is None:
            return step == self.total_steps
        due = {at: score for at, score in scores.items() if self.evaluates_at(at)}
        return sum(at > best_of(due)[0] for at in due) >= self.patience


def make_plan(config: Config, num_images: int, parts: Sequence[str]) -> Plan:
    """Makes the plan of a config.

    Args:
      config: its sections `train`, `finetune`, `data`, `log` and `checkpoint` are read.
      num_images: number of training images, at least 1.
      parts: parts of the network, in order (`Model.parts`).

    Raises:
      UserError: if a stage is invalid; see `make_stages`.
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
    """Refuses a plan that doesn't fit into its number of steps.

    Raises:
      UserError: if the last stage begins at or after the end, if the warm-up is longer than the training, or if there
        are more steps than can be counted.
    """
    total, optim = plan.total_steps, config.optim
    if plan.stages[-1].first_step >= total:
        raise UserError(
            f"finetune.unfreeze_epochs={list(config.finetune.unfreeze_epochs)}: the last stage begins at step"
            f" {plan.stages[-1].first_step}, but the training ends at step {total}; begin the stage earlier"
        )
    if total > _MOST_STEPS:
        raise UserError(
            f"train.epochs={config.train.epochs:g} makes {total} steps, more than the maximum of {_MOST_STEPS};"
            " lower train.epochs"
        )
    if (optim.warmup_steps or 0) > total:
        raise UserError(
            f"optim.warmup_steps={optim.warmup_steps} is longer than the training, which has {total} steps;"
            f" give {total} at most"
        )
    warmup_steps = round(optim.warmup_epochs * plan.steps_per_epoch)
    if optim.warmup_steps is None and warmup_steps > total:
        raise UserError(
            f"optim.warmup_epochs={optim.warmup_epochs:g} is {warmup_steps} steps, longer than the training, which has"
            f" {total}; give {total / plan.steps_per_epoch:g} at most"
        )


def best_of(scores: Mapping[int, float]) -> tuple[int, float]:
    """Returns step and score of the best evaluation: the first one if several tie, (0, 0) if there is none."""
    return max(scores.items(), key=lambda item: (item[1], -item[0]), default=(0, 0.0))
