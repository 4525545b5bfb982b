"""What tasks share whose targets hold numbers of classes, such as masks: data and weights must agree in them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from mnv2_jax.config import Config
from mnv2_jax.data.sources import Dataset
from mnv2_jax.errors import UserError
from mnv2_jax.models.plan import has_classes
from mnv2_jax.models.registry import for_classes
from mnv2_jax.tasks.base import MOST_EXAMPLES
from mnv2_jax.types import PyTree
from mnv2_jax.weights.file import Weights, WeightsInfo

_TYPICAL = MOST_EXAMPLES // 2
"""Number of examples around the median; the others are the worst."""
_T = TypeVar("_T")


def worst_and_typical(order: Sequence[_T]) -> list[tuple[str, _T]]:
    """Selects at most `MOST_EXAMPLES` of a list that begins with the worst: "worst", and "typical" at the median."""
    num_worst = min(MOST_EXAMPLES - _TYPICAL, -(-len(order) // 2))
    rest = order[num_worst:]
    middle = max((len(rest) - _TYPICAL) // 2, 0)
    return [("worst", each) for each in order[:num_worst]] + [("typical", each) for each in rest[middle:][:_TYPICAL]]


def check_options(config: Config, is_allowed: Mapping[str, bool]) -> None:
    """Refuses options that the task doesn't have, so that none is silently without effect.

    Args:
      config: the config, which may have no option that a classification alone has.
      is_allowed: whether further options have values that the task has, by their keys.

    Raises:
      UserError: naming the option.
    """
    default = Config()
    plain = ("policy", "shift_fraction", "erase_probability", "mixup_alpha", "cutmix_alpha")
    of_classification = {
        "loss.label_smoothing": config.loss.label_smoothing == 0,
        "distill.teacher": config.distill.teacher is None and config.distill.logits is None,
        **{f"augment.{name}": getattr(config.augment, name) == getattr(default.augment, name) for name in plain},
    }
    for key, holds in {**is_allowed, **of_classification}.items():
        if not holds:
            raise UserError(f"{key}: task={config.task} doesn't have this option with this value; leave it out")


def check_num_classes(config: Config, dataset: Dataset) -> None:
    """Refuses a number of classes other than that of the data.

    Raises:
      UserError: naming both.
    """
    count = len(dataset.class_names)
    if config.model.num_classes not in (None, count):
        raise UserError(
            f"model.num_classes={config.model.num_classes}, but {dataset.name} has {count} classes; leave it unset"
        )


def check_head(config: Config, weights: Weights, dataset: Dataset) -> None:
    """Refuses weights whose head can't be trained further on these data.

    Raises:
      UserError: saying how to start with a new head, or that a part of the new head would be frozen.
    """
    if config.init.head == "new":
        _check_frozen(config, weights, dataset)
        return
    try:
        same_classes(dataset, weights.info, weights.model.num_classes)
    except UserError as error:
        name = config.init.weights
        raise UserError(f"init.weights={name!r}: {error}, or give --config.init.head=new for a new head") from error


def _check_frozen(config: Config, weights: Weights, dataset: Dataset) -> None:
    model, first = for_classes(config.model, config.norm, len(dataset.class_names)), config.finetune.train_from[0]
    # An unknown part is refused elsewhere.
    before = model.parts[: model.parts.index(first)] if first in model.parts else ()
    frozen = [part for part in before if part in model.head_parts]
    if not frozen:
        return
    random = jax.eval_shape(model.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32))["params"]
    held = weights.variables["params"]
    for part in frozen:
        if has_classes(part) or _shapes(held.get(part)) != _shapes(random[part]):
            raise UserError(
                f"finetune.train_from={list(config.finetune.train_from)} freezes {part}, which is new with"
                f" init.head=new, so it would stay random; begin with {part}"
            )


def _shapes(tree: PyTree) -> PyTree:
    return jax.tree.map(np.shape, tree)


def same_classes(dataset: Dataset, info: WeightsInfo, num_classes: int) -> Dataset:
    """Returns the data, whose classes must be those of the weights in the same order: masks hold numbers of classes.

    Raises:
      UserError: naming the first class that differs.
    """
    ours, theirs = dataset.class_names, info.labels
    if len(ours) != num_classes:
        reason = f"the weights have {num_classes} classes and {dataset.name} has {len(ours)}"
    elif theirs and ours != theirs:
        place = next(place for place, names in enumerate(zip(ours, theirs, strict=True)) if len({*names}) > 1)
        reason = f"class {place} is {theirs[place]!r} in the weights and {ours[place]!r} in {dataset.name}"
    else:
        return dataset
    raise UserError(f"{reason}; let the data have the classes of the weights in the same order")
