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
from collections.abc import Callable, Iterable, Iterator, Mapping

import numpy as np

from mnv2_jax.config import AugmentConfig, DataConfig
from mnv2_jax.data import shared
from mnv2_jax.data.images import (
    MOST_NAMED,
    DamagedImageError,
    Picture,
    damaged_images,
    evaluation_view,
    random_resized_view,
)
from mnv2_jax.data.policies import apply_policy
from mnv2_jax.data.shared import NumpyBatch
from mnv2_jax.data.split import Split
from mnv2_jax.data.workers import Batches, in_order, num_cores
from mnv2_jax.errors import UserError

RESIDENT_BYTES = 512 * 2**20
"""Most that a split may take on a device; the network and its activations want the rest."""

_PLAIN = AugmentConfig()
OR_SKIP = "; or go on without: --config.data.skip_corrupt=True"
"""What else can be done about them in a run."""
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
        """What stands at some positions, int [b], of the stream.

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


def fits(data: DataConfig, split: Split, training: bool, augment: AugmentConfig = _PLAIN) -> bool:
    """Whether the split can be kept on a device: each image has one view only, and they all are small enough."""
    one_view = not training or (data.crop != "random_resized" and augment.policy == "none" and not data.scales)
    skips = training and data.skip_corrupt and not split.in_memory  # which batches tell of
    resolution = data.resolution if training else data.seen_resolution
    return one_view and not skips and len(split) * resolution**2 * 3 <= RESIDENT_BYTES


def load_arrays(
    data: DataConfig,
    split: Split,
    poll: Callable[[], None] = lambda: None,
    damaged: dict[int, str] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """The deterministic view of every image, in the order of the split.

    Args:
      data: how images are cropped. For training unset `eval_resolution`, so that it is `resolution`.
      split: what is loaded.
      poll: called every few images, since this can take minutes; it may raise to give up.
      damaged: takes what can't be decoded, as in `without_damaged`; unset: there must be none.

    Returns:
      Images, uint8 [n, resolution, resolution, 3], black where they can't be decoded, and labels, int32 [n].

    Raises:
      UserError: naming the image file that can't be read, or all that can't be decoded.
    """
    size, resolution = len(split), data.seen_resolution
    images = np.zeros((size, resolution, resolution, 3), np.uint8)
    labels = np.zeros(size, np.int32)
    found: dict[int, str] = {}
    for batch in without_damaged(data, split, eval_batches(data, split, batch_size=min(size, 64)), found):
        poll()
        index, mask = batch["index"], batch["mask"]
        images[index[mask]], labels[index[mask]] = batch["image"][mask], batch["label"][mask]
    if damaged is not None:
        damaged.update(found)
    elif found:
        raise damage(split, found)
    return images, labels


def train_batches(
    data: DataConfig,
    split: Split,
    seed: int,
    start_step: int = 0,
    process: tuple[int, int] = (0, 1),
    resident: bool = False,
    augment: AugmentConfig = _PLAIN,
    shapes: tuple[tuple[int, int], ...] = (),
    group_size: int = 1,
) -> Batches:
    """The endless batches of training, from a step on. Close the iterator to end its worker processes.

    Args:
      data: how images are cropped, `resolution`, `batch_size` (b, over all processes) and `num_workers`.
      split: what is trained on.
      seed: of the order and the crops.
      start_step: number of the first batch.
      process: (p, P): of each batch, rows p * b / P up to (p + 1) * b / P are given.
      resident: images and labels are with the caller; only index and epoch are given.
      augment: what is done to images on the host, after the crop, and how often an image is repeated.
      shapes: (resolution, b) of the batches instead, each once in as many steps.
      group_size: of the norms; the repeats of an image lie in different groups. Must divide b.

    Yields:
      index, epoch: int32 [b / P]; unless resident image: uint8 [b / P, resolution, resolution, 3] and label:
      int32 [b / P]. With `data.skip_corrupt` an image that can't be decoded is replaced by the next of the split that
      can; index, label and crop are then that one's, and skipped, int32 [b / P], says how many were passed over: the
      images (index - 1, ..., index - skipped) % n.

    Raises:
      UserError: naming the image file that can't be read.
    """
    stream = IndexStream(len(split), seed, augment.repeats)
    shape_stream = ShapeStream(shapes or ((data.resolution, data.batch_size),), seed)
    for _, batch_size in shape_stream.shapes:
        _rows(batch_size, process)  # refuses now what would fail in a worker
    make = _TrainBatch(data, augment, split, seed, process, stream, shape_stream, group_size, resident)
    return in_order(make, start_step, sys.maxsize, 0 if resident else num_workers(data, split))


def eval_batches(
    data: DataConfig,
    split: Split,
    batch_size: int | None = None,
    process: tuple[int, int] = (0, 1),
    resident: bool = False,
) -> Batches:
    """Every image of a split exactly once, in order; the rows that fill the last batch up have mask False.

    Args:
      data: how images are cropped, `eval_batch_size` and `num_workers`.
      split: what is evaluated.
      batch_size: over all processes; None: `data.eval_batch_size`.
      process: as in `train_batches`; all processes get the same number of batches.
      resident: images and labels are with the caller; only index and mask are given.

    Yields:
      As `train_batches`, with mask: bool [b / P] instead of epoch. Rows of padding have index 0, label 0 and a black
      image. Where images can't be decoded, their rows are masked and black, too, and damaged: bool [b / P] says which
      they are (`without_damaged`).
    """
    batch_size = data.eval_batch_size if batch_size is None else batch_size
    make = _EvalBatch(data, split, batch_size, _rows(batch_size, process), resident)
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
    augment: AugmentConfig
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
        if not self.resident:
            sized = dataclasses.replace(self, data=dataclasses.replace(self.data, resolution=resolution))
            tries = len(self.split) if self.data.skip_corrupt else 1
            read = functools.partial(_first_sound, self.split, sized._view, tries)
            filled = _filled(resolution, self.split, batch, range(len(batch["index"])), read)
            if not self.data.skip_corrupt:
                del filled["skipped"]
            batch |= filled
        return batch

    def _view(self, image: Picture, index: int, epoch: int) -> np.ndarray:
        data, place = self.data, (self.seed, epoch, index)
        if data.crop == "random_resized":
            view = random_resized_view(image, data, np.random.default_rng(place))
        else:
            view = evaluation_view(image, data, data.resolution)
        if self.augment.policy == "none":
            return view
        # Draws of its own, so that a policy leaves the crops as they are.
        return apply_policy(view, self.augment, np.random.default_rng((*place, 1)), data.mean)


@dataclasses.dataclass(frozen=True)
class _EvalBatch:
    """Batch number -> batch."""

    data: DataConfig
    split: Split
    batch_size: int
    rows: slice
    resident: bool

    def __call__(self, number: int) -> NumpyBatch:
        index = number * self.batch_size + np.arange(self.rows.start, self.rows.stop, dtype=np.int32)
        mask = index < len(self.split)
        batch = {"index": np.where(mask, index, 0).astype(np.int32), "mask": mask}
        if not self.resident:
            batch |= _filled(
                self.data.seen_resolution, self.split, batch, np.flatnonzero(mask).tolist(), self._sound_or_none
            )
            damaged = batch.pop("skipped").astype(bool)
            if damaged.any():
                batch |= {"mask": mask & ~damaged, "damaged": damaged}
        return batch

    def _sound_or_none(self, index: int, epoch: int) -> tuple[np.ndarray | None, int, int]:
        del epoch
        try:
            return evaluation_view(self.split.read(index), self.data), index, 0
        except DamagedImageError:
            return None, index, 1


def _filled(
    resolution: int,
    split: Split,
    batch: NumpyBatch,
    rows: Iterable[int],
    read: Callable[[int, int], tuple[np.ndarray | None, int, int]],
) -> NumpyBatch:
    """The images and labels of these rows, black and 0 in the others; with their index and skipped.

    ``read`` makes of an index and its epoch the view, [resolution, resolution, 3], or none, which is black; the index
    that it is of; and how many images were skipped.
    """
    indices = batch["index"].copy()
    size = len(indices)
    labels, skipped = np.zeros(size, np.int32), np.zeros(size, np.int32)
    epochs = batch.get("epoch", np.zeros(size, np.int32))
    images = shared.empty((size, resolution, resolution, 3))
    images[sorted(set(range(size)).difference(rows))] = 0
    for row in rows:
        view, indices[row], skipped[row] = read(int(indices[row]), int(epochs[row]))
        images[row] = 0 if view is None else view
        labels[row] = split.labels[int(indices[row])]  # after its image: a record that holds both is read once
    return {"image": images, "label": labels, "index": indices, "skipped": skipped}


def _first_sound(
    split: Split, view: Callable[[Picture, int, int], np.ndarray], tries: int, index: int, epoch: int
) -> tuple[np.ndarray, int, int]:
    """The view of an image, or of the first after it that can be decoded, its index, and how many were skipped."""
    damage: list[DamagedImageError] = []
    while len(damage) < tries:
        place = (index + len(damage)) % len(split)
        try:
            return view(split.read(place), place, epoch), place, len(damage)
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
    return _lines(split, passed, np.asarray)


def without_damaged(data: DataConfig, split: Split, batches: Batches, found: dict[int, str]) -> Iterator[NumpyBatch]:
    """The same batches (`eval_batches`) without their "damaged".

    Args:
      data: how images are cropped.
      split: what the batches are of.
      batches: closed at the end.
      found: takes a line that names the file for each image that can't be decoded, by its index.
    """
    with contextlib.closing(batches):
        for batch in batches:
            if "damaged" in batch:
                indices = batch["index"][batch.pop("damaged")].tolist()
                found |= _lines(split, indices, lambda image: evaluation_view(image, data))
            yield batch


def _lines(split: Split, indices: Iterable[int], decode: Callable[[Picture], np.ndarray]) -> dict[int, str]:
    found: dict[int, str] = {}
    for index in indices:
        try:
            decode(split.read(index))
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
            lines |= _lines(split, batch["index"][batch["damaged"]].tolist(), np.asarray)
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
        damaged = [bool(_lines(self.split, [place], np.asarray)) for place in index.tolist()]
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
