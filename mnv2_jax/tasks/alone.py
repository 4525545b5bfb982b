"""What tasks have in common that train one network on its own: no teacher, no further arrays for each image."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Self

import jax
import numpy as np

from mnv2_jax.config import AugmentConfig, DataConfig
from mnv2_jax.models.registry import Model
from mnv2_jax.nn.forms import Forms
from mnv2_jax.ops import augment
from mnv2_jax.ops.random import example_keys, stream_key
from mnv2_jax.types import Array, Batch, Key, PyTree

COLOR = 2
"""Number that is folded into an image's random key for its colours."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Alone:
    """The part of a `tasks.base.Task` that is the same for every network on its own."""

    model: Model
    data: DataConfig
    augment: AugmentConfig
    class_names: tuple[str, ...]
    seed: int
    """Seed of augmentation, which depends on (seed, epoch, index) only."""
    notes: tuple[str, ...] = ()
    """Notes to print before a training."""

    @property
    def columns(self) -> Mapping[str, np.ndarray]:
        """Empty: the task needs no further arrays per image."""
        return {}

    @property
    def frozen(self) -> PyTree:
        """Empty: the task has no frozen arrays."""
        return {}

    def training_from(self, part: str) -> Self:
        """Returns the same task, in which only this part of the network and the parts after it are trained."""
        return dataclasses.replace(self, model=self.model.training_from(part))

    def with_forms(self, forms: Forms) -> Self:
        """Returns the same task, in which the network computes its convolutions by these `nn.forms`."""
        return dataclasses.replace(self, model=self.model.with_forms(forms))

    def _normalised(self, images: Array) -> Array:
        return augment.normalise(images, self.data.mean, self.data.std)

    def _coloured_batch(self, batch: Batch) -> Array:
        """Changes the colours of a batch's training images, and normalises them."""
        base = example_keys(stream_key(self.seed, "augment"), batch["epoch"], batch["index"])

        def keys() -> Key:
            return jax.vmap(jax.random.fold_in, (0, None))(base, COLOR)

        return self._normalised(self._coloured(keys, batch["image"]))

    def _coloured(self, keys: Callable[[], Key], images: Array) -> Array:
        """Changes the colours of training images [b, h, w, 3], as `config.AugmentConfig.color` says.

        ``keys`` makes the keys [b], if they are needed.
        """
        if self.augment.color == "inception":
            return augment.inception_color(keys(), augment.as_float(images))
        if self.augment.color == "jitter":
            return augment.color_jitter(keys(), augment.as_float(images), self.augment.color_jitter)
        return images
