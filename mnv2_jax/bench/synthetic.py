"""Builds the experiment of a config on random images, for benchmarks that need no data."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np

from mnv2_jax import config
from mnv2_jax.bench.pod_model import IMAGENET_IMAGES
from mnv2_jax.config import Config
from mnv2_jax.data.sources import Dataset, known_num_classes
from mnv2_jax.data.split import Split
from mnv2_jax.nn.forms import Forms
from mnv2_jax.ops.augment import normalise
from mnv2_jax.tasks.base import Task, kind_of
from mnv2_jax.tasks.classification import make_task
from mnv2_jax.tasks.distillation import Distillation
from mnv2_jax.tasks.teacher import TEACHER_LOGITS, Teacher
from mnv2_jax.training import mesh as meshes
from mnv2_jax.training.experiment import Experiment, Setup, plan_experiment
from mnv2_jax.training.initial import resolve_weights
from mnv2_jax.training.plan import make_plan
from mnv2_jax.types import Array, Batch, PyTree
from mnv2_jax.weights.file import Preprocessing, Weights, WeightsInfo


def load(spec: str, overrides: Sequence[str]) -> Config:
    """Loads the config of a command line and sets `model.num_classes`, from the data set if its classes are known.

    Raises:
      UserError: if the config can't be used.
    """
    return with_classes(resolve_weights(config.load(spec, overrides))[0])


def with_classes(settings: Config) -> Config:
    """Returns the config with `model.num_classes` set."""
    classes = settings.model.num_classes or known_num_classes(settings.data)
    return dataclasses.replace(settings, model=dataclasses.replace(settings.model, num_classes=classes))


def without_data(settings: Config, devices: Sequence[Any] | None = None, forms: Forms | None = None) -> Experiment:
    """Builds a config's experiment on a data set of ImageNet's size whose images can't be read.

    Args:
      settings: config with `model.num_classes` set.
      devices: devices to run on or to compile for; None takes all devices of this machine.
      forms: forms of the layers; None takes the fastest for the devices, as training does.
    """

    def read(index: int) -> NoReturn:
        raise AssertionError(index)

    assert settings.model.num_classes is not None
    names = tuple(map(str, range(settings.model.num_classes)))
    labels = np.arange(IMAGENET_IMAGES, dtype=np.int32) % len(names)  # no class is empty, as class weights need it
    split = Split("train", labels, read, targets=dict.fromkeys(("mask", "boxes", "classes", "crowd"), read))
    dataset = Dataset(settings.data.name, names, train=split, eval=split)
    kind, mesh, distill = kind_of(settings), meshes.make_mesh(devices), settings.distill
    task: Task
    if distill.teacher is not None or distill.logits is not None:  # the teacher's logits are in the batch
        student = make_task(settings, names, [1] * len(names))
        task = Distillation(student=student, teacher=Teacher(), temperature=distill.temperature, weight=distill.weight)
    else:
        task = kind.make(settings, dataset, False)
    task = task.with_forms(forms or meshes.fastest_forms(mesh, settings.model.dtype))
    setup = Setup(config=settings, dataset=dataset, kind=kind, task=task, mesh=mesh)
    return plan_experiment(setup, make_plan(settings, IMAGENET_IMAGES, task.model.parts))


def abstract_batch(experiment: Experiment) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns shapes and dtypes of a batch (`types.Batch`).

    With `data.scales` it is the batch of `data.resolution`; batches of other sizes have as many pixels.
    """
    data, task = experiment.config.data, experiment.task
    view = task.train_view.at(data.resolution)
    batch = {
        name: jax.ShapeDtypeStruct((data.batch_size, *array.shape), array.dtype) for name, array in view.spec.items()
    }
    batch |= {name: jax.ShapeDtypeStruct((data.batch_size,), jnp.int32) for name in ("index", "epoch")}
    if isinstance(task, Distillation):
        batch[TEACHER_LOGITS] = jax.ShapeDtypeStruct((data.batch_size, task.model.num_classes), jnp.float32)
    return batch


def random_batch(experiment: Experiment, seed: int = 0) -> Batch:
    """Returns a batch of noise on the devices: pixels in 0..255, other integers in 0..num_classes - 1.

    Floats are boxes, two corners in 0..1 each, and booleans are False.
    """
    rng, spec = np.random.default_rng(seed), abstract_batch(experiment)
    classes = experiment.task.model.num_classes

    def drawn(name: str, array: jax.ShapeDtypeStruct) -> np.ndarray:
        if array.dtype.kind == "f":
            corners = rng.random((*array.shape[:-1], 2, 2), np.float32)
            return np.sort(corners, axis=-2).reshape(array.shape)
        if array.dtype.kind == "b":
            return np.zeros(array.shape, array.dtype)
        return rng.integers(0, 256 if name == "image" else classes, array.shape, array.dtype)

    arrays = {
        **{name: drawn(name, x) for name, x in spec.items() if name not in ("index", "epoch", TEACHER_LOGITS)},
        "index": np.arange(spec["index"].shape[0], dtype=np.int32),
        "epoch": np.zeros(spec["epoch"].shape, np.int32),
    }
    if TEACHER_LOGITS in spec:
        arrays[TEACHER_LOGITS] = rng.standard_normal(spec[TEACHER_LOGITS].shape, np.float32)
    return meshes.make_feed(experiment.mesh, None)(arrays)


def normalised(experiment: Experiment, batch: Batch) -> Array:
    """Returns the images of a batch, normalised as for inference."""
    data = experiment.config.data
    return normalise(batch["image"], data.mean, data.std)


def decoder(experiment: Experiment) -> Callable[[PyTree], PyTree]:
    """Returns the function from the network's outputs to the answers of the task (`tasks.base.Answers.decode`)."""
    info = WeightsInfo(task=experiment.config.task, preprocessing=Preprocessing.of(experiment.config.data))
    model: Any = experiment.task.model
    return experiment.kind.answers(Weights(model, {}, info), None).decode
