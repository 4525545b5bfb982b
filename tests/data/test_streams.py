"""The streams by their invariances: restarts and processes change nothing; evaluation counts each image once."""

import dataclasses
import itertools
import time

import numpy as np
import pytest

from mnv2_jax.config import DataConfig
from mnv2_jax.data import streams
from mnv2_jax.data.images import evaluation_view, random_resized_view
from mnv2_jax.data.sources import MemoryReader, open_dataset
from mnv2_jax.data.split import Split
from mnv2_jax.data.streams import IndexStream, eval_batches, fits, load_arrays, train_batches
from mnv2_jax.errors import UserError

DATA = DataConfig(name="folder", resolution=16, batch_size=6, num_workers=0)


def numbered(count: int, size: int = 16) -> Split:
    """A split whose image i is filled with i, and labelled i % 5."""
    images = np.broadcast_to(np.arange(count, dtype=np.uint8)[:, None, None, None], (count, size, size, 3))
    return Split("train", np.arange(count, dtype=np.int32) % 5, MemoryReader(images), in_memory=True)


@pytest.fixture(scope="module")
def photo_split(photos) -> Split:
    return open_dataset(DataConfig(name="folder", path=str(photos))).train


def take(batches, count):
    """The first batches; then closes the stream."""
    taken = list(itertools.islice(batches, count))
    batches.close()
    return taken


def assert_same(a, b):
    assert a.keys() == b.keys()
    for key in a:
        assert a[key].dtype == b[key].dtype
        np.testing.assert_array_equal(a[key], b[key])


# --- the order ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_images", [1, 2, 17, 100, 1437])
def test_every_epoch_is_a_permutation(num_images):
    order = IndexStream(num_images, seed=3).take(0, 3 * num_images)
    np.testing.assert_array_equal(order["epoch"], np.repeat(np.arange(3), num_images))
    for epoch in order["index"].reshape(3, num_images):
        np.testing.assert_array_equal(np.sort(epoch), np.arange(num_images))


def test_epochs_and_seeds_differ_and_neighbouring_seeds_share_no_epoch():
    orders = [IndexStream(50, seed).take(0, 300)["index"].reshape(6, 50) for seed in range(20)]
    assert len({epoch.tobytes() for order in orders for epoch in order}) == 20 * 6


def test_position_and_image_are_uncorrelated():
    orders = np.stack([IndexStream(97, seed).take(0, 97)["index"] for seed in range(300)])
    # The mean image number at each position: 48 in expectation, with a deviation of 28 / sqrt(300) = 1.6.
    assert np.abs(orders.mean(axis=0) - 48).max() < 6.5


def test_a_batch_crosses_the_end_of_an_epoch():
    stream = IndexStream(10, seed=0)
    whole = stream.take(0, 24)
    batch = stream.take(8, 16)
    np.testing.assert_array_equal(batch["index"], whole["index"][8:16])
    np.testing.assert_array_equal(batch["epoch"], [0, 0, 1, 1, 1, 1, 1, 1])
    assert batch["index"].dtype == batch["epoch"].dtype == np.int32


def test_order_is_the_published_one():
    # Runs that have been published can be continued only as long as these numbers stand.
    assert IndexStream(1000, seed=0).take(0, 6)["index"].tolist() == [855, 921, 269, 11, 850, 403]
    assert IndexStream(1000, seed=1).take(10**9, 10**9 + 3)["index"].tolist() == [165, 417, 927]


def test_a_late_step_costs_no_more_than_the_first():
    stream = IndexStream(100_000, seed=0)
    start = time.perf_counter()
    stream.take(10**9, 10**9 + 96)
    assert time.perf_counter() - start < 0.5  # 7 ms on an idle core


def test_index_batches_are_much_faster_than_training_needs_them():
    batches = train_batches(dataclasses.replace(DATA, batch_size=128), numbered(250), seed=0, resident=True)
    next(batches)
    start = time.perf_counter()
    take(batches, 100)
    assert 100 * 128 / (time.perf_counter() - start) > 100_000  # images a second; 4 million on an idle core


# --- training batches ---------------------------------------------------------------------------------------

CROPS = ["random_resized", "shift", "none"]


@pytest.mark.parametrize("crop", CROPS)
@pytest.mark.parametrize("resident", [True, False])
def test_restart_at_any_step_continues_the_stream(photo_split, crop, resident):
    data = dataclasses.replace(DATA, crop=crop)
    whole = take(train_batches(data, photo_split, seed=1, resident=resident), 7)
    for step in (1, 2, 5):
        for a, b in zip(
            take(train_batches(data, photo_split, 1, step, resident=resident), 7 - step), whole[step:], strict=True
        ):
            assert_same(a, b)


@pytest.mark.parametrize("count", [2, 3, 6])
@pytest.mark.parametrize("resident", [True, False])
def test_processes_together_read_the_batch_of_one(photo_split, count, resident):
    whole = take(train_batches(DATA, photo_split, seed=1, resident=resident), 4)
    shares = [
        take(train_batches(DATA, photo_split, seed=1, process=(p, count), resident=resident), 4) for p in range(count)
    ]
    for k in range(4):
        assert_same({key: np.concatenate([share[k][key] for share in shares]) for key in whole[k]}, whole[k])


def test_contents(photo_split):
    (batch,) = take(train_batches(DATA, photo_split, seed=9, start_step=5), 1)
    assert {key: (value.dtype.name, value.shape) for key, value in batch.items()} == {
        "index": ("int32", (6,)),
        "epoch": ("int32", (6,)),
        "image": ("uint8", (6, 16, 16, 3)),
        "label": ("int32", (6,)),
    }
    for row, (index, epoch) in enumerate(zip(batch["index"].tolist(), batch["epoch"].tolist(), strict=True)):
        rng = np.random.default_rng((9, epoch, index))
        expected = random_resized_view(photo_split.read(index), DATA, rng)
        np.testing.assert_array_equal(batch["image"][row], expected)
        assert batch["label"][row] == photo_split.labels[index]


def test_the_crop_depends_on_seed_epoch_and_index_only(photo_split):
    """The same (epoch, image) in another batch size, so at another step and row, is cropped alike."""

    def views(batch_size, steps):
        batches = take(train_batches(dataclasses.replace(DATA, batch_size=batch_size), photo_split, 4), steps)
        return {
            (int(e), int(i)): image.tobytes()
            for batch in batches
            for e, i, image in zip(batch["epoch"], batch["index"], batch["image"], strict=True)
        }

    assert views(4, 9) == views(12, 3)
    first, second = ({i: v for (e, i), v in views(17, 2).items() if e == epoch} for epoch in (0, 1))
    assert sum(first[i] == second[i] for i in range(17)) == 0


def test_without_random_crop_it_is_the_evaluation_view(photo_split):
    (batch,) = take(train_batches(dataclasses.replace(DATA, crop="shift"), photo_split, seed=0), 1)
    expected = evaluation_view(photo_split.read(int(batch["index"][2])), DATA)
    np.testing.assert_array_equal(batch["image"][2], expected)


def test_batch_may_be_larger_than_the_split():
    (batch,) = take(train_batches(dataclasses.replace(DATA, batch_size=20), numbered(7), seed=0), 1)
    np.testing.assert_array_equal(np.bincount(batch["epoch"]), [7, 7, 6])


def test_resident_batches_read_no_image():
    def read(index):
        raise AssertionError(f"image {index} was read")

    split = dataclasses.replace(numbered(7), read=read)
    assert set(take(train_batches(DATA, split, 0, resident=True), 1)[0]) == {"index", "epoch"}
    assert set(take(eval_batches(DATA, split, resident=True), 1)[0]) == {"index", "mask"}


def test_batch_that_does_not_divide():
    with pytest.raises(UserError, match=r"a batch of 6 images does not divide over 4 processes; .*: 8"):
        train_batches(DATA, numbered(7), seed=0, process=(0, 4))


# --- evaluation batches -------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_images", [1, 2, 97, 96])
@pytest.mark.parametrize(("batch_size", "count"), [(1, 1), (8, 1), (8, 2), (96, 4), (100, 1), (128, 8)])
@pytest.mark.parametrize("resident", [True, False])
def test_every_image_counts_once(num_images, batch_size, count, resident):
    split = numbered(num_images)
    data = dataclasses.replace(DATA, eval_crop_fraction=1.0)
    seen: list[int] = []
    lengths = set()
    for p in range(count):
        batches = list(eval_batches(data, split, batch_size, process=(p, count), resident=resident))
        lengths.add(len(batches))
        for batch in batches:
            assert all(len(value) == batch_size // count for value in batch.values())
            seen += batch["index"][batch["mask"]].tolist()
            assert (batch["index"][~batch["mask"]] == 0).all()
            if not resident:
                np.testing.assert_array_equal(batch["image"][batch["mask"]][:, 3, 3, 0], batch["index"][batch["mask"]])
                np.testing.assert_array_equal(batch["label"][batch["mask"]], batch["index"][batch["mask"]] % 5)
    assert sorted(seen) == list(range(num_images))
    assert lengths == {-(-num_images // batch_size)}  # the same on all processes, or they would wait for each other


def test_evaluation_is_in_order():
    indices = np.concatenate([b["index"] for b in eval_batches(DATA, numbered(12), 4)])
    np.testing.assert_array_equal(indices, np.arange(12))


# --- resident arrays ----------------------------------------------------------------------------------------


def test_arrays_are_the_evaluation_views(photo_split):
    images, labels = load_arrays(DATA, photo_split)
    assert images.shape == (17, 16, 16, 3)
    for i in range(17):
        np.testing.assert_array_equal(images[i], evaluation_view(photo_split.read(i), DATA))
    np.testing.assert_array_equal(labels, photo_split.labels)


def test_fits():
    small, data = numbered(50), dataclasses.replace(DATA, crop="shift")
    assert fits(data, small, training=True)
    assert not fits(dataclasses.replace(data, crop="random_resized"), small, training=True)
    assert fits(dataclasses.replace(data, crop="random_resized"), small, training=False)
    limit = streams.RESIDENT_BYTES // (4096**2 * 3)
    assert limit == 10
    assert fits(dataclasses.replace(data, resolution=4096), numbered(10), training=True)
    assert not fits(dataclasses.replace(data, resolution=4096), numbered(11), training=True)
