"""Makes everything that training and evaluation need from a config, each thing once; compiles nothing yet."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from mnv2_jax.config import Config, check_devices, resolved
from mnv2_jax.data.policies import check_policy
from mnv2_jax.data.sources import Dataset, check_trainable, open_dataset
from mnv2_jax.errors import UserError
from mnv2_jax.nn.norm import SingleValueError
from mnv2_jax.processes import together
from mnv2_jax.tasks.base import Kind, Task, kind_of
from mnv2_jax.training import mesh as meshes
from mnv2_jax.training.finetune import head_of, make_optimizers
from mnv2_jax.training.optim import Optimizer
from mnv2_jax.training.plan import Plan, check_plan, make_plan
from mnv2_jax.training.schedules import make_schedule
from mnv2_jax.training.state import TrainState, init_state
from mnv2_jax.training.step import TrainStep, make_train_step
from mnv2_jax.weights.file import WeightsInfo


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setup:
    """Task, data and devices of an evaluation."""

    config: Config
    dataset: Dataset
    kind: Kind
    task: Task
    mesh: jax.sharding.Mesh


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experiment(Setup):
    """Everything that a training needs."""

    plan: Plan
    optimizers: tuple[Optimizer, ...]
    """One optimiser for each stage of the plan; schedules count epochs of this data set."""
    facts: Mapping[str, Any]
    """Facts found in the data, for dataset.json."""

    def train_step(self, stage: int) -> TrainStep:
        """The step of a stage. Pure."""
        task = self.task.training_from(self.plan.stages[stage].train_from)
        return make_train_step(task, self.optimizers[stage], self.config, meshes.spread_microbatches(self.mesh))

    def init_state(self) -> TrainState:
        """The state before the first step. Pure."""
        return init_state(
            self.task, self.optimizers[0], self.config.seed, use_ema=self.config.optim.ema_decay is not None
        )


def open_setup(
    config: Config,
    devices: Sequence[jax.Device] | None = None,
    *,
    evaluates: bool = True,
    classes: tuple[str, WeightsInfo, int] | None = None,
) -> Setup:
    """Opens the data and makes the task.

    Args:
      config: the experiment.
      devices: the devices to run on; all devices if unset.
      evaluates: whether the setup only evaluates. Evaluation weighs no classes and needs no training images.
      classes: of weights that are evaluated: the name by which errors call them, their `WeightsInfo`, and their number
        of classes. The data may have only some of these classes.

    Raises:
      UserError: if the data can't be opened, or the task, the model or the weights' classes don't fit the data.
    """
    if config.model.dtype == "float64" and not jax.config.read("jax_enable_x64"):
        raise UserError("model.dtype='float64' needs JAX_ENABLE_X64=1 in the environment")
    kind = kind_of(config)
    dataset = open_dataset(config.data, evaluates)
    # The run's config records the share that was held out of images without splits, so that every later command that
    # reads it holds out the same images.
    held_out = dataclasses.replace(config.data, holdout_fraction=dataset.holdout_fraction)
    config = dataclasses.replace(config, data=held_out)
    if classes is not None:
        weights_name, info, num_classes = classes
        try:
            dataset = kind.with_known_classes(dataset, info, num_classes)
        except UserError as error:
            raise UserError(f"{weights_name}: {error}") from error
    mesh = meshes.make_mesh(devices)
    task = kind.make(config, dataset, evaluates).with_forms(meshes.fastest_forms(mesh, config.model.dtype))
    return Setup(config=config, dataset=dataset, kind=kind, task=task, mesh=mesh)


def open_experiment(config: Config, devices: Sequence[jax.Device] | None = None) -> Experiment:
    """Opens the data and makes everything that a training needs.

    Args:
      config: the experiment.
      devices: the devices to run on; all devices if unset.

    Raises:
      UserError: if the data can't be opened, or if this config can't train on them with these devices: there are no
        training images, an augmentation doesn't exist, the devices don't divide the batch, the scales don't keep the
        number of pixels per batch level, a norm has one value per channel, the warm-up is longer than the training, or
        the teacher can't be opened or has other classes.
    """
    together.check_compiles()
    setup = open_setup(config, devices, evaluates=False)
    check_trainable(setup.dataset)
    check_policy(config.augment)
    check_devices(config, setup.mesh.size)
    plan = make_plan(config, len(setup.dataset.train), setup.task.model.parts)
    check_plan(plan, config)
    experiment = plan_experiment(setup, plan)
    _check_norms(experiment)
    return dataclasses.replace(experiment, facts=_facts(experiment))


def plan_experiment(setup: Setup, plan: Plan) -> Experiment:
    """Makes the experiment of a plan, with empty `Experiment.facts`."""
    optim, model = setup.config.optim, setup.task.model
    schedule = make_schedule(optim, setup.config.peak_lr, plan.steps_per_epoch, plan.total_steps)
    factor = setup.config.finetune.backbone_lr_factor
    optimizers = make_optimizers(optim, factor, schedule, plan.stages, model.parts, head_of(model))
    setup_fields = {field.name: getattr(setup, field.name) for field in dataclasses.fields(Setup)}
    return Experiment(**setup_fields, plan=plan, optimizers=optimizers, facts={})


def _facts(experiment: Experiment) -> dict[str, Any]:
    data, task = experiment.dataset, experiment.task
    splits = {"train": data.train, "eval": data.eval}
    teacher_arrays = jax.tree.leaves((task.frozen, dict(task.columns)))
    return {
        "name": data.name,
        "class_names": list(data.class_names),
        "num_train": len(data.train),
        "num_eval": len(data.eval),
        "eval_split": data.eval.name,
        # Digests of what the split knows about its images, as ``train.names: SHA-256``; a second per million images.
        "digest": {f"{name}.{kind}": sha for name, split in splits.items() for kind, sha in split.digest().items()},
        "steps": experiment.plan.total_steps,
        **({"teacher": _sha256(teacher_arrays)} if teacher_arrays else {}),
    }


def _sha256(arrays: Sequence[Any]) -> str:
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


_MAY_DIFFER_BETWEEN_PROCESSES = ("data.path", "data.image_root", "data.num_workers")


def config_facts(config: Config) -> dict[str, Any]:
    """Options that must be the same in all processes of a run."""
    return {k: v for k, v in resolved(config).items() if k not in _MAY_DIFFER_BETWEEN_PROCESSES}


def _check_norms(experiment: Experiment) -> None:
    """Refuses norms with one value per channel: their output is their bias, whatever the image is.

    Raises:
      UserError: naming the layer, if there is such a norm.
    """
    config = experiment.config
    if config.norm.group_size > 1:
        return
    for stage in experiment.plan.stages:
        task = experiment.task.training_from(stage.train_from)
        variables = jax.eval_shape(task.init, jax.random.key(0))
        for resolution, _ in experiment.plan.batch_shapes:
            size = config.data.size or (resolution, resolution)
            image = jax.ShapeDtypeStruct((1, *size, 3), np.float32)
            keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 1))
            try:
                jax.eval_shape(functools.partial(task.model.apply, train=True), variables, image, dropout_keys=keys)
            except SingleValueError as error:
                raise UserError(
                    f"norm.group_size=1 at {resolution} px leaves a norm with one value per channel, from which it"
                    f" can't learn ({error}); set norm.group_size to 2 or more, and data.batch_size to a multiple of it"
                ) from error
