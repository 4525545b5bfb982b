"""A data set and its batches, for your own training loop: NumPy arrays in the order and with the crops of the trainer.

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

_STEP_OPTIONS = ("flip", "pad_pixels", "scales", "mean", "std")
"""Options of `DataConfig` that the trainer applies in the step, on the devices."""


@dataclasses.dataclass(frozen=True)
class Data:
    """A data set with the options by which its images are cropped and put into batches. `open_data` makes one."""

    dataset: Dataset
    config: DataConfig

    def __post_init__(self) -> None:
        if self.config.crop == "shift":
            raise UserError(
                "crop='shift' belongs to the step: set crop='none', and call mnv2_jax.ops.augment.random_shift there"
            )

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes, in the order of their labels."""
        return self.dataset.class_names

    @property
    def train(self) -> Split:
        """The images to train on; ``len(data.train)`` is their number."""
        return self.dataset.train

    @property
    def eval(self) -> Split:
        """The images to evaluate."""
        return self.dataset.eval

    def train_batches(self, seed: int = 0, start_step: int = 0) -> Batches:
        """Yields batches to train on, without end: every image once in each epoch, in a new order.

        Worker processes decode image files. They end with the program, or when the iterator's ``close()`` is called.

        Args:
          seed: the seed of the order and the crops. Batch k depends only on the seed and k.
          start_step: number of the first batch, to resume a training.

        Yields:
          image: uint8 [b, resolution, resolution, 3]; label: int32 [b]; index, int32 [b]: places in the split; epoch,
          int32 [b].

        Raises:
          UserError: if there are no images to train on, or naming an image that can't be read.
        """
        check_trainable(self.dataset)
        return streams.train_batches(self.config, TrainView(self.config), self.train, seed, start_step)

    def eval_batches(self) -> Batches:
        """Yields every image to evaluate once, in order.

        Yields:
          image, label and index as in training; mask, bool [b]: False for rows that only fill up the last batch, and
          with ``skip_corrupt`` for images that can't be decoded.

        Raises:
          UserError: naming an image that can't be read.
        """
        view, damaged = EvalView(self.config), dict[int, str]()
        batches = streams.eval_batches(self.config, view, self.eval)
        with contextlib.closing(streams.without_damaged(view, self.eval, batches, damaged)) as masked:
            for batch in masked:
                if damaged and not self.config.skip_corrupt:
                    raise streams.damage_error(self.eval, damaged)
                yield batch


def open_data(name: str, path: str | os.PathLike[str] | None = None, **options: Any) -> Data:
    """Opens a data set for your own training loop.

    Batches hold the cropped images, uint8. Normalise and flip them in the step: `normalise`, `ops.augment`.

    Args:
      name: digits, cifar10, imagenet, synthetic, folder, tfds:NAME, or a name given to `register_dataset`.
      path: the path of the data.
      **options: fields of `config.DataConfig`: resolution, batch_size, crop (random_resized or none), crop_area,
        eval_split, holdout_fraction, num_workers … ``mnv2 train --help data`` explains them.

    Raises:
      UserError: for data that don't exist, an unknown option, a value that isn't allowed, or an option that belongs to
        the step.
    """
    for key in _STEP_OPTIONS:
        if key in options:
            raise UserError(
                f"{key}={options[key]!r} belongs to the step, and batches hold cropped images only; leave it out and do"
                " it in the step"
            )
    location = {} if path is None else {"path": os.fspath(path)}
    data = config.build({"data": {"name": name, **location, **options}}).data
    return Data(open_dataset(data), data)
