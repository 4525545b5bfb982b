"""The streams by their invariances: restarts and processes change nothing; evaluation counts each image once."""

import collections
import dataclasses
import itertools
import os
import re
import shutil
import time

import numpy as np
import pytest

from mnv2_jax.config import AugmentConfig, DataConfig
from mnv2_jax.data import images, streams
from mnv2_jax.data.images import DamagedImageError, evaluation_view, random_resized_view
from mnv2_jax.data.policies import apply_policy
from mnv2_jax.data.sources import open_dataset
from mnv2_jax.data.split import Split
from mnv2_jax.data.streams import IndexStream, ShapeStream, skipped_images
from mnv2_jax.errors import UserError
from tests.data.classified import eval_batches, fits, load_arrays, train_batches, without_damaged

DATA = DataConfig(name="folder", resolution=16, batch_size=6, num_workers=0)


def numbered(count: int, size: int = 16) -> Split:
    """A split whose image i is filled with i, and labelled i % 5."""
    images = np.broadcast_to(np.arange(count, dtype=np.uint8)[:, None, None, None], (count, size, size, 3))
    return Split.of_arrays("train", images, np.arange(count) % 5)


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
    order = IndexStream(num_images, seed=3).take(np.arange(3 * num_images))
    np.testing.assert_array_equal(order["epoch"], np.repeat(np.arange(3), num_images))
    for epoch in order["index"].reshape(3, num_images):
        np.testing.assert_array_equal(np.sort(epoch), np.arange(num_images))


def test_epochs_and_seeds_differ_and_neighbouring_seeds_share_no_epoch():
    orders = [IndexStream(50, seed).take(np.arange(300))["index"].reshape(6, 50) for seed in range(20)]
    assert len({epoch.tobytes() for order in orders for epoch in order}) == 20 * 6


def test_position_and_image_are_uncorrelated():
    orders = np.stack([IndexStream(97, seed).take(np.arange(97))["index"] for seed in range(300)])
    # The mean image number at each position: 48 in expectation, with a deviation of 28 / sqrt(300) = 1.6.
    assert np.abs(orders.mean(axis=0) - 48).max() < 6.5


def test_a_batch_crosses_the_end_of_an_epoch():
    stream = IndexStream(10, seed=0)
    whole = stream.take(np.arange(24))
    batch = stream.take(np.arange(8, 16))
    np.testing.assert_array_equal(batch["index"], whole["index"][8:16])
    np.testing.assert_array_equal(batch["epoch"], [0, 0, 1, 1, 1, 1, 1, 1])
    assert batch["index"].dtype == batch["epoch"].dtype == np.int32


def test_order_is_the_published_one():
    # Runs that have been published can be continued only as long as these numbers stand.
    assert IndexStream(1000, seed=0).take(np.arange(6))["index"].tolist() == [855, 921, 269, 11, 850, 403]
    assert IndexStream(1000, seed=1).take(np.arange(10**9, 10**9 + 3))["index"].tolist() == [165, 417, 927]


def test_a_late_step_costs_no_more_than_the_first():
    stream = IndexStream(100_000, seed=0)
    start = time.perf_counter()
    stream.take(np.arange(10**9, 10**9 + 96))
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
    with pytest.raises(UserError, match=r"batch of 6 images .* 4 processes; .* 8$"):
        train_batches(DATA, numbered(7), seed=0, process=(0, 4))


# --- batches of several shapes ------------------------------------------------------------------------------

SHAPES = ((16, 12), (24, 6), (32, 4))


def test_each_shape_comes_once_a_block_and_steps_before_are_counted():
    stream = ShapeStream(SHAPES, seed=2)
    steps = [stream.at(step) for step in range(300)]
    firsts = np.cumsum([0, *(images for _, images, _ in steps)])
    np.testing.assert_array_equal([first for _, _, first in steps], firsts[:-1])
    blocks = [tuple(resolution for resolution, _, _ in steps[i : i + 3]) for i in range(0, 300, 3)]
    assert {tuple(sorted(block)) for block in blocks} == {(16, 24, 32)}
    counts = collections.Counter(blocks)
    assert len(counts) == 6
    assert max(counts.values()) < 32  # 17 in expectation, with a deviation of 3.7
    other = ShapeStream(SHAPES, seed=3)
    assert [other.at(step) for step in range(300)] != steps


def test_order_of_shapes_is_the_published_one():
    five = ShapeStream(tuple((scale, 1) for scale in (128, 192, 224, 288, 320)), seed=0)
    assert [five.at(step)[0] for step in range(10)] == [288, 192, 320, 224, 128, 192, 288, 224, 128, 320]
    start = time.perf_counter()
    assert five.at(10**9)[2] == 10**9
    assert time.perf_counter() - start < 0.01


def test_one_shape_is_the_stream_without_shapes(photo_split):
    plain = take(train_batches(DATA, photo_split, seed=1, start_step=3), 3)
    shaped = take(train_batches(DATA, photo_split, seed=1, start_step=3, shapes=((16, 6),)), 3)
    for a, b in zip(shaped, plain, strict=True):
        assert_same(a, b)


@pytest.mark.parametrize("crop", CROPS)
def test_images_come_straight_to_the_resolution_of_their_batch(photo_split, crop):
    data = dataclasses.replace(DATA, crop=crop)
    stream = ShapeStream(SHAPES, seed=9)
    for step, batch in enumerate(take(train_batches(data, photo_split, seed=9, shapes=SHAPES), 3)):
        resolution, images, _ = stream.at(step)
        assert batch["image"].shape == (images, resolution, resolution, 3)
        index, epoch = int(batch["index"][2]), int(batch["epoch"][2])
        sized = dataclasses.replace(data, resolution=resolution)
        image, rng = photo_split.read(index), np.random.default_rng((9, epoch, index))
        expected = random_resized_view(image, sized, rng) if crop == CROPS[0] else evaluation_view(image, sized)
        np.testing.assert_array_equal(batch["image"][2], expected)


def test_restart_workers_and_processes_change_nothing_of_several_shapes(photo_split):
    options = {"seed": 1, "shapes": SHAPES, "augment": AugmentConfig(repeats=2), "group_size": 2}
    whole = take(train_batches(DATA, photo_split, **options), 7)
    for step in (1, 2, 3, 5):
        rest = take(train_batches(DATA, photo_split, start_step=step, **options), 7 - step)
        for a, b in zip(rest, whole[step:], strict=True):
            assert_same(a, b)
    in_workers = dataclasses.replace(DATA, num_workers=2)
    for a, b in zip(take(train_batches(in_workers, photo_split, **options), 7), whole, strict=True):
        assert_same(a, b)
    shares = [take(train_batches(DATA, photo_split, process=(p, 2), **options), 7) for p in range(2)]
    for k in range(7):
        assert_same({key: np.concatenate([share[k][key] for share in shares]) for key in whole[k]}, whole[k])
    with pytest.raises(UserError, match=r"batch of 6 images .* 4 processes"):
        train_batches(DATA, photo_split, process=(0, 4), **options)


def test_each_image_once_an_epoch_in_batches_of_several_sizes():
    batches = take(train_batches(DATA, numbered(33), seed=4, shapes=SHAPES, resident=True), 15)
    together = {key: np.concatenate([batch[key] for batch in batches]) for key in ("index", "epoch")}
    assert len(together["index"]) == 5 * 22
    np.testing.assert_array_equal(np.bincount(together["epoch"]), [33, 33, 33, 11])
    for epoch in range(3):
        np.testing.assert_array_equal(np.sort(together["index"][together["epoch"] == epoch]), np.arange(33))


# --- repeated augmentation ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("num_images", "repeats"), [(12, 1), (12, 3), (13, 4), (2, 5)])
def test_an_epoch_has_as_many_images_each_repeated(num_images, repeats):
    plain = IndexStream(num_images, seed=3).take(np.arange(3 * num_images))["index"].reshape(3, num_images)
    order = IndexStream(num_images, 3, repeats).take(np.arange(3 * num_images))
    np.testing.assert_array_equal(order["index"].reshape(3, num_images), np.repeat(plain, repeats, 1)[:, :num_images])
    np.testing.assert_array_equal(order["epoch"] // repeats, np.repeat(np.arange(3), num_images))
    assert len(set(zip(order["index"].tolist(), order["epoch"].tolist(), strict=True))) == 3 * num_images


def test_subsets_of_the_epochs_cover_every_image():
    drawn = IndexStream(40, seed=0, repeats=4).take(np.arange(40 * 40))["index"].reshape(40, 40)
    assert {len(set(epoch.tolist())) for epoch in drawn} == {10}
    counts = np.bincount(drawn.reshape(-1), minlength=40) / 4
    assert 0 < counts.min() < counts.max() < 25  # 10 in expectation, with a deviation of 2.7


@pytest.mark.parametrize(("batch_size", "group_size", "repeats"), [(24, 4, 4), (24, 4, 6), (20, 4, 3), (24, 24, 2)])
def test_repeats_lie_in_different_norm_groups(batch_size, group_size, repeats):
    data, augment = dataclasses.replace(DATA, batch_size=batch_size), AugmentConfig(repeats=repeats)
    batches = take(
        train_batches(data, numbered(101), seed=5, augment=augment, group_size=group_size, resident=True), 10
    )
    stream = IndexStream(101, 5, repeats)
    for step, batch in enumerate(batches):
        flat = stream.take(np.arange(step * batch_size, (step + 1) * batch_size))
        for key in flat:
            np.testing.assert_array_equal(np.sort(batch[key]), np.sort(flat[key]))
        groups = batch["index"].reshape(-1, group_size)
        # Repeats across the end of an epoch may be of the same image, by chance.
        if len(groups) > 1 and len(set((flat["epoch"] // repeats).tolist())) == 1:
            assert all(len(set(group.tolist())) == group_size for group in groups)


def test_repeats_are_cropped_each_by_itself(photo_split):
    (batch,) = take(train_batches(DATA, photo_split, seed=0, augment=AugmentConfig(repeats=3), group_size=6), 1)
    assert np.bincount(batch["index"]).max() == 3
    assert len({image.tobytes() for image in batch["image"]}) == 6
    for row in range(6):
        index, epoch = int(batch["index"][row]), int(batch["epoch"][row])
        expected = random_resized_view(photo_split.read(index), DATA, np.random.default_rng((0, epoch, index)))
        np.testing.assert_array_equal(batch["image"][row], expected)
    np.testing.assert_array_equal(np.sort(batch["epoch"]), [0, 0, 1, 1, 2, 2])


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
    assert not fits(dataclasses.replace(data, scales=(16, 24)), small, training=True)
    assert fits(dataclasses.replace(data, scales=(16, 24)), small, training=False)
    limit = streams.RESIDENT_BYTES // (4096**2 * 3)
    assert limit == 10
    assert fits(dataclasses.replace(data, resolution=4096), numbered(10), training=True)
    assert not fits(dataclasses.replace(data, resolution=4096), numbered(11), training=True)


# --- policies, resolutions, damage --------------------------------------------------------------------------


def test_a_policy_comes_after_the_crop_and_leaves_its_draws_alone(photo_split):
    augment = AugmentConfig(policy="trivialaugment")
    (plain,) = take(train_batches(DATA, photo_split, seed=9), 1)
    (changed,) = take(train_batches(DATA, photo_split, seed=9, augment=augment), 1)
    for row, (index, epoch) in enumerate(zip(plain["index"].tolist(), plain["epoch"].tolist(), strict=True)):
        rng = np.random.default_rng((9, epoch, index, 1))
        expected = apply_policy(plain["image"][row], augment, rng, DATA.mean)
        np.testing.assert_array_equal(changed["image"][row], expected)
    assert (plain["image"] != changed["image"]).any()


@pytest.mark.parametrize("crop", CROPS)
def test_training_has_its_resolution_and_evaluation_another(photo_split, crop):
    data = dataclasses.replace(DATA, crop=crop, eval_resolution=24)
    (batch,) = take(train_batches(data, photo_split, seed=0), 1)
    assert_same(batch, take(train_batches(dataclasses.replace(DATA, crop=crop), photo_split, seed=0), 1)[0])
    images, _ = load_arrays(data, photo_split)
    np.testing.assert_array_equal(images, load_arrays(dataclasses.replace(DATA, resolution=24), photo_split)[0])
    assert next(eval_batches(data, photo_split))["image"].shape[1:] == (24, 24, 3)


def test_fits_by_the_resolution_that_is_asked_for():
    data = dataclasses.replace(DATA, crop="none", resolution=16, eval_resolution=4096)
    assert fits(data, numbered(11), training=True)
    assert not fits(data, numbered(11), training=False)


@pytest.fixture
def spoilt(photos, tmp_path) -> tuple[DataConfig, Split, set[int]]:
    """The photos, three of which can't be decoded: two neighbours and the last."""
    shutil.copytree(photos, tmp_path / "spoilt")
    data = dataclasses.replace(DATA, path=str(tmp_path / "spoilt"), skip_corrupt=True)
    split = open_dataset(data).train
    damaged = {4, 5, 16}
    for index in damaged:
        (tmp_path / "spoilt" / os.fsdecode(split.read.names[index])).write_bytes(b"not an image")
    return data, split, damaged


def test_what_is_damaged_is_replaced_by_the_next_that_is_not(spoilt, photo_split):
    data, split, damaged = spoilt
    replaced = {4: 6, 5: 6, 16: 0}
    seen = []
    for batch, sound in zip(
        take(train_batches(data, split, 3), 9), take(train_batches(DATA, photo_split, 3), 9), strict=True
    ):
        expected = [replaced.get(index, index) for index in sound["index"].tolist()]
        assert batch["index"].tolist() == expected
        assert batch["skipped"].dtype == np.int32
        assert batch["skipped"].tolist() == [{4: 2, 5: 1, 16: 1}.get(i, 0) for i in sound["index"].tolist()]
        np.testing.assert_array_equal(batch["epoch"], sound["epoch"])
        np.testing.assert_array_equal(batch["label"], np.asarray(split.labels)[batch["index"]])
        for row, (index, epoch) in enumerate(zip(expected, batch["epoch"].tolist(), strict=True)):
            view = random_resized_view(photo_split.read(index), data, np.random.default_rng((3, epoch, index)))
            np.testing.assert_array_equal(batch["image"][row], view)
        found = skipped_images(split, batch)
        seen += found
        for index, line in found.items():
            assert os.fsdecode(split.read.names[index]) in line
            assert "\n" not in line
    assert set(seen) == damaged


def test_restarts_processes_and_workers_skip_alike(spoilt):
    data, split, _ = spoilt
    whole = take(train_batches(data, split, seed=1), 5)
    assert_same(take(train_batches(data, split, seed=1, start_step=3), 1)[0], whole[3])
    shares = [take(train_batches(data, split, 1, process=(p, 2)), 5) for p in range(2)]
    assert_same({key: np.concatenate([share[4][key] for share in shares]) for key in whole[4]}, whole[4])
    assert_same(take(train_batches(dataclasses.replace(data, num_workers=1), split, 1), 1)[0], whole[0])


def test_only_training_skips_and_only_when_told(spoilt):
    data, split, _ = spoilt
    with pytest.raises(DamagedImageError):
        take(train_batches(dataclasses.replace(data, skip_corrupt=False), split, seed=0), 3)
    with pytest.raises(DamagedImageError, match="3 of the 17 images of train"):
        load_arrays(data, split)
    shown_once = dataclasses.replace(data, crop="none")
    assert not fits(shown_once, split, training=True)  # the batches tell what was skipped
    assert fits(shown_once, split, training=False)
    assert fits(shown_once, numbered(5), training=True)


def test_evaluation_masks_what_is_damaged_in_every_process_and_names_it(spoilt, photo_split):
    data, split, damaged = spoilt
    whole = list(eval_batches(data, photo_split, 6))
    found: dict[int, str] = {}
    shares = [list(without_damaged(data, split, eval_batches(data, split, 6, (p, 2)), found)) for p in range(2)]
    for number, expected in enumerate(whole):
        batch = {key: np.concatenate([share[number][key] for share in shares]) for key in expected}
        mask = expected["mask"] & ~np.isin(expected["index"], list(damaged))
        np.testing.assert_array_equal(batch["mask"], mask)
        for key in ("image", "label", "index"):
            np.testing.assert_array_equal(batch[key][mask], expected[key][mask])
        assert not batch["image"][~mask].any()
    assert found.keys() == damaged
    assert all(os.fsdecode(split.read.names[index]) in line for index, line in found.items())
    black: dict[int, str] = {}
    pixels, labels = load_arrays(data, split, damaged=black)
    assert black == found
    np.testing.assert_array_equal(np.flatnonzero(~pixels.any((1, 2, 3))), sorted(damaged))
    np.testing.assert_array_equal(np.delete(labels, sorted(damaged)), np.delete(photo_split.labels, sorted(damaged)))


def test_all_damaged_images_are_named_at_once(spoilt, monkeypatch):
    data, split, damaged = spoilt
    data = dataclasses.replace(data, skip_corrupt=False)
    monkeypatch.setattr(images, "MOST_NAMED", len(damaged))
    with pytest.raises(DamagedImageError) as met:
        take(train_batches(data, split, seed=0), 3)
    errors = [str(streams.all_damage_error(data, split, met.value))]
    with pytest.raises(DamagedImageError) as caught:
        load_arrays(data, split)
    errors += [str(caught.value)]
    for error in errors:
        assert all(os.fsdecode(split.read.names[index]) in error for index in damaged)
        assert "3 of the 17 images of train can't be decoded" in error
        assert "more;" not in error
        assert "\n" not in error
    monkeypatch.setattr(images, "MOST_NAMED", 1)
    assert "; and 2 more; replace" in str(streams.all_damage_error(data, split, met.value))
    monkeypatch.setattr(streams, "_SEARCH_S", -1.0)  # no time for all
    monkeypatch.setattr(streams, "_SEARCH_IMAGES", 5)
    some = str(streams.all_damage_error(data, split, met.value))
    assert some.endswith(str(met.value))  # which says what to do, so that a caller can add to it
    assert re.search(r"^of the 17 images of train 5 .* 1 can't be decoded: ", some)


def test_a_missing_file_is_not_skipped(spoilt, tmp_path):
    data, split, _ = spoilt
    shutil.rmtree(tmp_path / "spoilt")
    with pytest.raises(UserError, match="can't be read"):
        take(train_batches(data, split, seed=0), 1)


def test_nothing_but_damage_is_one_line(spoilt):
    data, split, damaged = spoilt
    keep = np.isin(np.arange(len(split)), list(damaged))
    with pytest.raises(UserError, match=r"^none of the 3 images of train ") as caught:
        take(train_batches(data, split.subset(keep), seed=0), 1)
    assert "\n" not in str(caught.value)
