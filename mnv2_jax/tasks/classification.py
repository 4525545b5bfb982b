"""Image classification: preprocessing on the device, smoothed cross-entropy, top-1/top-5/ECE/confusion."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from mnv2_jax.config import AugmentConfig, Config, DataConfig
from mnv2_jax.models.registry import Model, from_config
from mnv2_jax.ops import augment, losses, metrics
from mnv2_jax.ops.random import example_keys, stream_key
from mnv2_jax.types import Array, Batch, Key, PyTree, Variables


@dataclasses.dataclass(frozen=True, kw_only=True)
class Classification:
    """A `tasks.base.Task`."""

    model: Model
    data: DataConfig
    augment: AugmentConfig
    class_names: tuple[str, ...]
    label_smoothing: float
    seed: int
    """Of augmentation, which follows from (seed, epoch, index) alone."""

    def init(self, key: Key) -> Variables:
        """Fresh variables for images of the config's resolution."""
        size = self.data.resolution
        return self.model.init(key, jnp.zeros((1, size, size, 3)))

    def loss(
        self, params: PyTree, model_state: PyTree, batch: Batch, key: Key
    ) -> tuple[Array, tuple[PyTree, dict[str, Array]]]:
        """Mean smoothed cross-entropy of the augmented images; metrics: loss, top1."""
        images = self._augmented(batch)
        dropout_keys = example_keys(key, batch["epoch"], batch["index"])
        logits, new_state = self.model.apply(
            {"params": params, **model_state}, images, train=True, dropout_keys=dropout_keys
        )
        # A training batch is whole, it needs no mask: a count summed over the devices would be one more all-reduce.
        each = losses.softmax_cross_entropy(logits, batch["label"], self.label_smoothing)
        right = (logits.argmax(axis=-1) == batch["label"]).astype(each.dtype)
        return each.mean(), (new_state, {"loss": each.mean(), "top1": right.mean()})

    def metrics(self, variables: Variables, batch: Batch) -> PyTree:
        """`ops.metrics.classification_sums` of the unaugmented images, without label smoothing."""
        logits, _ = self.model.apply(variables, self._normalised(batch["image"]), train=False)
        each = losses.softmax_cross_entropy(logits, batch["label"])
        return metrics.classification_sums(logits, batch["label"], each, batch["mask"])

    def summarise(self, sums: PyTree) -> Mapping[str, Any]:
        """`ops.metrics.summarise_classification` with this task's class names."""
        return metrics.summarise_classification(sums, self.class_names)

    def _normalised(self, images: Array) -> Array:
        return augment.normalise(images, self.data.mean, self.data.std)

    def _augmented(self, batch: Batch) -> Array:
        data, images = self.data, batch["image"]
        keys = example_keys(stream_key(self.seed, "augment"), batch["epoch"], batch["index"])
        shift, flip, color = (jax.vmap(jax.random.fold_in, (0, None))(keys, i) for i in range(3))
        if data.crop == "shift":
            images = augment.random_shift(shift, images, data.pad_pixels)
        if data.flip:
            images = augment.random_flip(flip, images)
        if self.augment.color == "inception":
            images = augment.inception_color(color, augment.as_float(images))
        return self._normalised(images)


def make_task(config: Config, class_names: tuple[str, ...]) -> Classification:
    """The task of a config, its head sized by the classes of the data."""
    model = from_config(dataclasses.replace(config.model, num_classes=len(class_names)), config.norm)
    return Classification(
        model=model,
        data=config.data,
        augment=config.augment,
        class_names=class_names,
        label_smoothing=config.loss.label_smoothing,
        seed=config.seed,
    )
