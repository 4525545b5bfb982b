"""From a config to everything that training and evaluation both need."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax

from mnv2_jax.config import Config, check_devices
from mnv2_jax.data import streams
from mnv2_jax.data.sources import Dataset, open_dataset
from mnv2_jax.data.split import Split
from mnv2_jax.errors import UserError
from mnv2_jax.models.counting import Summary, summarise
from mnv2_jax.models.weights import Weights
from mnv2_jax.tasks.classification import Classification, make_task
from mnv2_jax.training import mesh as meshes
from mnv2_jax.training.initial import relabel
from mnv2_jax.training.optim import Optimizer, make_optimizer
from mnv2_jax.training.signals import Stopped
from mnv2_jax.training.state import TrainState, init_state
from mnv2_jax.types import Batch

_MOST_STEPS = 2**31 - 1
"""What `TrainState.step` can count."""


def _never() -> bool:
    return False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experiment:
    """A config with its data opened and its parts made; nothing is compiled yet."""

    config: Config
    dataset: Dataset
    task: Classification
    mesh: jax.sharding.Mesh

    @property
    def steps_per_epoch(self) -> float:
        """Not rounded: batches cross the end of an epoch."""
        return len(self.dataset.train) / self.config.data.batch_size

    @property
    def total_steps(self) -> int:
        """`train.steps`, or what `train.epochs` comes to, at least 1."""
        train = self.config.train
        return train.steps or max(round(train.epochs * self.steps_per_epoch), 1)

    def evaluates_at(self, step: int) -> bool:
        """Whether an evaluation is due after so many steps: every `train.eval_every_epochs`, and at the end."""
        every = self.config.train.eval_every_epochs * self.steps_per_epoch
        due = every > 0 and step // every > (step - 1) // every
        return step > 0 and (due or step == self.total_steps)

    @property
    def optimizer(self) -> Optimizer:
        """By this data's epochs."""
        config = self.config
        return make_optimizer(config.optim, config.peak_lr, self.steps_per_epoch, self.total_steps)

    def init_state(self) -> TrainState:
        """The state before the first step. Pure."""
        return init_state(self.task, self.optimizer, self.config.seed, use_ema=self.config.optim.ema_decay is not None)

    def facts(self) -> dict[str, Any]:
        """What was found in the data, for `dataset.json`."""
        data = self.dataset
        return {
            "name": data.name,
            "class_names": list(data.class_names),
            "num_train": len(data.train),
            "num_eval": len(data.eval),
            "eval_split": data.eval.name,
            "steps": self.total_steps,
        }

    def model_summary(self) -> Summary:
        """Parameters and MAdds at the config's resolution."""
        return summarise(self.task.model, self.config.data.resolution)

    def train_batches(self, should_stop: Callable[[], bool] = _never) -> Callable[[int], Iterator[Batch]]:
        """A function from the number of steps done to the batches that follow, on the devices."""
        config, split = self.config, self.dataset.train
        resident, feed = self._feed(split, should_stop, training=True)
        return lambda step: map(
            feed,
            streams.train_batches(
                config.data,
                split,
                config.seed,
                step,
                process=_process(),
                resident=resident,
                augment=config.augment,
            ),
        )

    def eval_batches(self, should_stop: Callable[[], bool] = _never) -> Callable[[], Iterator[Batch]]:
        """A function that goes through the evaluation split once, each image in one row; others are masked."""
        data, split, devices = self.config.data, self.dataset.eval, self.mesh.size
        batch_size = -(-min(data.eval_batch_size, len(split)) // devices) * devices
        resident, feed = self._feed(split, should_stop, training=False)
        return lambda: map(feed, streams.eval_batches(data, split, batch_size, process=_process(), resident=resident))

    def _feed(
        self, split: Split, should_stop: Callable[[], bool], *, training: bool
    ) -> tuple[bool, Callable[[meshes.HostBatch], Batch]]:
        data = self.config.data
        if not streams.fits(data, split, training, self.config.augment):
            return False, meshes.make_feed(self.mesh, None)

        def poll() -> None:
            if should_stop():
                raise Stopped

        images, labels = streams.load_arrays(data, split, poll)
        return True, meshes.make_feed(self.mesh, {"image": images, "label": labels})


def open_experiment(
    config: Config,
    devices: Sequence[jax.Device] | None = None,
    *,
    classes_of: Weights | None = None,
) -> Experiment:
    """Opens the data; compiles nothing.

    Args:
      config: the experiment.
      devices: to run on; all there are if unset.
      classes_of: weights that are evaluated, on those of their classes that the data have.

    Raises:
      UserError: if the data aren't there, or the model doesn't go with them.
    """
    if config.model.dtype == "float64" and not jax.config.read("jax_enable_x64"):
        raise UserError("model.dtype='float64' needs JAX_ENABLE_X64=1 in the environment")
    dataset = open_dataset(config.data)
    if classes_of is not None:
        dataset = relabel(dataset, classes_of.info, classes_of.model.num_classes)
    found = len(dataset.class_names)
    if found < 2:
        raise UserError(f"{dataset.name} has one class ({dataset.class_names[0]!r}); classification takes two or more")
    if config.model.num_classes not in (None, found):
        raise UserError(
            f"model.num_classes={config.model.num_classes}, but {dataset.name} has {found} classes; leave it unset"
        )
    task = make_task(config, dataset.class_names)
    return Experiment(config=config, dataset=dataset, task=task, mesh=meshes.make_mesh(devices))


def check_training(experiment: Experiment) -> None:
    """Refuses what can't be trained, before anything is compiled.

    Raises:
      UserError: if the devices don't fit the batch, or the warm-up is longer than the training.
    """
    config, total = experiment.config, experiment.total_steps
    check_devices(config, experiment.mesh.size)
    if total > _MOST_STEPS:
        raise UserError(
            f"train.epochs={config.train.epochs:g} are {total} steps; {_MOST_STEPS} are the most, so lower it"
        )
    warmup_steps = round(config.optim.warmup_epochs * experiment.steps_per_epoch)
    if warmup_steps > total:
        raise UserError(
            f"optim.warmup_epochs={config.optim.warmup_epochs:g} is {warmup_steps} steps, longer than the training's"
            f" {total}; the most it can be: {total / experiment.steps_per_epoch:g}"
        )


def _process() -> tuple[int, int]:
    return jax.process_index(), jax.process_count()
