"""Which logits of weights are which classes of the data."""

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
    """Which logits of weights are those of the data's classes, int [k]; of further classes they say nothing.

    Raises:
      UserError: for a class of the data that the weights don't know; and if they don't name theirs and are of another
        number, or libraries number the data's in different orders.
    """
    names = dataset.class_names
    named = [known for known in (info.labels, info.class_ids) if known]
    if names in named:
        return np.arange(num_classes)
    if not named:
        reason = f"{dataset.name} has {len(names)}" if len(names) != num_classes else _two_orders(names)
        if reason:
            raise UserError(
                f"the weights have {num_classes} classes without names, and {reason}; name them, in the order of the"
                " weights, by python -m mnv2_jax.convert --labels=FILE"
            )
        return np.arange(num_classes)
    # A name that stands for two classes says neither.
    places = {name: place for known in named for place, name in enumerate(known) if known.count(name) == 1}
    if unknown := [name for name in names if name not in places]:
        some = ", ".join(named[-1][:3])
        raise UserError(
            f"the weights have no class {unknown[0]!r} of {dataset.name}; theirs are {num_classes}: {some}, …"
        )
    return np.array([places[name] for name in names])


def _two_orders(names: Sequence[str]) -> str:
    """Says so where class folders may have been numbered otherwise than here.

    Sorted as text, which torchvision, Keras and we do, 10 comes before 2 and Z before a; timm's order is the other.
    """

    def natural(name: str) -> list[int | str]:
        return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name.lower())]

    other = sorted(names, key=natural)
    if list(names) != sorted(names) or list(names) == other:  # an order of their own, or the one that all have
        return ""
    place = next(place for place, (ours, theirs) in enumerate(zip(names, other, strict=True)) if ours != theirs)
    return f"folder {place} is {names[place]!r} in the order of text, but {other[place]!r} in that of timm"


def relabel(dataset: Dataset, info: WeightsInfo, num_classes: int) -> Dataset:
    """The data to evaluate with the classes of the weights: all of them, in their order, whichever have images.

    Raises:
      UserError: for a class with images that the weights don't know (`columns_of`).
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
    """Refuses to train the head of other classes than the data's, unless a new one is asked for; and to freeze a part
    that the weights lack.

    Raises:
      UserError: naming what differs, or the part.
    """
    if config.init.head == "new":
        parts, first = weights.model.parts, config.finetune.train_from[0]
        frozen = parts[: parts.index(first)] if first in parts else ()  # another name is refused elsewhere
        if held_back := [part for part in weights.absent if part in frozen]:
            raise UserError(
                f"finetune.train_from={list(config.finetune.train_from)}: {held_back[0]}, which"
                f" init.weights={config.init.weights!r} lack, would stay as it was drawn; begin with {held_back[0]}"
            )
        return
    names, info = dataset.class_names, weights.info
    known = {*info.labels, *info.class_ids}
    if len(names) != weights.model.num_classes or (known and not known.issuperset(names)):
        raise UserError(
            f"init.weights={config.init.weights!r} have {weights.model.num_classes} classes,"
            f" {dataset.name} has {len(names)} others; give --config.init.head=new for a new head"
        )
    try:
        columns_of(info, weights.model.num_classes, dataset)
    except UserError as error:
        raise UserError(
            f"init.weights={config.init.weights!r}: {error}, or give --config.init.head=new for a new head"
        ) from error


def arranged(weights: Weights, dataset: Dataset) -> Weights:
    """The same weights with their classes in the order of the data's, which `check_head` has found to be the same."""
    columns = columns_of(weights.info, weights.model.num_classes, dataset)
    params = weights.variables["params"]
    classifier = {name: leaf[..., columns] for name, leaf in params["classifier"].items()}
    info = dataclasses.replace(weights.info, labels=dataset.class_names, class_ids=())
    variables = {**weights.variables, "params": {**params, "classifier": classifier}}
    return weights._replace(variables=variables, info=info)
