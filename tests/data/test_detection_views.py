"""Views of detection: what happens to an image happens to its boxes."""

import dataclasses

import numpy as np
import pytest

from mnv2_jax.config import DataConfig
from mnv2_jax.data.views import detection as views
from mnv2_jax.data.views.detection import (
    EvalView,
    Targets,
    TrainView,
    flipped,
    overlapping_crop,
    overlaps,
    shares_within,
)

DATA = DataConfig(resolution=64, crop="iou", expand=3.0, max_boxes=8, mean=(0.0, 0.0, 0.0))


def example(seed=0, count=4, size=(90, 120)):
    """An image that is bright in its boxes and black elsewhere."""
    rng = np.random.default_rng(seed)
    image, boxes = np.zeros((*size, 3), np.uint8), []
    for _ in range(count):
        sides = rng.integers(12, 40, 2)
        corner = [int(rng.integers(side - own)) for side, own in zip(size, sides, strict=True)]
        boxes.append([*corner, corner[0] + sides[0], corner[1] + sides[1]])
        image[boxes[-1][0] : boxes[-1][2], boxes[-1][1] : boxes[-1][3]] = 250
    return {
        "image": image,
        "label": 0,
        "boxes": np.array(boxes, np.float32).reshape(-1, 4),
        "classes": np.arange(count, dtype=np.int32),
        "crowd": np.zeros(count, bool),
    }


@pytest.mark.parametrize("seed", range(12))
def test_boxes_stay_on_what_they_hold(seed):
    row = TrainView(DATA)(example(seed), (0, 1, seed))
    is_box = row["classes"] >= 0
    assert row["image"].shape == (64, 64, 3)
    assert (row["boxes"][~is_box] == 0).all()
    for y0, x0, y1, x1 in row["boxes"][is_box] * 64:
        assert 0 <= y0 < y1 <= 64
        assert 0 <= x0 < x1 <= 64
        inner = row["image"][int(np.ceil(y0)) + 1 : int(y1) - 1, int(np.ceil(x0)) + 1 : int(x1) - 1]
        assert inner.size == 0 or inner.min() > 200
    outside = row["image"].astype(int).max(-1)
    for y0, x0, y1, x1 in row["boxes"][is_box] * 64:
        outside[max(int(y0) - 2, 0) : int(np.ceil(y1)) + 2, max(int(x0) - 2, 0) : int(np.ceil(x1)) + 2] = 0
    # What is bright outside every box belongs to boxes whose middle the crop left out.
    assert (outside > 200).mean() < 0.5


def test_a_row_depends_on_seed_epoch_and_index_alone():
    view = TrainView(DATA)
    first, again, other = (view(example(3), draw) for draw in ((0, 1, 2), (0, 1, 2), (0, 2, 2)))
    for name in first:
        np.testing.assert_array_equal(first[name], again[name])
    assert any((first[name] != other[name]).any() for name in ("image", "boxes"))


def test_without_a_draw_the_whole_image_is_seen():
    given = example()
    row = TrainView(DATA)(given, None)
    np.testing.assert_allclose(row["boxes"][:4] * np.tile(given["image"].shape[:2], 2), given["boxes"], rtol=1e-5)
    assert row["classes"].tolist() == [0, 1, 2, 3, -1, -1, -1, -1]
    seen = EvalView(DATA)(given, None)
    assert seen["size"].tolist() == [90, 120]
    np.testing.assert_array_equal(seen["image"], row["image"])


def test_of_too_many_boxes_the_largest_are_kept():
    given = example(count=8)
    row = TrainView(dataclasses.replace(DATA, max_boxes=3))(given, None)
    sizes = views.areas(given["boxes"])
    assert set(row["classes"].tolist()) == set(np.argsort(-sizes, kind="stable")[:3].tolist())


@pytest.mark.parametrize("draw", [None, (0, 0, 0), (0, 0, 1), (0, 0, 5)])
def test_an_image_without_boxes_has_none(draw):
    row = TrainView(DATA)(example(count=0), draw)
    assert (row["classes"] == -1).all()
    assert (row["boxes"] == 0).all()


def test_what_a_crop_shows_of_an_ignored_region_stays_ignored():
    boxes = np.array([[60, 20, 180, 200], [100, 210, 160, 300]], float)  # the crowd's middle isn't in most crops
    targets = Targets(boxes, np.array([0, 1], np.int32), np.array([True, False]))
    places = np.stack(np.meshgrid(np.arange(240), np.arange(320), indexing="ij"), -1).astype(float)
    image = np.concatenate([places, np.zeros((240, 320, 1))], -1)
    crops = [overlapping_crop(image, targets, np.random.default_rng(seed)) for seed in range(60)]
    for cropped, kept in crops:
        corner = np.tile(cropped[0, 0, :2], 2)
        expected = np.clip(boxes[0] - corner, 0, np.tile(cropped.shape[:2], 2))
        is_seen = bool(views.areas(expected[None])[0])
        assert kept.ignored.sum() == is_seen
        if is_seen:
            np.testing.assert_allclose(kept.boxes[kept.ignored], expected[None])
    assert len({len(kept.boxes) for _, kept in crops}) > 1
    alone = targets.at(targets.ignored, boxes)
    assert overlapping_crop(image, alone, np.random.default_rng(0))[0] is image


def test_mirrored_twice_is_the_same():
    given = example()
    targets = Targets(given["boxes"].astype(float), given["classes"], given["crowd"])
    image, back = flipped(*flipped(given["image"], targets))
    np.testing.assert_array_equal(image, given["image"])
    np.testing.assert_allclose(back.boxes, given["boxes"])


def test_overlaps_of_equal_disjoint_and_empty_boxes():
    boxes = np.array([[0, 0, 2, 2], [1, 1, 3, 3], [5, 5, 6, 6], [1, 1, 1, 1]], float)
    expected = [[1, 1 / 7, 0, 0], [1 / 7, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0]]
    np.testing.assert_allclose(overlaps(boxes, boxes), expected)
    within = [[1, 1 / 4, 0, 0], [1 / 4, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0]]
    np.testing.assert_allclose(shares_within(boxes, boxes), within)
