"""The order of the images, and the batches that follow it.

One index stream, two ways to fill it. Where every image can be prepared once (`fits`), the caller keeps them all on the
device (`load_arrays`) and asks for ``resident`` batches, which are index numbers only. Otherwise worker processes
decode whole batches.

    step k ──► positions k*b .. k*b + b - 1 ──► (epoch, index) ──► image index, cropped by (seed, epoch, index)

Where batches have several shapes, what comes before step k is counted in blocks (`ShapeStream`).

Batch k is a pure function of the seed and k: a run that restarts at step k reads nothing before it, and neither the
number of processes nor that of workers changes a pixel.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from mnv2_jax.config import DataConfig
from mnv2_jax.data import shared
from mnv2_jax.data.cores import num_cores
from mnv2_jax.data.images import MOST_NAMED, DamagedImageError, damaged_images
from mnv2_jax.data.shared import NumpyBatch
from mnv2_jax.data.split import Split
from mnv2_jax.data.views.base import Draw, View
from mnv2_jax.data.workers import Batches, in_order
from mnv2_jax.errors import UserError

RESIDENT_BYTES = 512 * 2**20
"""Most that a split may take on a device; the network and its activations want the rest."""

OR_SKIP = "; or go on without: --config.data.skip_corrupt=True"
"""Advice on images that can't be decoded in a run."""
_LOOK_S, _LOOK_IMAGES = 30.0, 64
"""How long to look for further damaged images, and how many are looked at together."""


# --- the index stream ---------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class IndexStream:
    """The endless order of training: every image once an epoch, a new permutation each.

    With ``repeats`` R each image stands R times in a row, and an epoch, as long as without, has 1 / R of them
    (Hoffer et al., arXiv:1901.09335; torchvision's RASampler).
    """

    num_images: int
    seed: int
    repeats: int = 1

    def take(self, positions: np.ndarray) -> NumpyBatch:
        """Items at some positions, int [b], of the stream.

        Returns:
          index: int32 [b], in 0..num_images - 1; epoch: int32 [b], epoch * R + number of the repeat, so that no two
          positions have both in common.
        """
        epoch, place = np.divmod(positions, self.num_images)
        place, repeat = np.divmod(place, self.repeats)
        index = np.empty(len(positions), np.int32)
        for number in np.unique(epoch).tolist():
            rows = epoch == number
            index[rows] = _permutation(self.num_images, self.seed, number)[place[rows]]
        return {"index": index, "epoch": (epoch * self.repeats + repeat).astype(np.int32)}


@dataclasses.dataclass(frozen=True)
class ShapeStream:
    """The endless order of batch shapes: each once a block of as many steps, a new permutation each.

    CoreNet's variable batch sampler draws every batch's shape by itself; in blocks, the images before a step are
    counted without going through the steps.
    """

    shapes: tuple[tuple[int, int], ...]
    """(resolution, images of a batch)."""
    seed: int

    def at(self, step: int) -> tuple[int, int, int]:
        """A step's resolution, its images, and how many images come before them."""
        block, place = divmod(step, len(self.shapes))
        # A spawn key is hashed behind four words, so that it is none of (seed, epoch) and (seed, epoch, index).
        order = _shuffled(len(self.shapes), np.random.SeedSequence(self.seed, spawn_key=(block,))).tolist()
        sizes = [images for _, images in self.shapes]
        return *self.shapes[order[place]], block * sum(sizes) + sum(sizes[number] for number in order[:place])


def _spread(num_images: int, group_size: int) -> np.ndarray:
    """Which position of its batch a row holds, int [num_images]: neighbours lie in different norm groups.

    So do the repeats of an image, if there are no more of them than groups: RASampler deals them to different GPUs in
    the same way, one after the other.
    """
    return np.arange(num_images).reshape(group_size, -1).T.reshape(-1)


@functools.lru_cache(maxsize=2)  # a batch may lie across the end of an epoch
def _permutation(num_images: int, seed: int, epoch: int) -> np.ndarray:
    """The order of one epoch, int32 [num_images]: 0.2 s for ImageNet, and nothing of the epochs before is needed."""
    return _shuffled(num_images, np.random.SeedSequence((seed, epoch)))


def _shuffled(count: int, seed: np.random.SeedSequence) -> np.ndarray:
    """0..count - 1 in random order, int32.

    Not by grain's `shuffle`: it seeds epoch e with seed + e, so that epoch 1 of seed 0 were epoch 0 of seed 1 and runs
    over neighbouring seeds went through the same orders (SeedSequence mixes the two numbers), and its index_shuffle
    takes 7 µs an index, 30 where there are 1,000 images. Sorting the raw words of a bit generator, which NumPy
    promises never to change, keeps the order the same under every version.
    """
    words = np.random.PCG64(seed).random_raw(count)
    return np.argsort(words, kind="stable").astype(np.int32)


# --- filling it ---------------------------------------------------------------------------------------------


def fits(view: View, split: Split) -> bool:
    """Whether the split can be kept on a device: each image has one view only, and they all are small enough."""
    return not view.varies and len(split) * sum(array.size_bytes for array in view.spec.values()) <= RESIDENT_BYTES


def fits_training(data: DataConfig, view: View, split: Split) -> bool:
    """Does what `fits` does, where batches have one shape and say nothing of images that were skipped."""
    return fits(view, split) and not data.scales and (split.in_memory or not data.skip_corrupt)


def load_arrays(
    data: DataConfig,
    view: View,
    split: Split,
    poll: Callable[[], None] = lambda: None,
    damaged: dict[int, str] | None = None,
) -> NumpyBatch:
    """The views of all images, in the order of the split.

    Args:
      data: `num_workers` is read.
      view: without a draw.
      split: what is loaded.
      poll: called every few images, since this can take minutes; it may raise to give up.
      damaged: takes what can't be decoded, as in `without_damaged`; unset: there must be none.

    Returns:
      The arrays of the view's spec, [n, ...]; zero where an image can't be decoded.

    Raises:
      UserError: naming the image file that can't be read, or all that can't be decoded.
    """
    size = len(split)
    whole = {name: np.zeros((size, *array.shape), array.dtype) for name, array in view.spec.items()}
    found: dict[int, str] = {}
    for batch in without_damaged(view, split, eval_batches(data, view, split, batch_size=min(size, 64)), found):
        poll()
        index, mask = batch["index"], batch["mask"]
        for name, array in whole.items():
            array[index[mask]] = batch[name][mask]
    if damaged is not None:
        damaged.update(found)
    elif found:
        raise damage(split, found)
    return whole


def train_batches(
    data: DataConfig,
    view: View,
    split: Split,
    seed: int,
    start_step: int = 0,
    process: tuple[int, int] = (0, 1),
    resident: bool = False,
    repeats: int = 1,
    shapes: tuple[tuple[int, int], ...] = (),
    group_size: int = 1,
) -> Batches:
    """The endless batches of training, from a step on. Close the iterator to end its worker processes.

    Args:
      data: `resolution`, `batch_size` (b, over all processes), `skip_corrupt` and `num_workers` are read.
      view: what an image becomes.
      split: what is trained on.
      seed: of the order and the views.
      start_step: number of the first batch.
      process: (p, P): of each batch, rows p * b / P up to (p + 1) * b / P are given.
      resident: the views are with the caller; only index and epoch are given.
      repeats: how often an image stands in a row, each time with another draw.
      shapes: (resolution, b) of the batches instead, each once in as many steps.
      group_size: of the norms; the repeats of an image lie in different groups. Must divide b.

    Yields:
      index, epoch: int32 [b / P]; unless resident the arrays of the view's spec, [b / P, ...]. With `data.skip_corrupt`
      an image that can't be decoded is replaced by the next of the split that can; index and view are then that one's,
      and skipped, int32 [b / P], says how many were passed over: the images (index - 1, ..., index - skipped) % n.

    Raises:
      UserError: naming the image file that can't be read.
    """
    stream = IndexStream(len(split), seed, repeats)
    shape_stream = ShapeStream(shapes or ((data.resolution, data.batch_size),), seed)
    for _, batch_size in shape_stream.shapes:
        _rows(batch_size, process)  # refuses now what would fail in a worker
    make = _TrainBatch(data, view, split, seed, process, stream, shape_stream, group_size, resident)
    return in_order(make, start_step, sys.maxsize, 0 if resident else num_workers(data, split))


def eval_batches(
    data: DataConfig,
    view: View,
    split: Split,
    batch_size: int | None = None,
    process: tuple[int, int] = (0, 1),
    resident: bool = False,
) -> Batches:
    """Every image of a split exactly once, in order; the rows that fill the last batch up have mask False.

    Args:
      data: `eval_batch_size` and `num_workers` are read.
      view: what an image becomes, without a draw.
      split: what is evaluated.
      batch_size: over all processes; None: `data.eval_batch_size`.
      process: as in `train_batches`; all processes get the same number of batches.
      resident: the views are with the caller; only index and mask are given.

    Yields:
      As `train_batches`, with mask: bool [b / P] instead of epoch. Rows of padding have index 0 and zeros. Where images
      can't be decoded, their rows are masked and zero, too, and damaged: bool [b / P] says which they are
      (`without_damaged`).
    """
    batch_size = data.eval_batch_size if batch_size is None else batch_size
    make = _EvalBatch(view, split, batch_size, _rows(batch_size, process), resident)
    num_batches = -(-len(split) // batch_size)
    workers = 0 if resident else min(num_workers(data, split), num_batches)
    if data.num_workers is None:
        # A worker takes as long to start as it does to decode some hundred images.
        workers = min(workers, len(split) // 500)
    return in_order(make, 0, num_batches, workers)


@dataclasses.dataclass(frozen=True)
class _TrainBatch:
    """Step number -> batch; what a worker process is sent."""

    data: DataConfig
    view: View
    split: Split
    seed: int
    process: tuple[int, int]
    stream: IndexStream
    shapes: ShapeStream
    group_size: int
    resident: bool

    def __call__(self, step: int) -> NumpyBatch:
        resolution, batch_size, first = self.shapes.at(step)
        positions = np.arange(batch_size) if self.stream.repeats == 1 else _spread(batch_size, self.group_size)
        batch = self.stream.take(first + positions[_rows(batch_size, self.process)])
        if self.resident:
            return batch
        view, epochs = self.view.at(resolution), batch["epoch"].tolist()
        tries = len(self.split) if self.data.skip_corrupt else 1

        def read(row: int, index: int) -> _Filling:
            return _first_sound(self.split, view, tries, index, lambda place: (self.seed, epochs[row], place))

        filled = _filled(view, batch["index"], range(len(epochs)), read)
        if not self.data.skip_corrupt:
            del filled["skipped"]
        return batch | filled


@dataclasses.dataclass(frozen=True)
class _EvalBatch:
    """Batch number -> batch."""

    view: View
    split: Split
    batch_size: int
    rows: slice
    resident: bool

    def __call__(self, number: int) -> NumpyBatch:
        index = number * self.batch_size + np.arange(self.rows.start, self.rows.stop, dtype=np.int32)
        mask = index < len(self.split)
        batch = {"index": np.where(mask, index, 0).astype(np.int32), "mask": mask}
        if not self.resident:
            batch |= _filled(self.view, batch["index"], np.flatnonzero(mask).tolist(), self._sound_or_none)
            damaged = batch.pop("skipped").astype(bool)
            if damaged.any():
                batch |= {"mask": mask & ~damaged, "damaged": damaged}
        return batch

    def _sound_or_none(self, row: int, index: int) -> _Filling:
        del row
        try:
            return _Filling(self.view(self.split.example(index), None), index, 0)
        except DamagedImageError:
            return _Filling(None, index, 1)


class _Filling(NamedTuple):
    """Content of a row."""

    view: Mapping[str, Any] | None
    """None: zeros."""
    place: int
    """Index of the image that it is of."""
    skipped: int
    """How many images were passed over for it."""


def _filled(view: View, indices: np.ndarray, rows: Iterable[int], read: Callable[[int, int], _Filling]) -> NumpyBatch:
    """The arrays of a view's spec for a batch, zero but in ``rows``; with their index and skipped.

    ``read`` is given a row and the index of its image.
    """
    size = len(indices)
    batch = {name: _empty((size, *array.shape), array.dtype) for name, array in view.spec.items()}
    batch |= {"index": indices.copy(), "skipped": np.zeros(size, np.int32)}
    others = sorted(set(range(size)).difference(rows))
    for name in view.spec:
        batch[name][others] = 0
    for row in rows:
        found, batch["index"][row], batch["skipped"][row] = read(row, int(indices[row]))
        for name in view.spec:
            batch[name][row] = 0 if found is None else found[name]
    return batch


def _empty(shape: tuple[int, ...], dtype: type[np.generic]) -> np.ndarray:
    """Pictures lie in shared memory; what is smaller is sent."""
    is_picture = dtype is np.uint8 and len(shape) > 2
    return shared.empty(shape) if is_picture else np.empty(shape, dtype)


def _first_sound(split: Split, view: View, tries: int, index: int, draw: Callable[[int], Draw]) -> _Filling:
    """The view of an image, or of the first after it that can be decoded."""
    damage: list[DamagedImageError] = []
    while len(damage) < tries:
        place = (index + len(damage)) % len(split)
        try:
            return _Filling(view(split.example(place), draw(place)), place, len(damage))
        except DamagedImageError as error:
            damage.append(error)
    if tries == 1:
        raise damage[0]
    raise UserError(f"none of the {tries} images of {split.name} can be decoded; the first: {damage[0]}")


# --- images that can't be decoded ---------------------------------------------------------------------------


def skipped_images(split: Split, batch: NumpyBatch) -> dict[int, str]:
    """The images that a batch passed over (see `train_batches`): their indices, and the line that names the file.

    Reads each of them again, to see what is wrong with it.
    """
    passed = [
        (index - back) % len(split)
        for index, skipped in zip(batch["index"].tolist(), batch["skipped"].tolist(), strict=True)
        for back in range(skipped, 0, -1)
    ]
    return _lines(passed, functools.partial(_decode, split))


def without_damaged(view: View, split: Split, batches: Batches, found: dict[int, str]) -> Batches:
    """The same batches (`eval_batches`) without their "damaged".

    Args:
      view: by which they were made.
      split: what the batches are of.
      batches: closed at the end.
      found: takes a line that names the file for each image that can't be decoded, by its index.
    """
    with contextlib.closing(batches):
        for batch in batches:
            if "damaged" in batch:
                indices = batch["index"][batch.pop("damaged")].tolist()
                found |= _lines(indices, lambda index: view(split.example(index), None))
            yield batch


def _decode(split: Split, index: int) -> np.ndarray:
    return np.asarray(split.read(index))


def _lines(indices: Iterable[int], look: Callable[[int], Any]) -> dict[int, str]:
    """Lines on the images that can't be looked at."""
    found: dict[int, str] = {}
    for index in indices:
        try:
            look(index)
        except DamagedImageError as error:
            found[index] = str(error)
    return found


def damage(split: Split, lines: Mapping[int, str]) -> DamagedImageError:
    """An error that names the images of a split which can't be decoded, by their lines (`without_damaged`)."""
    return damaged_images([lines[index] for index in sorted(lines)], f"{len(split):,} images of {split.name}")


def all_damage(data: DataConfig, split: Split, met: DamagedImageError) -> DamagedImageError:
    """Looks for further images that can't be decoded, as far as half a minute goes.

    Args:
      data: `num_workers` is read.
      split: where to look.
      met: the first that was met.

    Returns:
      `damage` of all there are; or that there is ``met``, where it takes longer.
    """
    deadline, looked, lines = time.monotonic() + _LOOK_S, 0, dict[int, str]()
    num_batches = -(-len(split) // _LOOK_IMAGES)
    with contextlib.closing(in_order(_Look(split), 0, num_batches, num_workers(data, split))) as batches:
        for batch in batches:
            looked += len(batch["index"])
            lines |= _lines(batch["index"][batch["damaged"]].tolist(), functools.partial(_decode, split))
            if time.monotonic() > deadline:
                break
    if looked == len(split) and lines:
        return damage(split, lines)
    known = [line for line in lines.values() if line != str(met)]
    return DamagedImageError(
        f"{'; '.join([str(met), *known[:MOST_NAMED]])} ({looked:,} of the {len(split):,} images of {split.name} were"
        f" looked at, of which {len(lines):,} can't be decoded)"
    )


@dataclasses.dataclass(frozen=True)
class _Look:
    """Batch number -> which of its images can't be decoded."""

    split: Split

    def __call__(self, number: int) -> NumpyBatch:
        index = np.arange(number * _LOOK_IMAGES, min((number + 1) * _LOOK_IMAGES, len(self.split)))
        damaged = [bool(_lines([place], functools.partial(_decode, self.split))) for place in index.tolist()]
        return {"index": index, "damaged": np.array(damaged)}


def _rows(batch_size: int, process: tuple[int, int]) -> slice:
    number, count = process
    if batch_size % count:
        raise UserError(
            f"a batch of {batch_size} images does not divide over {count} processes; the nearest that does:"
            f" {max(1, round(batch_size / count)) * count}"
        )
    share = batch_size // count
    return slice(number * share, (number + 1) * share)


def num_workers(data: DataConfig, split: Split) -> int:
    """Processes that decode the images of a split; 0: none but the main one."""
    if split.in_memory:
        return 0
    if data.num_workers is not None:
        return data.num_workers
    return num_cores()
