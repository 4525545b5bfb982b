"""The evaluation of a file by that of its task, as if it were the network, and its comparison with the network."""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mnv2_jax.config import ModelConfig
from mnv2_jax.errors import UserError
from mnv2_jax.export.data import Data
from mnv2_jax.export.function import Exportable
from mnv2_jax.export.runtimes import RUNTIMES, STAND_INS, read_stablehlo
from mnv2_jax.tasks.base import Evaluation
from mnv2_jax.training.evaluate import make_evaluate
from mnv2_jax.training.experiment import Setup, open_setup
from mnv2_jax.types import Array, PyTree
from mnv2_jax.weights.file import Weights


class Comparison(NamedTuple):
    """Scores of the network and of a file on the same images."""

    score: str
    """Name of the score; higher is better."""
    network: float
    file: float
    low: float | None
    high: float | None
    """Ends of a 95 % interval of file - network, from the images on which they differ; None where the task has no
    answer for each image that is right or wrong."""
    images: int
    """Number of images; 0 if `low` and `high` are None."""


def open_evaluation(data: Data, weights: Weights, source: str) -> Setup:
    """Opens the evaluation of the weights on one device.

    Raises:
      UserError: if the classes of the data aren't those of the weights.
    """
    return open_setup(data.config, jax.devices()[:1], classes=(source, weights.info, weights.model.num_classes))


def evaluate_network(setup: Setup, weights: Weights) -> Evaluation:
    """Evaluates the network."""
    return make_evaluate(setup)(jax.device_put(weights.variables))


def evaluate_file(setup: Setup, exportable: Exportable, form: str, path: pathlib.Path) -> Evaluation:
    """Evaluates a file by the evaluation of the task, as if it were the network, whose outputs it must have."""
    task: Any = setup.task
    task = dataclasses.replace(task, model=_FileModel(exportable, _traceable(exportable, form, path)))
    return make_evaluate(dataclasses.replace(setup, task=task))({})


def _traceable(exportable: Exportable, form: str, path: pathlib.Path) -> Callable[[Array], dict[str, Array]]:
    """Returns the function of a file, for use in a program of JAX."""
    if form == "stablehlo":
        call: Callable[[Array], dict[str, Array]] = read_stablehlo(path).call
        return call
    if form in STAND_INS:
        raise UserError(f"--eval: {form} can't run on this machine; leave it out of --format")
    run = RUNTIMES[form](str(path), os.cpu_count() or 1)

    def outside(images: Array) -> dict[str, Array]:
        spec = jax.eval_shape(exportable.apply, exportable.variables, exportable.spec(len(images)))
        outputs: dict[str, Array] = jax.pure_callback(lambda x: dict(run(np.asarray(x))), spec, images)
        return outputs

    return outside


@dataclasses.dataclass(frozen=True)
class _FileModel:
    """Stands where a task has its network: gives the outputs of a file for the same images."""

    exportable: Exportable
    call: Callable[[Array], dict[str, Array]]

    @property
    def options(self) -> ModelConfig:
        """Options of the network."""
        return self.exportable.weights.model.options

    def apply(self, variables: PyTree, images: Array, train: bool = False) -> tuple[PyTree, PyTree]:
        """Computes the outputs for normalised images, float32 [b, h, w, 3], from the pixels that they were."""
        preprocessing = self.exportable.weights.info.preprocessing
        mean, std = (jnp.asarray(x, jnp.float32).reshape(1, 1, 1, -1) for x in (preprocessing.mean, preprocessing.std))
        pixels = jnp.round((images * std + mean) * 255).astype(jnp.uint8)
        outputs = self.call(pixels if self.exportable.pixels == "uint8" else pixels / jnp.float32(255))
        return self.exportable.restored(outputs), {}


def compare(setup: Setup, network: Evaluation, file: Evaluation) -> Comparison:
    """Compares two evaluations on the same images."""
    name = setup.task.score
    scores = float(network.scalars[name]), float(file.scalars[name])
    columns = network.predictions, file.predictions
    interval: tuple[float | None, float | None] = None, None
    count = 0
    if all({"label", "prediction"} <= set(each) for each in columns):
        right = [np.asarray(each["label"] == each["prediction"]) for each in columns]
        count = len(right[0])
        interval = paired_interval(int((right[1] & ~right[0]).sum()), int((right[0] & ~right[1]).sum()), count)
    return Comparison(name, *scores, *interval, count)


def paired_interval(gained: int, lost: int, count: int) -> tuple[float, float]:
    """Returns a 95 % interval of the difference of two shares that were measured on the same items.

    Wald's interval with half an item added to each of the four cells of the table, which holds its level for few items
    too (Agresti and Min, "Simple improved confidence intervals for comparing matched proportions", 2005).

    Args:
      gained: items that only the second got right.
      lost: items that only the first got right.
      count: all items.
    """
    total, up, down = count + 2, gained + 0.5, lost + 0.5
    difference = (up - down) / total
    spread = 1.96 * np.sqrt((up + down) / total - difference**2) / np.sqrt(total)
    return float(difference - spread), float(difference + spread)
