"""Registers the tasks of the package under the names that a config uses."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import numpy as np

from mnv2_jax.config import Config
from mnv2_jax.data.sources import Dataset
from mnv2_jax.errors import UserError, nearest
from mnv2_jax.models.registry import for_classes
from mnv2_jax.registry import TASKS, module_of
from mnv2_jax.report.sections import CLASSIFICATION, absent_classes
from mnv2_jax.tasks.answers import top_classes
from mnv2_jax.tasks.base import Kind, Task
from mnv2_jax.tasks.classes import arrange_weights, check_head, relabel
from mnv2_jax.tasks.classification import Classification, make_task
from mnv2_jax.tasks.distillation import Distillation
from mnv2_jax.tasks.teacher import open_teacher


def student_of(config: Config, dataset: Dataset, evaluates: bool) -> Classification:
    """Makes the classification of a config, without a teacher.

    Raises:
      UserError: if the data have only one class, or the config states another number of classes; see also `make_task`.
    """
    num_classes = len(dataset.class_names)
    if config.model.head != "classifier":
        raise UserError(
            f"model.head={config.model.head!r} gives a class to each pixel; set task=segmentation, or"
            " model.head=classifier"
        )
    if num_classes < 2:
        raise UserError(
            f"{dataset.name} has only one class ({dataset.class_names[0]!r}); a classification needs two or more"
        )
    if config.model.num_classes not in (None, num_classes):
        raise UserError(
            f"model.num_classes={config.model.num_classes}, but {dataset.name} has {num_classes} classes; leave it"
            " unset"
        )
    counts = None
    if config.loss.class_weights != "none" and not evaluates:  # labels that are stored with the pixels are slow to read
        counts = np.bincount(np.asarray(dataset.train.labels), minlength=num_classes).tolist()
    notes = tuple(filter(None, [_classes_without_images(dataset)]))
    return make_task(config, dataset.class_names, counts, dataset.scored, notes)


def _classes_without_images(dataset: Dataset) -> str:
    """Note on the classes without images to evaluate; "" if there are none, or only reading all files could tell."""
    labels, names = dataset.eval.labels, dataset.class_names
    if not isinstance(labels, np.ndarray):
        return ""
    return absent_classes(dataset.eval.name, names, np.bincount(labels, minlength=len(names)).tolist())


def _make(variant: Callable[..., Classification], config: Config, dataset: Dataset, evaluates: bool) -> Task:
    """Makes a classification, or a distillation if the config names a teacher and the task is trained."""
    plain, distill = student_of(config, dataset, evaluates), config.distill
    student = variant(**{field.name: getattr(plain, field.name) for field in dataclasses.fields(plain)})
    if evaluates or (distill.teacher is None and distill.logits is None):
        return student
    teacher = open_teacher(config, dataset)
    return Distillation(student=student, teacher=teacher, temperature=distill.temperature, weight=distill.weight)


def _kind(name: str, variant: Callable[..., Classification]) -> Kind:
    return Kind(
        name=name,
        model=for_classes,
        make=functools.partial(_make, variant),
        answers=top_classes,
        saved_as="classification",
        page=CLASSIFICATION,
        with_known_classes=relabel,
        check_head=check_head,
        arrange_weights=arrange_weights,
    )


def register_classification(name: str, variant: Callable[..., Classification]) -> None:
    """Registers a variant of classification, such as one with another loss, under a name for `config.Config.task`.

    A run of the variant imports the module that defines it again when it is opened. Its weights are saved as those of a
    classification, and can be used without that module.

    Args:
      name: name of the task.
      variant: a subclass of `Classification` that overrides methods, such as `Classification.label_loss`; or a
        `functools.partial` of a subclass that has fields of its own.

    Raises:
      UserError: if the name is already registered, the module can't be imported again, or the subclass overrides
        nothing.
    """
    if isinstance(variant, type) and variant is not Classification:
        classes = [each for each in variant.__mro__ if each not in Classification.__mro__]
        own = {key for each in classes for key in vars(each) if not key.startswith("__")}
        inherited = {*dir(Classification), *(field.name for field in dataclasses.fields(Classification))}
        if not own & inherited:
            names = sorted(key for key in own if not key.startswith("_"))
            public = {key for key in inherited if not key.startswith("_")}
            hint = nearest(names[0], public) if names else ""
            raise UserError(f"task={name!r}: {variant.__name__} overrides nothing of Classification{hint}")
    TASKS.add(name, _kind(name, variant), module_of(variant))


TASKS.add("classification", _kind("classification", Classification), __name__)
