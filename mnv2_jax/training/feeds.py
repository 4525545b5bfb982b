"""From splits to batches on the devices: kept there where they fit, or made by worker processes as they are needed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Mapping

import jax
import numpy as np

from mnv2_jax.data import streams
from mnv2_jax.data.shared import NumpyBatch
from mnv2_jax.data.split import Split
from mnv2_jax.data.views.base import View
from mnv2_jax.processes.supervisor import Stopped
from mnv2_jax.training import mesh as meshes
from mnv2_jax.training.experiment import Experiment, Setup
from mnv2_jax.types import Batch

Skipped = Callable[[int, int, Mapping[int, str]], None]
"""Told for each batch for which images were skipped: the number of its step, how many they were, and a line for each of
them by its index."""


def _never() -> bool:
    return False


def train_batches(
    experiment: Experiment,
    start: int = 0,
    should_stop: Callable[[], bool] = _never,
    skipped: Skipped = lambda step, count, lines: None,
) -> Generator[Batch, None, None]:
    """The batches that follow ``start`` steps, without end. ``close()`` ends the workers.

    Args:
      experiment: what is trained.
      start: steps done.
      should_stop: asked every few images as long as a split is loaded, which `Stopped` then ends.
      skipped: called with `data.skip_corrupt` only.
    """
    config, split, task = experiment.config, experiment.dataset.train, experiment.task
    resident = streams.fits_training(config.data, task.train_view, split)
    feed = meshes.make_feed(experiment.mesh, None)
    if resident:
        feed = _feed(experiment, task.train_view, split, should_stop)
    on_host = streams.train_batches(
        config.data,
        task.train_view,
        split,
        config.seed,
        start,
        process=_process(),
        resident=resident,
        repeats=config.augment.repeats,
        shapes=experiment.plan.batch_shapes,
        group_size=config.norm.group_size,
    )
    with contextlib.closing(on_host):
        for step, batch in enumerate(on_host, start + 1):
            if "skipped" in batch and (count := int(batch["skipped"].sum())):
                skipped(step, count, streams.skipped_images(split, batch))
            fed = feed(_taken_along(task.columns, batch))
            del batch  # its memory is filled again
            yield fed


def eval_batches(
    setup: Setup, should_stop: Callable[[], bool] = _never
) -> Callable[[dict[int, str]], Generator[Batch, None, None]]:
    """A function that goes through the evaluation split once, each image in one row; others are masked.

    So are images that can't be decoded: the dict that it is given takes a line for each that this process has met, by
    its index.
    """
    data, split, view, devices = setup.config.data, setup.dataset.eval, setup.task.eval_view, setup.mesh.size
    batch_size = -(-min(data.eval_batch_size, len(split)) // devices) * devices
    resident, zero = streams.fits(view, split), dict[int, str]()
    feed = _feed(setup, view, split, should_stop, zero) if resident else meshes.make_feed(setup.mesh, None)

    def through(damaged: dict[int, str]) -> Generator[Batch, None, None]:
        damaged |= zero
        batches = streams.eval_batches(data, view, split, batch_size, process=_process(), resident=resident)
        with contextlib.closing(streams.without_damaged(view, split, batches, damaged)) as sound:
            for batch in sound:
                is_zero = np.isin(batch["index"], np.array([*zero], np.int32))
                fed = feed({**batch, "mask": batch["mask"] & ~is_zero})
                del batch
                yield fed

    return through


def _taken_along(columns: Mapping[str, np.ndarray], batch: NumpyBatch) -> NumpyBatch:
    """Arrays that go to the devices: with the rows of ``columns``, and without what was said about the batch."""
    taken = {name: rows[batch["index"]].astype(np.float32) for name, rows in columns.items()}
    return {name: array for name, array in batch.items() if name != "skipped"} | taken


def _feed(
    setup: Setup,
    view: View,
    split: Split,
    should_stop: Callable[[], bool],
    damaged: dict[int, str] | None = None,
) -> Callable[[meshes.HostBatch], Batch]:
    """Function that gathers batches out of a split, which it takes to the devices now."""

    def poll() -> None:
        if should_stop():
            raise Stopped

    arrays = streams.load_arrays(setup.config.data, view, split, poll, damaged)
    return meshes.make_feed(setup.mesh, arrays)


def _process() -> tuple[int, int]:
    return jax.process_index(), jax.process_count()
