"""Layers of Keras and TFLite files to our variables, by their place among those of the same kind."""

from __future__ import annotations

import dataclasses
import itertools
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from mnv2_jax.errors import UserError
from mnv2_jax.models.counting import count_layers
from mnv2_jax.models.network import Plan
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
"""Zeros around layers with a stride, by ``padding`` and kind; a file whose zeros fit several has the first."""
_LINEAR = ("project", "start_depthwise")
_SQUEEZE_EXCITE = {"squeeze_excite/reduce": "relu", "squeeze_excite/expand": "hard_sigmoid"}
_RELUS = ("relu", "relu6")


def _products(network: ForeignNetwork) -> list[ForeignLayer]:
    """Convolutions, then dense layers, which come last in every network here that has both."""
    return [layer for kind in ("conv", "dense") for layer in network.layers if layer.kind == kind]


def num_classes(path: pathlib.Path, network: ForeignNetwork) -> int:
    """How many the last layer of a file has.

    Raises:
      UserError: if it holds no layer that could be a classifier.
    """
    products = _products(network)
    if not products:
        raise UserError(f"{path}: holds no convolution and no dense layer; give another file")
    return int(products[-1].arrays["kernel"].shape[-1])


def without_other_head(
    path: pathlib.Path, model: Model, network: ForeignNetwork, head: Literal["load", "new"]
) -> tuple[ForeignNetwork, tuple[str, ...]]:
    """Takes what comes behind the mean out of a file where it isn't ours and a new head is asked for.

    Args:
      path: of the file, for errors.
      model: of any number of classes.
      network: what the file holds.
      head: load: nothing is taken out.

    Returns:
      The network and those of `Model.head_parts` that it doesn't have (then). A network whose other layers aren't
      the model's stays as it is.

    Raises:
      UserError: naming the layers behind the mean, if they aren't ours and are to be loaded.
    """
    shapes, parts = shapes_of(model), model.head_parts
    ours = _ours(model, shapes)
    body = {kind: [name for name in names if name not in parts] for kind, names in ours.items()}
    products, norms = _products(network), [layer for layer in network.layers if layer.kind == "norm"]
    last, behind = len(body["product"]) - 1, products[len(body["product"]) :]
    if len(products) <= last or _shape(products[last]) != shapes[f"params/{body['product'][last]}/kernel"][-2:]:
        return network, ()
    held = list(itertools.takewhile(lambda pair: _fits(*pair, behind, shapes), zip(parts, behind, strict=False)))
    others = [*behind[len(held) :], *([] if network.folded else norms[len(body["norm"]) :])]
    if (others or network.strange) and head == "load":
        theirs = ", ".join([*map(_described, others), *network.strange])
        wanted = " and ".join(f"{part} of {shapes[f'params/{part}/kernel'][0]} channels" for part in parts)
        raise UserError(
            f"{path}: behind the mean it has {theirs}, where {model.name} has {wanted}; a training can start from what"
            " comes before by --config.init.head=new"
        )
    kept = tuple(layer for layer in network.layers if all(layer is not other for other in others))
    return dataclasses.replace(network, layers=kept), parts[len(held) :]


def _described(layer: ForeignLayer) -> str:
    shape = list(next(iter(layer.arrays.values())).shape)
    return f"{layer.kind} {layer.name} {shape}" + (f" with {layer.activation}" if layer.activation else "")


def _shape(layer: ForeignLayer) -> tuple[int, ...]:
    """Channels in and out."""
    return layer.arrays["kernel"].shape[-2:]


def _fits(
    part: str, layer: ForeignLayer, behind: Sequence[ForeignLayer], shapes: Mapping[str, tuple[int, ...]]
) -> bool:
    """Whether a layer behind the mean is that part of ours; a classifier is the last, of any number of classes."""
    ours, (inputs, outputs) = shapes[f"params/{part}/kernel"], _shape(layer)
    if part == "classifier":
        can_be = (None, "log_softmax", "sigmoid") if outputs == 1 else (None, "log_softmax")
        return inputs == ours[0] and layer is behind[-1] and layer.activation in can_be
    return (inputs, outputs) == ours


def is_binary(network: ForeignNetwork) -> bool:
    """Whether the last layer gives one logit z, of which the second of two classes has the probability sigmoid(z)."""
    return [_shape(layer)[1] for layer in _products(network)[-1:]] == [1]


def of_two_classes(network: ForeignNetwork) -> ForeignNetwork:
    """The network, the one logit z of whose last layer is now two, 0 and z: the same probabilities."""
    last = _products(network)[-1]
    arrays = {leaf: np.concatenate([np.zeros_like(array), array], axis=-1) for leaf, array in last.arrays.items()}
    two = dataclasses.replace(last, arrays=arrays, activation=None)
    return dataclasses.replace(network, layers=tuple(two if layer is last else layer for layer in network.layers))


def facts_of(path: pathlib.Path, model: Model, network: ForeignNetwork, absent: tuple[str, ...] = ()) -> dict[str, Any]:
    """Options of `create_model` that a file says: ``strides``, ``padding`` and ``activation``.

    Args:
      path: of the file, for errors.
      model: built without them, whose layers the file's are.
      network: what the file holds.
      absent: parts of ours that it doesn't hold.

    Returns:
      Those that it says. ``activation`` isn't among them where it is the family's.

    Raises:
      UserError: if layers are missing or left over, or one has a stride, a dilation, a padding or an activation that
        ours can't have.
    """
    shapes = shapes_of(model, absent)
    pairs = dict(_pairs(model, network, shapes, f"{path}: not the weights of {describe(model)}"))
    pairs = {ours: layer for ours, layer in pairs.items() if layer.kind != "norm"}
    kernels = {ours: shapes[f"params/{ours}/kernel"] for ours in pairs}
    halving = _halving(model.plan, [ours for ours, (size, *rest) in kernels.items() if rest[1:] and size > 1])
    for ours, layer in pairs.items():
        strides = (1, 2) if ours in halving else (1,)
        if layer.stride not in (None, *strides) or layer.dilation not in (None, 1):
            raise UserError(
                f"{path}: layer {layer.name} has a stride of {layer.stride} and a dilation of {layer.dilation}, where"
                f" {model.name} has {' or '.join(map(str, strides))} and 1; give another model or file"
            )
        if ours not in halving and not _agrees(layer, "same", None):
            raise _wrong_padding(path, layer)
    facts: dict[str, Any] = _activation(path, model, network, pairs)
    window_layers = [pairs[ours] for ours in halving]
    if all(layer.stride is not None for layer in window_layers):
        facts["strides"] = tuple(layer.stride for layer in window_layers)
        if all(layer.pads is not None for layer in window_layers):
            facts["padding"] = _padding(path, model, window_layers, network.resolution)
    return facts


def _halving(plan: Plan, windowed: list[str]) -> list[str]:
    """The layers that halve the published map, out of all with a window: of a block the last has the stride."""
    places = ["stem", *(f"block_{i}" for i, block in enumerate(plan.blocks, 1) if block.stride > 1)]
    return [[ours for ours in windowed if ours.split("/")[0] == place][-1] for place in places]


def _padding(path: pathlib.Path, model: Model, layers: list[ForeignLayer], size: int | None) -> str:
    """Which padding has the zeros of the layers that halve the map of an image of that size."""
    if all(layer.pads == "same" for layer in layers):
        return "same"
    left = [name for name in _PADDINGS if name != "keras_v1" or family_of(model.name) == "mobilenet_v1"]
    for layer in layers:
        left = [name for name in left if _agrees(layer, _PADDINGS[name][layer.kind], size)]
        if not left:
            raise _wrong_padding(path, layer)
        # As few zeros as "same" adds leave as many places as (kernel - 1) zeros do.
        zeros = layer.pads if isinstance(layer.pads, tuple) else (layer.arrays["kernel"].shape[0] - 1,)
        size = size and (size + sum(zeros) - layer.arrays["kernel"].shape[0]) // (layer.stride or 1) + 1
    return left[0]


def _agrees(layer: ForeignLayer, padding: Padding, size: int | None) -> bool:
    """Whether a layer has the zeros of a padding; a map of unknown size counts as even, as in Keras."""
    stride = layer.stride or 1
    if layer.pads is None or layer.pads == padding or (layer.pads == "same" and stride == 1):
        return True
    zeros = (0, 0) if layer.pads == "valid" else layer.pads
    return zeros == Window(stride, 1, padding).pad(size or 2, layer.arrays["kernel"].shape[0])


def _wrong_padding(path: pathlib.Path, layer: ForeignLayer) -> UserError:
    pads = layer.pads if isinstance(layer.pads, str) else f"{layer.pads} zeros before and after"
    kernel, stride = layer.arrays["kernel"].shape[0], layer.stride
    return UserError(
        f"{path}: layer {layer.name} has padding {pads} with a kernel of {kernel} and a stride of {stride}, which fits"
        f" none of {', '.join(_PADDINGS)} together with the layers before it; give another file"
    )


def _activation(
    path: pathlib.Path, model: Model, network: ForeignNetwork, pairs: Mapping[str, ForeignLayer]
) -> dict[str, str]:
    """relu, where a family that has the choice has that; and every layer has the same as ours."""
    plan = model.plan
    said = {layer.activation for layer in pairs.values()}
    has_choice = family_of(model.name) in ("mobilenet_v1", "mobilenet_v2")
    chosen = next((name for name in _RELUS if name in said), None) if has_choice else None
    for ours, layer in pairs.items():
        wanted = _activation_of(ours, plan)
        wanted = chosen or wanted if wanted in _RELUS else wanted
        # A file of Keras with a config says everything; in TFLite an activation may be a mere range of integers.
        says_none = network.source == "keras" and layer.stride is not None
        if ours == "classifier" or layer.activation == wanted or (layer.activation is None and not says_none):
            continue
        raise UserError(
            f"{path}: after layer {layer.name} comes {layer.activation or 'no activation that we know'}, where"
            f" {model.name} has {wanted or 'none'}; give another model or file"
        )
    return {"activation": "relu"} if chosen == "relu" else {}


def _activation_of(ours: str, plan: Plan) -> str | None:
    """Activation that follows a layer of ours."""
    block, _, layer = ours.partition("/")
    if not layer:
        return plan.act
    options = plan.blocks[int(block.removeprefix("block_")) - 1].options
    if layer in _LINEAR or (layer == "depthwise" and options.get("linear_depthwise")):
        return None
    return _SQUEEZE_EXCITE.get(layer, options.get("act"))


def leaves_of(
    path: pathlib.Path, model: Model, network: ForeignNetwork, absent: tuple[str, ...] = ()
) -> dict[str, np.ndarray]:
    """Every leaf of ours from the file's layer of the same kind at the same place.

    A bias before a norm is taken out of the norm's mean, where it would be subtracted again; where the norms are folded
    into the convolutions, each becomes an identity with that bias. A bias that the file leaves out is zero; parts that
    are ``absent`` from it have no leaves.

    Raises:
      UserError: listing layers that are missing, left over, or of another shape.
    """
    shapes = shapes_of(model, absent)
    what = f"{path}: not the weights of {describe(model)}"
    leaves: dict[str, np.ndarray] = {}
    wrong, left = [], []
    biases = {}
    for layer, other in _pairs(model, network, shapes, what):
        arrays = dict(other.arrays)
        if other.kind != "norm" and (network.folded or f"params/{layer}/bias" in shapes):
            arrays.setdefault("bias", np.zeros_like(arrays["kernel"], shape=arrays["kernel"].shape[-1:]))
        for leaf, array in arrays.items():
            if leaf == "bias" and f"params/{layer}_norm/bias" in shapes:
                biases[f"{layer}_norm"] = array
                continue
            place = f"{'batch_stats' if leaf in ('mean', 'var') else 'params'}/{layer}/{leaf}"
            shape = shapes.get(place)
            if shape is None:
                left.append(f"{leaf} of {other.name}")
                continue
            if len(shape) == 2 and array.ndim == 4 and array.shape[:2] == (1, 1):
                array = array[0, 0]  # a dense layer as a 1×1 convolution
            if array.shape != shape:
                wrong.append(f"{leaf} of {other.name} is {list(array.shape)} instead of {list(shape)} for {layer}")
            leaves[place] = array
    for norm, bias in biases.items():
        if network.folded:
            leaves |= _identity(norm, bias, model.norm.epsilon)
        elif (mean := leaves.get(f"batch_stats/{norm}/mean")) is not None and mean.shape == bias.shape:
            leaves[f"batch_stats/{norm}/mean"] = mean - bias
    missing = sorted(set(shapes) - set(leaves))
    raise_mismatch({"missing": missing, "left over": left, "of another shape": wrong}, what)
    return leaves


def _pairs(
    model: Model, network: ForeignNetwork, shapes: Mapping[str, tuple[int, ...]], what: str
) -> list[tuple[str, ForeignLayer]]:
    """Our layers, in the order of computation, with theirs."""
    ours = _ours(model, shapes)
    if network.folded:
        ours["norm"] = []
    theirs: dict[str, list[ForeignLayer]] = {"product": _products(network)}
    theirs |= {kind: [layer for layer in network.layers if layer.kind == kind] for kind in ("depthwise", "norm")}
    missing = [name for kind in ours for name in ours[kind][len(theirs[kind]) :]]
    left = [layer.name for kind in ours for layer in theirs[kind][len(ours[kind]) :]]
    raise_mismatch({"missing": missing, "left over": left}, what)
    return [pair for kind in ours for pair in zip(ours[kind], theirs[kind], strict=True)]


def _ours(model: Model, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, list[str]]:
    """Names of our layers that are among the shapes, by kind, in the order of computation."""
    ours: dict[str, list[str]] = {"depthwise": [], "product": [], "norm": []}
    for layer in (row.name for row in count_layers(model, 64).layers):
        kernel = shapes.get(f"params/{layer}/kernel")
        if kernel is not None:
            ours["depthwise" if len(kernel) == 4 and kernel[2] == 1 else "product"].append(layer)
        elif f"batch_stats/{layer}/mean" in shapes:
            ours["norm"].append(layer)
    return ours


def _identity(norm: str, bias: np.ndarray, epsilon: float) -> dict[str, np.ndarray]:
    """Leaves of a norm that only adds: scale / sqrt(var + epsilon) = 1."""
    one = np.ones_like(bias)
    return {
        f"params/{norm}/scale": one,
        f"params/{norm}/bias": bias,
        f"batch_stats/{norm}/mean": 0 * one,
        f"batch_stats/{norm}/var": one - np.float32(epsilon),
    }
