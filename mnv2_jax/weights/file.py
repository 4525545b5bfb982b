"""One file for a model and its weights: a safetensors file whose metadata hold all that is needed to use them."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import pathlib
import types
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from mnv2_jax import config
from mnv2_jax.config import HEAD, STRUCTURE, Config, DataConfig
from mnv2_jax.errors import UserError, nearest
from mnv2_jax.json_files import reading, write_bytes
from mnv2_jax.models import base
from mnv2_jax.models.plan import part_of
from mnv2_jax.models.registry import Model, variable_shapes
from mnv2_jax.registry import TASKS
from mnv2_jax.types import Variables

_KEY = "mnv2_jax"
"""Key of our metadata. A safetensors file without it was written by another library."""
_VERSION = 1
_MOST_NAMED = 12
_TEXTS = ("labels", "class_ids", "notes")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """How images were prepared when the weights were evaluated, and boxes were chosen; the fields are those of
    `config.DataConfig`."""

    resolution: int = DataConfig.resolution
    mean: tuple[float, float, float] = DataConfig.mean
    std: tuple[float, float, float] = DataConfig.std
    eval_crop: str = DataConfig.eval_crop
    eval_crop_fraction: float = DataConfig.eval_crop_fraction
    interpolation: str = DataConfig.interpolation
    antialias: bool = DataConfig.antialias
    eval_short_side: int | None = DataConfig.eval_short_side
    eval_canvas: tuple[int, int] | None = DataConfig.eval_canvas
    eval_window: tuple[int, int] | None = DataConfig.eval_window
    eval_mirror: bool = DataConfig.eval_mirror
    eval_min_score: float = DataConfig.eval_min_score
    eval_nms_iou: float = DataConfig.eval_nms_iou
    eval_max_boxes: int = DataConfig.eval_max_boxes

    @classmethod
    def of(cls, data: DataConfig) -> Self:
        """Returns that of a config."""
        options = {field.name: getattr(data, field.name) for field in dataclasses.fields(cls)}
        return cls(**options | {"resolution": data.seen_resolution})


@dataclasses.dataclass(frozen=True, kw_only=True)
class WeightsInfo:
    """Facts that are saved together with weights."""

    preprocessing: Preprocessing = Preprocessing()
    labels: tuple[str, ...] = ()
    """Names of the classes in logit order; empty if they aren't known."""
    class_ids: tuple[str, ...] = ()
    """Names of the class folders if they differ from `labels`, such as ImageNet's n01440764."""
    task: str = Config.task
    """Task that the weights were trained for, as in `config.Config.task`."""
    source: str = "mnv2_jax"
    """Library or run that the weights come from."""
    notes: tuple[str, ...] = ()
    """Changes that were made to the weights, one sentence each."""


class Weights(NamedTuple):
    """Result of `load_weights`."""

    model: Model
    variables: Variables
    """All variables of the model, except those of the parts that are `absent`."""
    info: WeightsInfo

    @property
    def absent(self) -> tuple[str, ...]:
        """Parts among `Model.head_parts` that the file lacked. A training initialises them at random."""
        return tuple(part for part in self.model.head_parts if part not in self.variables["params"])


def save_weights(
    path: str | os.PathLike[str], model: Model, variables: Variables, info: WeightsInfo | None = None
) -> None:
    """Writes weights to a safetensors file, completely or not at all.

    Args:
      path: the file; must end in .safetensors.
      model: the model that the weights belong to.
      variables: the weights, as `Model.init` returns them.
      info: facts to save with the weights; unset: the defaults of `WeightsInfo`.

    Raises:
      UserError: if the variables don't fit the model, the number of labels differs from its number of classes, or the
        file can't be written.
    """
    info, path = info or WeightsInfo(), pathlib.Path(path)
    if path.suffix != ".safetensors":
        raise UserError(f"{path}: the name of a weights file must end in .safetensors; add that ending")
    leaves = flatten(jax.device_get(variables))
    check_shapes(model, {name: leaf.shape for name, leaf in leaves.items()}, "variables")
    _check_labels(info, model.num_classes, str(path))
    about = {
        "version": _VERSION,
        "model": dataclasses.asdict(dataclasses.replace(model.options, num_classes=model.num_classes)),
        "norm": dataclasses.asdict(model.norm),
        "info": dataclasses.asdict(info),
    }
    content = safetensors.numpy.save(
        {name: np.ascontiguousarray(leaf) for name, leaf in leaves.items()}, {_KEY: json.dumps(about)}
    )
    write_file(path, content)


def read_weights(path: str | os.PathLike[str]) -> Weights:
    """Reads a file that `save_weights` wrote.

    Raises:
      UserError: naming the file, if it is missing or damaged, if another library wrote it, or if its tensors don't fit
        its model.
    """
    path = pathlib.Path(path)
    leaves, metadata = read_safetensors(path)
    if _KEY not in metadata:
        raise UserError(f"{path}: mnv2_jax didn't write this file; convert it with python -m mnv2_jax.convert")
    try:
        about = json.loads(metadata[_KEY])
        version, parts, info = about["version"], {key: about[key] for key in ("model", "norm")}, about["info"]
        if version != _VERSION:
            raise UserError(
                f"{path}: has version {version!r} of the format, but this mnv2_jax reads version {_VERSION}; update"
                " mnv2_jax"
            )
        settings = config.build(parts)
        fields = dict(info, preprocessing=_preprocessing(info["preprocessing"]))
        fields = {key: tuple(value) if isinstance(value, list) else value for key, value in fields.items()}
        weights_info = WeightsInfo(**fields)
        names = {"source": (weights_info.source,), "task": (weights_info.task,)}
        for key, texts in (names | {key: getattr(weights_info, key) for key in _TEXTS}).items():
            if not isinstance(texts, tuple) or not all(isinstance(text, str) for text in texts):
                raise TypeError(f"{key} isn't text")
        model = TASKS.find(weights_info.task).model(settings.model, settings.norm, settings.model.num_classes)
    except UserError as error:
        raise UserError(f"{path}: {str(error).removeprefix(f'{path}: ')}") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}: the metadata are damaged ({error}); convert or save the weights again") from error
    _check_labels(weights_info, model.num_classes, str(path))
    check_shapes(model, {name: leaf.shape for name, leaf in leaves.items()}, str(path))
    not_float = [name for name, leaf in leaves.items() if not np.issubdtype(leaf.dtype, np.floating)]
    raise_mismatch({"not floating-point": not_float}, f"{path}: doesn't hold the weights of a network")
    return Weights(model, unflatten(leaves), weights_info)


def _preprocessing(tree: Mapping[str, Any]) -> Preprocessing:
    """Builds a `Preprocessing` from its fields, with the checks that a config gets."""
    fields = [field.name for field in dataclasses.fields(Preprocessing)]
    for key in tree:
        if key not in fields:
            raise UserError(f"unknown field {key!r} of the preprocessing{nearest(str(key), fields)}")
    data = config.build({"data": tree}).data
    return Preprocessing(**{field.name: getattr(data, field.name) for field in dataclasses.fields(Preprocessing)})


def preprocessing_from(tree: Mapping[str, Any], base: Preprocessing) -> Preprocessing:
    """Returns ``base`` with some of its fields changed.

    Raises:
      UserError: for a field that doesn't exist or a value that isn't allowed.
    """
    return _preprocessing(dataclasses.asdict(base) | dict(tree))


def is_written_by_us(path: str | os.PathLike[str]) -> bool:
    """Whether `save_weights` wrote this safetensors file.

    Raises:
      UserError: naming the file, if it isn't a safetensors file.
    """
    path = pathlib.Path(path)
    try:
        with _open(path) as file:
            return _KEY in (file.metadata() or {})
    except (safetensors.SafetensorError, OSError, UnicodeDecodeError) as error:
        raise _damaged(path, error) from error


def read_safetensors(path: pathlib.Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Reads the tensors and metadata of any safetensors file; bfloat16 and float16 become float32.

    Raises:
      UserError: naming the file, if it is missing or damaged.
    """
    try:
        with _open(path) as file:
            names = list(file.keys())
            metadata = dict(file.metadata() or {})
            leaves = {name: file.get_tensor(name) for name in names}
    except (safetensors.SafetensorError, OSError, UnicodeDecodeError, ValueError, AttributeError) as error:
        # AttributeError: raised for a type that NumPy doesn't have, such as float8.
        raise _damaged(path, error) from error
    half = (jnp.bfloat16, np.float16)
    return {n: x.astype(np.float32) if x.dtype in half else x for n, x in leaves.items()}, metadata


def _open(path: pathlib.Path) -> Any:
    """Opens a safetensors file. It is read once before, because the operating system's errors say more than
    safetensors' about a file that can't be read.
    """
    with reading(path), open(path, "rb") as file:
        file.read(1)
    return safetensors.safe_open(path, framework="numpy")


def _damaged(path: pathlib.Path, error: Exception) -> UserError:
    if isinstance(error, FileNotFoundError):
        return UserError(f"{path}: there is no such file; correct the path")
    return UserError(f"{path}: isn't a complete safetensors file ({error}); get it again")


def write_file(path: pathlib.Path, content: bytes) -> None:
    """Writes a file, completely or not at all, and creates the folders above it.

    Raises:
      UserError: if the file can't be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path}: can't be written ({error.strerror}); choose another place") from error
    write_bytes(path, content)


def flatten(variables: Variables) -> dict[str, np.ndarray]:
    """Leaves of the variables by path, such as ``params/block_1/expand/kernel``."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(variables)
    }


def unflatten(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Rebuilds the nested dicts that `flatten` took apart."""
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        node, *parents = tree, *path.split("/")[:-1]
        for parent in parents:
            node = node.setdefault(parent, {})
        node[path.rpartition("/")[2]] = leaf
    return tree


@functools.cache
def shapes_of(model: Model, without: tuple[str, ...] = ()) -> Mapping[str, tuple[int, ...]]:
    """Shapes of a model's variables by path, as in `flatten`; leaves out the variables of the parts in ``without``."""
    paths = {
        tuple(key.key for key in path): tuple(leaf.shape)
        for path, leaf in jax.tree_util.tree_leaves_with_path(variable_shapes(model))
    }
    return types.MappingProxyType(
        {"/".join(path): shape for path, shape in paths.items() if part_of(path[1]) not in without}
    )


def check_shapes(model: Model, shapes: Mapping[str, tuple[int, ...]], origin: str) -> None:
    """Checks that tensors have exactly the names and shapes of the model's variables.

    Raises:
      UserError: listing the tensors that are missing, left over, or of another shape.
    """
    expected = shapes_of(model)
    wrong = [
        f"{name} is {list(shapes[name])} instead of {list(shape)}"
        for name, shape in expected.items()
        if name in shapes and tuple(shapes[name]) != shape
    ]
    problems = {
        "missing": sorted(set(expected) - set(shapes)),
        "left over": sorted(set(shapes) - set(expected)),
        "of another shape": wrong,
    }
    raise_mismatch(problems, f"{origin}: not the weights of {describe(model)}")


def raise_mismatch(problems: Mapping[str, Sequence[str]], summary: str) -> None:
    """Raises a `UserError` that lists the problems by kind, if there are any."""

    def some(names: Sequence[str]) -> str:
        more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
        return ", ".join(names[:_MOST_NAMED]) + more

    parts = [f"{kind}: {some(names)}" for kind, names in problems.items() if names]
    if parts:
        raise UserError(f"{summary}; {'; '.join(parts)}")


def describe(model: base.Model) -> str:
    """Name of a model with its options that differ from the default: ``mobilenet_v2 width=0.35 with 10 classes``."""
    options, default = model.options, config.ModelConfig()
    keys = [key for key in (*STRUCTURE, *HEAD) if getattr(options, key) != getattr(default, key)]
    changed = [f"{key}={getattr(options, key)}" for key in keys]
    return " ".join([options.name, *changed, f"with {model.num_classes} classes"])


def _check_labels(info: WeightsInfo, num_classes: int, origin: str) -> None:
    for key, names in (("labels", info.labels), ("class_ids", info.class_ids)):
        if names and len(names) != num_classes:
            raise UserError(
                f"{origin}: has {len(names)} {key} for {num_classes} classes; give one for each class, in logit order"
            )
