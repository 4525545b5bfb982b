"""Feeds batches to the devices: a split stays there if it fits; otherwise worker processes make the batches."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Mapping
from typing import NamedTuple

import jax
import numpy as np

from mnv2_jax.data import streams
from mnv2_jax.data.shared import NumpyBatch
from mnv2_jax.data.split import Split
from mnv2_jax.data.views.base import View, views_of
from mnv2_jax.processes.supervisor import Stopped
from mnv2_jax.training import mesh as meshes
from mnv2_jax.training.experiment import Experiment, Setup
from mnv2_jax.types import Batch

Skipped = Callable[[int, int, Mapping[int, str]], None]
"""Called for each batch in which images were skipped: with the step, their number, and a line for each by its index."""


def _never() -> bool:
    return False


def train_batches(
    experiment: Experiment,
    start: int = 0,
    should_stop: Callable[[], bool] = _never,
    skipped: Skipped = lambda step, count, lines: None,
) -> Generator[Batch, None, None]:
    """Yields the batches after the first ``start`` steps, without end. ``close()`` ends the workers.

    Args:
      experiment: the experiment to train.
      start: steps done.
      should_stop: asked every few images while a split is loaded; if it says True, `Stopped` is raised.
      skipped: called only with `data.skip_corrupt`.
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
            fed = feed(_with_columns(task.columns, batch))
            del batch  # the workers reuse its memory
            yield fed


class Part(NamedTuple):
    """Images of the evaluation split that have rows of one shape."""

    indices: np.ndarray
    """Their indices in the split, int [n]."""
    batches: Callable[[dict[int, str]], Generator[Batch, None, None]]
    """Goes through them once: each image in one row, the other rows masked; "index" counts within the part. Images that
    can't be decoded are masked too. A line for each of those that this process has met is added, by its index in the
    split, to the dict that the function is given."""


def eval_parts(setup: Setup, should_stop: Callable[[], bool] = _never) -> list[Part]:
    """Makes the parts of the evaluation split, which hold every image once; most tasks have one."""
    split = setup.dataset.eval
    views = views_of(setup.task.eval_view, split)
    parts, held_bytes = list[Part](), 0
    for view, indices in views:
        some = split if len(views) == 1 else split.subset(np.isin(np.arange(len(split)), indices))
        resident = streams.fits(view, some, held_bytes)
        held_bytes += resident * streams.size_bytes(view, some)
        parts.append(_part(setup, view, some, indices, resident, should_stop))
    return parts


def _part(
    setup: Setup, view: View, split: Split, indices: np.ndarray, resident: bool, should_stop: Callable[[], bool]
) -> Part:
    data, devices = setup.config.data, setup.mesh.size
    batch_size = -(-min(data.eval_batch_size, len(split)) // devices) * devices
    undecoded = dict[int, str]()  # images that lie on the devices as zeros
    feed = _feed(setup, view, split, should_stop, undecoded) if resident else meshes.make_feed(setup.mesh, None)

    def through(damaged: dict[int, str]) -> Generator[Batch, None, None]:
        lines = dict(undecoded)
        batches = streams.eval_batches(data, view, split, batch_size, process=_process(), resident=resident)
        try:
            with contextlib.closing(streams.without_damaged(view, split, batches, lines)) as sound:
                for batch in sound:
                    is_zero = np.isin(batch["index"], np.array([*undecoded], np.int32))
                    fed = feed({**batch, "mask": batch["mask"] & ~is_zero})
                    del batch
                    yield fed
        finally:
            damaged |= {int(indices[place]): line for place, line in lines.items()}

    return Part(indices, through)


def _with_columns(columns: Mapping[str, np.ndarray], batch: NumpyBatch) -> NumpyBatch:
    """Adds the batch's rows of ``columns``, and drops the report of skipped images, which isn't for the devices."""
    rows_of_batch = {name: rows[batch["index"]].astype(np.float32) for name, rows in columns.items()}
    return {name: array for name, array in batch.items() if name != "skipped"} | rows_of_batch


def _feed(
    setup: Setup,
    view: View,
    split: Split,
    should_stop: Callable[[], bool],
    damaged: dict[int, str] | None = None,
) -> Callable[[meshes.HostBatch], Batch]:
    """Takes a whole split to the devices, and returns a function that gathers batches from it."""

    def poll() -> None:
        if should_stop():
            raise Stopped

    arrays = streams.load_arrays(setup.config.data, view, split, poll, damaged)
    return meshes.make_feed(setup.mesh, arrays)


def _process() -> tuple[int, int]:
    return jax.process_index(), jax.process_count()
