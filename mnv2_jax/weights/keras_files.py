"""Reads the weights in Keras files with h5py only: without Keras, TensorFlow or pickled code.

    model.h5            model.save of Keras 1 and 2: arrays by layer name, and the config of the model
    weights.h5          save_weights of Keras 1 and 2, as Keras Applications publishes them: arrays by layer name
    model.weights.h5    save_weights of Keras 3: layers/CLASS_NUMBER/vars/0, 1, ..., numbered class by class
    model.keras         a zip of config.json and such a model.weights.h5

Only the first and the last form hold strides, paddings, activations, the epsilon of the norms, the resolution and the
preprocessing of images before the first convolution (`pixels`).
No file can make this code run anything. But HDF5's C code doesn't withstand all damage: of 13,000 small files in which
random bytes were changed, it crashed or hung on 4.
"""

from __future__ import annotations

import collections
import dataclasses
import io
import itertools
import json
import math
import pathlib
import re
import struct
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from mnv2_jax.errors import UserError
from mnv2_jax.weights import pixels
from mnv2_jax.weights.layers import (
    LARGEST,
    ForeignLayer,
    ForeignNetwork,
    Kind,
    as_float32,
    one_of,
    pads_of,
    reading,
    without_softmax,
)

_KINDS: dict[str, Kind] = {
    "conv2d": "conv",
    "depthwise_conv2d": "depthwise",
    "dense": "dense",
    "batch_normalization": "norm",
    "batch_normalization_v1": "norm",  # TensorFlow 1
    "sync_batch_normalization": "norm",
}
_LEAVES = {
    "kernel": "kernel",
    "depthwise_kernel": "kernel",
    "bias": "bias",
    "gamma": "scale",
    "beta": "bias",
    "moving_mean": "mean",
    "moving_variance": "var",
    "mean": "mean",  # this and the next two belong to a Normalization layer
    "variance": "var",
    "count": "count",
}
_LEARNT = ("mean", "var", "count")
"""Variables that a Normalization layer learns from data, in the order of the file."""
_ON_PIXELS = re.compile(
    r"(rescaling|normalization|resizing|center_crop|lambda|true_divide|subtract|(tf|slicing)_op_lambda"
    r"|tf\.(math\.(truediv|subtract|multiply)|nn\.bias_add|__operators__\.(add|getitem)))(_\d+)?"
)
"""Usual names of layers that prepare images, for files without a config."""
_ACTIVATIONS = {"None": None, "linear": None, "hard_silu": "hard_swish"}  # other names stay as they are
_CLASSES = {
    "LeakyReLU": "leaky_relu",
    "ELU": "elu",
    "ThresholdedReLU": "thresholded_relu",
    "Softmax": "softmax",
    "Relu": "relu",  # this and the following are functions of keras.ops
    "Relu6": "relu6",
    "Silu": "silu",
    "HardSilu": "hard_swish",
    "Gelu": "gelu",
}
_ACTIVATION_CLASSES = {"Activation", "ReLU", "TFOpLambda", *_CLASSES}
_ACTIVATION_MODULES = "nn.", "keras.activations."  # of functions that TFOpLambda calls
_GATED = {"hard_sigmoid": "hard_swish", "sigmoid": "swish"}  # if multiplied by their own input
_ZEROS = "zero_padding2d"
_UNSUPPORTED = {
    *("global_max_pooling2d", "max_pooling2d", "cropping2d", "up_sampling2d", "unit_normalization", "lambda"),
    *("rescaling", "resizing", "center_crop"),
}
"""Layers without weights that no MobileNet has after its first convolution."""
_ADDS = {"add", "tf_op_lambda", "tensor_flow_op_layer"}  # the x + 3 in a hard sigmoid of several layers, by version
_WEIGHTS = "weight_names"
_CONTAINERS = ("layers", "_layer_checkpoint_dependencies")  # Keras 3; TensorFlow 2.12 to 2.15
_LARGEST_CONFIG = 1 << 26
_GIVE_SAVED = "give a file that Keras's save or save_weights wrote"
_SAVE_WHOLE = "save the whole model as .keras and give that"


def read_keras(path: pathlib.Path) -> ForeignNetwork:
    """Reads the layers with weights from a Keras file of any form that the module lists.

    Raises:
      UserError: if the file can't be read, or holds a layer with weights that no MobileNet has.
    """
    try:
        import h5py
    except ImportError as error:
        raise UserError(f"{path}: reading Keras files needs h5py; run pip install 'mnv2_jax[convert]'") from error
    with reading(path, "Keras"):
        with path.open("rb") as stream:
            content = stream.read(LARGEST + 1)
        if len(content) > LARGEST:
            raise UserError(f"has more than {LARGEST >> 20} MiB, unlike any MobileNet; {_GIVE_SAVED}")
        config, weights, version = _unzip(content) if content.startswith(b"PK\3\4") else (None, content, None)
        _check_heaps(weights)
        with h5py.File(io.BytesIO(weights), "r") as file:
            config = config or file.attrs.get("model_config")
            version = str(version or file.attrs.get("keras_version"))
            graph = _Graph(version)
            if config:
                _add(graph, json.loads(config), [])
            layers = _layers_with_arrays(file, list(graph.nodes()))
            leading = _leading(graph, layers)
            fields = _preprocessing(graph, layers, leading)
            return ForeignNetwork(
                source="keras",
                layers=_layers((node, arrays) for node, arrays in layers if node.path not in leading),
                folded=False,
                epsilon=_epsilon(layers),
                resolution=fields.pop("resolution", None),
                mean=fields.pop("mean", None),
                std=fields.pop("std", None),
                pixel_layers={} if config else _pixel_layers(layers),
                unsupported=_unsupported(graph, layers, leading),
                view=fields,
            )


def _unzip(zipped: bytes) -> tuple[bytes, bytes, str | None]:
    """Config, weights and Keras version in a .keras file."""
    with zipfile.ZipFile(io.BytesIO(zipped)) as archive:

        def content(name: str, largest: int) -> bytes:
            if name not in archive.namelist():
                raise UserError(f"the zip has no {name}, so it isn't a .keras file; {_GIVE_SAVED}")
            with archive.open(name) as member:
                data = member.read(largest + 1)  # the size that the zip states may be wrong
            if len(data) > largest:
                raise UserError(f"{name} in it has more than {largest >> 20} MiB, unlike any MobileNet; {_GIVE_SAVED}")
            return data

        config, weights = content("config.json", _LARGEST_CONFIG), content("model.weights.h5", LARGEST)
        return config, weights, json.loads(content("metadata.json", _LARGEST_CONFIG)).get("keras_version")


def _check_heaps(content: bytes) -> None:
    """Checks the heaps that hold strings, because HDF5 crashes or loops for ever on a damaged one."""
    start = -1
    while (start := content.find(b"GCOL\1", start + 1)) >= 0:
        (size,) = struct.unpack_from("<Q", content, start + 8)
        at, end = start + 16, start + size
        while at + 16 <= end <= len(content):
            number, length = struct.unpack_from("<H6xQ", content, at)
            if number == 0 and length < 16:
                break
            at += length if number == 0 else 16 + -(-length // 8) * 8  # 0: free space, whose length includes its header
        if end > len(content) or at > end or at + 16 <= end:
            raise UserError("its strings are damaged; get the file again")


# --- the config: the layers and their order ---------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Node:
    """A layer of the model or of a model nested in it."""

    name: str
    top: str
    """Name of the layer at the top level of the model that is, or contains, this layer."""
    group: tuple[str, ...]
    """Class and number of each model around the layer and of the layer itself, as Keras 3 names its groups."""
    kind: Kind | None
    """Kind of a layer with weights that MobileNets have; None: any other layer."""
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    activation: str | None = None
    window: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Stride, dilation and pads of a `ForeignLayer`."""
    path: str = ""
    """Path of the layer in the `_Graph`."""

    @property
    def is_normalization(self) -> bool:
        """Whether the layer is a Normalization with the variables of `_LEARNT`, by its class."""
        return bool(self.group) and self.group[-1].startswith("normalization")


def _add(
    graph: _Graph, model: Any, feeds: list[str], group: tuple[str, ...] = (), above: tuple[str, ...] = ()
) -> list[str]:
    """Adds the layers of a config to the graph, and those of nested models. Keras lists them in order of computation.

    Args:
      graph: the graph to which the layers are added.
      model: the config.
      feeds: the layers whose output is the model's input.
      group: the model's `_Node.group`.
      above: the names of the models around the model, and its own name.

    Returns:
      The layers whose output is the model's output.
    """
    config = model["config"]
    layers = {_name(layer): layer for layer in (config["layers"] if isinstance(config, dict) else config)}
    inbound = {name: list(_inbound(layer.get("inbound_nodes"))) for name, layer in layers.items()}
    if not any(inbound.values()):  # a Sequential
        inbound |= {name: [previous] for previous, name in itertools.pairwise(layers)}
    # The layers that compute the output of each layer. Those of a nested model are known once the model is added.
    ends = {name: ["/".join((*above, name))] for name, layer in layers.items() if "layers" not in layer["config"]}
    numbers: collections.Counter[str] = collections.Counter()
    for name, layer in layers.items():
        class_name = _class_name(layer)
        inner = (*group, f"{class_name}_{numbers[class_name]}" if numbers[class_name] else class_name)
        numbers[class_name] += 1
        inputs = [end for each in inbound[name] for end in ends.get(each, ())] if inbound[name] else feeds
        if inbound[name] and not inputs:
            raise UserError(f"no layer in its config feeds layer {name!r}; get the file again")
        if "layers" in layer["config"]:
            ends[name] = _add(graph, layer, inputs, inner, (*above, name))
        else:
            graph.add(ends[name][0], layer, inputs, above[0] if above else name, inner)
    last = list(_inbound(config.get("output_layers"))) if isinstance(config, dict) else []
    return [end for name in last or list(layers)[-1:] for end in ends[name]]


def _name(layer: Mapping[str, Any]) -> str:
    return str(layer.get("name") or layer["config"]["name"])


def _inbound(tree: Any) -> Iterator[str]:
    """Yields the names in inbound_nodes. Its form changed with every version, but all contain ["name", 0, 0]."""
    if isinstance(tree, list) and len(tree) in (3, 4) and [type(part) for part in tree[:3]] == [str, int, int]:
        yield tree[0]
    for part in tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ():
        yield from _inbound(part)


def _class_name(layer: Mapping[str, Any]) -> str:
    """Class of a layer in snake case, as Keras 3 names its groups: depthwise_conv2d for DepthwiseConv2D."""
    class_name = re.sub(r"\W+", "", layer["class_name"])
    return re.sub("([a-z])([A-Z])", r"\1_\2", re.sub("(.)([A-Z][a-z]+)", r"\1_\2", class_name)).lower()


class _Graph:
    """Layers of a model and of its nested models by path, and which layers come before and after each."""

    def __init__(self, version: str) -> None:
        self.version = version
        """Version of Keras."""
        self.layers: dict[str, Mapping[str, Any]] = {}
        self.before: dict[str, list[str]] = {}
        self.after: dict[str, list[str]] = collections.defaultdict(list)
        self._places: dict[str, tuple[str, tuple[str, ...]]] = {}

    def add(self, path: str, layer: Mapping[str, Any], before: list[str], top: str, group: tuple[str, ...]) -> None:
        """Adds a layer whose inputs are the layers ``before``."""
        self.layers[path], self.before[path], self._places[path] = layer, before, (top, group)
        for each in before:
            self.after[each].append(path)

    def nodes(self) -> Iterator[_Node]:
        """Yields the layers in order."""
        for path, (top, group) in self._places.items():
            kind = _KINDS.get(self.class_name(path))
            window = self.window(path) if kind in ("conv", "depthwise") else {}
            layer = self.layers[path]
            yield _Node(_name(layer), top, group, kind, layer["config"], self.activation(path), window, path)

    def class_name(self, path: str) -> str:
        """Class of a layer in snake case."""
        return _class_name(self.layers[path])

    def leading_to(self, path: str) -> list[str]:
        """Returns the layers from the image to a layer, which must form a chain.

        Raises:
          UserError: naming a layer with several inputs.
        """
        chain: list[str] = []
        while before := self.before[path]:
            if len(before) > 1 or before[0] in chain:
                name, class_name = _name(self.layers[path]), self.layers[path]["class_name"]
                raise UserError(
                    f"layer {name!r} ({class_name}) joins several maps before the first convolution, which our"
                    " preprocessing can't express; save the model without it, and apply it to the images yourself"
                )
            (path,) = before
            chain.append(path)
        return chain[::-1]

    def activation(self, name: str) -> str | None:
        """Activation in a layer, after it, or after the norm that follows it."""
        following = {layer: self.class_name(layer) for layer in self.after.get(name, ())}
        for norm in [layer for layer, class_name in following.items() if _KINDS.get(class_name) == "norm"]:
            following |= {layer: self.class_name(layer) for layer in self.after.get(norm, ())}
        candidates = [self._own_activation(name)]
        candidates += [
            self._own_activation(layer)
            for layer in following
            if self.layers[layer]["class_name"] in _ACTIVATION_CLASSES
        ]
        for layer, class_name in following.items():
            clipped = [self._own_activation(each) for each in self.after.get(layer, ())]
            if class_name in _ADDS and len(self.before[layer]) == 1 and "relu6" in clipped:
                candidates.append("hard_sigmoid")
        first = next(filter(None, candidates), None)
        return _GATED.get(str(first), first) if "multiply" in following.values() else first

    def _own_activation(self, name: str) -> str | None:
        """Activation that a layer is, or contains, by the version of Keras."""
        activation = _activation(self.layers[name])
        if activation == "hard_sigmoid" and not self.version.startswith("3."):
            return "hard_sigmoid of Keras 2"  # clip(0.2 x + 0.5, 0, 1); in Keras 3 it is relu6(x + 3) / 6
        return activation

    def window(self, name: str) -> dict[str, Any]:
        """Stride, dilation and pads of a convolution, as far as its config states them."""
        config = self.layers[name]["config"]
        window: dict[str, Any] = {}
        for key, keras_key in {"stride": "strides", "dilation": "dilation_rate"}.items():
            if keras_key in config:
                window[key] = one_of(name, key, _pair(config[keras_key]))
        if "padding" in config:
            zeros = [self.layers[layer]["config"] for layer in self.before[name] if self.class_name(layer) == _ZEROS]
            added = tuple(tuple(_pair(side)) for side in _pair(zeros[0]["padding"])) if zeros else None
            window["pads"] = pads_of(name, config["padding"], added)
        return window


def _pair(value: Any) -> list[Any]:
    """Returns two values; Keras writes a single one for two equal ones."""
    return list(value) if isinstance(value, list) else [value, value]


def _activation(layer: Mapping[str, Any]) -> str | None:
    """Activation that a layer is, or contains."""
    class_name, config = layer["class_name"], layer["config"]
    if not isinstance(config, dict):  # the config of a function is its name
        return _activation_name(config)
    if class_name == "ReLU":
        plain = not any(np.any(config.get(key)) for key in ("negative_slope", "threshold"))
        return {None: "relu", 6.0: "relu6"}.get(config.get("max_value"), class_name) if plain else class_name
    if class_name == "TFOpLambda":
        function = str(config.get("function"))
        return _activation_name(function.rpartition(".")[2]) if function.startswith(_ACTIVATION_MODULES) else None
    value = config.get("activation", _CLASSES.get(class_name))
    return _activation(value) if isinstance(value, dict) else _activation_name(value)


def _activation_name(value: Any) -> str | None:
    return _ACTIVATIONS.get(str(value), str(value))


def _epsilon(layers: _LayersWithArrays) -> float | None:
    values = sorted({float(node.config["epsilon"]) for node, _ in layers if node.kind == "norm" and node.config})
    if len(values) > 1:
        raise UserError(
            f"its norms have epsilons from {values[0]:g} to {values[-1]:g}, but only one for all norms can be read;"
            " give another file"
        )
    return values[0] if values else None


def _leading(graph: _Graph, layers: _LayersWithArrays) -> list[str]:
    """Paths of the layers from the image to the first convolution; empty without a config."""
    first = next((node.path for node, _ in layers if node.kind == "conv" and node.path), None)
    leading = [] if first is None else graph.leading_to(first)
    # Zeros right before the convolution are its pads.
    return leading[:-1] if leading and graph.class_name(leading[-1]) == _ZEROS else leading


def _preprocessing(graph: _Graph, layers: _LayersWithArrays, leading: list[str]) -> dict[str, Any]:
    """Fields of `weights.file.Preprocessing`, as far as the config states them."""
    learnt = {
        node.path: {leaf: _array(node.name, array) for leaf, array in arrays.items() if leaf != "count"}
        for node, arrays in layers
        if node.path in leading
    }
    steps = [pixels.Step(_name(graph.layers[path]), graph.layers[path], learnt[path]) for path in leading]
    sizes = [size for node, _ in layers if (size := _size(node.config))]
    fields = pixels.preprocessing_of(
        steps, _size(graph.layers[leading[0]]["config"]) if leading else None, graph.version
    )
    if "resolution" not in fields and sizes and sizes[0][0] == sizes[0][1]:
        fields["resolution"] = sizes[0][0]
    return fields


def _size(config: Any) -> tuple[int, int] | None:
    """Height and width of the model's input, if the config is of an input layer with fixed sizes."""
    match isinstance(config, dict) and config.get("batch_shape", config.get("batch_input_shape")):
        case [_, int(height), int(width), _]:
            return height, width
    return None


def _pixel_layers(layers: _LayersWithArrays) -> dict[str, bool]:
    """Names of layers that change images in a file without a config; True if the convolutions are in the same model."""

    def is_outermost(node: _Node) -> bool:
        return len(node.group) == 1 if node.group else f"/{node.name}".endswith(f"/{node.top}")

    is_nested = not all(is_outermost(node) for node, _ in layers if node.kind == "conv")
    return {
        node.name: is_outermost(node) != is_nested
        for node, arrays in layers
        if _ON_PIXELS.fullmatch(node.name) or "count" in arrays
    }


def _unsupported(graph: _Graph, layers: _LayersWithArrays, leading: list[str]) -> tuple[str, ...]:
    """Names and classes of layers after the last convolution that no MobileNet has.

    Raises:
      UserError: for such a layer before the last convolution.
    """
    last = max((index for index, (node, _) in enumerate(layers) if node.kind in ("conv", "depthwise")), default=0)
    unsupported = {
        index: f"{node.name} ({graph.layers[node.path]['class_name']})"
        for index, (node, _) in enumerate(layers)
        if node.path and node.path not in leading and graph.class_name(node.path) in _UNSUPPORTED
    }
    if early := [description for index, description in unsupported.items() if index < last]:
        raise UserError(f"layer {early[0]} comes between its convolutions, unlike any MobileNet; give another file")
    return tuple(unsupported.values())


# --- the arrays -------------------------------------------------------------------------------------------------

_LayersWithArrays = list[tuple[_Node, dict[str, Any]]]
"""The layers in order, each with its h5py datasets by our leaf names."""


def _layers_with_arrays(file: Any, nodes: list[_Node]) -> _LayersWithArrays:
    """Lists all layers of a file with their arrays, in the order of its config if it has one."""
    group = _child(file, "model_weights") if "model_weights" in file else file
    container = next((name for name in _CONTAINERS if name in file), None)
    if names := _strings(group, "layer_names"):
        layers = _by_name(group, names, nodes)
    elif container:
        layers = _by_number(file, container, nodes)
    else:
        raise UserError(f"holds neither layer_names nor layers; {_GIVE_SAVED}")
    datasets = [array for _, arrays in layers for array in arrays.values()]
    if (size := sum(math.prod(array.shape) * array.dtype.itemsize for array in datasets)) > LARGEST:
        raise UserError(f"its arrays have {size >> 20} MiB, unlike any MobileNet; {_GIVE_SAVED}")
    return layers


def _layers(listed: Iterable[tuple[_Node, dict[str, Any]]]) -> tuple[ForeignLayer, ...]:
    """Converts the layers with weights."""
    # The arrays of a Normalization mean nothing without the config: see `_pixel_layers`.
    foreign_layers = [
        _layer(node, arrays) for node, arrays in listed if node.kind or (arrays and "count" not in arrays)
    ]
    if not foreign_layers:
        raise UserError(f"holds no layers with weights; {_GIVE_SAVED}")
    return without_softmax(foreign_layers)


def _layer(node: _Node, datasets: Mapping[str, Any]) -> ForeignLayer:
    if node.kind is None:
        raise UserError(f"layer {node.name!r} has weights but isn't one of {', '.join(_KINDS)}; give another file")
    arrays = {leaf: _array(node.name, dataset) for leaf, dataset in datasets.items()}
    if node.kind == "norm" and "mean" in arrays:
        mean = arrays["mean"]
        arrays = {"scale": np.ones_like(mean), "bias": np.zeros_like(mean)} | arrays
    elif node.kind == "depthwise" and arrays["kernel"].ndim == 4:
        arrays["kernel"] = arrays["kernel"].transpose(0, 1, 3, 2)  # [r, s, c, 1]
    return ForeignLayer(node.name, node.kind, arrays, node.activation, **node.window)


def _array(name: str, dataset: Any) -> np.ndarray:
    if dataset.dtype.kind != "f" or dataset.is_virtual or dataset.external:
        raise UserError(
            f"the arrays of layer {name!r} have the type {dataset.dtype} or are in another file; {_SAVE_WHOLE}, in"
            " float32"
        )
    return as_float32(dataset[()])


def _child(group: Any, path: str) -> Any:
    """Item at a path below a group. Soft and external links aren't followed, because they may lead to other files."""
    import h5py

    for part in path.split("/"):
        if not isinstance(group.get(part, getlink=True), h5py.HardLink):
            raise UserError(f"there is no {path!r} in its {group.name}; get the file again")
        group = group[part]
    return group


def _strings(group: Any, name: str) -> list[str]:
    """Names in an attribute. Keras splits a long list into several attributes, NAME0, NAME1, ..."""
    pieces = itertools.takewhile(group.attrs.__contains__, (f"{name}{i}" for i in itertools.count()))
    values = [value for piece in ([name] if name in group.attrs else pieces) for value in group.attrs[piece]]
    return [value.decode() if isinstance(value, bytes) else value for value in values]


def _by_name(group: Any, tops: list[str], nodes: list[_Node]) -> _LayersWithArrays:
    """Finds the arrays of each layer in a file by layer name.

    Each layer at the top level lists its arrays as NAME/kernel:0. A nested model is one such layer with all its arrays.
    """
    arrays: dict[tuple[str, str], dict[str, Any]] = {}
    kinds: dict[tuple[str, str], Kind] = {}
    means = []
    for top in tops:
        holder = _child(group, top)
        listed = {node.name for node in nodes if node.top == top}
        for path in _strings(holder, _WEIGHTS):
            *scope, leaf = path.removesuffix(":0").split("/")
            key = top, _owner(scope, listed) or top
            layer_arrays = arrays.setdefault(key, {})
            if leaf not in _LEAVES or _LEAVES[leaf] in layer_arrays:
                raise UserError(f"layer {top!r} has {path!r} twice, or unlike any layer of MobileNets; {_SAVE_WHOLE}")
            dataset = layer_arrays[_LEAVES[leaf]] = _child(holder, path)
            if leaf == "moving_mean":
                means.append(key)
                kinds[key] = "norm"
            elif "kernel" in leaf:
                kinds[key] = (
                    "depthwise" if leaf == "depthwise_kernel" else "dense" if len(dataset.shape) == 2 else "conv"
                )
    if not nodes:
        # Keras lists trained arrays before frozen ones, so the last layers of a partly frozen nested model come first.
        # Means are never trained, so their order is always that of the network.
        if [key for key in arrays if kinds.get(key) == "norm"] != means:
            raise UserError(f"the layers of a partly frozen model are out of order in it; {_SAVE_WHOLE}")
        holding = [(_Node(key[1], key[0], (), kinds.get(key)), layer_arrays) for key, layer_arrays in arrays.items()]
        return holding + [(_Node(top, top, (), None), {}) for top in tops if not _strings(_child(group, top), _WEIGHTS)]
    ordered = []
    for node in nodes:
        key = node.top, node.name
        if node.is_normalization and key not in arrays:
            key = node.top, node.top  # Keras 2 names the arrays of a Normalization in a nested model after that model
        ordered.append((node, arrays.pop(key, {})))
    if arrays:
        raise UserError(f"has arrays for layer {next(iter(arrays))[1]!r}, which its config doesn't list; {_SAVE_WHOLE}")
    return ordered


def _owner(scope: list[str], listed: set[str]) -> str:
    """Finds the layer that owns an array. Layer names may contain slashes, and names of models may precede them."""
    names = ["/".join(scope[start:]) for start in range(len(scope))]
    return next((name for name in names if name in listed), "/".join(scope))


def _by_number(file: Any, container: str, nodes: list[_Node]) -> _LayersWithArrays:
    """Finds the arrays of each layer in a file of Keras 3.

    Groups are numbered by class within each model, and the arrays are numbered within the group of their layer.
    """
    import h5py

    top = _child(file, container)
    if not nodes:
        nodes = list(_list_layers(top, container))
        around: dict[Kind | None, set[tuple[str, ...]]] = collections.defaultdict(set)
        for node in nodes:
            around[node.kind].add(node.group[:-1])
        if mixed := [kind for kind, models in around.items() if kind and len(models) > 1]:
            raise UserError(f"doesn't state the order of the {mixed[0]} layers across its nested models; {_SAVE_WHOLE}")
    unused: set[str] = set()
    top.visititems(lambda path, item: unused.add(path) if isinstance(item, h5py.Dataset) else None)
    layers = []
    for node in nodes:
        arrays = {}
        if node.kind or node.is_normalization:
            path = f"/{container}/".join(node.group) + "/vars"
            names = _leaf_names(node, len(_child(top, path)))
            arrays = {leaf: _child(top, f"{path}/{i}") for i, leaf in enumerate(names)}
            unused -= {f"{path}/{i}" for i in range(len(names))}
        layers.append((node, arrays))
    # Seed generators belong to dropout and augmentation.
    if surplus := sorted(path for path in unused if "seed_generator" not in path):
        raise UserError(f"has {surplus[0]}, whose layer isn't one of {', '.join(_KINDS)}; give another file")
    return layers


def _list_layers(holder: Any, container: str, group: tuple[str, ...] = ()) -> Iterator[_Node]:
    """Yields the layers of a file without a config, sorted by class and number."""

    def numbered(name: str) -> tuple[str, int]:
        class_name, _, number = name.rpartition("_")
        return (class_name, int(number)) if class_name and number.isdecimal() else (name, 0)

    for name in sorted(holder, key=numbered):
        child = _child(holder, name)
        inner = (*group, name)
        if container in child:
            yield from _list_layers(_child(child, container), container, inner)
        else:
            title = child["vars"].attrs.get("name", name) if "vars" in child else name
            yield _Node(str(title), inner[0], inner, _KINDS.get(numbered(name)[0]))


def _leaf_names(node: _Node, count: int) -> list[str]:
    """Our leaf names for the numbered arrays of a layer."""
    names = list(_LEARNT if node.is_normalization else ("kernel", "bias"))[:count]
    if node.kind == "norm":
        options = {"scale": "scale", "bias": "center"}  # without a config, a third array could be either of them
        names = [leaf for leaf, key in options.items() if node.config.get(key, bool(node.config) or count == 4)] + [
            "mean",
            "var",
        ]
    if len(names) != count:
        raise UserError(f"{node.kind} layer {node.name!r} has {count} arrays instead of {len(names)}; {_SAVE_WHOLE}")
    return names
