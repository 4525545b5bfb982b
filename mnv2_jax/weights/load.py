"""Loads weights of any kind as a model with its variables.

    our file ──────────────────────────────────────────────────────┐
    a name ──► hub ──► a file                                      │
    PyTorch, .safetensors ──► state_dicts ──► by_name (names) ──┐  ├──► Weights(model, variables, info)
    .h5 .weights.h5 .keras ──► keras_files ──► by_order ────────┼──┘
    .tflite ──► tflite_files ──► by_order ──────────────────────┘

`conventions` holds what a file doesn't say: the padding, epsilon and normalisation of its library.
"""

from __future__ import annotations

import os
import pathlib
import zipfile
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias

import numpy as np

from mnv2_jax.config import NormConfig
from mnv2_jax.data import imagenet
from mnv2_jax.errors import UserError, nearest
from mnv2_jax.models.registry import Model, create_model, list_models
from mnv2_jax.presets import native_resolution
from mnv2_jax.weights import by_name, by_order, dense, hub, names
from mnv2_jax.weights.conventions import CONVENTIONS, WIDTH_RULES, Convention, Source
from mnv2_jax.weights.dense import DenseForm
from mnv2_jax.weights.file import (
    Preprocessing,
    Weights,
    WeightsInfo,
    is_written_by_us,
    preprocessing_from,
    read_weights,
    unflatten,
)
from mnv2_jax.weights.keras_files import read_keras
from mnv2_jax.weights.layers import ForeignNetwork, reading
from mnv2_jax.weights.state_dicts import StateDict, form_of, read_state_dict
from mnv2_jax.weights.tflite_files import read_tflite

_BACKGROUND_CLASSES = 1001
_ANY_CLASSES = 2
"""Number of classes of a network whose classifier isn't read."""
_KERAS_V3_LAYERS = ("rescaling", "tf")
"""Beginnings of the names of the layers with which Keras's own MobileNetV3 scales pixels."""
_TENSORFLOW: tuple[Source, ...] = ("keras", "tflite", "timm_tf")


def load_weights(
    source: str | os.PathLike[str],
    model: str | None = None,
    *,
    library: Source | None = None,
    preprocessing: Mapping[str, Any] | None = None,
    labels: Sequence[str] | None = None,
    take: str | None = None,
    head: Head = "load",
    **options: Any,
) -> Weights:
    """Reads weights of any kind.

    Args:
      source: a file that `save_weights` wrote; a file of torchvision, timm, CoreNet, Keras or TFLite, whose format is
        detected; or a name such as ``timm/mobilenetv2_100.ra_in1k`` or ``torchvision/mobilenet_v2.v2``.
      model: the network that another library's file holds, one of `list_models`. Our own files, published names, and
        checkpoints that name their architecture don't need it.
      library: the library that wrote the weights, if the file can't tell (``timm_tf``: timm's tf_ models).
      preprocessing: fields of `weights.file.Preprocessing` that replace the conventions of the library.
      labels: names of the classes in logit order.
      take: which network to take from a PyTorch checkpoint that holds several: "ema" (the averaged weights), "raw" (the
        weights themselves), or its place in the file, such as ``teacher``. Unset: the average if there is one, as in
        timm.
      head: "new" accepts a file without a classifier that fits the model, for a training with a new classifier: the
        layers before it are loaded, and `Weights.absent` names the missing parts.
      **options: further arguments of `create_model`, such as ``width=0.35``.

    Returns:
      ``(model, variables, info)``; the variables are NumPy arrays. TensorFlow's 1001 classes, of which the first is the
      background, become ImageNet's 1000.

    Raises:
      UserError: in one line, if the source can't be downloaded or read, or doesn't hold exactly the weights of the
        model.
    """
    text = os.fspath(source)
    path = pathlib.Path(os.path.expanduser(text))
    if fixed := {"num_classes", "norm"} & set(options):
        raise UserError(f"{text}: {min(fixed)} is read from the file; leave {min(fixed)} out")
    is_name = hub.is_published_name(text)
    if not is_name and os.path.isdir(path):
        raise UserError(f"{path}: is a folder, not a weights file; to use a run folder, give it as --workdir")
    if not is_name and kind_of(path) == "ours":
        if any(value is not None for value in (model, library, preprocessing, labels, take)) or options:
            raise UserError(
                f"{path}: was written by mnv2_jax and names its own model; leave the model and its options out"
            )
        return read_weights(path)
    class_names = None if labels is None else {"labels": tuple(labels)}
    published = hub.fetch(text) if is_name else hub.read_config_beside(path)
    path = published.path if published else path
    foreign = _read(path, take)
    file_notes = list(foreign.notes) if isinstance(foreign, StateDict) else []
    if published is None and isinstance(foreign, StateDict):
        architecture, published = _named_architecture(path, foreign)
        file_notes += [f"the file says that it is {architecture}"] if published else []
    if published is not None:
        options = {**published.model, **options}
        name = options.pop("name")
        if model not in (None, name):
            raise UserError(f"{text}: the network is {name}, not {model}; leave the model out")
        model, library = name, library or published.source
        preprocessing = {**(published.preprocessing or {}), **(preprocessing or {})}
        if class_names is None and published.labels:
            class_names = {"labels": published.labels, "class_ids": published.class_ids}
    library = library or _library(path, foreign)
    form = dense.form_of(path, foreign, library)
    model = form.model if form and model is None else model
    if model is None:
        raise UserError(
            f"{path}: the file was written by another library and doesn't name its network; give the name of the model,"
            " as in mnv2 convert --model=mobilenet_v2"
        )
    if model not in list_models():
        raise UserError(f"unknown model {model!r}{nearest(model, list_models())}")
    network, leaves, notes = _convert(path, foreign, library, model, options, class_names, head, form)
    if form and not class_names and network.num_classes in form.classes:
        class_names = {"labels": form.classes[network.num_classes]}
        notes.append(
            f"the file doesn't name its {network.num_classes} classes, which are taken for the published network's"
        )
    full_preprocessing = preprocessing_from(preprocessing or {}, _preprocessing(path, foreign, library, model, form))
    _check_pixels(path, foreign, model, preprocessing or {})
    if "resolution" not in (preprocessing or {}) and getattr(foreign, "resolution", None) is None:
        notes.append(f"the file gives no resolution; {full_preprocessing.resolution} px is the published one")
    has_classes = form is not None or "params/classifier/kernel" in leaves
    classes = _classes(path, network.num_classes, class_names) if has_classes else {}
    info = WeightsInfo(
        preprocessing=full_preprocessing,
        labels=classes.get("labels", ()),
        class_ids=classes.get("class_ids", ()),
        task=form.task if form else WeightsInfo.task,
        source=text if is_name else library,
        notes=(f"converted from {path.name}", *file_notes, *notes),
    )
    return Weights(network, unflatten(leaves), info)


_Foreign: TypeAlias = ForeignNetwork | StateDict
Head: TypeAlias = Literal["load", "new"]
"""Value of `InitConfig.head`."""


_Classes: TypeAlias = dict[str, tuple[str, ...]]
"""Names of the classes: the fields ``labels`` and ``class_ids`` of a `WeightsInfo`."""


def _classes(path: pathlib.Path, num_classes: int, known_names: _Classes | None) -> _Classes:
    """Returns the known names of the classes; without any, ImageNet's if the number of classes is the same."""
    if known_names is None and num_classes == len(imagenet.class_ids()):
        return {"labels": imagenet.class_names(), "class_ids": imagenet.class_ids()}
    for labels in (known_names or {}).values():
        if labels and len(labels) != num_classes:
            raise UserError(f"{path}: has {num_classes} classes, but got {len(labels)} labels; give one for each class")
    return known_names or {}


def _read(path: pathlib.Path, take: str | None) -> _Foreign:
    kind = kind_of(path)
    if kind == "state dict":
        return read_state_dict(path, take)
    if take is not None:
        raise UserError(f"{path}: take={take!r} applies to PyTorch checkpoints only; leave it out")
    return read_keras(path) if kind == "keras" else read_tflite(path)


def _convention(path: pathlib.Path, foreign: _Foreign, library: Source, model: str) -> Convention:
    family = names.family_of(model)
    is_pytorch = library not in ("keras", "tflite")
    if isinstance(foreign, StateDict) != is_pytorch:
        kind = "a state dict" if isinstance(foreign, StateDict) else f"a {foreign.source} file"
        raise UserError(f"{path}: is {kind}, which {library} doesn't write; leave the library out")
    if (library, family) not in CONVENTIONS:
        families = sorted({readable for owner, readable in CONVENTIONS if owner == library})
        raise UserError(
            f"{path}: {model} can't be read from {library}'s files; the families that can: {', '.join(families)}"
        )
    return CONVENTIONS[library, family]


def _preprocessing(
    path: pathlib.Path, foreign: _Foreign, library: Source, model: str, form: DenseForm | None
) -> Preprocessing:
    """Preprocessing that the file states, completed by the conventions of its library."""
    convention = CONVENTIONS[library, names.family_of(model)]
    fields: dict[str, Any] = {key: getattr(convention, key) for key in ("interpolation", "antialias")}
    fields["resolution"] = form.resolution if form else native_resolution(model)
    if convention.normalisation is not None:
        fields |= {key: (value,) * 3 for key, value in zip(("mean", "std"), convention.normalisation, strict=True)}
    if form:
        fields |= form.preprocessing
    if isinstance(foreign, ForeignNetwork):
        stated = {"resolution": foreign.resolution, "mean": foreign.mean, "std": foreign.std}
        fields |= {key: value for key, value in stated.items() if value is not None}
        fields |= foreign.view
    try:
        return preprocessing_from(fields, Preprocessing())
    except UserError as error:
        raise UserError(f"{path}: the preprocessing in the file is invalid: {error}") from error


def _check_pixels(path: pathlib.Path, foreign: _Foreign, model: str, given_fields: Mapping[str, Any]) -> None:
    """Refuses a file with layers that change pixels by numbers which neither the file nor the user gives."""
    unstated = foreign.pixel_layers if isinstance(foreign, ForeignNetwork) else {}
    if names.family_of(model) == "mobilenet_v3":  # Keras's own V3 has such layers, which scale pixels to -1 to 1
        unstated = {
            name: is_beside
            for name, is_beside in unstated.items()
            if not (is_beside and name.startswith(_KERAS_V3_LAYERS))
        }
    if unstated and not {"mean", "std"} <= set(given_fields):
        raise UserError(
            f"{path}: its layer {next(iter(unstated))!r} changes pixels, but the file doesn't hold the numbers; save"
            " the whole model as .keras or .h5 and give that, or convert it with --mean and --std"
        )


def _convert(
    path: pathlib.Path,
    foreign: _Foreign,
    library: Source,
    name: str,
    requested: Mapping[str, Any],
    class_names: _Classes | None,
    head: Head,
    form: DenseForm | None,
) -> tuple[Model, dict[str, np.ndarray], list[str]]:
    """Converts a foreign file into a network, its leaves, and notes on the changes.

    The number of classes is arbitrary if the file has no classifier.
    """
    convention = _convention(path, foreign, library, name)
    family = names.family_of(name)
    options: dict[str, Any] = {"padding": convention.padding}
    if (library, family) in WIDTH_RULES:
        options["width_rule"] = WIDTH_RULES[library, family]
    if convention.activation is not None:
        options["activation"] = convention.activation
    file_epsilon = foreign.epsilon if isinstance(foreign, ForeignNetwork) else None
    decay = convention.decay if form is None or form.decay is None else form.decay
    norm = NormConfig(epsilon=convention.epsilon if file_epsilon is None else file_epsilon, decay=decay)

    def build(num_classes: int, **chosen: Any) -> Model:
        return create_model(name, num_classes, norm=norm, **options | dict(requested) | chosen)

    notes: list[str] = []
    sketch = build(_ANY_CLASSES)
    absent: tuple[str, ...] = ()
    if isinstance(foreign, ForeignNetwork) and form:
        options |= by_order.dense_options(foreign)
        if name == form.model and not {"width", "width_rule"} & set(requested):
            options |= by_order.fitting(foreign, lambda width: build(_ANY_CLASSES, **width), dense.WIDTHS) or {}
        network = build(by_order.num_classes(path, foreign))
        by_order.check_dense(path, network, foreign)
        leaves = by_order.leaves_of(path, network, foreign)
        notes += dense.adapt(form, network, leaves)
    elif isinstance(foreign, ForeignNetwork):
        foreign, absent = by_order.without_other_head(path, sketch, foreign, head)
        if by_order.is_binary(foreign):
            foreign = by_order.of_two_classes(foreign)
            notes.append("the file's single logit z became the logits 0 and z of two classes")
        _check_head(path, absent, head)
        num_classes = _ANY_CLASSES if absent else by_order.num_classes(path, foreign)
        options |= by_order.facts_of(path, build(num_classes), foreign, absent)
        network = build(num_classes)
        leaves = by_order.leaves_of(path, network, foreign, absent)
    elif form:
        table = form.names(sketch.plan)
        options |= {"align_corners": convention.align_corners, **dense.options_of(path, form, foreign, table)}
        network = build(form.num_classes(foreign.tensors, table))
        state, notes = dense.used(form, foreign.tensors)
        leaves, zeros = by_name.leaves_of(path, network, state, table)
        notes += [f"the file lacks {name}, which was set to zero" for name in zeros]
        notes += dense.adapt(form, network, leaves)
    else:
        table = names.TABLES[library, family](sketch.plan)
        network = build(by_name.num_classes(foreign.tensors, table))
        state, absent, notes = by_name.without_other_head(path, network, foreign.tensors, table, head)
        _check_head(path, absent, head)
        leaves, zeros = by_name.leaves_of(path, network, state, table, absent)
        notes += [f"the file lacks {name}, which was set to zero" for name in zeros]
    if absent:
        notes.append(f"the file has no {' and no '.join(absent)} for {name}")
    if isinstance(foreign, ForeignNetwork) and foreign.folded:
        notes.append("the norms were folded into the convolutions in the file: each became an identity with a bias")
    has_background = not absent and library in _TENSORFLOW and network.num_classes == _BACKGROUND_CLASSES
    if has_background and len((class_names or {}).get("labels", ())) != _BACKGROUND_CLASSES:
        network = build(_BACKGROUND_CLASSES - 1)
        for leaf in ("kernel", "bias"):
            leaves[f"params/classifier/{leaf}"] = leaves[f"params/classifier/{leaf}"][..., 1:]
        notes.append("the first of the 1001 classes, the background, was dropped")
    return network, {place: np.ascontiguousarray(leaf) for place, leaf in leaves.items()}, notes


def _check_head(path: pathlib.Path, absent: tuple[str, ...], head: Head) -> None:
    """Refuses a file without a classifier, unless a new head was requested."""
    if absent and head == "load":
        raise UserError(
            f"{path}: has no {absent[-1]}, so it can't classify images; to start a training from it, give"
            " --config.init.head=new"
        )


def kind_of(path: pathlib.Path) -> Literal["ours", "keras", "tflite", "state dict"]:
    """Detects the kind of a weights file by its first bytes.

    Raises:
      UserError: naming the file, if it can't be read or is of no known kind.
    """
    try:
        with path.open("rb") as file:
            head = file.read(16)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"{path}: can't be read ({reason}); correct the path") from error
    if head.startswith(b"\x89HDF\r\n\x1a\n"):
        return "keras"
    if head[4:8] == b"TFL3":
        return "tflite"
    if head.startswith(b"PK"):
        with reading(path, "Keras or PyTorch"), zipfile.ZipFile(path) as archive:
            members = archive.namelist()
        return "keras" if "model.weights.h5" in members else "state dict"
    form = form_of(head)
    if form == "safetensors" or (form is None and path.suffix == ".safetensors"):
        return "ours" if is_written_by_us(path) else "state dict"
    if form == "torch" or path.suffix in (".pth", ".pt", ".bin"):
        return "state dict"
    raise UserError(
        f"{path}: not a weights file that mnv2_jax can read (.safetensors, PyTorch's, .h5, .weights.h5, .keras,"
        " .tflite); instead of a TF-slim checkpoint, give the .tflite or Keras file of the same network"
    )


def _named_architecture(path: pathlib.Path, foreign: StateDict) -> tuple[str, hub.Fetched | None]:
    """Finds the first architecture named in the file that is known of its library, with its model and options."""
    candidates = ((each, hub.of_architecture(each, foreign.source, path)) for each in foreign.architectures)
    return next((pair for pair in candidates if pair[1] is not None), ("", None))


def _library(path: pathlib.Path, foreign: _Foreign) -> Source:
    """Library of a file. The file's name, or an architecture named in it, tells timm's ``tf_`` models apart."""
    architectures = foreign.architectures if isinstance(foreign, StateDict) else ()
    is_tf = path.name.startswith("tf_") or any(map(hub.is_tensorflow, architectures))
    return "timm_tf" if foreign.source == "timm" and is_tf else foreign.source
