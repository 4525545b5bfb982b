"""The teacher of a distillation: a network that is asked in the step, or the logits that it gave once.

A live teacher sees what the student sees, augmented and mixed. Logits stored once an image are of the unaugmented one:
they cost nothing, and are the weaker targets the stronger the augmentation is.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Literal

import jax
import numpy as np

from mnv2_jax.config import Config, DataConfig, DistillConfig, ModelConfig
from mnv2_jax.data.sources import Dataset
from mnv2_jax.data.split import Split
from mnv2_jax.errors import UserError, machine_fault
from mnv2_jax.models.registry import Model, from_config
from mnv2_jax.ops.augment import normalise
from mnv2_jax.runs.weights import open_weights, read_run_weights
from mnv2_jax.tasks.classes import columns_of
from mnv2_jax.types import Array, PyTree
from mnv2_jax.weights.file import Weights, write_file
from mnv2_jax.weights.load import load_weights

DTYPE: Literal["bfloat16"] = "bfloat16"
"""The teacher's compute type; its logits are float32."""
_PROBES = 256
"""Images, evenly spread, by which a split is known again."""
_SAME_COLOUR = 0.5
"""Decoders differ by less than this in the mean of a channel, of 255."""
_CHUNK = 2**16
"""Rows whose finiteness is looked at together."""
_WRITE = "by python -m mnv2_jax.predict --store-logits"
TEACHER_LOGITS = "teacher_logits"
"""Key of a batch's stored logits, float32 [b, k]."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Teacher:
    """Either a network or what it has said."""

    answer: Callable[[PyTree, Array], Array] | None = None
    """From its variables and the student's view [b, h, w, 3] to logits [b, k], a column for each class of the data."""
    variables: PyTree = dataclasses.field(default_factory=dict)
    columns: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    """`TEACHER_LOGITS` of the whole train split."""

    def digest(self) -> str:
        """SHA-256 of its weights or logits: a run that goes on must have the same."""
        digest = hashlib.sha256()
        for leaf in jax.tree.leaves((self.variables, dict(self.columns))):
            digest.update(np.ascontiguousarray(leaf).data)
        return digest.hexdigest()


def open_teacher(config: Config, dataset: Dataset) -> Teacher:
    """Opens what ``distill`` names.

    Args:
      config: `distill`, `augment` and `data` are read.
      dataset: whose classes, and for stored logits whose train split, they must be of.

    Raises:
      UserError: if it can't be had, is of other classes or of other data, or doesn't go with the config.
    """
    distill, augment = config.distill, config.augment
    if distill.logits is None:
        try:
            weights = _open(distill)
            return Teacher(answer=_of_view(weights, dataset, config.data), variables=weights.variables)
        except UserError as error:
            reason = str(error).removeprefix(f"{distill.teacher}: ")
            raise UserError(f"distill.teacher={distill.teacher!r}: {reason}") from error
    for key, alpha in (("mixup_alpha", augment.mixup_alpha), ("cutmix_alpha", augment.cutmix_alpha)):
        if alpha:
            raise UserError(
                f"distill.logits={distill.logits!r} are of whole images, and augment.{key}={alpha:g} mixes them; give"
                " distill.teacher instead, or set it to 0"
            )
    return Teacher(columns={TEACHER_LOGITS: read_logits(pathlib.Path(distill.logits).expanduser(), dataset)})


def _open(distill: DistillConfig) -> Weights:
    source, name = distill.teacher, distill.teacher_model
    assert source is not None
    path = os.path.expanduser(source)
    if name is None:
        return read_run_weights(pathlib.Path(path)) if os.path.isdir(path) else load_weights(source)
    weights = open_weights(source, ModelConfig(name=name))
    if weights.model.name != name:
        raise UserError(f"this is {weights.model.name}; leave distill.teacher_model={name!r} out")
    return weights


def _of_view(weights: Weights, dataset: Dataset, seen: DataConfig) -> Callable[[PyTree, Array], Array]:
    """Does what `answers_of` does, for images that are normalised for the student."""
    answer, wanted = answers_of(weights, dataset), weights.info.preprocessing
    # From one normalisation to the other: what the student's calls 0 and 1 in terms of the teacher's.
    mean = tuple((to - of) / by for to, of, by in zip(wanted.mean, seen.mean, seen.std, strict=True))
    std = tuple(to / of for to, of in zip(wanted.std, seen.std, strict=True))
    return lambda variables, images: answer(variables, normalise(images, mean, std))


def answers_of(weights: Weights, dataset: Dataset) -> Callable[[PyTree, Array], Array]:
    """``(variables, normalised images [b, h, w, 3]) -> float32 [b, k]``, a column for each class of the data."""
    own = weights.model
    model: Model = from_config(dataclasses.replace(own.options, dtype=DTYPE), own.norm)
    columns = columns_of(weights.info, model.num_classes, dataset)

    def answer(variables: PyTree, images: Array) -> Array:
        logits, _ = model.apply(variables, images)
        return logits[:, columns]

    return answer


# --- stored logits --------------------------------------------------------------------------------------------


def write_logits(path: pathlib.Path, dataset: Dataset, logits: np.ndarray, labels: np.ndarray) -> None:
    """Writes logits of a train split to a .npz, whole or not at all.

    Args:
      path: replaced where it exists. It holds logits; class_names: [k]; labels; probes: int [m], places of some images,
        and colours: float32 [m, 3], their mean RGB, 0 to 255.
      dataset: whose split it is.
      logits: float16 [n, k], a row an image in the order of the split, a column a class of the data.
      labels: int32 [n].

    Raises:
      UserError: if logits are not finite, or the file can't be written.
    """
    if (bad := _not_finite(logits)) is not None:
        raise UserError(f"the logits of image {bad} of {dataset.name} are not finite in float16; take other weights")
    probes, colours = _probe(dataset.train)
    file = io.BytesIO()
    np.savez(file, logits=logits, class_names=dataset.class_names, labels=labels, probes=probes, colours=colours)
    write_file(path, file.getvalue())


def read_logits(path: pathlib.Path, dataset: Dataset) -> np.ndarray:
    """Reads what `write_logits` wrote for this train split.

    Returns:
      float16 [n, k], finite.

    Raises:
      UserError: naming the file, if it is missing or damaged, or is of other images or classes.
    """
    split = dataset.train
    n, k = len(split), len(dataset.class_names)
    try:
        with path.open("rb") as opened, np.load(opened, allow_pickle=False) as archive:
            logits, class_names, labels, probes, colours = (
                archive[name] for name in ("logits", "class_names", "labels", "probes", "colours")
            )
    except (FileNotFoundError, IsADirectoryError, PermissionError) as error:
        raise UserError(f"distill.logits={str(path)!r} can't be read ({error.strerror}); correct the path") from error
    except Exception as error:  # a damaged zip fails in many ways, and NumPy's own message advises to unpickle it
        if (fault := machine_fault(error)) is not None:
            raise UserError(
                f"distill.logits={str(path)!r} can't be read ({fault}); mend that and start again"
            ) from error
        raise UserError(f"{path}: not a file of stored logits, or a damaged one; write it {_WRITE}") from error

    def refuse(what: str) -> UserError:
        return UserError(f"{path}: of other data, {what}; write it again {_WRITE}")

    if class_names.tolist() != list(dataset.class_names):
        raise refuse(f"its classes aren't the {k} of {dataset.name}")
    if labels.shape != (n,):
        raise refuse(f"it is of {labels.size} images, and {dataset.name} has {n} to train on")
    if logits.shape != (n, k) or logits.dtype != np.float16 or labels.dtype != np.int32:
        raise refuse(f"its logits are {logits.dtype} {list(logits.shape)}, not float16 {[n, k]}")
    here, found = _probe(split)
    # Labels that lie beside the pixels cost as much to read as the images.
    places = np.arange(n) if isinstance(split.labels, np.ndarray) else here
    if labels[places].tolist() != [int(split.labels[place]) for place in places.tolist()]:
        raise refuse("the labels differ")
    if probes.tolist() != here.tolist() or colours.shape != found.shape:
        raise refuse("its probes are of another version")
    off = np.abs(colours - found).max(axis=1) > _SAME_COLOUR
    if off.any():
        raise refuse(f"image {here[off][0]} of the train split is another one")
    if (bad := _not_finite(logits)) is not None:
        raise UserError(f"{path}: the logits of image {bad} are not finite; write it again by another teacher")
    return logits


def _probe(split: Split) -> tuple[np.ndarray, np.ndarray]:
    """Places of some images, int [m], and their mean colours, float32 [m, 3]."""
    places = np.unique(np.linspace(0, len(split) - 1, _PROBES).astype(np.int64))
    means = [np.asarray(split.read(place)).mean(axis=(0, 1)) for place in places.tolist()]
    return places, np.array(means, np.float32)


def _not_finite(logits: np.ndarray) -> int | None:
    """The first row with a value that isn't."""
    for start in range(0, len(logits), _CHUNK):
        bad = ~np.isfinite(logits[start : start + _CHUNK]).all(axis=1)
        if bad.any():
            return start + int(bad.argmax())
    return None
