"""Matches the logits of weights to the classes of the data."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence

import numpy as np

from mnv2_jax.config import Config
from mnv2_jax.data.sources import Dataset
from mnv2_jax.errors import UserError
from mnv2_jax.weights.file import Weights, WeightsInfo


def columns_of(info: WeightsInfo, num_classes: int, dataset: Dataset) -> np.ndarray:
    """Index of the logit of each class of the data, int [k]. Further classes of the weights are ignored.

    Raises:
      UserError: if the weights don't have a class of the data. For weights without class names: if the number of
        classes differs, or if libraries order the data's class folders differently.
    """
    names = dataset.class_names
    named = [texts for texts in (info.labels, info.class_ids) if texts]
    if names in named:
        return np.arange(num_classes)
    if not named:
        reason = f"{dataset.name} has {len(names)}" if len(names) != num_classes else _two_orders(names)
        if reason:
            raise UserError(
                f"the weights have {num_classes} classes without names, and {reason}; name them, in the order of the"
                " weights, with python -m mnv2_jax.convert --labels=FILE"
            )
        return np.arange(num_classes)
    # A name that two classes share identifies neither.
    places = {name: place for texts in named for place, name in enumerate(texts) if texts.count(name) == 1}
    if unknown := [name for name in names if name not in places]:
        some = ", ".join(named[-1][:3])
        raise UserError(
            f"the weights have no class {unknown[0]!r} of {dataset.name}; their {num_classes} classes are: {some}, …"
        )
    return np.array([places[name] for name in names])


def _two_orders(names: Sequence[str]) -> str:
    """Text on the first difference between the two common orders of class folders; "" if these names have only one.

    torchvision, Keras and this package sort names as text: 10 before 2 and Z before a. timm sorts numbers by value and
    ignores case.
    """

    def natural(name: str) -> list[int | str]:
        return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name.lower())]

    timm_order = sorted(names, key=natural)
    if list(names) != sorted(names) or list(names) == timm_order:  # not sorted at all, or the same in both orders
        return ""
    index = next(index for index, (name, other) in enumerate(zip(names, timm_order, strict=True)) if name != other)
    return f"folder {index} is {names[index]!r} in text order, but {timm_order[index]!r} in timm's order"


def relabel(dataset: Dataset, info: WeightsInfo, num_classes: int) -> Dataset:
    """Returns the data with the classes of the weights, all of them and in their order, for an evaluation.

    Raises:
      UserError: if the weights don't have a class of which the data have images (see `columns_of`).
    """
    names = info.labels or info.class_ids
    if not names:
        columns_of(info, num_classes, dataset)
        return dataset
    labels = np.asarray(dataset.eval.labels)
    present = np.unique(labels)
    some = dataclasses.replace(dataset, class_names=tuple(dataset.class_names[label] for label in present.tolist()))
    index_of = np.zeros(len(dataset.class_names), np.int32)
    index_of[present] = columns_of(info, num_classes, some)
    evaluated = dataclasses.replace(dataset.eval, labels=index_of[labels])
    scored = None if dataset.scored is None else tuple(sorted(index_of[list(dataset.scored)].tolist()))
    return dataclasses.replace(dataset, class_names=names, eval=evaluated, scored=scored)


def check_head(config: Config, weights: Weights, dataset: Dataset) -> None:
    """Checks that a training can start from the head of these weights.

    Raises:
      UserError: if the classes of the weights differ from the data's and no new head is requested, or if a part that
        the weights lack would be frozen.
    """
    if config.init.head == "new":
        parts, first = weights.model.parts, config.finetune.train_from[0]
        frozen = parts[: parts.index(first)] if first in parts else ()  # an unknown name is refused elsewhere
        if held_back := [part for part in weights.absent if part in frozen]:
            raise UserError(
                f"finetune.train_from={list(config.finetune.train_from)} freezes {held_back[0]}, which"
                f" init.weights={config.init.weights!r} lack, so it would stay random; begin with {held_back[0]}"
            )
        return
    names, info = dataset.class_names, weights.info
    known_names = {*info.labels, *info.class_ids}
    if len(names) != weights.model.num_classes or (known_names and not known_names.issuperset(names)):
        raise UserError(
            f"init.weights={config.init.weights!r} have {weights.model.num_classes} classes, but {dataset.name} has"
            f" {len(names)} other classes; give --config.init.head=new for a new head"
        )
    try:
        columns_of(info, weights.model.num_classes, dataset)
    except UserError as error:
        raise UserError(
            f"init.weights={config.init.weights!r}: {error}, or give --config.init.head=new for a new head"
        ) from error


def arrange_weights(weights: Weights, dataset: Dataset) -> Weights:
    """Reorders the classes of the weights to the data's order. `check_head` must have accepted them before."""
    columns = columns_of(weights.info, weights.model.num_classes, dataset)
    params = weights.variables["params"]
    classifier = {name: leaf[..., columns] for name, leaf in params["classifier"].items()}
    info = dataclasses.replace(weights.info, labels=dataset.class_names, class_ids=())
    variables = {**weights.variables, "params": {**params, "classifier": classifier}}
    return weights._replace(variables=variables, info=info)
