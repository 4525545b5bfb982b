"""Weights of any kind as a model with its variables.

    our file ─────────────────────────────► models.weights ──────────┐
    name ──► hub ──► file                                            ├──► Weights(model, variables, info)
    .pth .pt .safetensors ──► state_dicts ──► names ────┐            │
    .h5 .weights.h5 .keras ──► keras_files ──► order ───┼► variables ┘
    .tflite ──► tflite_files ──► order ─────────────────┘

What isn't in a file, its library's padding, epsilon and normalisation, stands in `CONVENTIONS`.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
import zipfile
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias

import numpy as np

from mnv2_jax.config import NormConfig
from mnv2_jax.convert import hub, names
from mnv2_jax.convert.keras_files import read_keras
from mnv2_jax.convert.layers import ForeignLayer, ForeignNetwork
from mnv2_jax.convert.state_dicts import read_state_dict
from mnv2_jax.convert.tflite_files import read_tflite
from mnv2_jax.data import imagenet
from mnv2_jax.errors import UserError, nearest
from mnv2_jax.models.counting import summarise
from mnv2_jax.models.registry import Model, create_model, list_models
from mnv2_jax.models.weights import (
    Preprocessing,
    Weights,
    WeightsInfo,
    check_shapes,
    describe,
    flatten,
    is_ours,
    preprocessing_from,
    raise_mismatch,
    read_weights,
    shapes_of,
    unflatten,
)

Source = Literal["torchvision", "timm", "timm_tf", "corenet", "keras", "tflite"]
Padding = Literal["same", "symmetric", "keras_v1"]


@dataclasses.dataclass(frozen=True)
class Convention:
    """What a library does and its files don't say."""

    padding: Padding
    epsilon: float
    decay: float
    """Of the running statistics: 1 - PyTorch's momentum."""
    normalisation: tuple[float, float] | None = None
    """Mean and deviation of all channels; None: ImageNet's."""
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    activation: Literal["relu", "relu6"] | None = None


_WIDTH_RULES: Mapping[tuple[str, str], str] = {
    ("torchvision", "mobilenet_v3"): "torchvision",
    ("corenet", "mobilenet_v1"): "corenet",
    ("corenet", "mobilenet_v2"): "corenet",
}
HALF = (0.5, 0.5)  # pixels from -1 to 1
CONVENTIONS: Mapping[tuple[str, str], Convention] = {
    # torchvision/models: mobilenetv2.py, mobilenetv3.py (epsilon 0.001, momentum 0.01), resnet.py
    ("torchvision", "mobilenet_v2"): Convention("symmetric", 1e-5, 0.9),
    ("torchvision", "mobilenet_v3"): Convention("symmetric", 1e-3, 0.99),
    ("torchvision", "resnet50"): Convention("symmetric", 1e-5, 0.9),
    # timm/models: efficientnet.py, mobilenetv3.py, resnet.py; its tf_ models keep TensorFlow's padding and epsilon
    ("timm", "mobilenet_v1"): Convention("symmetric", 1e-5, 0.9, HALF, "bicubic"),
    ("timm", "mobilenet_v2"): Convention("symmetric", 1e-5, 0.9, None, "bicubic"),
    ("timm", "mobilenet_v3"): Convention("symmetric", 1e-5, 0.9, None, "bicubic"),
    ("timm", "mobilenet_v4"): Convention("symmetric", 1e-5, 0.9, None, "bicubic"),
    ("timm", "resnet50"): Convention("symmetric", 1e-5, 0.9, None, "bicubic"),
    ("timm_tf", "mobilenet_v3"): Convention("same", 1e-3, 0.99, HALF),
    # apple/corenet projects/mobilenet_v{1,2}: pixels from 0 to 1; V1 has ReLU. Its V3 is another network.
    ("corenet", "mobilenet_v1"): Convention("symmetric", 1e-5, 0.9, (0.0, 1.0), activation="relu"),
    ("corenet", "mobilenet_v2"): Convention("symmetric", 1e-5, 0.9, (0.0, 1.0)),
    # keras/src/applications: mobilenet.py, mobilenet_v2.py, mobilenet_v3.py; "tf" mode of preprocess_input
    ("keras", "mobilenet_v1"): Convention("keras_v1", 1e-3, 0.99, HALF),
    ("keras", "mobilenet_v2"): Convention("same", 1e-3, 0.999, HALF),
    ("keras", "mobilenet_v3"): Convention("same", 1e-3, 0.999, HALF),
    # TensorFlow's padding; the norms are folded, so the epsilon is only that of the identity
    ("tflite", "mobilenet_v1"): Convention("same", 1e-3, 0.997, HALF),
    ("tflite", "mobilenet_v2"): Convention("same", 1e-3, 0.997, HALF),
    ("tflite", "mobilenet_v3"): Convention("same", 1e-3, 0.997, HALF),
    ("tflite", "mobilenet_v4"): Convention("same", 1e-3, 0.997, HALF),
}
"""By source and family."""

_OF_KEYS: tuple[tuple[str, Source], ...] = (
    ("conv_1.block.conv.weight", "corenet"),
    ("conv_stem.weight", "timm"),
    ("features.0.0.weight", "torchvision"),
    ("layer1.0.conv1.weight", "torchvision"),
)
"""A tensor that tells whose state dict it is; ResNet's names are the same everywhere."""
_BACKGROUND_CLASSES = 1001


def load_weights(
    source: str | os.PathLike[str],
    model: str | None = None,
    *,
    library: Source | None = None,
    preprocessing: Mapping[str, Any] | None = None,
    labels: Sequence[str] | None = None,
    **options: Any,
) -> Weights:
    """Reads weights of any kind.

    Args:
      source: a file of `save_weights`; a file of torchvision, timm, CoreNet, Keras or TFLite, whose kind is
        recognised; or a name, as ``timm/mobilenetv2_100.ra_in1k`` or ``torchvision/mobilenet_v2.v2``.
      model: which network a foreign file holds, one of `list_models`; our files and names say it themselves.
      library: whose weights they are, where a file can't tell (``timm_tf``: timm's tf_ models).
      preprocessing: fields of `models.weights.Preprocessing` that are known better than by the library's custom.
      labels: names of the classes, in their order.
      **options: further arguments of `create_model`, as ``width=0.35``.

    Returns:
      ``(model, variables, info)``, the variables NumPy arrays. TensorFlow's 1001 classes, the first of them
      background, become ImageNet's 1000.

    Raises:
      UserError: in one line, if the source can't be had or read, or doesn't hold just the weights of the model.
    """
    text = os.fspath(source)
    path = pathlib.Path(text).expanduser()
    if hub.is_name(text):
        fetched = hub.fetch(text)
        options = {**fetched.model, **options}
        name = options.pop("name")
        if model not in (None, name):
            raise UserError(f"{text} is {name}, not {model}; leave the model out")
        model, library, path = name, library or fetched.source, fetched.path
        preprocessing = {**(fetched.preprocessing or {}), **(preprocessing or {})}
    elif kind_of(path) == "ours":
        if any(asked is not None for asked in (model, library, preprocessing, labels)) or options:
            raise UserError(f"{path}: says itself what it holds; leave the model and its options out")
        return read_weights(path)
    if model is None:
        raise UserError(f"{path}: a file of another library doesn't say which network it holds; give the model's name")
    if model not in list_models():
        raise UserError(f"unknown model {model!r}{nearest(model, list_models())}")
    foreign = _read(path)
    library = library or _library(path, foreign)
    network, leaves, notes = _convert(path, foreign, library, model, options)
    if labels is None and network.num_classes == len(imagenet.class_ids()):
        named: dict[str, Any] = {"labels": imagenet.class_names(), "class_ids": imagenet.class_ids()}
    else:
        named = {"labels": tuple(labels or ())}
    if named["labels"] and len(named["labels"]) != network.num_classes:
        raise UserError(f"{path}: {len(named['labels'])} labels for {network.num_classes} classes; give one each")
    info = WeightsInfo(
        preprocessing=preprocessing_from(preprocessing or {}, _preprocessing(foreign, library, model)),
        source=text if hub.is_name(text) else library,
        notes=(f"converted from {path.name}", *notes),
        **named,
    )
    return Weights(network, unflatten(leaves), info)


_Foreign: TypeAlias = ForeignNetwork | dict[str, np.ndarray]


def _read(path: pathlib.Path) -> _Foreign:
    kind = kind_of(path)
    if kind == "state dict":
        return read_state_dict(path)
    return read_keras(path) if kind == "keras" else read_tflite(path)


def _convention(path: pathlib.Path, foreign: _Foreign, library: Source, model: str) -> Convention:
    family = names.family_of(model)
    is_named = (library, family) in names.TABLES
    if (library, family) not in CONVENTIONS or isinstance(foreign, dict) != is_named:
        known = sorted({of for whose, of in CONVENTIONS if whose == library})
        raise UserError(f"{path}: no {model} of {library} that we can read; the families we can: {', '.join(known)}")
    return CONVENTIONS[library, family]


def _preprocessing(foreign: _Foreign, library: Source, model: str) -> Preprocessing:
    """What the file says of it, for the rest the library's custom."""
    custom = CONVENTIONS[library, names.family_of(model)]
    told: dict[str, Any] = {"interpolation": custom.interpolation}
    if custom.normalisation is not None:
        told |= {key: (value,) * 3 for key, value in zip(("mean", "std"), custom.normalisation, strict=True)}
    if isinstance(foreign, ForeignNetwork):
        said = {"resolution": foreign.resolution, "mean": foreign.mean, "std": foreign.std}
        told |= {key: value for key, value in said.items() if value is not None}
    return preprocessing_from(told, Preprocessing())


def _convert(
    path: pathlib.Path, foreign: _Foreign, library: Source, name: str, asked: Mapping[str, Any]
) -> tuple[Model, dict[str, np.ndarray], list[str]]:
    """The network, its leaves, and what was done to them."""
    custom = _convention(path, foreign, library, name)
    family = names.family_of(name)
    options: dict[str, Any] = {"padding": custom.padding}
    if (library, family) in _WIDTH_RULES:
        options["width_rule"] = _WIDTH_RULES[library, family]
    activation = _activation(foreign) or custom.activation
    if activation == "relu" and family in ("mobilenet_v1", "mobilenet_v2"):
        options["activation"] = activation
    epsilon = (foreign.epsilon if isinstance(foreign, ForeignNetwork) else None) or custom.epsilon
    norm = NormConfig(epsilon=epsilon, decay=custom.decay)

    def build(num_classes: int) -> Model:
        return create_model(name, num_classes, norm=norm, **options | dict(asked))

    if isinstance(foreign, ForeignNetwork):
        network = build(_num_classes_by_order(path, foreign))
        leaves = _by_order(path, network, foreign)
    else:
        table = names.TABLES[library, family](build(2).module.plan)
        network = build(_num_classes_by_name(path, foreign, table))
        leaves = _by_name(path, network, foreign, table)
    notes = []
    if isinstance(foreign, ForeignNetwork) and foreign.folded:
        notes.append("norms were folded into the convolutions: each is an identity with a bias")
    if network.num_classes == _BACKGROUND_CLASSES:
        network = build(_BACKGROUND_CLASSES - 1)
        for leaf in ("kernel", "bias"):
            leaves[f"params/classifier/{leaf}"] = leaves[f"params/classifier/{leaf}"][..., 1:]
        notes.append("the first of 1001 classes, background, was dropped")
    leaves = {path_of: np.ascontiguousarray(leaf) for path_of, leaf in leaves.items()}
    check_shapes(network, {path_of: leaf.shape for path_of, leaf in leaves.items()}, str(path))
    return network, leaves, notes


def to_timm(weights: Weights) -> dict[str, np.ndarray]:
    """The state dict that timm's model of the same network loads; ``num_batches_tracked`` is 0.

    Raises:
      UserError: if timm has no such network, or pads differently.
    """
    model = weights.model
    family = names.family_of(model.name)
    if ("timm", family) not in names.TABLES:
        raise UserError(f"timm has no {model.name}")
    table = names.TABLES["timm", family](model.module.plan)
    state: dict[str, np.ndarray] = {}
    for path, leaf in flatten(weights.variables).items():
        layer, _, kind = path.partition("/")[2].rpartition("/")
        theirs = table[layer]
        if kind == "kernel":
            is_dense = leaf.ndim == 2
            leaf = leaf[None, None] if is_dense and layer != "classifier" else leaf  # timm's are 1×1 convolutions
            leaf = leaf.T if leaf.ndim == 2 else leaf.transpose(3, 2, 0, 1)
        if layer.endswith("layer_scale"):
            state[f"{theirs}.gamma"] = leaf
            continue
        state[f"{theirs}.{names.LEAVES[kind]}"] = leaf
        if kind == "mean":
            state[f"{theirs}.num_batches_tracked"] = np.zeros((), np.int64)
    return {name: np.asarray(array, order="C") for name, array in state.items()}


def kind_of(path: pathlib.Path) -> Literal["ours", "keras", "tflite", "state dict"]:
    """What a file is, by its first bytes.

    Raises:
      UserError: naming the file, if it can't be read or is none of them.
    """
    try:
        with path.open("rb") as file:
            head = file.read(16)
    except OSError as error:
        raise UserError(f"{path}: can't be read ({error.strerror}); correct the path") from error
    if head.startswith(b"\x89HDF\r\n\x1a\n"):
        return "keras"
    if head[4:8] == b"TFL3":
        return "tflite"
    if head.startswith(b"PK"):
        try:
            with zipfile.ZipFile(path) as archive:
                members = archive.namelist()
        except (zipfile.BadZipFile, OSError) as error:
            raise UserError(f"{path}: a damaged archive ({error}); get it again") from error
        return "keras" if "model.weights.h5" in members else "state dict"
    if path.suffix == ".safetensors":
        return "ours" if is_ours(path) else "state dict"
    if path.suffix in (".pth", ".pt", ".bin"):
        return "state dict"
    raise UserError(
        f"{path}: not a file of weights that we can read (.safetensors, .pth, .pt, .h5, .weights.h5, .keras, .tflite);"
        " a TF-slim checkpoint can be had as a .tflite or a Keras file"
    )


def _library(path: pathlib.Path, foreign: _Foreign) -> Source:
    if isinstance(foreign, ForeignNetwork):
        return foreign.source
    for key, source in _OF_KEYS:
        if key in foreign:
            if source == "timm" and path.name.startswith("tf_"):
                return "timm_tf"
            return source
    first = ", ".join(list(foreign)[:3])
    raise UserError(f"{path}: no library's names that we know ({first}, …); torchvision, timm and CoreNet are known")


def _activation(foreign: _Foreign) -> str | None:
    """relu or relu6, where the file says it and all its convolutions have the same."""
    if not isinstance(foreign, ForeignNetwork):
        return None
    found = {layer.activation for layer in foreign.layers if layer.activation}
    return found.pop() if len(found) == 1 and found <= {"relu", "relu6"} else None


# --- by name ------------------------------------------------------------------------------------------------


def _num_classes_by_name(path: pathlib.Path, state: Mapping[str, np.ndarray], table: Mapping[str, str]) -> int:
    head = f"{table['classifier']}.weight"
    if head not in state:
        raise UserError(f"{path}: no tensor {head}, so no classifier; weights without their head can't be converted")
    return int(state[head].shape[0])


def _by_name(
    path: pathlib.Path, model: Model, state: Mapping[str, np.ndarray], table: Mapping[str, str]
) -> dict[str, np.ndarray]:
    """Every leaf of ours from the tensor that the table names.

    Raises:
      UserError: listing tensors that are missing, left over, or of another shape.
    """
    leaves, missing, wrong, used = {}, [], [], set()
    for ours, shape in shapes_of(model).items():
        layer, _, kind = ours.partition("/")[2].rpartition("/")
        leaf = "gamma" if layer.endswith("layer_scale") else names.LEAVES[kind]
        theirs = f"{table.get(layer, layer)}.{leaf}"
        used.add(theirs)
        if theirs not in state:
            missing.append(theirs)
            continue
        array = state[theirs]
        if kind == "kernel" and array.ndim in (2, 4):
            array = array.T if array.ndim == 2 else array.transpose(2, 3, 1, 0)
        if len(shape) == 2 and array.shape[:2] == (1, 1) and array.ndim == 4:
            array = array[0, 0]
        if array.shape != shape:
            wrong.append(f"{theirs} is {list(array.shape)} instead of {list(shape)} for {layer}")
        leaves[ours] = array
    problems = {"missing": missing, "left over": sorted(set(state) - used), "of another shape": wrong}
    raise_mismatch(problems, f"{path}: not the weights of {describe(model)}")
    return leaves


# --- by order -----------------------------------------------------------------------------------------------


def _products(network: ForeignNetwork) -> list[ForeignLayer]:
    """Convolutions, then dense layers, which come last in every network here that has both."""
    return [layer for kind in ("conv", "dense") for layer in network.layers if layer.kind == kind]


def _num_classes_by_order(path: pathlib.Path, network: ForeignNetwork) -> int:
    products = _products(network)
    if not products:
        raise UserError(f"{path}: holds no convolution and no dense layer; give another file")
    return int(products[-1].arrays["kernel"].shape[-1])


def _by_order(path: pathlib.Path, model: Model, network: ForeignNetwork) -> dict[str, np.ndarray]:
    """Every layer of ours from the file's layer of the same kind at the same place.

    Raises:
      UserError: listing layers that are missing, left over, or of another shape.
    """
    shapes = shapes_of(model)
    order = [layer.name for layer in summarise(model, 64).layers]
    ours: dict[str, list[str]] = {"depthwise": [], "product": [], "norm": []}
    for layer in order:
        kernel = shapes.get(f"params/{layer}/kernel")
        if kernel is not None:
            ours["depthwise" if len(kernel) == 4 and kernel[2] == 1 else "product"].append(layer)
        elif f"batch_stats/{layer}/mean" in shapes:
            ours["norm"].append(layer)
    theirs: dict[str, list[ForeignLayer]] = {
        "depthwise": [layer for layer in network.layers if layer.kind == "depthwise"],
        "product": _products(network),
        "norm": [layer for layer in network.layers if layer.kind == "norm"],
    }
    if network.folded:
        theirs["norm"], ours["norm"] = [], []
    what = f"{path}: not the weights of {describe(model)}"
    raise_mismatch(
        {
            "missing": [name for kind in ours for name in ours[kind][len(theirs[kind]) :]],
            "left over": [layer.name for kind in ours for layer in theirs[kind][len(ours[kind]) :]],
        },
        what,
    )
    leaves: dict[str, np.ndarray] = {}
    wrong, left, before_norm = [], [], {}
    for kind in ours:
        for layer, other in zip(ours[kind], theirs[kind], strict=True):
            for leaf, array in other.arrays.items():
                place = f"{'batch_stats' if leaf in ('mean', 'var') else 'params'}/{layer}/{leaf}"
                if leaf == "bias" and f"params/{layer}_norm/bias" in shapes:
                    before_norm[f"{layer}_norm"] = array
                    continue
                shape = shapes.get(place)
                if shape is None:
                    left.append(f"{leaf} of {other.name}")
                    continue
                if len(shape) == 2 and array.shape[:2] == (1, 1) and array.ndim == 4:
                    array = array[0, 0]
                if array.shape != shape:
                    wrong.append(f"{leaf} of {other.name} is {list(array.shape)} instead of {list(shape)} for {layer}")
                leaves[place] = array
    for norm, bias in before_norm.items():
        if network.folded:
            one = np.ones_like(bias)
            # scale / sqrt(var + epsilon) = 1
            leaves |= {f"params/{norm}/scale": one, f"params/{norm}/bias": bias}
            leaves |= {f"batch_stats/{norm}/mean": 0 * one, f"batch_stats/{norm}/var": one - model.module.norm.epsilon}
        elif (mean := leaves.get(f"batch_stats/{norm}/mean")) is not None and mean.shape == bias.shape:
            leaves[f"batch_stats/{norm}/mean"] = mean - bias  # what is added before a norm is subtracted in it
    missing = sorted(set(shapes) - set(leaves))
    raise_mismatch({"missing": missing, "left over": left, "of another shape": wrong}, what)
    return leaves
