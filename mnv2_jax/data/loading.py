"""A data set and the batches of it, for a loop of one's own: NumPy arrays, in the order and the crops of the trainer.

data = open_data("folder", "photos", resolution=128, batch_size=64)
for batch in data.train_batches(seed=0): ...
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from typing import Any

from mnv2_jax import config
from mnv2_jax.config import DataConfig
from mnv2_jax.data import streams
from mnv2_jax.data.sources import Dataset, check_trainable, open_dataset
from mnv2_jax.data.split import Split
from mnv2_jax.data.views.classification import EvalView, TrainView
from mnv2_jax.data.workers import Batches
from mnv2_jax.errors import UserError

_OF_THE_STEP = ("flip", "pad_pixels", "scales", "mean", "std")
"""Options of `DataConfig` that the trainer follows on the devices."""


@dataclasses.dataclass(frozen=True)
class Data:
    """A data set, and how its images are cropped and put into batches. `open_data` makes one by name."""

    dataset: Dataset
    config: DataConfig

    def __post_init__(self) -> None:
        if self.config.crop == "shift":
            raise UserError("crop='shift' is done in the step, by mnv2_jax.ops.augment.random_shift; take crop='none'")

    @property
    def class_names(self) -> tuple[str, ...]:
        """In the order of the labels."""
        return self.dataset.class_names

    @property
    def train(self) -> Split:
        """The images to train on; ``len(data.train)`` is how many."""
        return self.dataset.train

    @property
    def eval(self) -> Split:
        """The images to evaluate on."""
        return self.dataset.eval

    def train_batches(self, seed: int = 0, start_step: int = 0) -> Batches:
        """The batches of training, without end; every image once an epoch, in a new order each.

        Worker processes decode image files. They end with the program, or by ``close()``.

        Args:
          seed: of the order and the crops. Batch k follows from it and k alone.
          start_step: number of the first batch, to go on with a training.

        Yields:
          image: uint8 [b, resolution, resolution, 3]; label: int32 [b]; index, int32 [b]: places in the split; epoch,
          int32 [b].

        Raises:
          UserError: if there is nothing to train on; naming an image that can't be read.
        """
        check_trainable(self.dataset)
        return streams.train_batches(self.config, TrainView(self.config), self.train, seed, start_step)

    def eval_batches(self) -> Batches:
        """Every image to evaluate on, once and in order.

        Yields:
          image, label and index as in training; mask, bool [b]: False for rows that only fill the last batch up, and
          with ``skip_corrupt`` for images that can't be decoded.

        Raises:
          UserError: naming an image that can't be read.
        """
        view, damaged = EvalView(self.config), dict[int, str]()
        batches = streams.eval_batches(self.config, view, self.eval)
        with contextlib.closing(streams.without_damaged(view, self.eval, batches, damaged)) as sound:
            for batch in sound:
                if damaged and not self.config.skip_corrupt:
                    raise streams.damage(self.eval, damaged)
                yield batch


def open_data(name: str, path: str | os.PathLike[str] | None = None, **options: Any) -> Data:
    """Opens a data set for a loop of one's own.

    Batches have images as they are cropped, uint8. Normalising and mirroring them belongs into the step: `normalise`,
    `ops.augment`.

    Args:
      name: digits, cifar10, imagenet, synthetic, folder, tfds:NAME, or one of `register_dataset`.
      path: where it lies.
      **options: fields of `config.DataConfig`: resolution, batch_size, crop (random_resized or none), crop_area,
        eval_split, holdout_fraction, num_workers … ``mnv2 train --help data`` says what they mean.

    Raises:
      UserError: for data that aren't there, an unknown option, a value that can't be, or an option that belongs into
        the step.
    """
    for key in _OF_THE_STEP:
        if key in options:
            raise UserError(f"{key}={options[key]!r}: batches have images as they are cropped; do that in the step")
    where = {} if path is None else {"path": os.fspath(path)}
    data = config.build({"data": {"name": name, **where, **options}}).data
    return Data(open_dataset(data), data)
