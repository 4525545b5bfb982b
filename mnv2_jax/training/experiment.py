"""From a config to everything that training and evaluation need, each made once; nothing is compiled yet."""

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
from mnv2_jax.training.finetune import make_optimizers
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
    """Everything that a training is made of."""

    plan: Plan
    optimizers: tuple[Optimizer, ...]
    """One for each stage of the plan, by this data's epochs."""
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
      devices: to run on; all there are if unset.
      evaluates: whether it is for an evaluation only, which weighs no classes, and needs no images to train on.
      classes: what weights that are evaluated are called, what is said of their classes, and how many they are; the
        data may have some of them.

    Raises:
      UserError: if the data aren't there, or the task, the model or the weights' classes don't go with them.
    """
    if config.model.dtype == "float64" and not jax.config.read("jax_enable_x64"):
        raise UserError("model.dtype='float64' needs JAX_ENABLE_X64=1 in the environment")
    kind = kind_of(config)
    dataset = open_dataset(config.data, evaluates)
    # What is held out of images without splits stands in the run's config, so that others hold out the same.
    held_out = dataclasses.replace(config.data, holdout_fraction=dataset.holdout_fraction)
    config = dataclasses.replace(config, data=held_out)
    if classes is not None:
        whose, info, num_classes = classes
        try:
            dataset = kind.as_known(dataset, info, num_classes)
        except UserError as error:
            raise UserError(f"{whose}: {error}") from error
    mesh = meshes.make_mesh(devices)
    task = kind.make(config, dataset, evaluates).with_forms(meshes.fastest_forms(mesh, config.model.dtype))
    return Setup(config=config, dataset=dataset, kind=kind, task=task, mesh=mesh)


def open_experiment(config: Config, devices: Sequence[jax.Device] | None = None) -> Experiment:
    """Opens the data and makes all that a training needs.

    Args:
      config: the experiment.
      devices: to run on; all there are if unset.

    Raises:
      UserError: if the data aren't there, or can't be trained on with this config and on these devices: there is
        nothing to train on, an augmentation doesn't exist, the devices don't fit the batch, the scales don't keep its
        pixels level, a norm has one value a channel, the warm-up is longer than the training, or the teacher can't be
        had or is of other classes.
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
    """The experiment of a plan, without `Experiment.facts`."""
    optim, parts = setup.config.optim, setup.task.model.parts
    schedule = make_schedule(optim, setup.config.peak_lr, plan.steps_per_epoch, plan.total_steps)
    optimizers = make_optimizers(optim, setup.config.finetune.backbone_lr_factor, schedule, plan.stages, parts)
    parted = {field.name: getattr(setup, field.name) for field in dataclasses.fields(Setup)}
    return Experiment(**parted, plan=plan, optimizers=optimizers, facts={})


def _facts(experiment: Experiment) -> dict[str, Any]:
    data, task = experiment.dataset, experiment.task
    splits = {"train": data.train, "eval": data.eval}
    read = jax.tree.leaves((task.frozen, dict(task.columns)))
    return {
        "name": data.name,
        "class_names": list(data.class_names),
        "num_train": len(data.train),
        "num_eval": len(data.eval),
        "eval_split": data.eval.name,
        # Of what is known of the images, as ``train.names: SHA-256``; a second for a million of them.
        "digest": {f"{name}.{kind}": sha for name, split in splits.items() for kind, sha in split.digest().items()},
        "steps": experiment.plan.total_steps,
        **({"teacher": _sha256(read)} if read else {}),
    }


def _sha256(arrays: Sequence[Any]) -> str:
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


_MAY_DIFFER_BETWEEN_PROCESSES = ("data.path", "data.image_root", "data.num_workers")


def config_facts(config: Config) -> dict[str, Any]:
    """The options that all processes of a run must have alike."""
    return {k: v for k, v in resolved(config).items() if k not in _MAY_DIFFER_BETWEEN_PROCESSES}


def _check_norms(experiment: Experiment) -> None:
    """Refuses norms with one value a channel, which give their bias whatever the image is.

    Raises:
      UserError: naming the layer.
    """
    config = experiment.config
    if config.norm.group_size > 1:
        return
    for stage in experiment.plan.stages:
        task = experiment.task.training_from(stage.train_from)
        variables = jax.eval_shape(task.init, jax.random.key(0))
        for resolution, _ in experiment.plan.batch_shapes:
            image = jax.ShapeDtypeStruct((1, resolution, resolution, 3), np.float32)
            keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 1))
            try:
                jax.eval_shape(functools.partial(task.model.apply, train=True), variables, image, dropout_keys=keys)
            except SingleValueError as error:
                raise UserError(
                    f"norm.group_size=1 at {resolution} px leaves a norm one value a channel, of which nothing can be"
                    f" learnt ({error}); take norm.group_size=2 or more, and a data.batch_size that it divides"
                ) from error
