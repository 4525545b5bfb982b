"""PyTorch state dicts to our variables and back, by the tables of `names`."""

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
    """How many classes a state dict tells apart; 2, where nothing in it could be a classifier."""
    kernels = [state[name] for name in _behind(state, table) if state[name].ndim > 1]
    usual = state.get(f"{table['classifier']}.weight")
    if usual is not None and usual.ndim > 1:
        kernels.append(usual)
    return max([2, *(len(kernel) for kernel in kernels[-1:])])


def _behind(state: Mapping[str, np.ndarray], table: Mapping[str, str]) -> list[str]:
    """Tensors of the module that a library's classifier is, or is in."""
    root = table["classifier"].partition(".")[0]
    return [name for name in state if name.startswith(f"{root}.")]


def without_other_head(
    path: pathlib.Path,
    model: Model,
    state: Mapping[str, np.ndarray],
    table: Mapping[str, str],
    head: Literal["load", "new"],
) -> tuple[Mapping[str, np.ndarray], tuple[str, ...], list[str]]:
    """Takes what comes behind the mean out of a state dict where it isn't ours and a new head is asked for.

    A dense layer that is alone there is the classifier: people put it into an ``nn.Sequential`` after dropout, or in
    place of one.

    Args:
      path: of the file, for errors.
      model: of as many classes as `num_classes` says.
      state: the tensors.
      table: of the library's names.
      head: load: nothing is taken out.

    Returns:
      The state dict, the parts among `Model.head_parts` that it doesn't have (then), and what was done. One whose
      other tensors aren't the model's stays as it is.

    Raises:
      UserError: naming the tensors behind the mean, if they aren't ours and are to be loaded.
    """
    shapes, parts = shapes_of(model), model.head_parts
    body = _match(model, state, table, parts)
    if body.missing or body.wrong:
        return state, (), []

    def fits(part: str, name: str) -> bool:
        return name in state and state[name].shape[:2] == shapes[f"params/{part}/kernel"][::-1]

    *hidden, classifier = parts
    held = [part for part in hidden if fits(part, f"{table[part]}.weight")]
    behind = [name for name in _behind(state, table) if not any(name.startswith(f"{table[part]}.") for part in held)]
    absent = tuple(part for part in parts if part not in held)
    rest = {name: array for name, array in state.items() if name not in behind}
    if any(f"{table[part]}.weight" in rest for part in absent):
        return state, (), []
    if not behind:
        return rest, absent, []
    layer, usual = behind[0].rpartition(".")[0], table[classifier]
    is_alone = {*behind, f"{layer}.bias"} == {f"{layer}.weight", f"{layer}.bias"}
    if is_alone and absent == (classifier,) and fits(classifier, f"{layer}.weight"):
        moved = {name.replace(layer, usual, 1): state[name] for name in behind}
        return rest | moved, (), [] if layer == usual else [f"the classifier is {layer}"]
    told = ", ".join([f"{name} {list(state[name].shape)}" for name in behind[:6]] + ["…"] * (len(behind) > 6))
    if head == "load":
        wanted = " and ".join(f"{part} of {shapes[f'params/{part}/kernel'][0]} channels" for part in parts)
        raise UserError(
            f"{path}: behind the mean it has {told}, where {model.name} has {wanted}; a training can start from what"
            " comes before by --config.init.head=new"
        )
    return rest, absent, [f"{told} were left out"]


@dataclasses.dataclass(frozen=True)
class _Match:
    """Leaves from a state dict, and names of theirs that are at odds with the model."""

    leaves: dict[str, np.ndarray]
    missing: list[str]
    wrong: list[str]
    left: list[str]
    zeros: list[str]
    """Biases that the file leaves out."""


def _match(model: Model, state: Mapping[str, np.ndarray], table: Mapping[str, str], absent: tuple[str, ...]) -> _Match:
    shapes = shapes_of(model, absent)
    found = _Match({}, [], [], [], [])
    used = set()
    for ours, shape in shapes.items():
        layer, leaf = _split(ours)
        theirs = _name(table, layer, leaf)
        used.add(theirs)
        if theirs not in state:
            if leaf == "bias" and f"params/{layer}/kernel" in shapes and _name(table, layer, "kernel") in state:
                found.zeros.append(theirs)
                found.leaves[ours] = np.zeros(shape, np.float32)
            else:
                found.missing.append(theirs)
            continue
        array = state[theirs]
        if leaf == "kernel" and array.ndim in (2, 4):
            array = array.T if array.ndim == 2 else array.transpose(2, 3, 1, 0)
        if len(shape) == 2 and array.ndim == 4 and array.shape[:2] == (1, 1):
            array = array[0, 0]  # a dense layer as a 1×1 convolution
        if array.shape != shape:
            found.wrong.append(f"{theirs} is {list(array.shape)} instead of {list(shape)} for {layer}")
        found.leaves[ours] = array
    found.left.extend(sorted(set(state) - used))
    return found


def leaves_of(
    path: pathlib.Path,
    model: Model,
    state: Mapping[str, np.ndarray],
    table: Mapping[str, str],
    absent: tuple[str, ...] = (),
) -> tuple[dict[str, np.ndarray], list[str]]:
    """Every leaf of ours from the tensor that the table names, but for those of the parts that are ``absent``.

    Returns:
      The leaves, and the names of biases that the file leaves out, which are zero.

    Raises:
      UserError: listing tensors that are missing, left over, or of another shape.
    """
    found = _match(model, state, table, absent)
    problems = {"missing": found.missing, "left over": found.left, "of another shape": found.wrong}
    raise_mismatch(problems, f"{path}: not the weights of {describe(model)}")
    return found.leaves, found.zeros


def to_timm(weights: Weights) -> dict[str, np.ndarray]:
    """The state dict that timm's model of the same network loads; ``num_batches_tracked`` is 0.

    Padding, epsilon and activation are not in it: see `timm_options`.

    Raises:
      UserError: if timm has no such network.
    """
    model = weights.model
    own, default = model.options, ModelConfig()
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
    table = names.TABLES["timm", family](model.plan)
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
    """Arguments of ``timm.create_model`` besides the name, for the same outputs."""
    own, norm = weights.model.options, weights.model.norm
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
    """Name of the library's tensor; ours where the library has no such layer."""
    is_layer_scale = layer.endswith("layer_scale")
    return f"{table.get(layer, layer)}.{'gamma' if is_layer_scale else names.LEAVES[leaf]}"
