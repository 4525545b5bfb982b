"""Images for exported files: for calibration, and for the check."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from mnv2_jax import config as configs
from mnv2_jax.config import Config
from mnv2_jax.data.folder import find_images
from mnv2_jax.data.images import DamagedImageError
from mnv2_jax.data.sources import Dataset, check_trainable, open_dataset
from mnv2_jax.data.split import Split
from mnv2_jax.errors import UserError
from mnv2_jax.export.function import Exportable
from mnv2_jax.flags import config_of_run
from mnv2_jax.weights.file import Weights


class Data(NamedTuple):
    """Labelled images on which weights are calibrated and evaluated."""

    config: Config
    """A config with the network and the preprocessing of the weights."""
    dataset: Dataset


def open_data(
    source: str, weights: Weights, name: str | None, overrides: Sequence[str], calibrates: bool
) -> Data | None:
    """Opens the data of a run, or those that a flag names; None if there are neither.

    Args:
      source: what is exported.
      weights: its weights, for images of one size.
      name: data as in a config's argument, such as ``folder:photos``; None: those of the run.
      overrides: changes of config keys, as ``data.eval_split=test``.
      calibrates: whether training images are used for calibration. Data without splits are divided then; otherwise
        all their images are evaluated, if a file is exported.

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
    preprocessing = dataclasses.asdict(info.preprocessing) | {"eval_resolution": None}
    for override in overrides:
        if override.partition("=")[0].removeprefix("data.") in preprocessing:
            raise UserError(f"--config.{override}: a file has the preprocessing of its weights; leave it out")
    config = dataclasses.replace(
        config,
        model=weights.model.options,
        norm=weights.model.norm,
        task=info.task,
        data=dataclasses.replace(config.data, **preprocessing),
    )
    dataset = open_dataset(config.data, evaluates=not calibrates)
    # So that the evaluation holds out the same images, none of which calibration sees
    held_out = dataclasses.replace(config.data, holdout_fraction=dataset.holdout_fraction)
    return Data(dataclasses.replace(config, data=held_out), dataset)


def calibration_images(data: Data | None, exportable: Exportable, wanted: int | pathlib.Path) -> np.ndarray:
    """Reads images for calibration, as the network sees them in evaluation.

    Args:
      data: the data, of which training images are drawn with seed 0.
      exportable: what is exported.
      wanted: number of training images; all if there are fewer. Or a folder whose images are taken instead.

    Returns:
      The input of the function that is exported, [n, h, w, 3].

    Raises:
      UserError: if there are no training images, or none can be decoded.
    """
    if isinstance(wanted, pathlib.Path):
        images = _of_folder(wanted, exportable, "--calibration")
        return exportable.to_input(np.random.default_rng(0).permutation(images))  # files lie in the order of classes
    if data is None:
        raise UserError(
            "--precision=int8 needs images for calibration; give --data, as in folder:photos, or --calibration=FOLDER"
        )
    check_trainable(data.dataset)
    train = data.dataset.train
    order = np.random.default_rng(0).permutation(len(train)).tolist()
    return exportable.to_input(_prepared(train, order, wanted, exportable))


def check_images(data: Data | None, exportable: Exportable, paths: Sequence[str], most: int) -> np.ndarray:
    """Reads the images on which a file is compared with the network; calibration doesn't use them.

    Args:
      data: the data, whose evaluation split is used if there are no paths.
      exportable: what is exported.
      paths: image files or folders. If there are neither data nor paths, crops of scikit-learn's two photos are used.
      most: the most images.

    Returns:
      The input of the function that is exported, [n, h, w, 3].
    """
    if paths:
        parts = [_of_folder(pathlib.Path(path), exportable, "--images", most) for path in paths]
        images: Any = np.concatenate(parts)[:most]
    elif data is not None:
        split = data.dataset.eval
        order = np.random.default_rng(0).permutation(len(split)).tolist()
        images = _prepared(split, order, most, exportable)
    else:
        images = [exportable.prepared(crop) for crop in _crops(most)]
    return exportable.to_input(np.stack(images))


def _of_folder(path: pathlib.Path, exportable: Exportable, flag: str, most: int | None = None) -> np.ndarray:
    """Returns the images of a folder, or of one file, prepared: uint8 [n, h, w, 3]."""
    if not path.exists():
        raise UserError(f"{flag}={path}: there is no such folder or image; correct the path")
    files = find_images(str(path))[0] if path.is_dir() else [str(path)]
    if not files:
        raise UserError(f"{flag}={path}: no image that can be read in this folder; give another")
    return np.stack([exportable.prepared(file) for file in files[:most]])


def _prepared(split: Split, order: Sequence[int], count: int, exportable: Exportable) -> np.ndarray:
    """Returns the first images in an order that can be decoded, prepared: uint8 [n, h, w, 3]."""
    images: list[np.ndarray] = []
    for index in order:
        if len(images) == count:
            break
        try:
            images.append(exportable.prepared(np.asarray(split.example(index)["image"])))
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
