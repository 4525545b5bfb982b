"""The views of classification: an image and its label, cropped at random in training and as published in evaluation."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np

from mnv2_jax.config import AugmentConfig, DataConfig
from mnv2_jax.data.images import evaluation_view, random_resized_view
from mnv2_jax.data.policies import apply_policy
from mnv2_jax.data.split import Example
from mnv2_jax.data.views.base import Array, Draw

_PLAIN = AugmentConfig()


@dataclasses.dataclass(frozen=True)
class TrainView:
    """The `View` of training: image uint8 [resolution, resolution, 3] and label int32 []."""

    data: DataConfig
    augment: AugmentConfig = _PLAIN
    """The augmentation, whose `policy` is applied after the crop."""

    @property
    def varies(self) -> bool:
        """Whether crops or the policy's operations are random; random shifts and flips happen on the devices."""
        return self.data.crop == "random_resized" or self.augment.policy != "none"

    @property
    def spec(self) -> Mapping[str, Array]:
        """Shape and dtype of each array that an example gives, by name."""
        return _spec(self.data.resolution)

    def at(self, resolution: int) -> TrainView:
        """Returns the same view with images of another size."""
        return dataclasses.replace(self, data=dataclasses.replace(self.data, resolution=resolution))

    def __call__(self, example: Example, draw: Draw | None) -> Mapping[str, np.ndarray | int]:
        """Makes the row of an example; without a draw, with the deterministic crop and no policy."""
        data, image = self.data, example["image"]
        if data.crop == "random_resized" and draw is not None:
            view = random_resized_view(image, data, np.random.default_rng(draw))
        else:
            view = evaluation_view(image, data, data.resolution)
        if self.augment.policy != "none" and draw is not None:
            # The policy has its own generator, so that it doesn't change the crops.
            view = apply_policy(view, self.augment, np.random.default_rng((*draw, 1)), data.mean)
        return {"image": view, "label": example["label"]}


@dataclasses.dataclass(frozen=True)
class EvalView:
    """The `View` of evaluation: the deterministic crop at the resolution of evaluation, and the label."""

    data: DataConfig
    varies = False

    @property
    def spec(self) -> Mapping[str, Array]:
        """Shape and dtype of each array that an example gives, by name."""
        return _spec(self.data.seen_resolution)

    def at(self, resolution: int) -> EvalView:
        """Returns the same view with images of another size."""
        data = dataclasses.replace(self.data, resolution=resolution, eval_resolution=None)
        return dataclasses.replace(self, data=data)

    def __call__(self, example: Example, draw: Draw | None) -> Mapping[str, np.ndarray | int]:
        """Makes the row of an example; ignores the draw."""
        return {"image": evaluation_view(example["image"], self.data), "label": example["label"]}


def _spec(resolution: int) -> Mapping[str, Array]:
    return {"image": Array((resolution, resolution, 3), np.uint8), "label": Array((), np.int32)}
