"""Reads the weights in Keras files with h5py alone: no Keras, no TensorFlow, no pickled code.

    model.h5            model.save of Keras 1 and 2: arrays by layer name, and the config of the model
    weights.h5          save_weights of Keras 1 and 2, as Keras Applications publishes them: arrays by layer name
    model.weights.h5    save_weights of Keras 3: layers/CLASS_NUMBER/vars/0, 1, ..., numbered class by class
    model.keras         a zip of config.json and such a model.weights.h5

Only the first and the last know strides, paddings, activations, the epsilon of the norms, the resolution and what is
done to images before the first convolution (`pixels`).
No file makes this code run anything, but the C code of HDF5 isn't proof against all damage: of 13,000 small files with
random bytes changed it crashed or hung on 4.
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
    "mean": "mean",  # this and the next two: of a Normalization
    "variance": "var",
    "count": "count",
}
_LEARNT = ("mean", "var", "count")
"""Variables of a Normalization layer, in this order."""
_ON_PIXELS = re.compile(
    r"(rescaling|normalization|resizing|center_crop|lambda|true_divide|subtract|(tf|slicing)_op_lambda"
    r"|tf\.(math\.(truediv|subtract|multiply)|nn\.bias_add|__operators__\.(add|getitem)))(_\d+)?"
)
"""Usual names of layers that prepare images, in files without a config."""
_ACTIVATIONS = {"None": None, "linear": None, "hard_silu": "hard_swish"}  # others by their own names
_CLASSES = {
    "LeakyReLU": "leaky_relu",
    "ELU": "elu",
    "ThresholdedReLU": "thresholded_relu",
    "Softmax": "softmax",
    "Relu": "relu",  # this and the next: functions of keras.ops
    "Relu6": "relu6",
    "Silu": "silu",
    "HardSilu": "hard_swish",
    "Gelu": "gelu",
}
_ACTIVATING = {"Activation", "ReLU", "TFOpLambda", *_CLASSES}
_ACTING = "nn.", "keras.activations."  # functions that TFOpLambda calls
_GATED = {"hard_sigmoid": "hard_swish", "sigmoid": "swish"}  # times what they are of
_ZEROS = "zero_padding2d"
_STRANGE = {
    *("global_max_pooling2d", "max_pooling2d", "cropping2d", "up_sampling2d", "unit_normalization", "lambda"),
    *("rescaling", "resizing", "center_crop"),
}
"""Layers without weights that no MobileNet has, once its convolutions have begun."""
_ADDS = {"add", "tf_op_lambda", "tensor_flow_op_layer"}  # x + 3 of a composed hard sigmoid, by version
_WEIGHTS = "weight_names"
_CONTAINERS = ("layers", "_layer_checkpoint_dependencies")  # Keras 3; TensorFlow 2.12 to 2.15
_LARGEST_CONFIG = 1 << 26
_GIVE = "give what Keras's save or save_weights wrote"
_WHOLE = "save the whole model as .keras and give that"


def read_keras(path: pathlib.Path) -> ForeignNetwork:
    """Reads the layers with weights of a Keras file of any of the forms above.

    Raises:
      UserError: if the file can't be read, or holds a layer with weights that no MobileNet has.
    """
    try:
        import h5py
    except ImportError as error:
        raise UserError(f"{path}: reading Keras files needs h5py; pip install 'mnv2_jax[convert]'") from error
    with reading(path, "Keras"):
        with path.open("rb") as opened:
            content = opened.read(LARGEST + 1)
        if len(content) > LARGEST:
            raise UserError(f"it has more than {LARGEST >> 20} MiB, as no MobileNet has; {_GIVE}")
        config, weights, version = _unzipped(content) if content.startswith(b"PK\3\4") else (None, content, None)
        _check_heaps(weights)
        with h5py.File(io.BytesIO(weights), "r") as file:
            config = config or file.attrs.get("model_config")
            version = str(version or file.attrs.get("keras_version"))
            graph = _Graph(version)
            if config:
                _add(graph, json.loads(config), [])
            found = _found(file, list(graph.nodes()))
            leading = _leading(graph, found)
            told = _preprocessing(graph, found, leading)
            return ForeignNetwork(
                source="keras",
                layers=_layers((node, arrays) for node, arrays in found if node.path not in leading),
                folded=False,
                epsilon=_epsilon(found),
                resolution=told.pop("resolution", None),
                mean=told.pop("mean", None),
                std=told.pop("std", None),
                unsaid={} if config else _unsaid(found),
                strange=_strange(graph, found, leading),
                view=told,
            )


def _unzipped(zipped: bytes) -> tuple[bytes, bytes, str | None]:
    """Its config, its weights and the version of Keras."""
    with zipfile.ZipFile(io.BytesIO(zipped)) as archive:

        def content(name: str, largest: int) -> bytes:
            if name not in archive.namelist():
                raise UserError(f"a zip without {name} is no .keras file; {_GIVE}")
            with archive.open(name) as member:
                found = member.read(largest + 1)  # whatever size the zip states
            if len(found) > largest:
                raise UserError(f"{name} in it has more than {largest >> 20} MiB, as no MobileNet has; {_GIVE}")
            return found

        config, weights = content("config.json", _LARGEST_CONFIG), content("model.weights.h5", LARGEST)
        return config, weights, json.loads(content("metadata.json", _LARGEST_CONFIG)).get("keras_version")


def _check_heaps(content: bytes) -> None:
    """Walks the heaps that hold strings: over a damaged one HDF5 loops for ever, or crashes."""
    start = -1
    while (start := content.find(b"GCOL\1", start + 1)) >= 0:
        (size,) = struct.unpack_from("<Q", content, start + 8)
        at, end = start + 16, start + size
        while at + 16 <= end <= len(content):
            number, length = struct.unpack_from("<H6xQ", content, at)
            if number == 0 and length < 16:
                break
            at += length if number == 0 else 16 + -(-length // 8) * 8  # 0: free space, its header counted
        if end > len(content) or at > end or at + 16 <= end:
            raise UserError("its strings are damaged; get it again")


# --- the config: which layers there are, in which order ---------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Node:
    """A layer of the model, or of a model nested in it."""

    name: str
    top: str
    """The layer of the whole model that it is, or is in."""
    group: tuple[str, ...]
    """Class and number of the models around it and its own, as Keras 3 names the groups."""
    kind: Kind | None
    """None: not one with weights that a MobileNet has."""
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    activation: str | None = None
    window: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Stride, dilation and pads of a `ForeignLayer`."""
    path: str = ""
    """In the `_Graph`."""

    @property
    def is_normalization(self) -> bool:
        """Whether it holds what `_LEARNT` names; its class says so in every version."""
        return bool(self.group) and self.group[-1].startswith("normalization")


def _add(
    graph: _Graph, model: Any, feeds: list[str], group: tuple[str, ...] = (), above: tuple[str, ...] = ()
) -> list[str]:
    """Adds the layers that a config lists, which Keras does in an order of computation, and those of models in it.

    Args:
      graph: to which they are added.
      model: the config.
      feeds: the layers whose output is the model's input.
      group: of the model.
      above: the names of the models around it, and its own.

    Returns:
      The layers whose output is the model's.
    """
    config = model["config"]
    layers = {_name(layer): layer for layer in (config["layers"] if isinstance(config, dict) else config)}
    inbound = {name: list(_inbound(layer.get("inbound_nodes"))) for name, layer in layers.items()}
    if not any(inbound.values()):  # Sequential
        inbound |= {name: [previous] for previous, name in itertools.pairwise(layers)}
    # Which layers give a layer's output: a model in the model isn't known before it is added.
    ends = {name: ["/".join((*above, name))] for name, layer in layers.items() if "layers" not in layer["config"]}
    numbers: collections.Counter[str] = collections.Counter()
    for name, layer in layers.items():
        klass = _klass(layer)
        inner = (*group, f"{klass}_{numbers[klass]}" if numbers[klass] else klass)
        numbers[klass] += 1
        came = [end for each in inbound[name] for end in ends.get(each, ())] if inbound[name] else feeds
        if inbound[name] and not came:
            raise UserError(f"no layer that it lists feeds {name!r}; get it again")
        if "layers" in layer["config"]:
            ends[name] = _add(graph, layer, came, inner, (*above, name))
        else:
            graph.add(ends[name][0], layer, came, above[0] if above else name, inner)
    last = list(_inbound(config.get("output_layers"))) if isinstance(config, dict) else []
    return [end for name in last or list(layers)[-1:] for end in ends[name]]


def _name(layer: Mapping[str, Any]) -> str:
    return str(layer.get("name") or layer["config"]["name"])


def _inbound(tree: Any) -> Iterator[str]:
    """Names in inbound_nodes, whose form changed with every version; ["name", 0, 0] is somewhere in all of them."""
    if isinstance(tree, list) and len(tree) in (3, 4) and [type(part) for part in tree[:3]] == [str, int, int]:
        yield tree[0]
    for part in tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ():
        yield from _inbound(part)


def _klass(layer: Mapping[str, Any]) -> str:
    """In snake case, as Keras 3 names the groups: DepthwiseConv2D, depthwise_conv2d."""
    klass = re.sub(r"\W+", "", layer["class_name"])
    return re.sub("([a-z])([A-Z])", r"\1_\2", re.sub("(.)([A-Z][a-z]+)", r"\1_\2", klass)).lower()


class _Graph:
    """The layers of a model and of those in it, by their paths, and which come before and after each."""

    def __init__(self, version: str) -> None:
        self.version = version
        """Version of Keras."""
        self.layers: dict[str, Mapping[str, Any]] = {}
        self.before: dict[str, list[str]] = {}
        self.after: dict[str, list[str]] = collections.defaultdict(list)
        self._places: dict[str, tuple[str, tuple[str, ...]]] = {}

    def add(self, path: str, layer: Mapping[str, Any], before: list[str], top: str, group: tuple[str, ...]) -> None:
        """Adds a layer that those before feed."""
        self.layers[path], self.before[path], self._places[path] = layer, before, (top, group)
        for each in before:
            self.after[each].append(path)

    def nodes(self) -> Iterator[_Node]:
        """The layers in order."""
        for path, (top, group) in self._places.items():
            kind = _KINDS.get(self.klass(path))
            window = self.window(path) if kind in ("conv", "depthwise") else {}
            layer = self.layers[path]
            yield _Node(_name(layer), top, group, kind, layer["config"], self.activation(path), window, path)

    def klass(self, path: str) -> str:
        """See `_klass`."""
        return _klass(self.layers[path])

    def leading_to(self, path: str) -> list[str]:
        """The layers between the image and one, which must follow each other.

        Raises:
          UserError: naming a layer that several feed.
        """
        found: list[str] = []
        while before := self.before[path]:
            if len(before) > 1 or before[0] in found:
                name, klass = _name(self.layers[path]), self.layers[path]["class_name"]
                raise UserError(
                    f"layer {name!r} ({klass}) joins several maps before the first convolution, which our preprocessing"
                    " can't express; save the model without it, and do it to the images"
                )
            (path,) = before
            found.append(path)
        return found[::-1]

    def activation(self, name: str) -> str | None:
        """The activation in a layer, after it, or after the norm that follows it."""
        following = {other: self.klass(other) for other in self.after.get(name, ())}
        for norm in [other for other, klass in following.items() if _KINDS.get(klass) == "norm"]:
            following |= {other: self.klass(other) for other in self.after.get(norm, ())}
        found = [self._own(name)]
        found += [self._own(other) for other in following if self.layers[other]["class_name"] in _ACTIVATING]
        for other, klass in following.items():
            clipped = [self._own(each) for each in self.after.get(other, ())]
            if klass in _ADDS and len(self.before[other]) == 1 and "relu6" in clipped:
                found.append("hard_sigmoid")
        first = next(filter(None, found), None)
        return _GATED.get(str(first), first) if "multiply" in following.values() else first

    def _own(self, name: str) -> str | None:
        """The activation that a layer is, or has in it."""
        found = _activation(self.layers[name])
        if found == "hard_sigmoid" and not self.version.startswith("3."):
            return "hard_sigmoid of Keras 2"  # clip(0.2 x + 0.5, 0, 1); in Keras 3 it is relu6(x + 3) / 6
        return found

    def window(self, name: str) -> dict[str, Any]:
        """Stride, dilation and pads of a convolution, as far as its config says them."""
        config = self.layers[name]["config"]
        found: dict[str, Any] = {}
        for ours, theirs in {"stride": "strides", "dilation": "dilation_rate"}.items():
            if theirs in config:
                found[ours] = one_of(name, ours, _pair(config[theirs]))
        if "padding" in config:
            zeros = [self.layers[other]["config"] for other in self.before[name] if self.klass(other) == _ZEROS]
            added = tuple(tuple(_pair(side)) for side in _pair(zeros[0]["padding"])) if zeros else None
            found["pads"] = pads_of(name, config["padding"], added)
        return found


def _pair(value: Any) -> list[Any]:
    """Keras takes one for two that are equal."""
    return list(value) if isinstance(value, list) else [value, value]


def _activation(layer: Mapping[str, Any]) -> str | None:
    """The activation that a layer is, or has in it."""
    klass, config = layer["class_name"], layer["config"]
    if not isinstance(config, dict):  # a function's config is its name
        return _named(config)
    if klass == "ReLU":
        plain = not any(np.any(config.get(key)) for key in ("negative_slope", "threshold"))
        return {None: "relu", 6.0: "relu6"}.get(config.get("max_value"), klass) if plain else klass
    if klass == "TFOpLambda":
        function = str(config.get("function"))
        return _named(function.rpartition(".")[2]) if function.startswith(_ACTING) else None
    value = config.get("activation", _CLASSES.get(klass))
    return _activation(value) if isinstance(value, dict) else _named(value)


def _named(value: Any) -> str | None:
    return _ACTIVATIONS.get(str(value), str(value))


def _epsilon(found: _Found) -> float | None:
    values = sorted({float(node.config["epsilon"]) for node, _ in found if node.kind == "norm" and node.config})
    if len(values) > 1:
        raise UserError(f"its norms have epsilons from {values[0]:g} to {values[-1]:g}; only one for all can be read")
    return values[0] if values else None


def _leading(graph: _Graph, found: _Found) -> list[str]:
    """Paths of the layers from the image to the first convolution, as far as there is a config."""
    first = next((node.path for node, _ in found if node.kind == "conv" and node.path), None)
    leading = [] if first is None else graph.leading_to(first)
    return leading[:-1] if leading and graph.klass(leading[-1]) == _ZEROS else leading  # zeros are its pads


def _preprocessing(graph: _Graph, found: _Found, leading: list[str]) -> dict[str, Any]:
    """Fields of `weights.file.Preprocessing`, as far as the config says them."""
    learnt = {
        node.path: {leaf: _array(node.name, array) for leaf, array in arrays.items() if leaf != "count"}
        for node, arrays in found
        if node.path in leading
    }
    steps = [pixels.Step(_name(graph.layers[path]), graph.layers[path], learnt[path]) for path in leading]
    sizes = [size for node, _ in found if (size := _size(node.config))]
    told = pixels.preprocessing_of(steps, _size(graph.layers[leading[0]]["config"]) if leading else None, graph.version)
    if "resolution" not in told and sizes and sizes[0][0] == sizes[0][1]:
        told["resolution"] = sizes[0][0]
    return told


def _size(config: Any) -> tuple[int, int] | None:
    """Height and width of a model's input, if the layer is one and they are fixed."""
    match isinstance(config, dict) and config.get("batch_shape", config.get("batch_input_shape")):
        case [_, int(height), int(width), _]:
            return height, width
    return None


def _unsaid(found: _Found) -> dict[str, bool]:
    """The layers of a file without a config that do something to images; whether the convolutions are beside them."""

    def is_outermost(node: _Node) -> bool:
        return len(node.group) == 1 if node.group else f"/{node.name}".endswith(f"/{node.top}")

    is_nested = not all(is_outermost(node) for node, _ in found if node.kind == "conv")
    return {
        node.name: is_outermost(node) != is_nested
        for node, arrays in found
        if _ON_PIXELS.fullmatch(node.name) or "count" in arrays
    }


def _strange(graph: _Graph, found: _Found, leading: list[str]) -> tuple[str, ...]:
    """The layers behind the last convolution that no MobileNet has.

    Raises:
      UserError: for one before it.
    """
    last = max((place for place, (node, _) in enumerate(found) if node.kind in ("conv", "depthwise")), default=0)
    strange = {
        place: f"{node.name} ({graph.layers[node.path]['class_name']})"
        for place, (node, _) in enumerate(found)
        if node.path and node.path not in leading and graph.klass(node.path) in _STRANGE
    }
    if early := [told for place, told in strange.items() if place < last]:
        raise UserError(f"layer {early[0]} stands between its convolutions, as in no MobileNet; give another file")
    return tuple(strange.values())


# --- the arrays -------------------------------------------------------------------------------------------------

_Found = list[tuple[_Node, dict[str, Any]]]
"""The layers in order, and of each its h5py datasets by our names."""


def _found(file: Any, nodes: list[_Node]) -> _Found:
    """All layers that a file lists, by its config where it has one, and their arrays."""
    group = _child(file, "model_weights") if "model_weights" in file else file
    container = next((name for name in _CONTAINERS if name in file), None)
    if names := _strings(group, "layer_names"):
        found = _by_name(group, names, nodes)
    elif container:
        found = _by_number(file, container, nodes)
    else:
        raise UserError(f"it holds neither layer_names nor layers; {_GIVE}")
    datasets = [array for _, arrays in found for array in arrays.values()]
    if (size := sum(math.prod(array.shape) * array.dtype.itemsize for array in datasets)) > LARGEST:
        raise UserError(f"its arrays have {size >> 20} MiB, as no MobileNet has; {_GIVE}")
    return found


def _layers(found: Iterable[tuple[_Node, dict[str, Any]]]) -> tuple[ForeignLayer, ...]:
    """Those with weights."""
    # What a Normalization has learnt says nothing without the config: `_unsaid`.
    layers = [_layer(node, arrays) for node, arrays in found if node.kind or (arrays and "count" not in arrays)]
    if not layers:
        raise UserError(f"it holds no layers with weights; {_GIVE}")
    return without_softmax(layers)


def _layer(node: _Node, datasets: Mapping[str, Any]) -> ForeignLayer:
    if node.kind is None:
        raise UserError(f"layer {node.name!r} has weights and isn't one of {', '.join(_KINDS)}; give another file")
    arrays = {leaf: _array(node.name, dataset) for leaf, dataset in datasets.items()}
    if node.kind == "norm" and "mean" in arrays:
        mean = arrays["mean"]
        arrays = {"scale": np.ones_like(mean), "bias": np.zeros_like(mean)} | arrays
    elif node.kind == "depthwise" and arrays["kernel"].ndim == 4:
        arrays["kernel"] = arrays["kernel"].transpose(0, 1, 3, 2)  # [r, s, c, 1]
    return ForeignLayer(node.name, node.kind, arrays, node.activation, **node.window)


def _array(name: str, dataset: Any) -> np.ndarray:
    if dataset.dtype.kind != "f" or dataset.is_virtual or dataset.external:
        raise UserError(f"layer {name!r} holds {dataset.dtype} or lies in another file; {_WHOLE} in float32")
    return as_float32(dataset[()])


def _child(group: Any, path: str) -> Any:
    """Item at a path below a group. Links aren't followed: they may lead to other files."""
    import h5py

    for part in path.split("/"):
        if not isinstance(group.get(part, getlink=True), h5py.HardLink):
            raise UserError(f"there is no {path!r} in its {group.name}; get it again")
        group = group[part]
    return group


def _strings(group: Any, name: str) -> list[str]:
    """An attribute that lists names; long lists lie in several, NAME0, NAME1, ..."""
    pieces = itertools.takewhile(group.attrs.__contains__, (f"{name}{i}" for i in itertools.count()))
    values = [value for piece in ([name] if name in group.attrs else pieces) for value in group.attrs[piece]]
    return [value.decode() if isinstance(value, bytes) else value for value in values]


def _by_name(group: Any, tops: list[str], nodes: list[_Node]) -> _Found:
    """Each layer of the model lists its arrays as NAME/kernel:0; a nested model is one layer, with all of its."""
    arrays: dict[tuple[str, str], dict[str, Any]] = {}
    kinds: dict[tuple[str, str], Kind] = {}
    means = []
    for top in tops:
        holder = _child(group, top)
        listed = {node.name for node in nodes if node.top == top}
        for path in _strings(holder, _WEIGHTS):
            *scope, leaf = path.removesuffix(":0").split("/")
            key = top, _owner(scope, listed) or top
            found = arrays.setdefault(key, {})
            if leaf not in _LEAVES or _LEAVES[leaf] in found:
                raise UserError(f"layer {top!r} has {path!r}, twice or unlike all layers of MobileNets; {_WHOLE}")
            dataset = found[_LEAVES[leaf]] = _child(holder, path)
            if leaf == "moving_mean":
                means.append(key)
                kinds[key] = "norm"
            elif "kernel" in leaf:
                kinds[key] = (
                    "depthwise" if leaf == "depthwise_kernel" else "dense" if len(dataset.shape) == 2 else "conv"
                )
    if not nodes:
        # Keras lists first what is trained and then what isn't: of a nested model half frozen, the last layers come
        # first. Means are never trained, so that they always stand in order.
        if [key for key in arrays if kinds.get(key) == "norm"] != means:
            raise UserError(f"the layers of a model that was partly frozen are out of order in it; {_WHOLE}")
        holding = [(_Node(key[1], key[0], (), kinds.get(key)), found) for key, found in arrays.items()]
        return holding + [(_Node(top, top, (), None), {}) for top in tops if not _strings(_child(group, top), _WEIGHTS)]
    ordered = []
    for node in nodes:
        key = node.top, node.name
        if node.is_normalization and key not in arrays:
            key = node.top, node.top  # as Keras 2 names what one in a nested model holds
        ordered.append((node, arrays.pop(key, {})))
    if arrays:
        raise UserError(f"it has arrays for {next(iter(arrays))[1]!r}, which its config doesn't list; {_WHOLE}")
    return ordered


def _owner(scope: list[str], listed: set[str]) -> str:
    """The layer in whose scope an array is: its name may have slashes, and models may stand before it."""
    names = ["/".join(scope[start:]) for start in range(len(scope))]
    return next((name for name in names if name in listed), "/".join(scope))


def _by_number(file: Any, container: str, nodes: list[_Node]) -> _Found:
    """Each layer's group numbers its arrays, and groups are numbered within a class and a model."""
    import h5py

    top = _child(file, container)
    if not nodes:
        nodes = list(_listed(top, container))
        around: dict[Kind | None, set[tuple[str, ...]]] = collections.defaultdict(set)
        for node in nodes:
            around[node.kind].add(node.group[:-1])
        if mixed := [kind for kind, models in around.items() if kind and len(models) > 1]:
            raise UserError(
                f"it doesn't say how the {mixed[0]} layers of its nested models follow each other; {_WHOLE}"
            )
    left: set[str] = set()
    top.visititems(lambda path, item: left.add(path) if isinstance(item, h5py.Dataset) else None)
    found = []
    for node in nodes:
        arrays = {}
        if node.kind or node.is_normalization:
            path = f"/{container}/".join(node.group) + "/vars"
            names = _numbered(node, len(_child(top, path)))
            arrays = {leaf: _child(top, f"{path}/{i}") for i, leaf in enumerate(names)}
            left -= {f"{path}/{i}" for i in range(len(names))}
        found.append((node, arrays))
    if others := sorted(path for path in left if "seed_generator" not in path):  # of dropout and augmentations
        raise UserError(f"it has {others[0]}, of a layer that isn't one of {', '.join(_KINDS)}; give another file")
    return found


def _listed(holder: Any, container: str, group: tuple[str, ...] = ()) -> Iterator[_Node]:
    """The layers of a file without a config, each class by its numbers."""

    def numbered(name: str) -> tuple[str, int]:
        klass, _, number = name.rpartition("_")
        return (klass, int(number)) if klass and number.isdecimal() else (name, 0)

    for name in sorted(holder, key=numbered):
        child = _child(holder, name)
        inner = (*group, name)
        if container in child:
            yield from _listed(_child(child, container), container, inner)
        else:
            title = child["vars"].attrs.get("name", name) if "vars" in child else name
            yield _Node(str(title), inner[0], inner, _KINDS.get(numbered(name)[0]))


def _numbered(node: _Node, count: int) -> list[str]:
    """Arrays of a layer by our names."""
    names = list(_LEARNT if node.is_normalization else ("kernel", "bias"))[:count]
    if node.kind == "norm":
        told = {"scale": "scale", "bias": "center"}  # where the config doesn't, a third array could be either
        names = [leaf for leaf, key in told.items() if node.config.get(key, bool(node.config) or count == 4)] + [
            "mean",
            "var",
        ]
    if len(names) != count:
        raise UserError(f"{node.kind} layer {node.name!r} has {count} arrays, not {len(names)}; {_WHOLE}")
    return names
