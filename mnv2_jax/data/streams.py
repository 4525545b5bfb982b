"""The order of the images, and the batches that follow it.

One index stream, two ways to fill it. Where every image can be prepared once (`fits`), the caller keeps them all on the
device (`load_arrays`) and asks for ``resident`` batches, which are index numbers only. Otherwise worker processes
decode whole batches.

    step k ──► positions k*b .. k*b + b - 1 ──► (epoch, index) ──► image index, cropped by (seed, epoch, index)

Batch k is a pure function of the seed and k: a run that restarts at step k reads nothing before it, and neither the
number of processes nor that of workers changes a pixel.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import functools
import multiprocessing
import os
import signal
import sys
import threading
import weakref
from collections.abc import Callable, Generator, Iterable
from typing import TypeAlias

import grain
import numpy as np
from absl import flags

from mnv2_jax.config import AugmentConfig, DataConfig
from mnv2_jax.data.images import evaluation_view, random_resized_view
from mnv2_jax.data.split import Split
from mnv2_jax.errors import UserError

RESIDENT_BYTES = 512 * 2**20
"""Most that a split may take on a device; the network and its activations want the rest."""

_PLAIN = AugmentConfig()

NumpyBatch: TypeAlias = dict[str, np.ndarray]
"""See `types.Batch`: index; epoch in training, mask in evaluation; image and label unless they are resident."""

Batches: TypeAlias = Generator[NumpyBatch, None, None]
"""``close()`` ends its worker processes; so does dropping it."""


# --- the index stream ---------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class IndexStream:
    """The endless order of training: every image once an epoch, a new permutation each."""

    num_images: int
    seed: int

    def take(self, start: int, stop: int) -> NumpyBatch:
        """Positions ``start`` to ``stop`` of the stream.

        Returns:
          index: int32 [stop - start], in 0..num_images - 1; epoch: int32 [stop - start].
        """
        positions = np.arange(start, stop)
        epoch = (positions // self.num_images).astype(np.int32)
        index = np.empty(len(positions), np.int32)
        for number in np.unique(epoch).tolist():
            rows = epoch == number
            index[rows] = _permutation(self.num_images, self.seed, number)[positions[rows] % self.num_images]
        return {"index": index, "epoch": epoch}


@functools.lru_cache(maxsize=2)  # a batch may lie across the end of an epoch
def _permutation(num_images: int, seed: int, epoch: int) -> np.ndarray:
    """The order of one epoch, int32 [num_images]: 0.2 s for ImageNet, and nothing of the epochs before is needed.

    Not by grain's `shuffle`: it seeds epoch e with seed + e, so that epoch 1 of seed 0 were epoch 0 of seed 1 and runs
    over neighbouring seeds went through the same orders (SeedSequence mixes the two numbers), and its index_shuffle
    takes 7 µs an index, 30 where there are 1,000 images. Sorting the raw words of a bit generator, which NumPy
    promises never to change, keeps the order the same under every version.
    """
    words = np.random.PCG64(np.random.SeedSequence((seed, epoch))).random_raw(num_images)
    return np.argsort(words, kind="stable").astype(np.int32)


# --- filling it ---------------------------------------------------------------------------------------------


def fits(data: DataConfig, split: Split, training: bool, augment: AugmentConfig = _PLAIN) -> bool:
    """Whether the split can be kept on a device: each image has one view only, and they all are small enough."""
    one_view = not training or (data.crop != "random_resized" and augment.policy == "none")
    return one_view and len(split) * data.resolution**2 * 3 <= RESIDENT_BYTES


def load_arrays(
    data: DataConfig, split: Split, poll: Callable[[], None] = lambda: None
) -> tuple[np.ndarray, np.ndarray]:
    """The deterministic view of every image, in the order of the split.

    Args:
      data: how images are cropped.
      split: what is loaded.
      poll: called every few images, since this can take minutes; it may raise to give up.

    Returns:
      Images, uint8 [n, resolution, resolution, 3], and labels, int32 [n].

    Raises:
      UserError: naming the image file that can't be read.
    """
    size = len(split)
    images = np.empty((size, data.resolution, data.resolution, 3), np.uint8)
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
) -> Batches:
    """The endless batches of training, from a step on. Close the iterator to end its worker processes.

    Args:
      data: how images are cropped, `batch_size` (b, over all processes) and `num_workers`.
      split: what is trained on.
      seed: of the order and the crops.
      start_step: number of the first batch.
      process: (p, P): of each batch, rows p * b / P up to (p + 1) * b / P are given.
      resident: images and labels are with the caller; only index and epoch are given.
      augment: what is done to images on the host, after the crop.

    Yields:
      index, epoch: int32 [b / P]; unless resident image: uint8 [b / P, resolution, resolution, 3] and label:
      int32 [b / P].

    Raises:
      UserError: naming the image file that can't be read.
    """
    rows = _rows(data.batch_size, process)
    make = _TrainBatch(data, augment, split, seed, rows, IndexStream(len(split), seed), resident)
    return _stream(make, start_step, sys.maxsize, 0 if resident else _num_workers(data, split))


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
    workers = 0 if resident else min(_num_workers(data, split), num_batches)
    if data.num_workers is None:
        # A worker takes as long to start as it does to decode some hundred images.
        workers = min(workers, len(split) // 500)
    return _stream(make, 0, num_batches, workers)


@dataclasses.dataclass(frozen=True)
class _TrainBatch:
    """Step number -> batch; what a worker process is sent."""

    data: DataConfig
    augment: AugmentConfig
    split: Split
    seed: int
    rows: slice
    stream: IndexStream
    resident: bool

    def __call__(self, step: int) -> NumpyBatch:
        first = step * self.data.batch_size
        batch = self.stream.take(first + self.rows.start, first + self.rows.stop)
        if not self.resident:
            batch |= _filled(self.data, self.split, batch, range(len(batch["index"])), self._view)
        return batch

    def _view(self, image: np.ndarray, index: int, epoch: int) -> np.ndarray:
        if self.data.crop != "random_resized":
            return evaluation_view(image, self.data)
        return random_resized_view(image, self.data, np.random.default_rng((self.seed, epoch, index)))


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
            batch |= _filled(self.data, self.split, batch, rows, lambda image, *_: evaluation_view(image, self.data))
        return batch


def _filled(
    data: DataConfig,
    split: Split,
    batch: NumpyBatch,
    rows: Iterable[int],
    view: Callable[[np.ndarray, int, int], np.ndarray],
) -> NumpyBatch:
    """The images and labels of these rows, black and 0 in the others.

    ``view`` makes [resolution, resolution, 3] of an image, its index and epoch.
    """
    size = len(batch["index"])
    images = np.zeros((size, data.resolution, data.resolution, 3), np.uint8)
    labels = np.zeros(size, np.int32)
    epochs = batch.get("epoch", np.zeros(size, np.int32))
    for row in rows:
        index = int(batch["index"][row])
        images[row] = view(split.read(index), index, int(epochs[row]))
        labels[row] = split.labels[index]  # after its image: a record that holds both is then read once
    return {"image": images, "label": labels}


def _rows(batch_size: int, process: tuple[int, int]) -> slice:
    number, count = process
    if batch_size % count:
        raise UserError(
            f"a batch of {batch_size} images does not divide over {count} processes; the nearest that does:"
            f" {max(1, round(batch_size / count)) * count}"
        )
    share = batch_size // count
    return slice(number * share, (number + 1) * share)


# --- worker processes ---------------------------------------------------------------------------------------


def _num_workers(data: DataConfig, split: Split) -> int:
    if split.in_memory:
        return 0
    if data.num_workers is not None:
        return data.num_workers
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _stream(make: Callable[[int], NumpyBatch], start: int, stop: int, num_workers: int) -> Batches:
    """``make(start)``, ``make(start + 1)``, ... in this order, made by worker processes where there are any."""
    if num_workers == 0:
        return (make(step) for step in range(start, stop))
    batches = _from_workers(make, start, stop, num_workers)
    _OPEN.add(batches)
    return batches


_OPEN: weakref.WeakSet[Batches] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    """Ends the workers of a stream that was left open, before the interpreter takes apart what they need to end."""
    for batches in list(_OPEN):
        with contextlib.suppress(ValueError):  # it is being read from by another thread
            batches.close()


def _from_workers(make: Callable[[int], NumpyBatch], start: int, stop: int, num_workers: int) -> Batches:
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # grain reads a flag of absl; under app.run they are parsed already
    dataset = (
        grain.MapDataset.range(start, stop)
        .map(make)
        .to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))  # a process each is parallel enough
        .mp_prefetch(grain.MultiprocessingOptions(num_workers=num_workers), worker_init_fn=_start_worker)
    )
    with contextlib.closing(iter(dataset)) as iterator:
        while True:
            try:
                batch = next(iterator)
            except StopIteration:
                return
            except UserError as error:
                raise UserError(str(error)) from None  # without grain's frames and its note on how to see them
            except RuntimeError as error:
                if "terminated unexpectedly" not in str(error):
                    raise
                raise UserError(
                    f"a process that reads images was killed ({str(error).split('.')[0]}), mostly for want of memory;"
                    " lower data.num_workers, or give more of it (exit code -7: of shared memory, docker run"
                    " --shm-size=8g)"
                ) from error
            # Copied out of shared memory, which is small (64 MB in a container) and must not outlive the worker.
            arrays = {key: np.array(value) for key, value in batch.items()}
            del batch
            yield arrays


def _start_worker(number: int, count: int) -> None:
    """Runs first in a worker: it shall live exactly as long as it is needed."""
    del number, count
    # Ctrl-C and a scheduler's SIGTERM reach the whole process group, but it is the main process that decides: it takes
    # the batch it waits for, saves a checkpoint, and then closes us. Should it not, we are gone a minute later.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(60))
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    """A main process that is killed can't close anything; without it, a worker would wait forever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
