"""The teacher of a distillation: between the data and the step, it adds its logits to each batch.

    host batch ──► stored logits, by index ──► feed ──► batch ──► live teacher, on the student's view ──► step

A live teacher sees what the student sees, augmented and mixed. Logits stored once an image are of the unaugmented one:
they cost nothing, and are the weaker targets the stronger the augmentation is.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import os
import pathlib
import sys
from collections.abc import Callable
from typing import Literal

import jax
import numpy as np
import tqdm

from mnv2_jax.config import Config, DistillConfig, ModelConfig
from mnv2_jax.data import streams
from mnv2_jax.data.sources import Dataset, check_trainable, open_dataset
from mnv2_jax.data.split import Split
from mnv2_jax.errors import UserError, machine_fault
from mnv2_jax.models.registry import Model, from_config
from mnv2_jax.ops.augment import normalise
from mnv2_jax.ops.random import step_key
from mnv2_jax.runs.weights import open_weights, read_run_weights
from mnv2_jax.tasks.classification import Classification
from mnv2_jax.tasks.distillation import TEACHER_LOGITS, Distillation
from mnv2_jax.training import mesh as meshes
from mnv2_jax.training.initial import columns_of
from mnv2_jax.training.mesh import HostBatch
from mnv2_jax.types import Array, Batch, PyTree
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Teacher:
    """What is done to batch number k before step k takes it; where there is no teacher, nothing."""

    on_host: Callable[[HostBatch], HostBatch] = lambda batch: batch
    on_device: Callable[[int, Batch], Batch] = lambda step, batch: batch
    digest: str | None = None
    """SHA-256 of its weights or logits: a run that goes on must have the same."""


def open_teacher(
    config: Config, dataset: Dataset, task: Classification | Distillation, mesh: jax.sharding.Mesh
) -> Teacher:
    """Opens what ``distill`` names; compiles nothing yet.

    Args:
      config: `distill`, `augment` and `seed` are read.
      dataset: whose classes, and for stored logits whose train split, they must be of.
      task: what is trained.
      mesh: where a live teacher lies and runs.

    Raises:
      UserError: if it can't be had, is of other classes or of other data, or doesn't go with the config.
    """
    if not isinstance(task, Distillation):
        return Teacher()
    distill, augment = config.distill, config.augment
    if distill.logits is None:
        try:
            return _live(_open(distill), dataset, task.student, config.seed, mesh)
        except UserError as error:
            reason = str(error).removeprefix(f"{distill.teacher}: ")
            raise UserError(f"distill.teacher={distill.teacher!r}: {reason}") from error
    for key, alpha in (("mixup_alpha", augment.mixup_alpha), ("cutmix_alpha", augment.cutmix_alpha)):
        if alpha:
            raise UserError(
                f"distill.logits={distill.logits!r} are of whole images, and augment.{key}={alpha:g} mixes them; give"
                " distill.teacher instead, or set it to 0"
            )
    logits = read_logits(pathlib.Path(distill.logits).expanduser(), dataset)
    return Teacher(
        on_host=lambda batch: {**batch, TEACHER_LOGITS: logits[batch["index"]].astype(np.float32)},
        digest=_digest(logits),
    )


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


def _live(weights: Weights, dataset: Dataset, student: Classification, seed: int, mesh: jax.sharding.Mesh) -> Teacher:
    answer = _answer(weights, dataset)
    seen, wanted = student.data, weights.info.preprocessing
    # From one normalisation to the other: what the student's calls 0 and 1 in terms of the teacher's.
    mean = tuple((to - of) / by for to, of, by in zip(wanted.mean, seen.mean, seen.std, strict=True))
    std = tuple(to / of for to, of in zip(wanted.std, seen.std, strict=True))

    def logits(variables: PyTree, step: Array, batch: Batch) -> Array:
        key = step_key(seed, step)  # the step's own, so the view is its own
        images, _ = student.view(batch, key)
        return answer(variables, normalise(images, mean, std))

    compiled = meshes.compile_teacher(mesh, logits)
    variables = meshes.put(mesh, weights.variables)
    return Teacher(
        on_device=lambda step, batch: {**batch, TEACHER_LOGITS: compiled(variables, np.int32(step), batch)},
        digest=_digest(weights.variables),
    )


def _digest(tree: PyTree) -> str:
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(tree):
        digest.update(np.ascontiguousarray(leaf).data)
    return digest.hexdigest()


def _answer(weights: Weights, dataset: Dataset) -> Callable[[PyTree, Array], Array]:
    """``(variables, normalised images [b, h, w, 3]) -> float32 [b, k]``, a column for each class of the data."""
    own = weights.model
    model: Model = from_config(dataclasses.replace(own.options, dtype=DTYPE), own.norm)
    columns = columns_of(weights.info, model.num_classes, dataset)

    def answer(variables: PyTree, images: Array) -> Array:
        logits, _ = model.apply(variables, images)
        return logits[:, columns]

    return answer


# --- stored logits --------------------------------------------------------------------------------------------


def store_logits(path: pathlib.Path, weights: Weights, config: Config) -> int:
    """Writes the logits of every training image, each seen as evaluation by these weights sees it.

    Args:
      path: ends in .npz; replaced where it exists. logits: float16 [n, k], a row an image in the order of the split, a
        column a class of the data; class_names: [k]; labels: int32 [n]; probes: int [m], places of some images, and
        colours: float32 [m, 3], their mean RGB, 0 to 255.
      weights: the teacher.
      config: `data` says which images.

    Returns:
      The number of images.

    Raises:
      UserError: if the data can't be read, their classes aren't the weights', or the file can't be written.
    """
    if path.suffix != ".npz":
        raise UserError(f"{path}: a file of logits ends in .npz; give it that ending")
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise UserError(f"{path}: no file can be written there; make the folder, or give another")
    dataset, mesh = open_dataset(config.data), meshes.make_mesh()
    check_trainable(dataset)
    for note in dataset.notes:
        tqdm.tqdm.write(note, file=sys.stderr)
    split, wanted = dataset.train, weights.info.preprocessing
    answer = _answer(weights, dataset)
    data = dataclasses.replace(config.data, eval_resolution=None, **dataclasses.asdict(wanted))

    def of(variables: PyTree, step: Array, batch: Batch) -> Array:
        del step
        return answer(variables, normalise(batch["image"], wanted.mean, wanted.std))

    compiled, feed = meshes.compile_teacher(mesh, of), meshes.make_feed(mesh, None)
    variables = meshes.put(mesh, weights.variables)
    logits = np.empty((len(split), len(dataset.class_names)), np.float16)
    labels = np.empty(len(split), np.int32)
    size = -(-min(data.eval_batch_size, len(split)) // mesh.size) * mesh.size
    total, damaged = -(-len(split) // size), dict[int, str]()
    batches = streams.without_damaged(data, split, streams.eval_batches(data, split, size), damaged)
    for batch in tqdm.tqdm(batches, total=total, disable=None):
        rows, mask = batch["index"][batch["mask"]], batch["mask"]
        logits[rows] = np.asarray(compiled(variables, np.int32(0), feed(batch)))[mask]
        labels[rows] = batch["label"][mask]
    if damaged:
        raise streams.damage(split, damaged)
    if (bad := _not_finite(logits)) is not None:
        raise UserError(f"the logits of image {bad} of {dataset.name} are not finite in float16; take other weights")
    probes, colours = _probe(split)
    file = io.BytesIO()
    np.savez(file, logits=logits, class_names=dataset.class_names, labels=labels, probes=probes, colours=colours)
    write_file(path, file.getvalue())
    return len(split)


def read_logits(path: pathlib.Path, dataset: Dataset) -> np.ndarray:
    """Reads what `store_logits` wrote for this train split.

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
