"""Images for exported files: for calibration, for the check, and the evaluation of a file on a whole split."""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mnv2_jax import config as configs
from mnv2_jax.config import Config
from mnv2_jax.data.folder import find_images
from mnv2_jax.data.images import DamagedImageError
from mnv2_jax.data.sources import Dataset, check_trainable, open_dataset
from mnv2_jax.data.split import Split
from mnv2_jax.errors import UserError
from mnv2_jax.export.function import Exportable
from mnv2_jax.export.runtimes import RUNTIMES, STAND_INS, read_stablehlo
from mnv2_jax.flags import config_of_run
from mnv2_jax.tasks.base import Evaluation
from mnv2_jax.tasks.predictor import Predictor
from mnv2_jax.training.evaluate import make_evaluate
from mnv2_jax.training.experiment import Setup, open_setup
from mnv2_jax.types import Array, PyTree
from mnv2_jax.weights.file import Weights


class Data(NamedTuple):
    """Labelled images on which weights are calibrated and evaluated."""

    config: Config
    """A config with the network and the preprocessing of the weights."""
    dataset: Dataset


def open_data(
    source: str, weights: Weights, resolution: int, name: str | None, overrides: Sequence[str]
) -> Data | None:
    """Opens the data of a run, or those that a flag names; None if there are neither.

    Args:
      source: what is exported.
      weights: its weights.
      resolution: height and width that the network sees, in pixels.
      name: data as in a config's argument, such as ``folder:photos``; None: those of the run.
      overrides: changes of config keys, as ``data.eval_split=test``.

    Raises:
      UserError: if the data can't be opened.
    """
    path = pathlib.Path(source).expanduser()
    if name is None and not (path / "config.json").is_file():
        if overrides:
            raise UserError(f"--config.{overrides[0]}: {source} has no data of its own; give --data too")
        return None
    spec = config_of_run(path) if name is None else f"w1_0:data={name}"
    config, info = configs.load(spec, overrides).config, weights.info
    preprocessing = dataclasses.asdict(info.preprocessing) | {"resolution": resolution, "eval_resolution": None}
    set_by_flag = {override.partition("=")[0].removeprefix("data.") for override in overrides}
    kept = {key: value for key, value in preprocessing.items() if key not in set_by_flag}
    config = dataclasses.replace(
        config,
        model=weights.model.options,
        norm=weights.model.norm,
        task=info.task,
        data=dataclasses.replace(config.data, **kept),
    )
    dataset = open_dataset(config.data)
    # So that the evaluation holds out the same images, none of which calibration sees
    held_out = dataclasses.replace(config.data, holdout_fraction=dataset.holdout_fraction)
    return Data(dataclasses.replace(config, data=held_out), dataset)


def calibration_images(data: Data | None, predictor: Predictor, exportable: Exportable, count: int) -> np.ndarray:
    """Reads images of the training split, drawn with seed 0, as the network sees them in evaluation.

    Returns:
      The input of the function that is exported, [n, h, w, 3]; n is ``count`` or that of all training images.

    Raises:
      UserError: if there are no training images, or none can be decoded.
    """
    if data is None:
        raise UserError("--precision=int8 needs training images for calibration; give --data, as in folder:photos")
    check_trainable(data.dataset)
    train = data.dataset.train
    order = np.random.default_rng(0).permutation(len(train)).tolist()
    return exportable.to_input(_prepared(train, order, count, predictor, exportable.resolution))


def check_images(
    data: Data | None, predictor: Predictor, exportable: Exportable, paths: Sequence[str], most: int
) -> np.ndarray:
    """Reads the images on which a file is compared with the network; calibration doesn't use them.

    Args:
      data: the data, whose evaluation split is used if there are no paths.
      predictor: prepares the images.
      exportable: what is exported.
      paths: image files or folders. If there are neither data nor paths, crops of scikit-learn's two photos are used.
      most: the most images.

    Returns:
      The input of the function that is exported, [n, h, w, 3].
    """
    if paths:
        files: list[str] = []
        for path in paths:
            files += find_images(path)[0] if pathlib.Path(path).is_dir() else [path]
        if not files:
            raise UserError(f"--images={paths[0]}: no image that can be read in this folder")
        images: Any = [predictor.preprocess(file, exportable.resolution) for file in files[:most]]
    elif data is not None:
        split = data.dataset.eval
        order = np.random.default_rng(0).permutation(len(split)).tolist()
        images = _prepared(split, order, most, predictor, exportable.resolution)
    else:
        images = [predictor.preprocess(crop, exportable.resolution) for crop in _crops(most)]
    return exportable.to_input(np.stack(images))


def _prepared(split: Split, order: Sequence[int], count: int, predictor: Predictor, resolution: int) -> np.ndarray:
    """Returns the first images in an order that can be decoded, prepared: uint8 [n, resolution, resolution, 3]."""
    images: list[np.ndarray] = []
    for index in order:
        if len(images) == count:
            break
        try:
            images.append(predictor.preprocess(np.asarray(split.example(index)["image"]), resolution))
        except DamagedImageError:
            continue
    if not images:
        raise UserError(f"none of the {len(order):,} images of {split.name} can be decoded; mnv2 inspect lists them")
    return np.stack(images)


def _crops(most: int) -> list[np.ndarray]:
    from sklearn.datasets import load_sample_images

    rng, crops = np.random.default_rng(0), []
    for photo in load_sample_images().images:
        for _ in range(most // 4):
            side = int(rng.integers(100, min(photo.shape[:2])))
            top, left = (int(rng.integers(size - side + 1)) for size in photo.shape[:2])
            crops.append(photo[top : top + side, left : left + side])
    return crops


# --- evaluation ---------------------------------------------------------------------------------------------


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


def evaluation_setup(data: Data, weights: Weights, source: str) -> Setup:
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

    def apply(self, variables: PyTree, images: Array, train: bool = False) -> tuple[PyTree, PyTree]:
        """Computes the outputs for normalised images, float32 [b, h, w, 3], from the pixels that they were."""
        preprocessing = self.exportable.weights.info.preprocessing
        mean, std = (jnp.asarray(x, jnp.float32).reshape(1, 1, 1, -1) for x in (preprocessing.mean, preprocessing.std))
        pixels = jnp.round((images * std + mean) * 255).astype(jnp.uint8)
        outputs = self.call(pixels if self.exportable.pixels == "uint8" else pixels / jnp.float32(255))
        return (outputs["logits"] if set(outputs) == {"logits"} else outputs), {}


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
