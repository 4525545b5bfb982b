"""Weights that a run starts from, or that are evaluated as they are."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from mnv2_jax.config import Config, Loaded, ModelConfig, flatten
from mnv2_jax.errors import UserError
from mnv2_jax.registry import import_modules
from mnv2_jax.runs.weights import open_weights
from mnv2_jax.training.state import TrainState
from mnv2_jax.types import PyTree
from mnv2_jax.weights.file import STRUCTURE, Preprocessing, Weights, describe
from mnv2_jax.weights.load import Head

_TAKEN = (*(f"model.{key}" for key in STRUCTURE), "norm.epsilon", "data.mean", "data.std")
"""Keys that weights fill in for training."""
_TAKEN_TO_EVALUATE = (
    "model.strides",
    "model.output_stride",
    *(f"data.{field.name}" for field in dataclasses.fields(Preprocessing)),
)
"""Further ones for an evaluation of the weights as they are: they fit any strides, but were trained with theirs."""


def resolve_weights(
    loaded: Loaded, *, evaluates: bool = False, saved: Config | None = None
) -> tuple[Config, Weights | None]:
    """Opens `init.weights`, where they are set, and makes the config one of their network.

    What belongs to weights comes from them, unless it is `Loaded.said`: padding, width rule, epsilon of the norms, how
    pixels are normalised; for an evaluation of the weights themselves the strides, the resolution and the crop, too.

    Args:
      loaded: the experiment.
      evaluates: whether the weights are evaluated, not trained on.
      saved: the config of the run that is gone on with, which has it all: the weights aren't opened.

    Returns:
      The config, and the weights if they were opened.

    Raises:
      UserError: if the weights can't be had, or are of another network than the config's.
    """
    config, said = loaded.config, loaded.said
    import_modules(config.modules)  # before weights are opened, which may be of what they register
    if evaluates and "data.eval_resolution" not in said:
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, eval_resolution=None))
    keys = [key for key in (_TAKEN + _TAKEN_TO_EVALUATE if evaluates else _TAKEN) if key not in said]
    if config.init.weights is None or not keys:
        return config, None
    if saved is not None and saved.init == config.init:
        return _take(config, keys, flatten(dataclasses.asdict(saved))), None
    weights = open_weights(config.init.weights, config.model, "load" if evaluates else config.init.head)
    check_network(config, weights, said)
    own = weights.model
    held = {
        "model": dataclasses.asdict(own.options),
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


def check_network(config: Config, weights: Weights, said: Collection[str] = ()) -> None:
    """Refuses weights of another network than the config's, whose keys in ``said`` aren't to be changed.

    Raises:
      UserError: naming all options that differ, as flags.
    """
    own, default, asked = weights.model.options, ModelConfig(), config.model

    def is_open(key: str) -> bool:
        is_default = getattr(asked, key) == getattr(default, key)
        return key not in ("name", "width") and is_default and f"model.{key}" not in said

    keys = [key for key in ("name", *STRUCTURE) if getattr(asked, key) != getattr(own, key) and not is_open(key)]
    if keys:
        raise UserError(
            f"init.weights={config.init.weights!r} are of {describe(weights.model)}, and"
            f" {', '.join(f'model.{key}={getattr(asked, key)!r}' for key in keys)};"
            f" give {' '.join(f'--config.model.{key}={getattr(own, key)}' for key in keys)}"
        )


def with_weights(state: TrainState, weights: Weights, head: Head) -> TrainState:
    """The state before the first step with its random weights replaced, those of a new head excepted: its last
    part, and what the weights lack.

    Host arrays, each its own: the state will be donated, and a buffer can be given away only once.
    """

    def copied(tree: PyTree, random: PyTree) -> PyTree:
        held = {name: branch for name, branch in tree.items() if name != classifier}
        source = {**random, **held} if head == "new" else tree
        return {name: _copy(branch, random[name]) for name, branch in source.items()}

    variables, classifier = weights.variables, weights.model.parts[-1]

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
