"""Times the input pipeline beside plain decoding of the same files, and beside the train step."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import statistics
import sys
import time
from typing import Any

import numpy as np

from mnv2_jax import config
from mnv2_jax.data import imagenet_subsets, images, streams
from mnv2_jax.data.cores import num_cores
from mnv2_jax.data.images import DamagedImageError, EncodedImage
from mnv2_jax.data.policies import check_policy
from mnv2_jax.data.shared import NumpyBatch
from mnv2_jax.data.sources import check_trainable, open_dataset
from mnv2_jax.data.split import Split
from mnv2_jax.data.views.classification import TrainView
from mnv2_jax.data.workers import Batches, in_order
from mnv2_jax.errors import UserError

TURN_SECONDS = 2.0
"""A turn takes at least so long."""


def time_input(
    loaded: config.Loaded, repeats: int, turn_seconds: float = TURN_SECONDS, *, times_step: bool = True
) -> dict[str, Any]:
    """Medians over turns.

    Args:
      loaded: says which images, crops and batches, and how many worker processes.
      repeats: turns, at least 1.
      turn_seconds: how long each takes at least.
      times_step: whether the train step is timed, too.

    Returns:
      workers: processes, 0 for none; cores: those they can use; resize: the library that resizes; pipeline and
      decoding: {images_per_second, images_per_second_per_core}; ratio: the median of the turns' ratios of the two;
      where the step is timed step_images_per_second and limit, "input" or "step".

    Raises:
      UserError: if the data aren't there, or are no image files.
    """
    settings = loaded.config
    # The images to evaluate on aren't read, so they need not be there.
    whole = settings.data.name in ("digits", "cifar10", "synthetic", *imagenet_subsets.NAMES)
    data = dataclasses.replace(settings.data, eval_split=None if whole else "train", holdout_fraction=0.0)
    dataset = open_dataset(data)
    check_trainable(dataset)
    check_policy(settings.augment)
    config.check_devices(settings, 1)
    split = dataset.train
    view = TrainView(data, settings.augment)
    if split.in_memory or streams.fits_training(data, view, split):
        raise UserError(
            f"data.name={settings.data.name!r} is kept in memory as arrays, without an input pipeline; give image"
            " files that are cropped at random, as --data=folder:PATH"
        )
    with contextlib.suppress(DamagedImageError):  # which is a file, and may be skipped
        if not isinstance(split.read(0), EncodedImage):
            raise UserError(f"data.name={settings.data.name!r} has nothing to decode; give --data=folder:PATH")
    workers = streams.num_workers(data, split)
    cores = max(1, min(workers, num_cores()))
    ours = streams.train_batches(
        data,
        view,
        split,
        settings.seed,
        repeats=settings.augment.repeats,
        shapes=config.batch_shapes(settings),
        group_size=settings.norm.group_size,
    )
    plain = in_order(
        _Decoded(split, data.batch_size, (DamagedImageError,) if data.skip_corrupt else ()), 0, sys.maxsize, workers
    )
    try:
        turns = [(_rate(ours, workers, turn_seconds), _rate(plain, workers, turn_seconds)) for _ in range(repeats)]
    finally:
        ours.close()
        plain.close()
    pipeline, decoding = (statistics.median(rates) for rates in zip(*turns, strict=True))
    found: dict[str, Any] = {
        "workers": workers,
        "cores": cores,
        "resize": images.resizer(data),
        "pipeline": {"images_per_second": pipeline, "images_per_second_per_core": pipeline / cores},
        "decoding": {"images_per_second": decoding, "images_per_second_per_core": decoding / cores},
        "ratio": statistics.median(mine / theirs for mine, theirs in turns),
    }
    if times_step:
        step = _step_rate(loaded, repeats)
        found |= {"step_images_per_second": step, "limit": "step" if step < pipeline else "input"}
    return found


def table(found: dict[str, Any]) -> str:
    """Table of the results of `time_input`."""
    lines = [f"{'':<10} {'images/s':>10} {'images/s per core':>18}"]
    for name in ("pipeline", "decoding"):
        rates = found[name]
        lines.append(f"{name:<10} {rates['images_per_second']:>10,.0f} {rates['images_per_second_per_core']:>18,.0f}")
    lines.append(
        f"The pipeline runs at {found['ratio']:.0%} of the rate of plain decoding, with {found['workers']} worker"
        f" processes; {found['resize']} resizes."
    )
    if "limit" in found:
        step, pipeline = found["step_images_per_second"], found["pipeline"]["images_per_second"]
        lines.append(
            f"The {found['limit']} is the limit: the train step takes {step:,.0f} images/s from memory, the pipeline"
            f" gives {pipeline:,.0f}."
        )
    return "\n".join(lines)


@dataclasses.dataclass(frozen=True)
class _Decoded:
    """Batch number -> nothing but the fact that so many images were decoded whole."""

    split: Split
    batch_size: int
    skipped: tuple[type[Exception], ...]

    def __call__(self, number: int) -> NumpyBatch:
        first = number * self.batch_size
        index = np.arange(first, first + self.batch_size, dtype=np.int64) % len(self.split)
        for place in index.tolist():
            with contextlib.suppress(*self.skipped):
                picture = self.split.read(place)
                assert isinstance(picture, EncodedImage)
                height, width, _ = picture.shape
                picture.part(0, 0, height, width, enough=max(height, width))
        return {"index": index}


def _rate(batches: Batches, workers: int, seconds: float) -> float:
    """Images a second, counted once all that was made before is used up and the other's workers wait again.

    Four batches a worker are made ahead of need: these must be used up; and as many are still being made for the other
    stream, whose turn is just over.
    """
    for _ in itertools.islice(batches, 12 * workers + 1):
        pass
    count, begun = 0, time.perf_counter()
    while True:
        for batch in itertools.islice(batches, max(workers, 1)):  # a whole round of the workers
            count += len(batch["index"])
        if (elapsed := time.perf_counter() - begun) >= seconds:
            return count / elapsed


def _step_rate(loaded: config.Loaded, repeats: int) -> float:
    """Images a second of the train step on one batch that stays on the devices."""
    from mnv2_jax.bench.contest import OUR_ENTRY, compare
    from mnv2_jax.bench.synthetic import with_classes
    from mnv2_jax.training.initial import resolve_weights

    (row,) = compare([OUR_ENTRY], "train", with_classes(resolve_weights(loaded)[0]), repeats)
    rate: float = row["images_per_second"]
    return rate
