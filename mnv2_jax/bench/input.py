"""Times the input pipeline, and compares it with plain decoding of the same files and with the train step."""

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
"""Minimum length of a turn."""


def time_input(
    loaded: config.Loaded, repeats: int, turn_seconds: float = TURN_SECONDS, *, times_step: bool = True
) -> dict[str, Any]:
    """Times pipeline and decoding in turns, and returns medians over the turns.

    Args:
      loaded: config that sets the images, crops, batches and the number of worker processes.
      repeats: number of turns, at least 1.
      turn_seconds: minimum length of a turn.
      times_step: whether to time the train step too.

    Returns:
      workers: number of processes, 0 for none; cores: number of cores that they can use; resize: library that resizes;
      pipeline and decoding: {images_per_second, images_per_second_per_core}; ratio: median over the turns of the
      pipeline's rate divided by the decoding rate; with ``times_step`` also step_images_per_second and limit, the
      slower of "input" and "step".

    Raises:
      UserError: if the data are missing or aren't image files.
    """
    settings = loaded.config
    # Evaluation images aren't read, so their split may be missing.
    has_fixed_splits = settings.data.name in ("digits", "cifar10", "synthetic", *imagenet_subsets.NAMES)
    data = dataclasses.replace(settings.data, eval_split=None if has_fixed_splits else "train", holdout_fraction=0.0)
    dataset = open_dataset(data)
    check_trainable(dataset)
    check_policy(settings.augment)
    config.check_devices(settings, 1)
    split = dataset.train
    view = TrainView(data, settings.augment)
    if split.in_memory or streams.fits_training(data, view, split):
        raise UserError(
            f"data.name={settings.data.name!r} is kept in memory as arrays, so it has no input pipeline to time; give"
            " image files with random crops, e.g. --data=folder:PATH"
        )
    with contextlib.suppress(DamagedImageError):  # a damaged file is an image file too; training may skip it
        if not isinstance(split.read(0), EncodedImage):
            raise UserError(f"data.name={settings.data.name!r} has no image files to decode; give --data=folder:PATH")
    workers = streams.num_workers(data, split)
    cores = max(1, min(workers, num_cores()))
    pipeline_batches = streams.train_batches(
        data,
        view,
        split,
        settings.seed,
        repeats=settings.augment.repeats,
        shapes=config.batch_shapes(settings),
        group_size=settings.norm.group_size,
    )
    skipped = (DamagedImageError,) if data.skip_corrupt else ()
    decoded_batches = in_order(_DecodeBatch(split, data.batch_size, skipped), 0, sys.maxsize, workers)
    try:
        turns = [
            (_rate(pipeline_batches, workers, turn_seconds), _rate(decoded_batches, workers, turn_seconds))
            for _ in range(repeats)
        ]
    finally:
        pipeline_batches.close()
        decoded_batches.close()
    pipeline, decoding = (statistics.median(rates) for rates in zip(*turns, strict=True))
    results: dict[str, Any] = {
        "workers": workers,
        "cores": cores,
        "resize": images.resizer(data),
        "pipeline": {"images_per_second": pipeline, "images_per_second_per_core": pipeline / cores},
        "decoding": {"images_per_second": decoding, "images_per_second_per_core": decoding / cores},
        "ratio": statistics.median(pipeline_rate / decoding_rate for pipeline_rate, decoding_rate in turns),
    }
    if times_step:
        step = _step_rate(loaded, repeats)
        results |= {"step_images_per_second": step, "limit": "step" if step < pipeline else "input"}
    return results


def table(results: dict[str, Any]) -> str:
    """Formats the results of `time_input` as a table."""
    lines = [f"{'':<10} {'images/s':>10} {'images/s per core':>18}"]
    for name in ("pipeline", "decoding"):
        rates = results[name]
        lines.append(f"{name:<10} {rates['images_per_second']:>10,.0f} {rates['images_per_second_per_core']:>18,.0f}")
    lines.append(
        f"With {results['workers']} worker processes the pipeline reaches {results['ratio']:.0%} of the rate of plain"
        f" decoding. It resizes with {results['resize']}."
    )
    if "limit" in results:
        step, pipeline = results["step_images_per_second"], results["pipeline"]["images_per_second"]
        lines.append(
            f"The {results['limit']} limits the speed: the train step can use {step:,.0f} images/s from memory, the"
            f" pipeline delivers {pipeline:,.0f} images/s."
        )
    return "\n".join(lines)


@dataclasses.dataclass(frozen=True)
class _DecodeBatch:
    """Decodes all images of batch ``number`` completely and returns only their indices."""

    split: Split
    batch_size: int
    skipped: tuple[type[Exception], ...]

    def __call__(self, number: int) -> NumpyBatch:
        first = number * self.batch_size
        index = np.arange(first, first + self.batch_size, dtype=np.int64) % len(self.split)
        for i in index.tolist():
            with contextlib.suppress(*self.skipped):
                picture = self.split.read(i)
                assert isinstance(picture, EncodedImage)
                height, width, _ = picture.shape
                picture.part(0, 0, height, width, enough=max(height, width))
        return {"index": index}


def _rate(batches: Batches, workers: int, seconds: float) -> float:
    """Returns images per second, timed from the moment when only this stream's workers are busy.

    Each worker prepares four batches ahead. Before the clock starts, those of this stream must be used up, and the
    workers of the other stream, whose turn has just ended, must have refilled theirs.
    """
    for _ in itertools.islice(batches, 12 * workers + 1):
        pass
    count, start = 0, time.perf_counter()
    while True:
        for batch in itertools.islice(batches, max(workers, 1)):  # one batch from each worker
            count += len(batch["index"])
        if (elapsed := time.perf_counter() - start) >= seconds:
            return count / elapsed


def _step_rate(loaded: config.Loaded, repeats: int) -> float:
    """Returns the images per second of the train step on one batch that stays on the devices."""
    from mnv2_jax.bench.contest import OUR_ENTRY, compare
    from mnv2_jax.bench.synthetic import with_classes
    from mnv2_jax.training.initial import resolve_weights

    (row,) = compare([OUR_ENTRY], "train", with_classes(resolve_weights(loaded)[0]), repeats)
    rate: float = row["images_per_second"]
    return rate
