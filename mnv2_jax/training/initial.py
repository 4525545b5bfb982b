"""Weights that a run starts from, or that are evaluated without training."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

import jax
import numpy as np

from mnv2_jax.config import HEAD, STRUCTURE, Config, Loaded, ModelConfig, flatten, from_weights
from mnv2_jax.errors import UserError
from mnv2_jax.models.base import Model
from mnv2_jax.models.plan import has_classes, part_of
from mnv2_jax.registry import import_modules
from mnv2_jax.runs.weights import open_weights
from mnv2_jax.training.state import TrainState
from mnv2_jax.types import PyTree
from mnv2_jax.weights.file import Preprocessing, Weights, describe
from mnv2_jax.weights.load import Head

_FILLED_IN_TO_EVALUATE = (
    "model.strides",
    "model.output_stride",
    *(f"model.{key}" for key in HEAD),
    *(f"data.{field.name}" for field in dataclasses.fields(Preprocessing)),
)
"""Further keys that weights fill in when they are evaluated: they fit any strides, but were trained with their own."""


def resolve_weights(
    loaded: Loaded, *, evaluates: bool = False, saved: Config | None = None
) -> tuple[Config, Weights | None]:
    """Opens `init.weights`, where they are set, and completes the config with the options that the weights decide.

    These options come from the weights, except `Loaded.explicit_keys`: padding, width rule, epsilon of the norms, and
    the mean and std of the pixels; and what follows the features, unless the head is new. If the weights are evaluated,
    the strides, the resolution and the crop do too.

    Args:
      loaded: the experiment.
      evaluates: whether the weights are evaluated without training.
      saved: the config of the run that is resumed. It has all these options, so the weights aren't opened.

    Returns:
      The config, and the weights if they were opened.

    Raises:
      UserError: if the weights can't be opened, or belong to another network than the config's.
    """
    config, explicit_keys = loaded.config, loaded.explicit_keys
    import_modules(config.modules)  # before the weights are opened: their network may be registered there
    if evaluates and "data.eval_resolution" not in explicit_keys:
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, eval_resolution=None))
    filled_in = from_weights(config) + (_FILLED_IN_TO_EVALUATE if evaluates else ())
    keys = [key for key in filled_in if key not in explicit_keys]
    if config.init.weights is None or not keys:
        return config, None
    if saved is not None and saved.init == config.init:
        return _fill_in(config, keys, flatten(dataclasses.asdict(saved))), None
    weights = open_weights(config.init.weights, config.model, "load" if evaluates else config.init.head)
    check_network(config, weights, explicit_keys, keys)
    model = weights.model
    held = {
        "model": dataclasses.asdict(model.options),
        "norm": dataclasses.asdict(model.norm),
        "data": dataclasses.asdict(weights.info.preprocessing),
    }
    return _fill_in(config, keys, flatten(held)), weights


def _fill_in(config: Config, keys: Collection[str], values: Mapping[str, Any]) -> Config:
    for key in keys:
        section, _, leaf = key.partition(".")
        part = dataclasses.replace(getattr(config, section), **{leaf: values[key]})
        config = dataclasses.replace(config, **{section: part})
    return config


def check_network(
    config: Config, weights: Weights, explicit_keys: Collection[str] = (), filled_in: Collection[str] = ()
) -> None:
    """Refuses weights of another network than the config's.

    An option that has its default may differ, because `resolve_weights` fills it in, unless the user set it. So may any
    option of the head, if the weights have a dense one. The name and the width must always agree.

    Args:
      config: the experiment.
      weights: the weights of `init.weights`.
      explicit_keys: keys that the user set.
      filled_in: keys that will be filled in.

    Raises:
      UserError: naming all options that differ, as flags.
    """
    actual, default, requested = weights.model.options, ModelConfig(), config.model

    def is_open(key: str) -> bool:
        if key in HEAD and f"model.{key}" in filled_in and actual.head != default.head:
            return True
        is_default = getattr(requested, key) == getattr(default, key)
        return key not in ("name", "width") and is_default and f"model.{key}" not in explicit_keys

    compared = ("name", *STRUCTURE, *(HEAD if config.init.head == "load" else ()))
    keys = [key for key in compared if getattr(requested, key) != getattr(actual, key) and not is_open(key)]
    if keys:
        flags = [f"--config.model.{key}={getattr(actual, key)}" for key in keys]
        if "head" in keys:  # the user wants this head, not that of the weights
            flags = [flag for key, flag in zip(keys, flags, strict=True) if key not in HEAD]
            flags.append("--config.init.head=new to train a new head")
        raise UserError(
            f"init.weights={config.init.weights!r} are of {describe(weights.model)}, but the config has"
            f" {', '.join(f'model.{key}={getattr(requested, key)!r}' for key in keys)};"
            f" give {' '.join(flags)}"
        )


def with_weights(state: TrainState, weights: Weights, head: Head, model: Model) -> TrainState:
    """Replaces the random weights of the state before the first step, which are those of ``model``.

    With a new head, the last part keeps its random weights, and so do the other parts of the head that give classes, or
    boxes of other anchors, or that the weights lack or have with other shapes. Parts of the weights that the network
    doesn't have are left out. The arrays are on the host, and each is a copy: the state will be donated, and a buffer
    can be donated only once.
    """

    def is_held(name: str, branch: PyTree, random: PyTree) -> bool:
        part = part_of(name)
        if name not in random or part == model.parts[-1]:
            return False
        if part not in model.head_parts:
            return True
        if part.endswith("_boxes") and weights.model.options.anchors != model.options.anchors:
            return False
        return not has_classes(part) and _shapes(branch) == _shapes(random[name])

    def copied(tree: PyTree, random: PyTree) -> PyTree:
        held = {name: branch for name, branch in tree.items() if is_held(name, branch, random)}
        source = {**random, **held} if head == "new" else tree
        return {name: _copy(branch, random[name]) for name, branch in source.items()}

    variables = weights.variables

    def fresh() -> dict[str, PyTree]:
        random = {"params": state.params, **state.model_state}
        return {name: copied(variables[name], random[name]) for name in random}

    both = fresh()
    params = both.pop("params")
    return state.replace(params=params, model_state=both, ema=None if state.ema is None else fresh())


def _shapes(tree: PyTree) -> PyTree:
    return jax.tree.map(np.shape, tree)


def _copy(tree: PyTree, like: PyTree) -> PyTree:
    if isinstance(tree, dict):
        return {name: _copy(branch, like[name]) for name, branch in tree.items()}
    return np.array(tree, dtype=like.dtype)
