"""The teacher of a distillation: a network that runs in every step, or logits that it computed once.

A live teacher gets the same augmented and mixed images as the student. Stored logits are those of each image without
augmentation. They cost nothing in training, but the stronger the augmentation, the weaker they are as targets.
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
"""Compute type of the teacher; its logits are float32."""
_PROBES = 256
"""Number of evenly spaced images by which a split is recognised."""
_SAME_COLOUR = 0.5
"""Bound on the difference of a channel's mean (0 to 255) between decoders of the same image."""
_CHUNK = 2**16
"""Number of rows that are checked for finite values at once."""
_WRITE = "with python -m mnv2_jax.predict --store-logits"
TEACHER_LOGITS = "teacher_logits"
"""Key of the stored logits in a batch, float32 [b, k]."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Teacher:
    """A teacher: either a live network or its stored logits."""

    answer: Callable[[PyTree, Array], Array] | None = None
    """Computes logits [b, k], one column per class of the data, from the teacher's variables and the student's view
    [b, h, w, 3]; None for stored logits."""
    variables: PyTree = dataclasses.field(default_factory=dict)
    """The teacher's variables; empty for stored logits."""
    columns: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    """`TEACHER_LOGITS` of the whole train split; empty for a live teacher."""

    def digest(self) -> str:
        """SHA-256 of the teacher's weights or logits. A resumed run must have the same."""
        digest = hashlib.sha256()
        for leaf in jax.tree.leaves((self.variables, dict(self.columns))):
            digest.update(np.ascontiguousarray(leaf).data)
        return digest.hexdigest()


def open_teacher(config: Config, dataset: Dataset) -> Teacher:
    """Opens the teacher or the stored logits that ``distill`` names.

    Args:
      config: the experiment, of which `distill`, `augment` and `data` are read.
      dataset: the data; the teacher must have their classes, and stored logits must be of their train split.

    Raises:
      UserError: if the teacher can't be read, has other classes or other data, or doesn't fit the config.
    """
    distill, augment = config.distill, config.augment
    if distill.logits is None:
        try:
            weights = _open(distill)
            return Teacher(answer=_answers_of_view(weights, dataset, config.data), variables=weights.variables)
        except UserError as error:
            reason = str(error).removeprefix(f"{distill.teacher}: ")
            raise UserError(f"distill.teacher={distill.teacher!r}: {reason}") from error
    for key, alpha in (("mixup_alpha", augment.mixup_alpha), ("cutmix_alpha", augment.cutmix_alpha)):
        if alpha:
            raise UserError(
                f"distill.logits={distill.logits!r} are for single images, but augment.{key}={alpha:g} mixes images;"
                f" give distill.teacher instead, or set augment.{key}=0"
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
        raise UserError(f"the network is {weights.model.name}; leave distill.teacher_model={name!r} out")
    return weights


def _answers_of_view(weights: Weights, dataset: Dataset, student: DataConfig) -> Callable[[PyTree, Array], Array]:
    """Like `answers_of`, for images that are normalised for the student."""
    answer, teacher = answers_of(weights, dataset), weights.info.preprocessing
    # Mean and std that convert the student's normalisation into the teacher's.
    mean = tuple((to - of) / by for to, of, by in zip(teacher.mean, student.mean, student.std, strict=True))
    std = tuple(to / of for to, of in zip(teacher.std, student.std, strict=True))
    return lambda variables, images: answer(variables, normalise(images, mean, std))


def answers_of(weights: Weights, dataset: Dataset) -> Callable[[PyTree, Array], Array]:
    """Makes ``(variables, normalised images [b, h, w, 3]) -> float32 [b, k]``, one column per class of the data."""
    saved = weights.model
    model: Model = from_config(dataclasses.replace(saved.options, dtype=DTYPE), saved.norm)
    columns = columns_of(weights.info, model.num_classes, dataset)

    def answer(variables: PyTree, images: Array) -> Array:
        logits, _ = model.apply(variables, images)
        return logits[:, columns]

    return answer


# --- stored logits --------------------------------------------------------------------------------------------


def write_logits(path: pathlib.Path, dataset: Dataset, logits: np.ndarray, labels: np.ndarray) -> None:
    """Writes the logits of a train split to a .npz file, completely or not at all.

    Args:
      path: the file; replaced if it exists. It holds logits; class_names: [k]; labels; probes: int [m], indices of some
        images; and colours: float32 [m, 3], the mean RGB of these images, 0 to 255.
      dataset: the data of the split.
      logits: float16 [n, k], one row per image in the order of the split, one column per class of the data.
      labels: int32 [n].

    Raises:
      UserError: if logits are not finite, or the file can't be written.
    """
    if (bad := _not_finite(logits)) is not None:
        raise UserError(f"the logits of image {bad} of {dataset.name} are not finite in float16; give other weights")
    probes, colours = _probe(dataset.train)
    file = io.BytesIO()
    np.savez(file, logits=logits, class_names=dataset.class_names, labels=labels, probes=probes, colours=colours)
    write_file(path, file.getvalue())


def read_logits(path: pathlib.Path, dataset: Dataset) -> np.ndarray:
    """Reads the logits that `write_logits` wrote for this train split.

    Returns:
      The logits, float16 [n, k], all finite.

    Raises:
      UserError: naming the file, if it is missing or damaged, or holds logits of other images or classes.
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
    except Exception as error:  # a damaged zip raises many kinds of errors, and NumPy's message advises to unpickle it
        if (fault := machine_fault(error)) is not None:
            raise UserError(
                f"distill.logits={str(path)!r} can't be read ({fault}); fix that and start again"
            ) from error
        raise UserError(f"{path}: isn't a file of stored logits, or is damaged; write it {_WRITE}") from error

    def refusal(difference: str) -> UserError:
        return UserError(f"{path}: belongs to other data: {difference}; write it again {_WRITE}")

    if class_names.tolist() != list(dataset.class_names):
        raise refusal(f"its classes aren't the {k} classes of {dataset.name}")
    if labels.shape != (n,):
        raise refusal(f"it has {labels.size} images, and the train split of {dataset.name} has {n}")
    if logits.shape != (n, k) or logits.dtype != np.float16 or labels.dtype != np.int32:
        raise refusal(f"its logits are {logits.dtype} {list(logits.shape)}, not float16 {[n, k]}")
    expected_probes, expected_colours = _probe(split)
    # Labels that are stored with the pixels cost as much to read as the images.
    places = np.arange(n) if isinstance(split.labels, np.ndarray) else expected_probes
    if labels[places].tolist() != [int(split.labels[place]) for place in places.tolist()]:
        raise refusal("the labels differ")
    if probes.tolist() != expected_probes.tolist() or colours.shape != expected_colours.shape:
        raise refusal("its probes were made by another version of mnv2_jax")
    off = np.abs(colours - expected_colours).max(axis=1) > _SAME_COLOUR
    if off.any():
        raise refusal(f"image {expected_probes[off][0]} of the train split is a different one")
    if (bad := _not_finite(logits)) is not None:
        raise UserError(f"{path}: the logits of image {bad} are not finite; write it again with another teacher")
    return logits


def _probe(split: Split) -> tuple[np.ndarray, np.ndarray]:
    """Indices of some images, int [m], and their mean colours, float32 [m, 3]."""
    places = np.unique(np.linspace(0, len(split) - 1, _PROBES).astype(np.int64))
    means = [np.asarray(split.read(place)).mean(axis=(0, 1)) for place in places.tolist()]
    return places, np.array(means, np.float32)


def _not_finite(logits: np.ndarray) -> int | None:
    """Index of the first row with a value that isn't finite; None if all are."""
    for start in range(0, len(logits), _CHUNK):
        bad = ~np.isfinite(logits[start : start + _CHUNK]).all(axis=1)
        if bad.any():
            return start + int(bad.argmax())
    return None
