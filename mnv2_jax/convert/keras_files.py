"""Reads the weights in Keras files with h5py alone: no Keras, no TensorFlow, no pickled code.

    model.h5            model.save of Keras 1 and 2: arrays by layer name, and the config of the model
    weights.h5          save_weights of Keras 1 and 2, as Keras Applications publishes them: arrays by layer name
    model.weights.h5    save_weights of Keras 3: layers/CLASS_NUMBER/vars/0, 1, ..., numbered class by class
    model.keras         a zip of config.json and such a model.weights.h5

Only the first and the last know strides, paddings, activations, the epsilon of the norms and the resolution.
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
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from mnv2_jax.convert.layers import (
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
from mnv2_jax.errors import UserError

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
}
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
_ADDS = {"add", "tf_op_lambda", "tensor_flow_op_layer"}  # x + 3 of a composed hard sigmoid, by version
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
            nodes = list(_configured(json.loads(config), version)) if config else []
            return ForeignNetwork(
                source="keras",
                layers=_layers(file, nodes),
                folded=False,
                epsilon=_epsilon(nodes),
                resolution=_resolution(nodes),
                mean=None,
                std=None,
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


def _configured(model: Any, version: str, group: tuple[str, ...] = (), top: str | None = None) -> Iterator[_Node]:
    """The layers that a config lists: Keras does so in an order of computation."""
    config = model["config"]
    layers = {_name(layer): layer for layer in (config["layers"] if isinstance(config, dict) else config)}
    before = {name: list(_inbound(layer.get("inbound_nodes"))) for name, layer in layers.items()}
    if not any(before.values()):  # Sequential
        before = {name: [previous] for previous, name in itertools.pairwise(layers)}
    after: dict[str, list[str]] = collections.defaultdict(list)
    for name, inputs in before.items():
        for each in inputs:
            after[each].append(name)
    graph = _Graph(layers, before, after, version)
    numbers: collections.Counter[str] = collections.Counter()
    for name, layer in layers.items():
        klass = graph.klass(name)
        inner = (*group, f"{klass}_{numbers[klass]}" if numbers[klass] else klass)
        numbers[klass] += 1
        if "layers" in layer["config"]:
            yield from _configured(layer, version, inner, top or name)
        else:
            kind, config = _KINDS.get(klass), layer["config"]
            window = graph.window(name) if kind in ("conv", "depthwise") else {}
            yield _Node(name, top or name, inner, kind, config, graph.activation(name), window)


def _name(layer: Mapping[str, Any]) -> str:
    return str(layer.get("name") or layer["config"]["name"])


def _inbound(tree: Any) -> Iterator[str]:
    """Names in inbound_nodes, whose form changed with every version; ["name", 0, 0] is somewhere in all of them."""
    if isinstance(tree, list) and len(tree) in (3, 4) and [type(part) for part in tree[:3]] == [str, int, int]:
        yield tree[0]
    for part in tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ():
        yield from _inbound(part)


@dataclasses.dataclass(frozen=True)
class _Graph:
    """The layers of one model by name, and which come before and after each."""

    layers: Mapping[str, Any]
    before: Mapping[str, list[str]]
    after: Mapping[str, list[str]]
    version: str
    """Of Keras."""

    def klass(self, name: str) -> str:
        """In snake case, as Keras 3 names the groups: DepthwiseConv2D, depthwise_conv2d."""
        klass = re.sub(r"\W+", "", self.layers[name]["class_name"])
        return re.sub("([a-z])([A-Z])", r"\1_\2", re.sub("(.)([A-Z][a-z]+)", r"\1_\2", klass)).lower()

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
            zeros = [
                self.layers[other]["config"] for other in self.before[name] if self.klass(other) == "zero_padding2d"
            ]
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


def _epsilon(nodes: list[_Node]) -> float | None:
    values = sorted({float(node.config["epsilon"]) for node in nodes if node.kind == "norm"})
    if len(values) > 1:
        raise UserError(f"its norms have epsilons from {values[0]:g} to {values[-1]:g}; only one for all can be read")
    return values[0] if values else None


def _resolution(nodes: list[_Node]) -> int | None:
    for node in nodes:
        match node.config.get("batch_shape", node.config.get("batch_input_shape")):
            case [_, int(height), int(width), _]:
                return height if height == width else None
    return None


# --- the arrays -------------------------------------------------------------------------------------------------

_Found = list[tuple[_Node, dict[str, Any]]]
"""The layers in order, and of each its h5py datasets by our names."""


def _layers(file: Any, nodes: list[_Node]) -> tuple[ForeignLayer, ...]:
    group = _child(file, "model_weights") if "model_weights" in file else file
    container = next((name for name in _CONTAINERS if name in file), None)
    if names := _strings(group, "layer_names"):
        found = _by_name(group, names, nodes)
    elif container:
        found = _by_number(file, container, nodes)
    else:
        raise UserError(f"it holds neither layer_names nor layers; {_GIVE}")
    found = [(node, arrays) for node, arrays in found if arrays or node.kind]
    if not found:
        raise UserError(f"it holds no layers with weights; {_GIVE}")
    datasets = [array for _, arrays in found for array in arrays.values()]
    if (size := sum(math.prod(array.shape) * array.dtype.itemsize for array in datasets)) > LARGEST:
        raise UserError(f"its arrays have {size >> 20} MiB, as no MobileNet has; {_GIVE}")
    return without_softmax(itertools.starmap(_layer, found))


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
    """What lies at a path below a group, through no links, which may lead to other files."""
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
        for path in _strings(holder, "weight_names"):
            *scope, leaf = path.removesuffix(":0").split("/")
            key = top, scope[-1] if scope else top
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
        return [(_Node(key[1], key[0], (), kinds.get(key)), found) for key, found in arrays.items()]
    ordered = [(node, arrays.pop((node.top, node.name), {})) for node in nodes]
    if arrays:
        raise UserError(f"it has arrays for {next(iter(arrays))[1]!r}, which its config doesn't list; {_WHOLE}")
    return ordered


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
        if node.kind:
            path = f"/{container}/".join(node.group) + "/vars"
            names = _numbered(node, len(_child(top, path)))
            found.append((node, {leaf: _child(top, f"{path}/{i}") for i, leaf in enumerate(names)}))
            left -= {f"{path}/{i}" for i in range(len(names))}
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
    """What the arrays of a layer are, by our names."""
    names = ["kernel", "bias"][:count]
    if node.kind == "norm":
        told = {"scale": "scale", "bias": "center"}  # where the config doesn't, a third array could be either
        names = [leaf for leaf, key in told.items() if node.config.get(key, bool(node.config) or count == 4)] + [
            "mean",
            "var",
        ]
    if len(names) != count:
        raise UserError(f"{node.kind} layer {node.name!r} has {count} arrays, not {len(names)}; {_WHOLE}")
    return names
