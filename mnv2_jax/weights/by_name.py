"""Converts PyTorch state dicts to our variables and back, by the tables of `names`."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

from mnv2_jax.config import ModelConfig
from mnv2_jax.errors import UserError
from mnv2_jax.models.registry import Model
from mnv2_jax.weights import names
from mnv2_jax.weights.file import Weights, describe, flatten, raise_mismatch, shapes_of


def num_classes(state: Mapping[str, np.ndarray], table: Mapping[str, str]) -> int:
    """Number of classes of a state dict's classifier; 2 if none of its tensors could be a classifier."""
    kernels = [state[name] for name in _behind(state, table) if state[name].ndim > 1]
    usual = state.get(f"{table['classifier']}.weight")
    if usual is not None and usual.ndim > 1:
        kernels.append(usual)
    return max([2, *(len(kernel) for kernel in kernels[-1:])])


def _behind(state: Mapping[str, np.ndarray], table: Mapping[str, str]) -> list[str]:
    """Names of the tensors in the module that is, or contains, the library's classifier."""
    root = table["classifier"].partition(".")[0]
    return [name for name in state if name.startswith(f"{root}.")]


def without_other_head(
    path: pathlib.Path,
    model: Model,
    state: Mapping[str, np.ndarray],
    table: Mapping[str, str],
    head: Literal["load", "new"],
) -> tuple[Mapping[str, np.ndarray], tuple[str, ...], list[str]]:
    """Removes the layers after global pooling from a state dict if they differ from the model's and a new head is
    requested.

    A single dense layer there is taken as the classifier: users put it into an ``nn.Sequential`` after dropout, or
    replace such a Sequential by it.

    Args:
      path: the file, for errors.
      model: the model, with as many classes as `num_classes` returns.
      state: the tensors.
      table: the library's names.
      head: "load" removes nothing.

    Returns:
      The state dict, the parts among `Model.head_parts` that it lacks (now), and notes on the changes. The state dict
      is returned unchanged if its other tensors aren't the model's.

    Raises:
      UserError: naming the tensors after global pooling, if they should be loaded but aren't the model's.
    """
    shapes, parts = shapes_of(model), model.head_parts
    body = _match(model, state, table, parts)
    if body.missing or body.wrong_shape:
        return state, (), []

    def fits(part: str, name: str) -> bool:
        return name in state and state[name].shape[:2] == shapes[f"params/{part}/kernel"][::-1]

    *hidden, classifier = parts
    held = [part for part in hidden if fits(part, f"{table[part]}.weight")]
    behind = [name for name in _behind(state, table) if not any(name.startswith(f"{table[part]}.") for part in held)]
    absent = tuple(part for part in parts if part not in held)
    remaining = {name: array for name, array in state.items() if name not in behind}
    if any(f"{table[part]}.weight" in remaining for part in absent):
        return state, (), []
    if not behind:
        return remaining, absent, []
    layer, usual = behind[0].rpartition(".")[0], table[classifier]
    is_alone = {*behind, f"{layer}.bias"} == {f"{layer}.weight", f"{layer}.bias"}
    if is_alone and absent == (classifier,) and fits(classifier, f"{layer}.weight"):
        moved = {name.replace(layer, usual, 1): state[name] for name in behind}
        return remaining | moved, (), [] if layer == usual else [f"the classifier is {layer}"]
    behind_text = ", ".join([f"{name} {list(state[name].shape)}" for name in behind[:6]] + ["…"] * (len(behind) > 6))
    if head == "load":
        expected = " and ".join(f"{part} of {shapes[f'params/{part}/kernel'][0]} channels" for part in parts)
        raise UserError(
            f"{path}: after global pooling it has {behind_text}, where {model.name} has {expected}; to start a training"
            " from the layers before, give --config.init.head=new"
        )
    return remaining, absent, [f"{behind_text} were left out"]


@dataclasses.dataclass(frozen=True)
class _Match:
    """Leaves from a state dict, and the library's names of tensors that don't agree with the model."""

    leaves: dict[str, np.ndarray]
    missing: list[str]
    wrong_shape: list[str]
    unused: list[str]
    zeros: list[str]
    """Biases that the file lacks."""


def _match(model: Model, state: Mapping[str, np.ndarray], table: Mapping[str, str], absent: tuple[str, ...]) -> _Match:
    shapes = shapes_of(model, absent)
    match = _Match({}, [], [], [], [])
    used = set()
    for path, shape in shapes.items():
        layer, leaf = _split(path)
        name = _name(table, layer, leaf)
        used.add(name)
        if name not in state:
            if leaf == "bias" and f"params/{layer}/kernel" in shapes and _name(table, layer, "kernel") in state:
                match.zeros.append(name)
                match.leaves[path] = np.zeros(shape, np.float32)
            else:
                match.missing.append(name)
            continue
        array = state[name]
        if leaf == "kernel" and array.ndim in (2, 4):
            array = array.T if array.ndim == 2 else array.transpose(2, 3, 1, 0)
        if len(shape) == 2 and array.ndim == 4 and array.shape[:2] == (1, 1):
            array = array[0, 0]  # a dense layer as a 1×1 convolution
        if array.shape != shape:
            match.wrong_shape.append(f"{name} is {list(array.shape)} instead of {list(shape)} for {layer}")
        match.leaves[path] = array
    match.unused.extend(sorted(set(state) - used))
    return match


def leaves_of(
    path: pathlib.Path,
    model: Model,
    state: Mapping[str, np.ndarray],
    table: Mapping[str, str],
    absent: tuple[str, ...] = (),
) -> tuple[dict[str, np.ndarray], list[str]]:
    """Makes each of the model's leaves from the tensor that the table names; skips the parts that are ``absent``.

    Returns:
      The leaves, and the names of the biases that the file lacks, whose leaves are zero.

    Raises:
      UserError: listing tensors that are missing, left over, or of another shape.
    """
    match = _match(model, state, table, absent)
    problems = {"missing": match.missing, "left over": match.unused, "of another shape": match.wrong_shape}
    raise_mismatch(problems, f"{path}: not the weights of {describe(model)}")
    return match.leaves, match.zeros


def to_timm(weights: Weights) -> dict[str, np.ndarray]:
    """Returns a state dict that timm's model of the same network can load; ``num_batches_tracked`` is 0.

    It doesn't hold padding, epsilon and activation: see `timm_options`.

    Raises:
      UserError: if timm has no such network.
    """
    model = weights.model
    options, default = model.options, ModelConfig()
    family = names.family_of(model.name)
    lacking = {
        "model.padding='keras_v1'": options.padding == "keras_v1",
        "model.width_rule='corenet'": options.width_rule == "corenet",
        f"model.strides={list(options.strides)}": options.strides != default.strides,
        f"model.output_stride={options.output_stride}": options.output_stride != default.output_stride,
        f"model.head={options.head!r}": options.head != default.head,
        model.name: ("timm", family) not in names.TABLES,
    }
    if unsupported := [feature for feature, lacks in lacking.items() if lacks]:
        raise UserError(f"timm has no {describe(model)}: it lacks {unsupported[0]}; leave --to=timm out")
    table = names.TABLES["timm", family](model.plan)
    state: dict[str, np.ndarray] = {}
    for path, array in flatten(weights.variables).items():
        layer, leaf = _split(path)
        if leaf == "kernel":
            is_conv = array.ndim == 4 or layer != "classifier"  # timm's other dense layers are 1×1 convolutions
            array = array.reshape(1, 1, *array.shape) if is_conv and array.ndim == 2 else array
            array = array.transpose(3, 2, 0, 1) if is_conv else array.T
        name_in_timm = _name(table, layer, leaf)
        state[name_in_timm] = array
        if leaf == "mean":
            state[name_in_timm.replace("running_mean", "num_batches_tracked")] = np.zeros((), np.int64)
    return {name: np.asarray(array, order="C") for name, array in state.items()}


def timm_options(weights: Weights) -> dict[str, Any]:
    """Arguments of ``timm.create_model``, besides the name, that give the same outputs."""
    options, norm = weights.model.options, weights.model.norm
    arguments: dict[str, Any] = {"num_classes": weights.model.num_classes}
    if options.name != "resnet50":
        arguments |= {"pad_type": "" if options.padding == "symmetric" else "same", "bn_eps": norm.epsilon}
    if options.activation:
        arguments["act_layer"] = options.activation
    return arguments


def _split(path: str) -> tuple[str, str]:
    """Splits ``params/block_1/expand/kernel`` into layer and leaf: ``block_1/expand``, ``kernel``."""
    layer, _, leaf = path.partition("/")[2].rpartition("/")
    return layer, leaf


def _name(table: Mapping[str, str], layer: str, leaf: str) -> str:
    """Name of a leaf's tensor in the library; with our name of the layer if the library has no such layer."""
    is_layer_scale = layer.endswith("layer_scale")
    return f"{table.get(layer, layer)}.{'gamma' if is_layer_scale else names.LEAVES[leaf]}"
