"""Weights that a run starts from, or that are evaluated as they are."""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections.abc import Collection, Mapping
from typing import Any, Literal

import numpy as np

from mnv2_jax.config import Config, ModelConfig, flatten
from mnv2_jax.convert.hub import is_name
from mnv2_jax.convert.load import Head, kind_of, load_weights
from mnv2_jax.data.sources import Dataset
from mnv2_jax.errors import UserError
from mnv2_jax.models.registry import from_config
from mnv2_jax.models.weights import STRUCTURE, Preprocessing, Weights, WeightsInfo, describe
from mnv2_jax.training.checkpoint import restore_variables
from mnv2_jax.training.run_folder import read_run
from mnv2_jax.training.state import TrainState
from mnv2_jax.types import PyTree


def read_run_weights(workdir: pathlib.Path, which: Literal["latest", "best"] | None = None) -> Weights:
    """A run's checkpoint, with its preprocessing and its classes; None: `Config.usual_checkpoint`.

    Raises:
      UserError: if there is no run with a checkpoint.
    """
    settings, names = read_run(workdir)
    model = from_config(dataclasses.replace(settings.model, num_classes=len(names)), settings.norm)
    step, variables = restore_variables(workdir, which or settings.usual_checkpoint)
    seen = {field.name: getattr(settings.data, field.name) for field in dataclasses.fields(Preprocessing)}
    info = WeightsInfo(
        preprocessing=Preprocessing(**seen | {"resolution": settings.data.seen_resolution}),
        labels=tuple(names),
        notes=(f"step {step} of the run {workdir.name}",),
    )
    return Weights(model, variables, info)


def open_weights(source: str, model: ModelConfig, head: Head = "load") -> Weights:
    """What ``init.weights`` names: a run's folder, our file, another library's, or published weights.

    Args:
      source: path or name.
      model: says which network a foreign file holds.
      head: new: `Weights.absent` parts are allowed.

    Raises:
      UserError: if it can't be had, or isn't that network.
    """
    path = os.path.expanduser(source)
    if os.path.isdir(path):
        return read_run_weights(pathlib.Path(path))
    if is_name(source) or kind_of(pathlib.Path(path)) == "ours":
        return load_weights(source)
    default = ModelConfig()
    options = ("width", "width_rule", "depth", "activation")  # the padding is its library's, not asked for
    asked = {key: getattr(model, key) for key in options if getattr(model, key) != getattr(default, key)}
    return load_weights(source, model.name, head=head, **asked)


_TAKEN = (*(f"model.{key}" for key in STRUCTURE), "norm.epsilon", "data.mean", "data.std")
"""Keys that weights fill in for training."""
_TAKEN_TO_EVALUATE = (
    "model.strides",
    "model.output_stride",
    *(f"data.{field.name}" for field in dataclasses.fields(Preprocessing)),
)
"""Further ones for an evaluation of the weights as they are: they fit any strides, but were trained with theirs."""


def prepare(
    config: Config, given: Collection[str], *, evaluates: bool = False, saved: Config | None = None
) -> tuple[Config, Weights | None]:
    """Opens `init.weights`, where they are set, and makes the config one of their network.

    What belongs to weights comes from them, unless the command line or a run's own config.json says it: padding, width
    rule, epsilon of the norms, how pixels are normalised; for an evaluation of the weights themselves the
    strides, the resolution and the crop, too. A recipe's values give way.

    Args:
      config: the experiment.
      given: keys that are said, see `config.given`.
      evaluates: whether the weights are evaluated, not trained on.
      saved: the config of the run that is gone on with, which has it all: the weights aren't opened.

    Returns:
      The config, and the weights if they were opened.

    Raises:
      UserError: if the weights can't be had, or are of another network than the config's.
    """
    if evaluates and "data.eval_resolution" not in given:
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, eval_resolution=None))
    keys = [key for key in (_TAKEN + _TAKEN_TO_EVALUATE if evaluates else _TAKEN) if key not in given]
    if config.init.weights is None or not keys:
        return config, None
    if saved is not None and saved.init == config.init:
        return _take(config, keys, flatten(dataclasses.asdict(saved))), None
    weights = open_weights(config.init.weights, config.model, "load" if evaluates else config.init.head)
    check_network(config, weights, given)
    own = weights.model.module
    held = {
        "model": dataclasses.asdict(own.model),
        "norm": dataclasses.asdict(own.norm),
        "data": dataclasses.asdict(weights.info.preprocessing),
    }
    return _take(config, keys, flatten(held)), weights


def _take(config: Config, keys: Collection[str], values: Mapping[str, Any]) -> Config:
    for key in keys:
        section, _, leaf = key.partition(".")
        part = dataclasses.replace(getattr(config, section), **{leaf: values[key]})
        config = dataclasses.replace(config, **{section: part})
    return config


def check_network(config: Config, weights: Weights, given: Collection[str] = ()) -> None:
    """Refuses weights of another network than the config's.

    Raises:
      UserError: naming all options that differ, as flags.
    """
    own, default, asked = weights.model.module.model, ModelConfig(), config.model

    def is_open(key: str) -> bool:
        is_default = getattr(asked, key) == getattr(default, key)
        return key not in ("name", "width") and is_default and f"model.{key}" not in given

    keys = [key for key in ("name", *STRUCTURE) if getattr(asked, key) != getattr(own, key) and not is_open(key)]
    if keys:
        raise UserError(
            f"init.weights={config.init.weights!r} are of {describe(weights.model)}, and"
            f" {', '.join(f'model.{key}={getattr(asked, key)!r}' for key in keys)};"
            f" give {' '.join(f'--config.model.{key}={getattr(own, key)}' for key in keys)}"
        )


def relabel(dataset: Dataset, info: WeightsInfo, num_classes: int) -> Dataset:
    """The data to evaluate with the classes of the weights: all of them, in their order, whichever have images.

    Raises:
      UserError: for a class that the weights don't know.
    """
    names = info.labels or info.class_ids
    if not names and len(dataset.class_names) == num_classes:
        return dataset
    places = {name: index for names in (info.labels, info.class_ids) for index, name in enumerate(names)}
    unknown = [name for name in dataset.class_names if name not in places]
    if unknown:
        some = ", ".join((info.class_ids or info.labels)[:3]) or "not named"
        raise UserError(
            f"init.weights know no class {unknown[0]!r} of {dataset.name}; theirs are {num_classes}: {some}, …"
        )
    index_of = np.array([places[name] for name in dataset.class_names], np.int32)

    evaluated = dataclasses.replace(dataset.eval, labels=index_of[np.asarray(dataset.eval.labels)])
    scored = None if dataset.scored is None else tuple(sorted(index_of[list(dataset.scored)].tolist()))
    return dataclasses.replace(dataset, class_names=names, eval=evaluated, scored=scored)


def check_head(config: Config, weights: Weights, dataset: Dataset) -> None:
    """Refuses to train the head of other classes than the data's, unless a new one is asked for; and to freeze a part
    that the weights lack.

    Raises:
      UserError: naming what differs, or the part.
    """
    if config.init.head == "new":
        parts, first = weights.model.module.parts, config.finetune.train_from[0]
        frozen = parts[: parts.index(first)] if first in parts else ()  # another name is refused elsewhere
        if held_back := [part for part in weights.absent if part in frozen]:
            raise UserError(
                f"finetune.train_from={list(config.finetune.train_from)}: {held_back[0]}, which"
                f" init.weights={config.init.weights!r} lack, would stay as it was drawn; begin with {held_back[0]}"
            )
        return
    names, info = dataset.class_names, weights.info
    is_same = len(names) == weights.model.num_classes and (not info.labels or names in (info.labels, info.class_ids))
    if not is_same:
        raise UserError(
            f"init.weights={config.init.weights!r} have {weights.model.num_classes} classes,"
            f" {dataset.name} has {len(names)} others; give --config.init.head=new for a new head"
        )


def with_weights(state: TrainState, weights: Weights, head: Head) -> TrainState:
    """The state before the first step with its random weights replaced, those of a new head excepted: the classifier,
    and what the weights lack.

    Host arrays, each its own: the state will be donated, and a buffer can be given away only once.
    """

    def copied(tree: PyTree, random: PyTree) -> PyTree:
        held = {name: branch for name, branch in tree.items() if name != "classifier"}
        source = {**random, **held} if head == "new" else tree
        return {name: _copy(branch, random[name]) for name, branch in source.items()}

    variables = weights.variables

    def fresh() -> dict[str, PyTree]:
        random = {"params": state.params, **state.model_state}
        return {name: copied(variables[name], random[name]) for name in random}

    both = fresh()
    params = both.pop("params")
    return state.replace(params=params, model_state=both, ema=None if state.ema is None else fresh())


def _copy(tree: PyTree, like: PyTree) -> PyTree:
    if isinstance(tree, dict):
        return {name: _copy(branch, like[name]) for name, branch in tree.items()}
    return np.array(tree, dtype=like.dtype)
