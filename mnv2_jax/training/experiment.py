"""From a config to everything that training and evaluation both need."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from mnv2_jax.config import Config, DataConfig, batch_shapes, check_devices, flatten, to_dict
from mnv2_jax.data import streams
from mnv2_jax.data.policies import check_policy
from mnv2_jax.data.shared import NumpyBatch
from mnv2_jax.data.sources import Dataset, check_trainable, open_dataset
from mnv2_jax.data.split import Split
from mnv2_jax.errors import UserError
from mnv2_jax.models.counting import Summary, summarise
from mnv2_jax.models.registry import variable_shapes
from mnv2_jax.nn.norm import SingleValueError
from mnv2_jax.ops.augment import normalise
from mnv2_jax.processes import together
from mnv2_jax.processes.supervisor import Stopped
from mnv2_jax.tasks.classification import Classification, make_task
from mnv2_jax.tasks.distillation import Distillation, with_teacher
from mnv2_jax.training import mesh as meshes
from mnv2_jax.training.finetune import Stage, make_optimizers, make_stages
from mnv2_jax.training.initial import relabel
from mnv2_jax.training.optim import Optimizer
from mnv2_jax.training.schedules import make_schedule
from mnv2_jax.training.state import TrainState, init_state
from mnv2_jax.training.step import TrainStep, make_train_step
from mnv2_jax.training.teacher import Teacher, open_teacher
from mnv2_jax.types import Batch
from mnv2_jax.weights.file import Weights, WeightsInfo
from mnv2_jax.weights.unfold import unfold

_MOST_STEPS = 2**31 - 1
"""What `TrainState.step` can count."""

_UNFOLDING_BATCH, _UNFOLDING_BATCHES = 64, 8
"""So many images are enough for statistics of a channel."""


def _never() -> bool:
    return False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experiment:
    """A config with its data opened and its parts made; nothing is compiled yet."""

    config: Config
    dataset: Dataset
    task: Classification | Distillation
    mesh: jax.sharding.Mesh

    @functools.cached_property
    def batch_shapes(self) -> tuple[tuple[int, int], ...]:
        """(resolution, images) of the training batches, each once in as many steps; each is compiled by itself."""
        return batch_shapes(self.config)

    @property
    def steps_per_epoch(self) -> float:
        """Not rounded: batches cross the end of an epoch. Of several sizes the mean counts."""
        sizes = [images for _, images in self.batch_shapes]
        return len(self.dataset.train) / (sum(sizes) / len(sizes))

    @property
    def total_steps(self) -> int:
        """`train.steps`, or what `train.epochs` comes to, at least 1."""
        train = self.config.train
        return train.steps or max(round(train.epochs * self.steps_per_epoch), 1)

    def is_over(self, step: int, top1_of: Mapping[int, float]) -> bool:
        """Whether no step follows this one: it is the last, or `train.patience` evaluations have not bettered the best.

        Args:
          step: steps taken.
          top1_of: of the evaluations so far, by their steps.
        """
        patience = self.config.train.patience
        stalled = patience is not None and sum(other > best_of(top1_of)[0] for other in top1_of) >= patience
        return step == self.total_steps or stalled

    def evaluates_at(self, step: int) -> bool:
        """Whether an evaluation is due after so many steps: every `train.eval_every_epochs`, and at the end."""
        every = self.config.train.eval_every_epochs * self.steps_per_epoch
        due = every > 0 and step // every > (step - 1) // every
        return step > 0 and (due or step == self.total_steps)

    @property
    def stages(self) -> tuple[Stage, ...]:
        """What is trained from which step on."""
        return make_stages(self.config.finetune, self.steps_per_epoch, self.task.model.parts)

    @property
    def optimizers(self) -> tuple[Optimizer, ...]:
        """One for each stage, by this data's epochs."""
        config = self.config
        schedule = make_schedule(config.optim, config.peak_lr, self.steps_per_epoch, self.total_steps)
        factor, parts = config.finetune.backbone_lr_factor, self.task.model.parts
        return make_optimizers(config.optim, factor, schedule, self.stages, parts)

    def train_step(self, stage: int) -> TrainStep:
        """The step of a stage. Pure."""
        task = self.task.training_from(self.stages[stage].train_from)
        return make_train_step(task, self.optimizers[stage], self.config, meshes.spread_microbatches(self.mesh))

    def init_state(self) -> TrainState:
        """The state before the first step. Pure."""
        return init_state(
            self.task, self.optimizers[0], self.config.seed, use_ema=self.config.optim.ema_decay is not None
        )

    def unfolded(self, weights: Weights) -> Weights:
        """The same weights, but norms that were folded have statistics, those of some training images."""
        # Whole views in the order of training, which skips what is to be skipped.
        data = dataclasses.replace(self._training_view, crop="none", batch_size=_UNFOLDING_BATCH)
        zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), variable_shapes(weights.model))
        # No norm comes behind a part that weights may lack.
        variables = {name: {**zeros[name], **branch} for name, branch in weights.variables.items()}
        measure = jax.jit(lambda x: weights.model.norm_inputs(variables, normalise(x, data.mean, data.std)))
        with contextlib.closing(streams.train_batches(data, self.dataset.train, self.config.seed)) as batches:
            inputs = [
                jax.device_get(measure(batch["image"])) for batch in itertools.islice(batches, _UNFOLDING_BATCHES)
            ]
        mean = jax.tree.map(lambda *means: np.mean(means, axis=0), *inputs)
        return weights._replace(variables=unfold(weights.model, weights.variables, mean))

    def facts(self) -> dict[str, Any]:
        """What was found in the data, for `dataset.json`."""
        data = self.dataset
        return {
            "name": data.name,
            "class_names": list(data.class_names),
            "num_train": len(data.train),
            "num_eval": len(data.eval),
            "eval_split": data.eval.name,
            "digest": self._digest,
            "steps": self.total_steps,
            **({"teacher": self.teacher.digest} if self.teacher.digest else {}),
        }

    @functools.cached_property
    def _digest(self) -> dict[str, str]:
        """Of what is known of the images, as ``train.names: SHA-256``; a second for a million of them."""
        splits = {"train": self.dataset.train, "eval": self.dataset.eval}
        return {f"{name}.{kind}": sha for name, split in splits.items() for kind, sha in split.digest().items()}

    def model_summary(self) -> Summary:
        """Parameters and MAdds at the resolution of evaluation."""
        return summarise(self.task.model, self.config.data.seen_resolution)

    @functools.cached_property
    def teacher(self) -> Teacher:
        """What ``distill`` asks for. Only training opens it: an evaluation needs neither its weights nor its logits."""
        return open_teacher(self.config, self.dataset, self.task, self.mesh)

    def train_batches(
        self,
        should_stop: Callable[[], bool] = _never,
        report: Callable[[int, int, Mapping[int, str]], None] = lambda step, count, lines: None,
    ) -> Callable[[int], Iterator[Batch]]:
        """A function from the number of steps done to the batches that follow, on the devices.

        Args:
          should_stop: asked every few images as long as a split is loaded.
          report: with `data.skip_corrupt` called for each batch for which images were skipped: with the number of its
            step, counted from 1, how many they were, and a line for each of them by its index.
        """
        config, split, teacher = self.config, self.dataset.train, self.teacher
        resident, feed = self._feed(split, should_stop, training=True)

        def without_skipped(step: int, batch: NumpyBatch) -> NumpyBatch:
            if "skipped" not in batch:
                return batch
            if count := int(batch["skipped"].sum()):
                report(step + 1, count, streams.skipped_images(split, batch))
            return {name: array for name, array in batch.items() if name != "skipped"}

        def following(step: int) -> Iterator[Batch]:
            on_host = streams.train_batches(
                config.data,
                split,
                config.seed,
                step,
                process=_process(),
                resident=resident,
                augment=config.augment,
                shapes=self.batch_shapes,
                group_size=config.norm.group_size,
            )
            on_device = map(feed, map(teacher.on_host, itertools.starmap(without_skipped, enumerate(on_host, step))))
            return itertools.starmap(teacher.on_device, enumerate(on_device, step))

        return following

    def eval_batches(self, should_stop: Callable[[], bool] = _never) -> Callable[[dict[int, str]], Iterator[Batch]]:
        """A function that goes through the evaluation split once, each image in one row; others are masked.

        So are images that can't be decoded: the dict that it is given takes a line for each that this process has met,
        by its index.
        """
        data, split, devices = self.config.data, self.dataset.eval, self.mesh.size
        batch_size = -(-min(data.eval_batch_size, len(split)) // devices) * devices
        black: dict[int, str] = {}
        resident, feed = self._feed(split, should_stop, training=False, damaged=black)

        def through(damaged: dict[int, str]) -> Iterator[Batch]:
            damaged |= black
            batches = streams.eval_batches(data, split, batch_size, process=_process(), resident=resident)
            for batch in streams.without_damaged(data, split, batches, damaged):
                is_black = np.isin(batch["index"], np.array([*black], np.int32))
                yield feed({**batch, "mask": batch["mask"] & ~is_black})

        return through

    @property
    def _training_view(self) -> DataConfig:
        """For the images that training has one view of."""
        return dataclasses.replace(self.config.data, eval_resolution=None)

    def _feed(
        self,
        split: Split,
        should_stop: Callable[[], bool],
        *,
        training: bool,
        damaged: dict[int, str] | None = None,
    ) -> tuple[bool, Callable[[meshes.HostBatch], Batch]]:
        data = self.config.data
        if not streams.fits(data, split, training, self.config.augment):
            return False, meshes.make_feed(self.mesh, None)

        def poll() -> None:
            if should_stop():
                raise Stopped

        images, labels = streams.load_arrays(self._training_view if training else data, split, poll, damaged)
        return True, meshes.make_feed(self.mesh, {"image": images, "label": labels})


_MAY_DIFFER_BETWEEN_PROCESSES = ("data.path", "data.num_workers")


def config_facts(config: Config) -> dict[str, Any]:
    """The options that all processes of a run must have alike."""
    return {k: v for k, v in flatten(to_dict(config)).items() if k not in _MAY_DIFFER_BETWEEN_PROCESSES}


def best_of(top1_of: Mapping[int, float]) -> tuple[int, float]:
    """Step and top-1 of the best evaluation, the first where several are; (0, 0) where there is none."""
    return max(top1_of.items(), key=lambda item: (item[1], -item[0]), default=(0, 0.0))


def open_experiment(
    config: Config,
    devices: Sequence[jax.Device] | None = None,
    *,
    evaluates: bool = False,
    classes: tuple[str, WeightsInfo, int] | None = None,
) -> Experiment:
    """Opens the data; compiles nothing.

    Args:
      config: the experiment.
      devices: to run on; all there are if unset.
      evaluates: whether it is opened for an evaluation only, which weighs no classes, and needs no images to train on.
      classes: what weights that are evaluated are called, what is said of their classes, and how many they are; the
        data may have some of them.

    Raises:
      UserError: if the data aren't there, or the model doesn't go with them.
    """
    if config.model.dtype == "float64" and not jax.config.read("jax_enable_x64"):
        raise UserError("model.dtype='float64' needs JAX_ENABLE_X64=1 in the environment")
    dataset = open_dataset(config.data, evaluates)
    if classes is not None:
        whose, info, num_classes = classes
        try:
            dataset = relabel(dataset, info, num_classes)
        except UserError as error:
            raise UserError(f"{whose}: {error}") from error
    found = len(dataset.class_names)
    if found < 2:
        raise UserError(f"{dataset.name} has one class ({dataset.class_names[0]!r}); classification takes two or more")
    if config.model.num_classes not in (None, found):
        raise UserError(
            f"model.num_classes={config.model.num_classes}, but {dataset.name} has {found} classes; leave it unset"
        )
    counts = None
    if config.loss.class_weights == "balanced" and not evaluates:  # labels that lie beside pixels take long to read
        counts = np.bincount(np.asarray(dataset.train.labels), minlength=found).tolist()
    mesh = meshes.make_mesh(devices)
    student = make_task(config, dataset.class_names, counts, dataset.scored)
    student = student.with_forms(meshes.fastest_forms(mesh, config.model.dtype))
    return Experiment(config=config, dataset=dataset, task=with_teacher(student, config.distill), mesh=mesh)


def check_training(experiment: Experiment) -> None:
    """Refuses what can't be trained, before anything is compiled.

    Raises:
      UserError: if there is nothing to train on, an augmentation doesn't exist, the devices don't fit the batch, the
        scales don't keep its pixels level, a norm has one value a channel, the warm-up is longer than the training, or
        the teacher can't be had or is of other classes.
    """
    together.check_compiles()
    check_trainable(experiment.dataset)
    check_policy(experiment.config.augment)
    config, total = experiment.config, experiment.total_steps
    check_devices(config, experiment.mesh.size)
    _check_norms(experiment)
    if experiment.stages[-1].first_step >= total:
        raise UserError(
            f"finetune.unfreeze_epochs={list(config.finetune.unfreeze_epochs)}: the last stage begins at step"
            f" {experiment.stages[-1].first_step}, and the training ends at {total}; begin it earlier"
        )
    if total > _MOST_STEPS:
        raise UserError(
            f"train.epochs={config.train.epochs:g} are {total} steps; {_MOST_STEPS} are the most, so lower it"
        )
    if (config.optim.warmup_steps or 0) > total:
        raise UserError(
            f"optim.warmup_steps={config.optim.warmup_steps} is longer than the training's {total} steps;"
            f" the most it can be: {total}"
        )
    warmup_steps = round(config.optim.warmup_epochs * experiment.steps_per_epoch)
    if config.optim.warmup_steps is None and warmup_steps > total:
        raise UserError(
            f"optim.warmup_epochs={config.optim.warmup_epochs:g} is {warmup_steps} steps, longer than the training's"
            f" {total}; the most it can be: {total / experiment.steps_per_epoch:g}"
        )
    _ = experiment.teacher  # opened here, it is refused before a run's folder is made


def _check_norms(experiment: Experiment) -> None:
    """Refuses norms with one value a channel, which give their bias whatever the image is.

    Raises:
      UserError: naming the layer.
    """
    config = experiment.config
    if config.norm.group_size > 1:
        return
    for stage in experiment.stages:
        task = experiment.task.training_from(stage.train_from)
        variables = jax.eval_shape(task.init, jax.random.key(0))
        for resolution, _ in experiment.batch_shapes:
            image = jax.ShapeDtypeStruct((1, resolution, resolution, 3), np.float32)
            keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 1))
            try:
                jax.eval_shape(functools.partial(task.model.apply, train=True), variables, image, dropout_keys=keys)
            except SingleValueError as error:
                raise UserError(
                    f"norm.group_size=1 at {resolution} px leaves a norm one value a channel, of which nothing can be"
                    f" learnt ({error}); take norm.group_size=2 or more, and a data.batch_size that it divides"
                ) from error


def _process() -> tuple[int, int]:
    return jax.process_index(), jax.process_count()
