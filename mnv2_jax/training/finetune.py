"""Fine-tuning in stages: which parts of a network are trained, from which step on, and at which learning rate.

A frozen part has no gradient and no weight decay, and its optimiser state doesn't change. Its norms use their running
statistics and keep them (`Model.training_from`). Each stage is a program of its own, compiled without what it doesn't
need. (Where gradients are accumulated over a number of microbatches that is no power of two, averaging equal statistics
rounds their last digit.)
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from mnv2_jax.config import FinetuneConfig, OptimConfig
from mnv2_jax.errors import UserError, nearest
from mnv2_jax.models.base import Model
from mnv2_jax.models.plan import part_of
from mnv2_jax.training.optim import Optimizer, make_transformation
from mnv2_jax.types import Array, PyTree


class Stage(NamedTuple):
    """A stage of fine-tuning: from ``first_step`` on, the part ``train_from`` and all parts behind it are trained."""

    train_from: str
    first_step: int


def make_stages(finetune: FinetuneConfig, steps_per_epoch: float, parts: Sequence[str]) -> tuple[Stage, ...]:
    """Makes the stages of a training.

    Args:
      finetune: see `config.FinetuneConfig`.
      steps_per_epoch: need not be whole.
      parts: `Model.parts`.

    Raises:
      UserError: if a part is unknown, if a stage unfreezes nothing, or if two stages begin at the same step.
    """
    for part in finetune.train_from:
        if part not in parts:
            raise UserError(
                f"finetune.train_from={list(finetune.train_from)}: the network has no part {part!r}"
                f"{nearest(part, parts)}"
            )
    starts = (0, *(round(epoch * steps_per_epoch) for epoch in finetune.unfreeze_epochs))
    stages = tuple(Stage(part, start) for part, start in zip(finetune.train_from, starts, strict=True))
    for earlier, later in itertools.pairwise(stages):
        if parts.index(later.train_from) >= parts.index(earlier.train_from):
            raise UserError(
                f"finetune.train_from={list(finetune.train_from)}: {later.train_from} does not come before"
                f" {earlier.train_from} in the network, so its stage unfreezes nothing; each stage must name an earlier"
                " part than the stage before it"
            )
        if later.first_step <= earlier.first_step:
            raise UserError(
                f"finetune.unfreeze_epochs={list(finetune.unfreeze_epochs)}: two stages begin at step"
                f" {later.first_step}; move them further apart"
            )
    return stages


def stage_at(stages: Sequence[Stage], step: int) -> int:
    """Returns the index of the stage that takes the next step after ``step`` steps."""
    return sum(stage.first_step <= step for stage in stages) - 1


class _Group(NamedTuple):
    """Parameters that are trained from the same step on with the same factor of the learning rate."""

    first_step: int
    lr_factor: float


def head_of(model: Model) -> tuple[str, ...]:
    """Returns the parts that `config.FinetuneConfig.backbone_lr_factor` leaves alone.

    Those of a dense head are all new. A classifier's hidden layer isn't: it comes with the weights.
    """
    return model.parts[-1:] if model.options.head == "classifier" else model.head_parts


def make_optimizers(
    optim: OptimConfig,
    backbone_lr_factor: float,
    schedule: optax.Schedule,
    stages: Sequence[Stage],
    parts: Sequence[str],
    head: Sequence[str] = (),
) -> tuple[Optimizer, ...]:
    """Makes an optimiser for each stage. All share one structure of state; the state of frozen parts doesn't change.

    Args:
      optim: options of the optimiser.
      backbone_lr_factor: factor of the learning rate of all parts but those of the head.
      schedule: the learning rate by step.
      stages: see `make_stages`.
      parts: `Model.parts`.
      head: parts of the head; empty: the last part (see `head_of`).
    """
    if len(stages) == 1 and stages[0].train_from == parts[0] and backbone_lr_factor == 1:
        return (Optimizer(make_transformation(optim, schedule), schedule),)
    group_of = {}
    for place, part in enumerate(parts):
        first_steps = [stage.first_step for stage in stages if parts.index(stage.train_from) <= place]
        if first_steps:
            is_head = part in (head or parts[-1:])
            group_of[part] = _Group(min(first_steps), 1.0 if is_head else backbone_lr_factor)
    unclipped = dataclasses.replace(optim, clip_grad_norm=None)  # `_grouped` clips by the norm over all groups
    transformations = {
        group: make_transformation(unclipped, _shifted(schedule, group)) for group in set(group_of.values())
    }
    return tuple(
        Optimizer(_grouped(group_of, transformations, stage.first_step, optim.clip_grad_norm), schedule)
        for stage in stages
    )


def _shifted(schedule: optax.Schedule, group: _Group) -> optax.Schedule:
    """Shifts and scales the schedule for a transformation that counts steps from the group's first step."""

    def shifted(count: Array) -> Array:
        return group.lr_factor * jnp.asarray(schedule(count + group.first_step))

    return shifted


def _grouped(
    group_of: Mapping[str, _Group],
    transformations: Mapping[_Group, optax.GradientTransformation],
    stage_start: int,
    clip_grad_norm: float | None,
) -> optax.GradientTransformation:
    """Applies each group's own transformation, in a stage that begins at step ``stage_start``."""

    def members(tree: PyTree, group: _Group) -> PyTree:
        return {name: leaf for name, leaf in tree.items() if group_of.get(part_of(name)) == group}

    def init(params: PyTree) -> dict[str, Any]:
        return {_label(group): each.init(members(params, group)) for group, each in transformations.items()}

    def update(grads: PyTree, state: dict[str, Any], params: PyTree) -> tuple[PyTree, dict[str, Any]]:
        updates, new_state = jax.tree.map(jnp.zeros_like, grads), dict(state)
        if clip_grad_norm is not None:
            grads, _ = optax.clip_by_global_norm(clip_grad_norm).update(grads, optax.EmptyState())
        for group, each in transformations.items():
            if group.first_step <= stage_start:
                label = _label(group)
                moved, new_state[label] = each.update(members(grads, group), state[label], members(params, group))
                updates = {**updates, **moved}
        return updates, new_state

    return optax.GradientTransformation(init, update)


def _label(group: _Group) -> str:
    return f"from_step_{group.first_step}_lr_{group.lr_factor:g}"
