"""PyTorch state dicts to our variables and back, by the tables of `names`."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from mnv2_jax.config import ModelConfig
from mnv2_jax.convert import names
from mnv2_jax.errors import UserError
from mnv2_jax.models.registry import Model
from mnv2_jax.models.weights import Weights, describe, flatten, raise_mismatch, shapes_of


def absent_from(state: Mapping[str, np.ndarray], model: Model, table: Mapping[str, str]) -> tuple[str, ...]:
    """Those of `Network.head_parts` of which a state dict holds nothing; none where it has a classifier."""
    parts = model.module.head_parts
    absent = [part for part in parts if not any(name.startswith(f"{table[part]}.") for name in state)]
    return tuple(absent) if parts[-1] in absent else ()


def num_classes(path: pathlib.Path, state: Mapping[str, np.ndarray], table: Mapping[str, str]) -> int:
    """How many the classifier of a state dict has.

    Raises:
      UserError: if it has none.
    """
    head = f"{table['classifier']}.weight"
    if head not in state or state[head].ndim == 0:
        raise UserError(f"{path}: no tensor {head}, so no classifier; give another file")
    return int(state[head].shape[0])


def leaves_of(
    path: pathlib.Path,
    model: Model,
    state: Mapping[str, np.ndarray],
    table: Mapping[str, str],
    absent: tuple[str, ...] = (),
) -> dict[str, np.ndarray]:
    """Every leaf of ours from the tensor that the table names, but for those of the parts that are ``absent``.

    Raises:
      UserError: listing tensors that are missing, left over, or of another shape.
    """
    leaves, missing, wrong, used = {}, [], [], set()
    for ours, shape in shapes_of(model, absent).items():
        layer, leaf = _split(ours)
        theirs = _name(table, layer, leaf)
        used.add(theirs)
        if theirs not in state:
            missing.append(theirs)
            continue
        array = state[theirs]
        if leaf == "kernel" and array.ndim in (2, 4):
            array = array.T if array.ndim == 2 else array.transpose(2, 3, 1, 0)
        if len(shape) == 2 and array.ndim == 4 and array.shape[:2] == (1, 1):
            array = array[0, 0]  # a dense layer as a 1×1 convolution
        if array.shape != shape:
            wrong.append(f"{theirs} is {list(array.shape)} instead of {list(shape)} for {layer}")
        leaves[ours] = array
    problems = {"missing": missing, "left over": sorted(set(state) - used), "of another shape": wrong}
    raise_mismatch(problems, f"{path}: not the weights of {describe(model)}")
    return leaves


def to_timm(weights: Weights) -> dict[str, np.ndarray]:
    """The state dict that timm's model of the same network loads; ``num_batches_tracked`` is 0.

    Padding, epsilon and activation are not in it: see `timm_options`.

    Raises:
      UserError: if timm has no such network.
    """
    model = weights.model
    own, default = model.module.model, ModelConfig()
    family = names.family_of(model.name)
    lacking = {
        "model.padding='keras_v1'": own.padding == "keras_v1",
        "model.width_rule='corenet'": own.width_rule == "corenet",
        f"model.strides={list(own.strides)}": own.strides != default.strides,
        f"model.output_stride={own.output_stride}": own.output_stride != default.output_stride,
        model.name: ("timm", family) not in names.TABLES,
    }
    if found := [what for what, lacks in lacking.items() if lacks]:
        raise UserError(f"timm has no {describe(model)}: not {found[0]}")
    table = names.TABLES["timm", family](model.module.plan)
    state: dict[str, np.ndarray] = {}
    for path, array in flatten(weights.variables).items():
        layer, leaf = _split(path)
        if leaf == "kernel":
            is_conv = array.ndim == 4 or layer != "classifier"  # its other dense layers are 1×1 convolutions
            array = array.reshape(1, 1, *array.shape) if is_conv and array.ndim == 2 else array
            array = array.transpose(3, 2, 0, 1) if is_conv else array.T
        theirs = _name(table, layer, leaf)
        state[theirs] = array
        if leaf == "mean":
            state[theirs.replace("running_mean", "num_batches_tracked")] = np.zeros((), np.int64)
    return {name: np.asarray(array, order="C") for name, array in state.items()}


def timm_options(weights: Weights) -> dict[str, Any]:
    """What ``timm.create_model`` is to be called with besides the name, for the same outputs."""
    own, norm = weights.model.module.model, weights.model.module.norm
    options: dict[str, Any] = {"num_classes": weights.model.num_classes}
    if own.name != "resnet50":
        options |= {"pad_type": "" if own.padding == "symmetric" else "same", "bn_eps": norm.epsilon}
    if own.activation:
        options["act_layer"] = own.activation
    return options


def _split(path: str) -> tuple[str, str]:
    """Layer and leaf of ``params/block_1/expand/kernel``."""
    layer, _, leaf = path.partition("/")[2].rpartition("/")
    return layer, leaf


def _name(table: Mapping[str, str], layer: str, leaf: str) -> str:
    """Of the library's tensor; ours where the library has no such layer."""
    is_layer_scale = layer.endswith("layer_scale")
    return f"{table.get(layer, layer)}.{'gamma' if is_layer_scale else names.LEAVES[leaf]}"
