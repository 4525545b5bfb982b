"""Converts the layers of Keras and TFLite files to our variables, by their order among layers of the same kind."""

from __future__ import annotations

import dataclasses
import itertools
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeVar

import numpy as np

from mnv2_jax.errors import UserError
from mnv2_jax.models.counting import count_layers
from mnv2_jax.models.plan import Plan, places
from mnv2_jax.models.registry import Model
from mnv2_jax.nn.window import Padding, Window
from mnv2_jax.weights.file import describe, raise_mismatch, shapes_of
from mnv2_jax.weights.layers import ForeignLayer, ForeignNetwork
from mnv2_jax.weights.names import family_of

_PADDINGS: Mapping[str, Mapping[str, Padding]] = {
    "symmetric": {"conv": "symmetric", "depthwise": "symmetric"},
    "keras_v1": {"conv": "same", "depthwise": "trailing"},
    "same": {"conv": "same", "depthwise": "same"},
}
"""Padding of layers with a stride, by ``padding`` and kind. If several fit a file's zeros, the first is chosen."""
_LINEAR = ("project", "start_depthwise")
"""Layers that no activation follows."""
_SQUEEZE_EXCITE = {"squeeze_excite/reduce": "relu", "squeeze_excite/expand": "hard_sigmoid"}
_RELUS = ("relu", "relu6")
T = TypeVar("T")


def _products(network: ForeignNetwork) -> list[ForeignLayer]:
    """Convolutions, then dense layers: every network here that has both ends with its dense layers."""
    return [layer for kind in ("conv", "dense") for layer in network.layers if layer.kind == kind]


def num_classes(path: pathlib.Path, network: ForeignNetwork) -> int:
    """Number of classes of the last layer in a file.

    Raises:
      UserError: if no layer in the file could be a classifier.
    """
    products = _products(network)
    if not products:
        raise UserError(f"{path}: holds neither a convolution nor a dense layer; give another file")
    return int(products[-1].arrays["kernel"].shape[-1])


def without_other_head(
    path: pathlib.Path, model: Model, network: ForeignNetwork, head: Literal["load", "new"]
) -> tuple[ForeignNetwork, tuple[str, ...]]:
    """Removes the layers after global pooling from a file's network if they differ from the model's and a new head is
    requested.

    Args:
      path: the file, for errors.
      model: the model, with any number of classes.
      network: the content of the file.
      head: "load" removes nothing.

    Returns:
      The network, and the parts among `Model.head_parts` that it lacks (now). The network is returned unchanged if its
      other layers aren't the model's.

    Raises:
      UserError: naming the layers after global pooling, if they should be loaded but aren't the model's.
    """
    shapes, parts = shapes_of(model), model.head_parts
    our_names = _layer_names(model, shapes)
    body = {kind: [name for name in names if name not in parts] for kind, names in our_names.items()}
    products, norms = _products(network), [layer for layer in network.layers if layer.kind == "norm"]
    last, behind = len(body["product"]) - 1, products[len(body["product"]) :]
    if len(products) <= last or _shape(products[last]) != shapes[f"params/{body['product'][last]}/kernel"][-2:]:
        return network, ()
    matched = list(itertools.takewhile(lambda pair: _fits(*pair, behind, shapes), zip(parts, behind, strict=False)))
    surplus = [*behind[len(matched) :], *([] if network.folded else norms[len(body["norm"]) :])]
    if (surplus or network.unsupported) and head == "load":
        description = ", ".join([*map(_describe_layer, surplus), *network.unsupported])
        expected = " and ".join(f"{part} of {shapes[f'params/{part}/kernel'][0]} channels" for part in parts)
        raise UserError(
            f"{path}: after global pooling it has {description}, where {model.name} has {expected}; to start a training"
            " from the layers before, give --config.init.head=new"
        )
    remaining = tuple(layer for layer in network.layers if all(layer is not each for each in surplus))
    return dataclasses.replace(network, layers=remaining), parts[len(matched) :]


def _describe_layer(layer: ForeignLayer) -> str:
    shape = list(next(iter(layer.arrays.values())).shape)
    return f"{layer.kind} {layer.name} {shape}" + (f" with {layer.activation}" if layer.activation else "")


def _shape(layer: ForeignLayer) -> tuple[int, ...]:
    """Input and output channels of a convolution or dense layer."""
    return layer.arrays["kernel"].shape[-2:]


def _fits(
    part: str, layer: ForeignLayer, behind: Sequence[ForeignLayer], shapes: Mapping[str, tuple[int, ...]]
) -> bool:
    """Whether a layer after global pooling fits a part of the model.

    A classifier must be the last layer; its number of classes is free.
    """
    our_shape, (inputs, outputs) = shapes[f"params/{part}/kernel"], _shape(layer)
    if part == "classifier":
        can_be = (None, "log_softmax", "sigmoid") if outputs == 1 else (None, "log_softmax")
        return inputs == our_shape[0] and layer is behind[-1] and layer.activation in can_be
    return (inputs, outputs) == our_shape


def is_binary(network: ForeignNetwork) -> bool:
    """Whether the last layer gives a single logit z: the second of two classes has the probability sigmoid(z)."""
    return [_shape(layer)[1] for layer in _products(network)[-1:]] == [1]


def of_two_classes(network: ForeignNetwork) -> ForeignNetwork:
    """Replaces the single logit z of the last layer by two, 0 and z, which give the same probabilities."""
    last = _products(network)[-1]
    arrays = {leaf: np.concatenate([np.zeros_like(array), array], axis=-1) for leaf, array in last.arrays.items()}
    two = dataclasses.replace(last, arrays=arrays, activation=None)
    return dataclasses.replace(network, layers=tuple(two if layer is last else layer for layer in network.layers))


def facts_of(path: pathlib.Path, model: Model, network: ForeignNetwork, absent: tuple[str, ...] = ()) -> dict[str, Any]:
    """Reads the options of `create_model` that a file states: ``strides``, ``padding`` and ``activation``.

    Args:
      path: the file, for errors.
      model: the model, built without these options.
      network: the content of the file.
      absent: parts of the model that the file lacks.

    Returns:
      The options that the file states. ``activation`` is left out if it is the usual one of the family.

    Raises:
      UserError: if layers are missing or left over, or a layer has a stride, dilation, padding or activation that the
        model's can't have.
    """
    shapes = shapes_of(model, absent)
    pairs = dict(_pairs(model, network, shapes, f"{path}: not the weights of {describe(model)}"))
    pairs = {name: layer for name, layer in pairs.items() if layer.kind != "norm"}
    kernels = {name: shapes[f"params/{name}/kernel"] for name in pairs}
    halving = _halving(model.plan, [name for name, (size, *dims) in kernels.items() if dims[1:] and size > 1])
    for name, layer in pairs.items():
        strides = (1, 2) if name in halving else (1,)
        if layer.stride not in (None, *strides) or layer.dilation not in (None, 1):
            raise UserError(
                f"{path}: layer {layer.name} has a stride of {layer.stride} and a dilation of {layer.dilation}, where"
                f" {model.name} has {' or '.join(map(str, strides))} and 1; give another model or file"
            )
        if name not in halving and not _agrees(layer, "same", None):
            raise _wrong_padding(path, layer)
    facts: dict[str, Any] = _activation(path, model, network, pairs)
    window_layers = [pairs[name] for name in halving]
    if all(layer.stride is not None for layer in window_layers):
        facts["strides"] = tuple(layer.stride for layer in window_layers)
        if all(layer.pads is not None for layer in window_layers):
            facts["padding"] = _padding(path, model, window_layers, network.resolution)
    return facts


def check_dense(path: pathlib.Path, model: Model, network: ForeignNetwork) -> None:
    """Checks strides, dilations, paddings and activations of a file's dense network.

    Raises:
      UserError: if layers are missing or left over, or one differs from the model's.
    """
    pairs = dict(_pairs(model, network, shapes_of(model), f"{path}: not the weights of {describe(model)}"))
    pairs = {name: layer for name, layer in pairs.items() if layer.kind != "norm"}
    parts = ("stem", *(f"block_{number}" for number in range(1, len(model.plan.blocks) + 1)))
    at = dict(zip(parts, places(model.plan, model.options), strict=True))
    for name, layer in pairs.items():
        place = at.get(name.split("/")[0])
        has_window = place is not None and layer.arrays["kernel"].shape[0] > 1
        expected = (place.stride, place.dilation) if place and has_window else (1, 1)
        if (layer.stride or 1, layer.dilation or 1) != expected:
            raise UserError(
                f"{path}: layer {layer.name} has a stride of {layer.stride} and a dilation of {layer.dilation}, where"
                f" {describe(model)} has {expected[0]} and {expected[1]}; give another model or file"
            )
        if has_window and layer.pads not in (None, "same"):
            raise _wrong_padding(path, layer)
    _activation(path, model, network, pairs)


def dense_options(network: ForeignNetwork) -> dict[str, Any]:
    """Options of a file's dense network: the output stride, the channels of its head, how logits are resized."""
    return {
        "head": network.head,
        "head_channels": int(_shape(_products(network)[-1])[0]),
        "output_stride": 2 ** sum(layer.stride == 2 for layer in network.layers),
        "align_corners": network.align_corners,
    }


def fitting(network: ForeignNetwork, model_of: Callable[..., Model], candidates: Sequence[T]) -> T | None:
    """Returns the first of the candidates with which ``model_of`` makes blocks of the file's channels; None: none does.

    Only the depthwise convolutions are compared, of which each block has one in V1 to V3.
    """
    held = [layer.arrays["kernel"].shape[-1] for layer in network.layers if layer.kind == "depthwise"]
    for candidate in candidates:
        plan = model_of(candidate).plan
        channels = [plan.stem, *(block.options["features"] for block in plan.blocks)]
        hidden = [block.options.get("hidden") for block in plan.blocks]
        if held == [own or before for own, before in zip(hidden, channels, strict=False)]:
            return candidate
    return None


def _halving(plan: Plan, windowed: list[str]) -> list[str]:
    """Selects the layers that halve the map in the published network, from all layers with a window.

    In a block it is the last layer with a window that has the stride.
    """
    places = ["stem", *(f"block_{i}" for i, block in enumerate(plan.blocks, 1) if block.stride > 1)]
    return [[name for name in windowed if name.split("/")[0] == place][-1] for place in places]


def _padding(path: pathlib.Path, model: Model, layers: list[ForeignLayer], size: int | None) -> str:
    """Finds the padding that gives the zeros of the layers that halve the map, for an image of ``size``."""
    if all(layer.pads == "same" for layer in layers):
        return "same"
    candidates = [name for name in _PADDINGS if name != "keras_v1" or family_of(model.name) == "mobilenet_v1"]
    for layer in layers:
        candidates = [name for name in candidates if _agrees(layer, _PADDINGS[name][layer.kind], size)]
        if not candidates:
            raise _wrong_padding(path, layer)
        # The zeros of "same" give a map of the same size as (kernel - 1) zeros do.
        zeros = layer.pads if isinstance(layer.pads, tuple) else (layer.arrays["kernel"].shape[0] - 1,)
        size = size and (size + sum(zeros) - layer.arrays["kernel"].shape[0]) // (layer.stride or 1) + 1
    return candidates[0]


def _agrees(layer: ForeignLayer, padding: Padding, size: int | None) -> bool:
    """Whether a layer's zeros are those of a padding. A map of unknown size counts as even, as in Keras."""
    stride = layer.stride or 1
    if layer.pads is None or layer.pads == padding or (layer.pads == "same" and stride == 1):
        return True
    zeros = (0, 0) if layer.pads == "valid" else layer.pads
    return zeros == Window(stride, 1, padding).pad(size or 2, layer.arrays["kernel"].shape[0])


def _wrong_padding(path: pathlib.Path, layer: ForeignLayer) -> UserError:
    pads = layer.pads if isinstance(layer.pads, str) else f"{layer.pads} zeros before and after"
    kernel, stride = layer.arrays["kernel"].shape[0], layer.stride
    return UserError(
        f"{path}: layer {layer.name} has padding {pads} with a kernel of {kernel} and a stride of {stride}; together"
        f" with the layers before it, that fits none of the paddings {', '.join(_PADDINGS)}; give another file"
    )


def _activation(
    path: pathlib.Path, model: Model, network: ForeignNetwork, pairs: Mapping[str, ForeignLayer]
) -> dict[str, str]:
    """Checks that each layer has the model's activation; returns the option ``activation`` if the file has relu where
    the family has a choice.
    """
    plan = model.plan
    of_dense_head = {name for name in pairs if name.startswith("aspp/")}  # it has relu, whatever the features have
    activations = {layer.activation for name, layer in pairs.items() if name not in of_dense_head}
    has_choice = family_of(model.name) in ("mobilenet_v1", "mobilenet_v2")
    chosen = next((relu for relu in _RELUS if relu in activations), None) if has_choice else None
    for name, layer in pairs.items():
        expected = _activation_of(name, plan)
        expected = chosen or expected if expected in _RELUS and name not in of_dense_head else expected
        # A Keras file with a config names every activation. In TFLite the range of the integers may stand for one.
        says_none = network.source == "keras" and layer.stride is not None
        if name == "classifier" or layer.activation == expected or (layer.activation is None and not says_none):
            continue
        raise UserError(
            f"{path}: layer {layer.name} is followed by {layer.activation or 'no known activation'}, where"
            f" {model.name} has {expected or 'no activation'}; give another model or file"
        )
    return {"activation": "relu"} if chosen == "relu" else {}


def _activation_of(name: str, plan: Plan) -> str | None:
    """Activation that follows a layer of our model."""
    block, _, layer = name.partition("/")
    if not layer:
        return plan.act
    if block == "aspp":
        return "relu"
    options = plan.blocks[int(block.removeprefix("block_")) - 1].options
    if layer in _LINEAR or (layer == "depthwise" and options.get("linear_depthwise")):
        return None
    return _SQUEEZE_EXCITE.get(layer, options.get("act"))


def leaves_of(
    path: pathlib.Path, model: Model, network: ForeignNetwork, absent: tuple[str, ...] = ()
) -> dict[str, np.ndarray]:
    """Makes each of the model's leaves from the file's layer of the same kind at the same place in the order.

    A bias before a norm is subtracted from the norm's mean, which has the same effect. If the norms are folded into the
    convolutions, each norm becomes an identity with that bias. A bias that the file lacks is zero. The parts that are
    ``absent`` from the file get no leaves.

    Raises:
      UserError: listing layers that are missing, left over, or of another shape.
    """
    shapes = shapes_of(model, absent)
    summary = f"{path}: not the weights of {describe(model)}"
    leaves: dict[str, np.ndarray] = {}
    wrong, unused = [], []
    biases = {}
    for layer, file_layer in _pairs(model, network, shapes, summary):
        arrays = dict(file_layer.arrays)
        if file_layer.kind != "norm" and (network.folded or f"params/{layer}/bias" in shapes):
            arrays.setdefault("bias", np.zeros_like(arrays["kernel"], shape=arrays["kernel"].shape[-1:]))
        for leaf, array in arrays.items():
            if leaf == "bias" and f"params/{layer}_norm/bias" in shapes:
                biases[f"{layer}_norm"] = array
                continue
            place = f"{'batch_stats' if leaf in ('mean', 'var') else 'params'}/{layer}/{leaf}"
            shape = shapes.get(place)
            if shape is None:
                unused.append(f"{leaf} of {file_layer.name}")
                continue
            if len(shape) == 2 and array.ndim == 4 and array.shape[:2] == (1, 1):
                array = array[0, 0]  # a dense layer as a 1×1 convolution
            if array.shape != shape:
                wrong.append(f"{leaf} of {file_layer.name} is {list(array.shape)} instead of {list(shape)} for {layer}")
            leaves[place] = array
    for norm, bias in biases.items():
        if network.folded:
            leaves |= _identity(norm, bias, model.norm.epsilon)
        elif (mean := leaves.get(f"batch_stats/{norm}/mean")) is not None and mean.shape == bias.shape:
            leaves[f"batch_stats/{norm}/mean"] = mean - bias
    missing = sorted(set(shapes) - set(leaves))
    raise_mismatch({"missing": missing, "left over": unused, "of another shape": wrong}, summary)
    return leaves


def _pairs(
    model: Model, network: ForeignNetwork, shapes: Mapping[str, tuple[int, ...]], summary: str
) -> list[tuple[str, ForeignLayer]]:
    """Pairs the names of our layers, in the order of computation, with the file's layers."""
    our_names = _layer_names(model, shapes)
    if network.folded:
        our_names["norm"] = []
    file_layers: dict[str, list[ForeignLayer]] = {"product": _products(network)}
    file_layers |= {kind: [layer for layer in network.layers if layer.kind == kind] for kind in ("depthwise", "norm")}
    missing = [name for kind in our_names for name in our_names[kind][len(file_layers[kind]) :]]
    unused = [layer.name for kind in our_names for layer in file_layers[kind][len(our_names[kind]) :]]
    raise_mismatch({"missing": missing, "left over": unused}, summary)
    return [pair for kind in our_names for pair in zip(our_names[kind], file_layers[kind], strict=True)]


def _layer_names(model: Model, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, list[str]]:
    """Names of the model's layers that occur in the shapes, by kind and in the order of computation."""
    layer_names: dict[str, list[str]] = {"depthwise": [], "product": [], "norm": []}
    for layer in (row.name for row in count_layers(model, 64).layers):
        kernel = shapes.get(f"params/{layer}/kernel")
        if kernel is not None:
            layer_names["depthwise" if len(kernel) == 4 and kernel[2] == 1 else "product"].append(layer)
        elif f"batch_stats/{layer}/mean" in shapes:
            layer_names["norm"].append(layer)
    return layer_names


def _identity(norm: str, bias: np.ndarray, epsilon: float) -> dict[str, np.ndarray]:
    """Leaves of a norm that only adds a bias: scale / sqrt(var + epsilon) = 1."""
    one = np.ones_like(bias)
    return {
        f"params/{norm}/scale": one,
        f"params/{norm}/bias": bias,
        f"batch_stats/{norm}/mean": 0 * one,
        f"batch_stats/{norm}/var": one - np.float32(epsilon),
    }
