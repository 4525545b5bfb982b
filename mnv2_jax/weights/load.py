"""Weights of any kind as a model with its variables.

    our file ──────────────────────────────────────────────────────┐
    a name ──► hub ──► a file                                      │
    PyTorch, .safetensors ──► state_dicts ──► by_name (names) ──┐  ├──► Weights(model, variables, info)
    .h5 .weights.h5 .keras ──► keras_files ──► by_order ────────┼──┘
    .tflite ──► tflite_files ──► by_order ──────────────────────┘

What a file doesn't say, its library's padding, epsilon and normalisation, stands in `conventions`.
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
from mnv2_jax.weights import by_name, by_order, hub, names
from mnv2_jax.weights.conventions import CONVENTIONS, WIDTH_RULES, Convention, Source
from mnv2_jax.weights.file import (
    Preprocessing,
    Weights,
    WeightsInfo,
    is_ours,
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
_OF_KERAS_V3 = ("rescaling", "tf")
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
      source: a file of `save_weights`; a file of torchvision, timm, CoreNet, Keras or TFLite, whose kind is
        recognised; or a name, as ``timm/mobilenetv2_100.ra_in1k`` or ``torchvision/mobilenet_v2.v2``.
      model: which network a foreign file holds, one of `list_models`; our files, names, and checkpoints that name their
        architecture say it themselves.
      library: whose weights they are, where a file can't tell (``timm_tf``: timm's tf_ models).
      preprocessing: fields of `weights.file.Preprocessing` that are known better than by the library's custom.
      labels: names of the classes, in their order.
      take: of a PyTorch checkpoint that holds several networks, the average of weights ("ema"), the weights themselves
        ("raw"), or the one at a place of it, as ``teacher``; unset: the average, where there is one, as timm does.
      head: new: of a file without a classifier of the model's, what it has before that is taken (`Weights.absent`), for
        a training with a new one.
      **options: further arguments of `create_model`, as ``width=0.35``.

    Returns:
      ``(model, variables, info)``, the variables NumPy arrays. TensorFlow's 1001 classes, the first of them
      background, become ImageNet's 1000.

    Raises:
      UserError: in one line, if the source can't be had or read, or doesn't hold just the weights of the model.
    """
    text = os.fspath(source)
    path = pathlib.Path(os.path.expanduser(text))
    if fixed := {"num_classes", "norm"} & set(options):
        raise UserError(f"{text}: {min(fixed)} follows from the file; leave it out")
    is_name = hub.is_name(text)
    if not is_name and os.path.isdir(path):
        raise UserError(f"{path}: a folder, and not a file of weights; a run's folder is given as --workdir")
    if not is_name and kind_of(path) == "ours":
        if any(asked is not None for asked in (model, library, preprocessing, labels, take)) or options:
            raise UserError(f"{path}: says itself what it holds; leave the model and its options out")
        return read_weights(path)
    known = None if labels is None else {"labels": tuple(labels)}
    published = hub.fetch(text) if is_name else hub.beside(path)
    path = published.path if published else path
    foreign = _read(path, take)
    said = list(foreign.notes) if isinstance(foreign, StateDict) else []
    if published is None and isinstance(foreign, StateDict):
        architecture, published = _said(path, foreign)
        said += [f"the file says that it is {architecture}"] if published else []
    if published is not None:
        options = {**published.model, **options}
        name = options.pop("name")
        if model not in (None, name):
            raise UserError(f"{text} is {name}, not {model}; leave the model out")
        model, library = name, library or published.source
        preprocessing = {**(published.preprocessing or {}), **(preprocessing or {})}
        if known is None and published.labels:
            known = {"labels": published.labels, "class_ids": published.class_ids}
    if model is None:
        raise UserError(f"{path}: a file of another library doesn't say which network it holds; give the model's name")
    if model not in list_models():
        raise UserError(f"unknown model {model!r}{nearest(model, list_models())}")
    library = library or _library(path, foreign)
    network, leaves, notes = _convert(path, foreign, library, model, options, known, head)
    wants = preprocessing_from(preprocessing or {}, _preprocessing(path, foreign, library, model))
    _check_pixels(path, foreign, model, preprocessing or {})
    if "resolution" not in (preprocessing or {}) and getattr(foreign, "resolution", None) is None:
        notes.append(f"{wants.resolution} px is what the network was published for; the file doesn't say")
    has_classes = "params/classifier/kernel" in leaves
    classes = _classes(path, network.num_classes, known) if has_classes else {}
    info = WeightsInfo(
        preprocessing=wants,
        labels=classes.get("labels", ()),
        class_ids=classes.get("class_ids", ()),
        source=text if is_name else library,
        notes=(f"converted from {path.name}", *said, *notes),
    )
    return Weights(network, unflatten(leaves), info)


_Foreign: TypeAlias = ForeignNetwork | StateDict
Head: TypeAlias = Literal["load", "new"]
"""Value of `InitConfig.head`."""


_Classes: TypeAlias = dict[str, tuple[str, ...]]
"""Names as `WeightsInfo` has them."""


def _classes(path: pathlib.Path, num_classes: int, known: _Classes | None) -> _Classes:
    """Those that are known, else ImageNet's where there are as many."""
    if known is None and num_classes == len(imagenet.class_ids()):
        return {"labels": imagenet.class_names(), "class_ids": imagenet.class_ids()}
    for given in (known or {}).values():
        if given and len(given) != num_classes:
            raise UserError(f"{path}: {len(given)} labels for {num_classes} classes; give one each")
    return known or {}


def _read(path: pathlib.Path, take: str | None) -> _Foreign:
    kind = kind_of(path)
    if kind == "state dict":
        return read_state_dict(path, take)
    if take is not None:
        raise UserError(f"{path}: take={take!r} is of PyTorch's checkpoints, which this isn't; leave it out")
    return read_keras(path) if kind == "keras" else read_tflite(path)


def _convention(path: pathlib.Path, foreign: _Foreign, library: Source, model: str) -> Convention:
    family = names.family_of(model)
    by_names = library not in ("keras", "tflite")
    if isinstance(foreign, StateDict) != by_names:
        kind = "a state dict" if isinstance(foreign, StateDict) else f"a file of {foreign.source}"
        raise UserError(f"{path}: {kind}, which {library} doesn't write; leave the library out")
    if (library, family) not in CONVENTIONS:
        known = sorted({of for whose, of in CONVENTIONS if whose == library})
        raise UserError(f"{path}: no {model} of {library} that we can read; the families we can: {', '.join(known)}")
    return CONVENTIONS[library, family]


def _preprocessing(path: pathlib.Path, foreign: _Foreign, library: Source, model: str) -> Preprocessing:
    """Preprocessing that the file states, and the library's convention for the rest."""
    custom = CONVENTIONS[library, names.family_of(model)]
    told: dict[str, Any] = {key: getattr(custom, key) for key in ("interpolation", "antialias")}
    told["resolution"] = native_resolution(model)
    if custom.normalisation is not None:
        told |= {key: (value,) * 3 for key, value in zip(("mean", "std"), custom.normalisation, strict=True)}
    if isinstance(foreign, ForeignNetwork):
        said = {"resolution": foreign.resolution, "mean": foreign.mean, "std": foreign.std}
        told |= {key: value for key, value in said.items() if value is not None}
        told |= foreign.view
    try:
        return preprocessing_from(told, Preprocessing())
    except UserError as error:
        raise UserError(f"{path}: says of its images {error}") from error


def _check_pixels(path: pathlib.Path, foreign: _Foreign, model: str, known: Mapping[str, Any]) -> None:
    """Refuses a file that prepares images by numbers that neither it nor the user says."""
    unsaid = foreign.unsaid if isinstance(foreign, ForeignNetwork) else {}
    if names.family_of(model) == "mobilenet_v3":  # Keras's own has such layers: pixels run from -1 to 1
        unsaid = {name: beside for name, beside in unsaid.items() if not (beside and name.startswith(_OF_KERAS_V3))}
    if unsaid and not {"mean", "std"} <= set(known):
        raise UserError(
            f"{path}: has a layer {next(iter(unsaid))!r} for its images and doesn't say by what numbers; give the whole"
            " model, saved as .keras or .h5, or convert it with --mean and --std"
        )


def _convert(
    path: pathlib.Path,
    foreign: _Foreign,
    library: Source,
    name: str,
    asked: Mapping[str, Any],
    known: _Classes | None,
    head: Head,
) -> tuple[Model, dict[str, np.ndarray], list[str]]:
    """The network, its leaves, and what was done to them; of a file without a classifier one of any classes."""
    custom = _convention(path, foreign, library, name)
    family = names.family_of(name)
    options: dict[str, Any] = {"padding": custom.padding}
    if (library, family) in WIDTH_RULES:
        options["width_rule"] = WIDTH_RULES[library, family]
    if custom.activation is not None:
        options["activation"] = custom.activation
    told = foreign.epsilon if isinstance(foreign, ForeignNetwork) else None
    norm = NormConfig(epsilon=custom.epsilon if told is None else told, decay=custom.decay)

    def build(num_classes: int) -> Model:
        return create_model(name, num_classes, norm=norm, **options | dict(asked))

    notes: list[str] = []
    sketch = build(_ANY_CLASSES)
    if isinstance(foreign, ForeignNetwork):
        foreign, absent = by_order.without_other_head(path, sketch, foreign, head)
        if by_order.is_binary(foreign):
            foreign = by_order.of_two_classes(foreign)
            notes.append("its one logit z is that of the second of two classes: 0 and z")
        _check_head(path, absent, head)
        num_classes = _ANY_CLASSES if absent else by_order.num_classes(path, foreign)
        options |= by_order.facts_of(path, build(num_classes), foreign, absent)
        network = build(num_classes)
        leaves = by_order.leaves_of(path, network, foreign, absent)
    else:
        table = names.TABLES[library, family](sketch.plan)
        network = build(by_name.num_classes(foreign.tensors, table))
        state, absent, notes = by_name.without_other_head(path, network, foreign.tensors, table, head)
        _check_head(path, absent, head)
        leaves, zeros = by_name.leaves_of(path, network, state, table, absent)
        notes += [f"{name}, which the file lacks, is zero" for name in zeros]
    if absent:
        notes.append(f"{' and '.join(absent)} of {name} can't be had from it")
    if isinstance(foreign, ForeignNetwork) and foreign.folded:
        notes.append("norms were folded into the convolutions: each is an identity with a bias")
    has_background = not absent and library in _TENSORFLOW and network.num_classes == _BACKGROUND_CLASSES
    if has_background and len((known or {}).get("labels", ())) != _BACKGROUND_CLASSES:
        network = build(_BACKGROUND_CLASSES - 1)
        for leaf in ("kernel", "bias"):
            leaves[f"params/classifier/{leaf}"] = leaves[f"params/classifier/{leaf}"][..., 1:]
        notes.append("the first of 1001 classes, background, was dropped")
    return network, {place: np.ascontiguousarray(leaf) for place, leaf in leaves.items()}, notes


def _check_head(path: pathlib.Path, absent: tuple[str, ...], head: Head) -> None:
    """Refuses a file without a classifier where it is to answer."""
    if absent and head == "load":
        raise UserError(
            f"{path}: has no {absent[-1]}, so that it can't say what is on an image; a training can start from it with"
            " --config.init.head=new"
        )


def kind_of(path: pathlib.Path) -> Literal["ours", "keras", "tflite", "state dict"]:
    """Kind of a file, by its first bytes.

    Raises:
      UserError: naming the file, if it can't be read or is none of them.
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
        return "ours" if is_ours(path) else "state dict"
    if form == "torch" or path.suffix in (".pth", ".pt", ".bin"):
        return "state dict"
    raise UserError(
        f"{path}: not a file of weights that we can read (.safetensors, PyTorch's, .h5, .weights.h5, .keras, .tflite);"
        " a TF-slim checkpoint can be had as a .tflite or a Keras file"
    )


def _said(path: pathlib.Path, foreign: StateDict) -> tuple[str, hub.Fetched | None]:
    """Name of the architecture in the file, with its model and options if it is a known one of its library."""
    found = ((each, hub.named(each, foreign.source, path)) for each in foreign.architectures)
    return next((pair for pair in found if pair[1] is not None), ("", None))


def _library(path: pathlib.Path, foreign: _Foreign) -> Source:
    """Library of the file; timm's ``tf_`` models are known by the file's name or the architecture in it."""
    said = foreign.architectures if isinstance(foreign, StateDict) else ()
    is_tf = path.name.startswith("tf_") or any(map(hub.is_tensorflow, said))
    return "timm_tf" if foreign.source == "timm" and is_tf else foreign.source
