"""The order of the images, and the batches that follow it.

There is one index stream and two ways to fill it. Where every image can be prepared once (`fits`), the caller keeps all
of them on the device (`load_arrays`) and asks for ``resident`` batches, which hold index numbers only. Otherwise worker
processes decode whole batches.

    step k ──► positions k*b .. k*b + b - 1 ──► (epoch, index) ──► image index, cropped by (seed, epoch, index)

Where batches have several shapes, the images before step k are counted in blocks of steps (`ShapeStream`).

Batch k is a pure function of the seed and k: a run that restarts at step k reads nothing before it, and neither the
number of processes nor that of workers changes a pixel.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
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
"""Memory that a split may take on a device at most; the network and its activations need the rest."""

OR_SKIP = "; or continue without them: --config.data.skip_corrupt=True"
"""Advice that a run adds to an error about images that can't be decoded."""
_SEARCH_S, _SEARCH_IMAGES = 30.0, 64
"""Seconds for which to search for further damaged images, and the number of images that a worker checks at a time."""


# --- the index stream ---------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class IndexStream:
    """The endless order of the training images: a new permutation of all of them in each epoch.

    With ``repeats`` R each image comes R times in a row. An epoch is as long as without repeats, and so holds 1 / R of
    the images (Hoffer et al., arXiv:1901.09335; torchvision's RASampler).
    """

    num_images: int
    seed: int
    repeats: int = 1

    def take(self, positions: np.ndarray) -> NumpyBatch:
        """Returns the items at some positions, int [b], of the stream.

        Returns:
          index: int32 [b], in 0..num_images - 1; epoch: int32 [b], epoch * R + number of the repeat. No two positions
          have the same index and epoch.
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
    """The endless order of batch shapes: every block of steps is a new permutation of all shapes.

    CoreNet's variable batch sampler draws the shape of each batch independently. With blocks, the images before a step
    can be counted without going through the steps.
    """

    shapes: tuple[tuple[int, int], ...]
    """Pairs of a resolution and the number of images in a batch."""
    seed: int

    def at(self, step: int) -> tuple[int, int, int]:
        """Returns a step's resolution, its number of images, and the number of images before it."""
        block, place = divmod(step, len(self.shapes))
        # A spawn key is hashed after four words, so it never equals (seed, epoch) or (seed, epoch, index).
        order = _shuffled(len(self.shapes), np.random.SeedSequence(self.seed, spawn_key=(block,))).tolist()
        sizes = [images for _, images in self.shapes]
        return *self.shapes[order[place]], block * sum(sizes) + sum(sizes[number] for number in order[:place])


def _spread(num_images: int, group_size: int) -> np.ndarray:
    """Returns the position in the batch for each row, int [num_images]; neighbours lie in different norm groups.

    The repeats of an image are neighbours, so they lie in different groups too, if there are at least as many groups as
    repeats. RASampler distributes them over GPUs in the same way, one after the other.
    """
    return np.arange(num_images).reshape(group_size, -1).T.reshape(-1)


@functools.lru_cache(maxsize=2)  # two, as a batch may cross the end of an epoch
def _permutation(num_images: int, seed: int, epoch: int) -> np.ndarray:
    """Returns the order of one epoch, int32 [num_images]; takes 0.2 s for ImageNet, and needs no earlier epoch."""
    return _shuffled(num_images, np.random.SeedSequence((seed, epoch)))


def _shuffled(count: int, seed: np.random.SeedSequence) -> np.ndarray:
    """Returns 0..count - 1 in random order, int32.

    This isn't grain's `shuffle`, which seeds epoch e with seed + e: epoch 1 of seed 0 would be epoch 0 of seed 1, and
    runs with neighbouring seeds would go through the same orders. (SeedSequence mixes the two numbers.) Grain's
    index_shuffle also takes 7 µs an index, and 30 µs where there are 1,000 images. Sorting the raw words of a bit
    generator, which NumPy promises never to change, gives the same order in every version.
    """
    words = np.random.PCG64(seed).random_raw(count)
    return np.argsort(words, kind="stable").astype(np.int32)


# --- filling the stream -------------------------------------------------------------------------------------


def size_bytes(view: View, split: Split) -> int:
    """Returns the size of the views of all images, in bytes."""
    return len(split) * sum(array.size_bytes for array in view.spec.values())


def fits(view: View, split: Split, held_bytes: int = 0) -> bool:
    """Whether a split can be kept on a device: each image has one view only, and all of them are small enough.

    Args:
      view: the view of an image.
      split: the images.
      held_bytes: size of other images of the same split that are kept already.
    """
    return not view.varies and held_bytes + size_bytes(view, split) <= RESIDENT_BYTES


def fits_training(data: DataConfig, view: View, split: Split) -> bool:
    """Whether a split to train on can be kept on a device: it `fits`, batches have one shape, and no image is skipped.

    With `data.skip_corrupt`, batches of images that need decoding must say which images were skipped.
    """
    return fits(view, split) and not data.scales and (split.in_memory or not data.skip_corrupt)


def load_arrays(
    data: DataConfig,
    view: View,
    split: Split,
    poll: Callable[[], None] = lambda: None,
    damaged: dict[int, str] | None = None,
) -> NumpyBatch:
    """Loads the views of all images, in the order of the split.

    Args:
      data: `num_workers` is read.
      view: the view of an image, used without a draw.
      split: the images to load.
      poll: called every few images, since loading can take minutes; it may raise to abort.
      damaged: filled with the images that can't be decoded, as in `without_damaged`; None: such images are an error.

    Returns:
      The arrays of the view's spec, [n, ...]; zero where an image can't be decoded.

    Raises:
      UserError: naming the image file that can't be read, or all images that can't be decoded.
    """
    size = len(split)
    whole = {name: np.zeros((size, *array.shape), array.dtype) for name, array in view.spec.items()}
    lines: dict[int, str] = {}
    for batch in without_damaged(view, split, eval_batches(data, view, split, batch_size=min(size, 64)), lines):
        poll()
        index, mask = batch["index"], batch["mask"]
        for name, array in whole.items():
            array[index[mask]] = batch[name][mask]
    if damaged is not None:
        damaged.update(lines)
    elif lines:
        raise damage_error(split, lines)
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
    """Yields the endless batches of training, from a step on. Close the iterator to end its worker processes.

    Args:
      data: `resolution`, `batch_size` (b, over all processes), `skip_corrupt` and `num_workers` are read.
      view: turns an example into a row of a batch.
      split: the images to train on.
      seed: the seed of the order and of the views.
      start_step: number of the first batch.
      process: (p, P): process p of P gets rows p * b / P up to (p + 1) * b / P of each batch.
      resident: whether the caller keeps the views; batches then hold only index and epoch.
      repeats: how many times in a row an image comes, each time with another draw.
      shapes: pairs (resolution, b) that replace those of ``data``; each comes once in as many steps as there are pairs.
      group_size: images of a norm group; must divide b. The repeats of an image lie in different groups.

    Yields:
      index, epoch: int32 [b / P]; unless resident, also the arrays of the view's spec, [b / P, ...]. With
      `data.skip_corrupt`, an image that can't be decoded is replaced by the next image of the split that can. Index and
      view are then those of the replacement, and skipped, int32 [b / P], counts the images passed over:
      (index - 1, ..., index - skipped) % n.

    Raises:
      UserError: naming the image file that can't be read.
    """
    stream = IndexStream(len(split), seed, repeats)
    shape_stream = ShapeStream(shapes or ((data.resolution, data.batch_size),), seed)
    for _, batch_size in shape_stream.shapes:
        _rows(batch_size, process)  # raises here rather than in a worker
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
    """Yields every image of a split exactly once, in order; rows that only fill up the last batch have mask False.

    Args:
      data: `eval_batch_size` and `num_workers` are read.
      view: turns an example into a row of a batch; used without a draw.
      split: the images to evaluate.
      batch_size: images of a batch over all processes; None: `data.eval_batch_size`.
      process: as in `train_batches`; all processes get the same number of batches.
      resident: whether the caller keeps the views; batches then hold only index and mask.

    Yields:
      Batches as those of `train_batches`, with mask, bool [b / P], instead of epoch. Rows of padding have index 0 and
      zeros. Rows of images that can't be decoded are masked and zero too; a batch with such rows has damaged,
      bool [b / P], which marks them (`without_damaged`).
    """
    batch_size = data.eval_batch_size if batch_size is None else batch_size
    make = _EvalBatch(view, split, batch_size, _rows(batch_size, process), resident)
    num_batches = -(-len(split) // batch_size)
    workers = 0 if resident else min(num_workers(data, split), num_batches)
    if data.num_workers is None:
        # Starting a worker takes as long as decoding a few hundred images.
        workers = min(workers, len(split) // 500)
    return in_order(make, 0, num_batches, workers)


@dataclasses.dataclass(frozen=True)
class _TrainBatch:
    """The function from a step's number to its batch, which worker processes receive."""

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
            return _first_decodable(self.split, view, tries, index, lambda place: (self.seed, epochs[row], place))

        filled = _fill(view, batch["index"], range(len(epochs)), read)
        if not self.data.skip_corrupt:
            del filled["skipped"]
        return batch | filled


@dataclasses.dataclass(frozen=True)
class _EvalBatch:
    """The function from a batch's number to the batch."""

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
            batch |= _fill(self.view, batch["index"], np.flatnonzero(mask).tolist(), self._read_or_mark)
            damaged = batch.pop("skipped").astype(bool)
            if damaged.any():
                batch |= {"mask": mask & ~damaged, "damaged": damaged}
        return batch

    def _read_or_mark(self, row: int, index: int) -> _Filling:
        del row
        try:
            return _Filling(self.view(self.split.example(index), None), index, 0)
        except DamagedImageError:
            return _Filling(None, index, 1)


class _Filling(NamedTuple):
    """The content of a row of a batch."""

    view: Mapping[str, Any] | None
    """The arrays of the row; None: zeros."""
    place: int
    """Index of the image that was read."""
    skipped: int
    """How many images that can't be decoded were passed over before it."""


def _fill(view: View, indices: np.ndarray, rows: Iterable[int], read: Callable[[int, int], _Filling]) -> NumpyBatch:
    """Fills the arrays of a view's spec for a batch, with index and skipped; rows other than ``rows`` are zero.

    ``read`` takes the number of a row and the index of its image.
    """
    size = len(indices)
    batch = {name: _empty((size, *array.shape), array.dtype) for name, array in view.spec.items()}
    batch |= {"index": indices.copy(), "skipped": np.zeros(size, np.int32)}
    empty_rows = sorted(set(range(size)).difference(rows))
    for name in view.spec:
        batch[name][empty_rows] = 0
    for row in rows:
        arrays, batch["index"][row], batch["skipped"][row] = read(row, int(indices[row]))
        for name in view.spec:
            batch[name][row] = 0 if arrays is None else arrays[name]
    return batch


def _empty(shape: tuple[int, ...], dtype: type[np.generic]) -> np.ndarray:
    """Allocates an array of a batch: pictures in memory shared with the main process, anything smaller outside it."""
    is_picture = dtype is np.uint8 and len(shape) > 2
    return shared.empty(shape) if is_picture else np.empty(shape, dtype)


def _first_decodable(split: Split, view: View, tries: int, index: int, draw: Callable[[int], Draw]) -> _Filling:
    """Returns the view of an image, or of the first image after it that can be decoded."""
    errors: list[DamagedImageError] = []
    while len(errors) < tries:
        place = (index + len(errors)) % len(split)
        try:
            return _Filling(view(split.example(place), draw(place)), place, len(errors))
        except DamagedImageError as error:
            errors.append(error)
    if tries == 1:
        raise errors[0]
    raise UserError(f"none of the {tries} images of {split.name} can be decoded; the first: {errors[0]}")


# --- images that can't be decoded ---------------------------------------------------------------------------


def skipped_images(split: Split, batch: NumpyBatch) -> dict[int, str]:
    """Returns the images that a batch passed over (see `train_batches`): a line that names the file, by index.

    Each of them is read again, to find what is wrong with it.
    """
    indices = [
        (index - back) % len(split)
        for index, skipped in zip(batch["index"].tolist(), batch["skipped"].tolist(), strict=True)
        for back in range(skipped, 0, -1)
    ]
    return _describe_damage(indices, functools.partial(_decode, split))


def without_damaged(view: View, split: Split, batches: Batches, lines: dict[int, str]) -> Batches:
    """Yields the batches of `eval_batches` without "damaged", and collects the images that can't be decoded.

    Args:
      view: the view with which the batches were made.
      split: the split of which the batches are made.
      batches: the batches; closed at the end.
      lines: filled with a line for each image that can't be decoded, which names the file, by its index.
    """
    with contextlib.closing(batches):
        for batch in batches:
            if "damaged" in batch:
                indices = batch["index"][batch.pop("damaged")].tolist()
                lines |= _describe_damage(indices, lambda index: view(split.example(index), None))
            yield batch


def _decode(split: Split, index: int) -> np.ndarray:
    return np.asarray(split.read(index))


def _describe_damage(indices: Iterable[int], read: Callable[[int], Any]) -> dict[int, str]:
    """Reads images again, and returns the errors of those that can't be decoded, by index."""
    lines: dict[int, str] = {}
    for index in indices:
        try:
            read(index)
        except DamagedImageError as error:
            lines[index] = str(error)
    return lines


def damage_error(split: Split, lines: Mapping[int, str]) -> DamagedImageError:
    """Returns an error that names the images of a split which can't be decoded, from lines as in `without_damaged`."""
    return damaged_images([lines[index] for index in sorted(lines)], f"{len(split):,} images of {split.name}")


def all_damage_error(data: DataConfig, split: Split, first: DamagedImageError) -> DamagedImageError:
    """Searches a split for further images that can't be decoded, for half a minute at most.

    Args:
      data: `num_workers` is read.
      split: the split to search.
      first: the error that was raised first.

    Returns:
      `damage_error` of all such images; where the time doesn't suffice, ``first`` and those that were found.
    """
    deadline, num_checked, lines = time.monotonic() + _SEARCH_S, 0, dict[int, str]()
    num_batches = -(-len(split) // _SEARCH_IMAGES)
    with contextlib.closing(in_order(_DamageCheck(split), 0, num_batches, num_workers(data, split))) as batches:
        for batch in batches:
            num_checked += len(batch["index"])
            lines |= _describe_damage(batch["index"][batch["damaged"]].tolist(), functools.partial(_decode, split))
            if time.monotonic() > deadline:
                break
    if num_checked == len(split) and lines:
        return damage_error(split, lines)
    further = [line for line in lines.values() if line != str(first)]
    return DamagedImageError(
        f"of the {len(split):,} images of {split.name} {num_checked:,} were checked, {len(lines):,} can't be decoded:"
        f" {'; '.join([str(first), *further[:MOST_NAMED]])}"
    )


@contextlib.contextmanager
def naming_all_damaged(data: DataConfig, split: Split) -> Iterator[None]:
    """Wraps reading images to train on: if one can't be decoded, raises a `UserError` that names all that can't."""
    try:
        yield
    except DamagedImageError as error:
        raise UserError(f"{all_damage_error(data, split, error)}{OR_SKIP}") from error


@dataclasses.dataclass(frozen=True)
class _DamageCheck:
    """The function from a batch's number to which of its images can't be decoded."""

    split: Split

    def __call__(self, number: int) -> NumpyBatch:
        index = np.arange(number * _SEARCH_IMAGES, min((number + 1) * _SEARCH_IMAGES, len(self.split)))
        read = functools.partial(_decode, self.split)
        damaged = [bool(_describe_damage([place], read)) for place in index.tolist()]
        return {"index": index, "damaged": np.array(damaged)}


def _rows(batch_size: int, process: tuple[int, int]) -> slice:
    """Returns the rows of a batch that a process reads."""
    number, count = process
    if batch_size % count:
        raise UserError(
            f"a batch of {batch_size} images does not divide over {count} processes; the nearest batch that does has"
            f" {max(1, round(batch_size / count)) * count}"
        )
    share = batch_size // count
    return slice(number * share, (number + 1) * share)


def num_workers(data: DataConfig, split: Split) -> int:
    """Returns the number of worker processes that decode the images of a split; 0: the main process decodes them."""
    if split.in_memory:
        return 0
    if data.num_workers is not None:
        return data.num_workers
    return num_cores()
