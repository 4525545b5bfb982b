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

import dataclasses
import functools
import sys
from collections.abc import Callable, Iterable

import numpy as np

from mnv2_jax.config import AugmentConfig, DataConfig
from mnv2_jax.data import shared
from mnv2_jax.data.images import (
    DamagedImageError,
    Picture,
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
    data: DataConfig, split: Split, poll: Callable[[], None] = lambda: None
) -> tuple[np.ndarray, np.ndarray]:
    """The deterministic view of every image, in the order of the split.

    Args:
      data: how images are cropped. For training unset `eval_resolution`, so that it is `resolution`.
      split: what is loaded.
      poll: called every few images, since this can take minutes; it may raise to give up.

    Returns:
      Images, uint8 [n, resolution, resolution, 3], and labels, int32 [n].

    Raises:
      UserError: naming the image file that can't be read.
    """
    size, resolution = len(split), data.seen_resolution
    images = np.empty((size, resolution, resolution, 3), np.uint8)
    labels = np.empty(size, np.int32)
    for batch in eval_batches(data, split, batch_size=min(size, 64)):
        poll()
        index, mask = batch["index"], batch["mask"]
        images[index[mask]], labels[index[mask]] = batch["image"][mask], batch["label"][mask]
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
      image.
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
            rows = range(len(batch["index"]))
            batch |= _filled(resolution, self.split, batch, rows, sized._view, self.data.skip_corrupt)
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
            rows = np.flatnonzero(mask).tolist()
            batch |= _filled(self.data.seen_resolution, self.split, batch, rows, self._view)
        return batch

    def _view(self, image: Picture, index: int, epoch: int) -> np.ndarray:
        del index, epoch
        return evaluation_view(image, self.data)


def _filled(
    resolution: int,
    split: Split,
    batch: NumpyBatch,
    rows: Iterable[int],
    view: Callable[[Picture, int, int], np.ndarray],
    skip_damaged: bool = False,
) -> NumpyBatch:
    """The images and labels of these rows, black and 0 in the others.

    ``view`` makes [resolution, resolution, 3] of an image, its index and epoch.
    """
    indices = batch["index"].copy()
    size, tries = len(indices), len(split) if skip_damaged else 1
    labels, skipped = np.zeros(size, np.int32), np.zeros(size, np.int32)
    epochs = batch.get("epoch", np.zeros(size, np.int32))
    images = shared.empty((size, resolution, resolution, 3))
    images[sorted(set(range(size)).difference(rows))] = 0
    for row in rows:
        images[row], indices[row], skipped[row] = _first_sound(split, view, int(indices[row]), int(epochs[row]), tries)
        labels[row] = split.labels[int(indices[row])]  # after its image: a record that holds both is read once
    filled: NumpyBatch = {"image": images, "label": labels}
    return filled | {"index": indices, "skipped": skipped} if skip_damaged else filled


def _first_sound(
    split: Split, view: Callable[[Picture, int, int], np.ndarray], index: int, epoch: int, tries: int
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


def skipped_images(split: Split, batch: NumpyBatch) -> dict[int, str]:
    """The images that a batch passed over (see `train_batches`): their indices, and the line that names the file.

    Reads each of them again, to see what is wrong with it.
    """
    found: dict[int, str] = {}
    for index, skipped in zip(batch["index"].tolist(), batch["skipped"].tolist(), strict=True):
        for back in range(skipped, 0, -1):
            place = (index - back) % len(split)
            try:
                np.asarray(split.read(place))
            except DamagedImageError as error:
                found[place] = str(error)
    return found


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
