"""COCO's scores: by hand, and what they don't depend on."""

import sys

import numpy as np
import pytest

from mnv2_jax.errors import UserError
from mnv2_jax.tasks.coco import coco_scores

NAMES = ("cat", "dog")
HALF = 51 / 101
"""The mean precision at 101 recalls of a curve that is 1 up to the recall 0.5."""


def truth(*boxes, classes=None, crowd=None, **more):
    n = len(boxes)
    classes, crowd = classes or [0] * n, crowd or [False] * n
    return {
        "boxes": np.asarray(boxes, np.float32).reshape(n, 4),
        "classes": np.asarray(classes, np.int32),
        "crowd": np.asarray(crowd, bool),
        **more,
    }


def scored(truths, found, ids=None, places=200):
    """Scores lists of detections (box, score) or (box, score, class), one list an image."""
    pytest.importorskip("pycocotools", reason="pip install .[detection]")
    m = len(truths)
    boxes, classes = np.zeros((m, places, 4), np.float32), np.full((m, places), -1, np.int32)
    scores = np.zeros((m, places), np.float32)
    for image, rows in enumerate(found):
        for place, (box, score, *number) in enumerate(rows):
            boxes[image, place], scores[image, place], classes[image, place] = box, score, number[0] if number else 0
    return coco_scores(ids or range(1, m + 1), truths, boxes, classes, scores, NAMES)


LEFT, RIGHT, AWAY = [0, 0, 100, 100], [0, 200, 100, 300], [300, 300, 400, 400]
PART = [0, 200, 100, 278]
"""A box whose IoU with `RIGHT` is 0.78, enough for 6 of the 10 thresholds."""


def test_a_small_case_by_hand():
    result = scored([truth(LEFT, RIGHT)], [[(PART, 0.7), (AWAY, 0.8), (LEFT, 0.9)]])
    full = (51 + 50 * 2 / 3) / 101  # precision 1 up to the recall 0.5, then 2/3
    expected = {"ap": 0.6 * full + 0.4 * HALF, "ap50": full, "ap75": full, "ap_large": 0.6 * full + 0.4 * HALF}
    expected |= {"ar1": 0.5, "ar10": 0.8, "ar100": 0.8, "ar_large": 0.8}
    expected |= dict.fromkeys(("ap_small", "ap_medium", "ar_small", "ar_medium"))
    cat, dog = result.pop("per_class")
    assert result == pytest.approx(expected)
    assert (cat["label"], cat["boxes"]) == ("cat", 2)
    assert (cat["ap"], cat["ap50"]) == pytest.approx((expected["ap"], full))
    assert cat["curve50"] == pytest.approx([1] * 51 + [2 / 3] * 50)
    assert dog == {"label": "dog", "boxes": 0, "ap": None, "ap50": None, "curve50": None}


def test_a_class_without_objects_isnt_in_the_mean_even_if_it_is_found():
    result = scored([truth(LEFT)], [[(LEFT, 0.5, 0), (RIGHT, 0.9, 1)]])
    assert result["ap"] == pytest.approx(1)
    assert [row["ap"] for row in result["per_class"]] == [pytest.approx(1), None]


def test_the_mean_is_of_classes():
    result = scored([truth(LEFT, RIGHT, AWAY, classes=[0, 0, 1])], [[(AWAY, 0.9, 0), (AWAY, 0.5, 1)]])
    assert [row["ap"] for row in result["per_class"]] == [0, pytest.approx(1)]
    assert [row["boxes"] for row in result["per_class"]] == [2, 1]
    assert result["ap"] == pytest.approx(0.5)


@pytest.mark.parametrize("truths", [[], [truth()], [truth(LEFT, crowd=[True]), truth()]])
@pytest.mark.parametrize("finds", [False, True])
def test_without_objects_there_are_no_numbers(truths, finds):
    result = scored(truths, [[(LEFT, 0.5)] if finds else []] * len(truths))
    assert {value for name, value in result.items() if name != "per_class"} == {None}
    assert all(row["ap"] is row["curve50"] is None and row["boxes"] == 0 for row in result["per_class"])


def test_what_is_found_in_an_image_without_objects_is_wrong():
    assert scored([truth(), truth(LEFT)], [[(LEFT, 0.9)], [(LEFT, 0.5)]])["ap"] == pytest.approx(0.5)


def test_an_image_without_detections_has_missed_objects():
    result = scored([truth(LEFT), truth(LEFT)], [[(LEFT, 0.9)], []])
    assert (result["ap"], result["ar100"]) == pytest.approx((HALF, 0.5))
    assert scored([truth(LEFT)], [[]])["ap"] == 0


@pytest.mark.parametrize(("crowd", "expected"), [(True, 1), (False, 0.5 * HALF)])
def test_a_crowd_makes_detections_in_it_neither_right_nor_wrong(crowd, expected):
    within = [310, 310, 330, 330]  # a small part of it
    result = scored([truth(LEFT, AWAY, crowd=[False, crowd])], [[(within, 0.9), (LEFT, 0.5)]])
    assert result["ap"] == pytest.approx(expected)
    assert result["per_class"][0]["boxes"] == (1 if crowd else 2)


def test_sizes_are_of_boxes_or_of_outlines():
    found = [[([0, 0, 30, 30], 0.5), ([100, 100, 190, 190], 0.4)]]
    boxes = [[0, 0, 30, 30], [100, 100, 190, 190]]
    result = scored([truth(*boxes)], found)
    assert (result["ap_small"], result["ap_medium"], result["ap_large"]) == (pytest.approx(1), pytest.approx(1), None)
    result = scored([truth(*boxes, areas=np.array([800.0, 1000.0]))], found)
    assert (result["ap_small"], result["ap_medium"], result["ap_large"]) == (pytest.approx(1), None, None)


def test_the_best_hundred_of_an_image_and_class_count():
    wrong = [([300 + place, 300, 310 + place, 310], 0.9) for place in range(150)]
    assert scored([truth(LEFT)], [[*wrong[:99], (LEFT, 0.5)]])["ap"] == pytest.approx(0.01)
    assert scored([truth(LEFT)], [[*wrong, (LEFT, 0.5)]])["ap"] == 0
    other = [(box, score, 1) for box, score in wrong]
    assert scored([truth(LEFT)], [[*other, (LEFT, 0.5)]])["ap"] == pytest.approx(1)


@pytest.mark.parametrize(("ids", "expected"), [([3, 7], 0.5), ([7, 3], 1)])
def test_of_equal_scores_the_image_with_the_lowest_number_comes_first(ids, expected):
    result = scored([truth(), truth(LEFT)], [[(AWAY, 0.5)], [(LEFT, 0.5)]], ids)
    assert result["ap"] == pytest.approx(expected)


def test_of_equal_scores_in_an_image_the_lowest_place_comes_first():
    assert scored([truth(LEFT)], [[(LEFT, 0.5), (AWAY, 0.5)]])["ap"] == pytest.approx(1)
    assert scored([truth(LEFT)], [[(AWAY, 0.5), (LEFT, 0.5)]])["ap"] == pytest.approx(0.5)


@pytest.mark.parametrize("empty", [0.0, np.nan])
def test_empty_places_count_for_nothing(empty):
    rows = [(LEFT, 0.5), (AWAY, empty), (RIGHT, empty, 1)]
    assert scored([truth(LEFT)], [rows]) == scored([truth(LEFT)], [rows[:1]], places=1)


def test_the_order_of_images_doesnt_matter():
    rng = np.random.default_rng(0)
    truths, found = [], []
    for _ in range(20):
        n = int(rng.integers(0, 5))
        first, size = rng.uniform(0, 300, (n, 2)), rng.uniform(10, 200, (n, 2))
        boxes, classes = np.concatenate([first, first + size], 1), rng.integers(0, 2, n).tolist()
        truths.append(truth(*boxes, classes=classes, crowd=(rng.random(n) < 0.2).tolist()))
        near = [
            (box + rng.normal(0, 5, 4), round(rng.random(), 1), number)
            for box, number in zip(boxes, classes, strict=True)
        ]
        found.append([*near, (AWAY, 0.5, 1)])
    ids, order = (rng.permutation(1000)[:20] + 5).tolist(), rng.permutation(20)
    result = scored(truths, found, ids)
    assert 0 < result["ap"] < 1
    assert scored(*([values[place] for place in order] for values in (truths, found, ids))) == result


def test_it_prints_nothing(capfd):
    scored([truth(LEFT)], [[(LEFT, 0.5)]])
    assert capfd.readouterr() == ("", "")


def test_two_images_of_one_number_are_refused():
    with pytest.raises(ValueError, match="two images have one number"):
        scored([truth(), truth()], [[], []], [4, 4])


def test_without_pycocotools_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "pycocotools.coco", None)
    with pytest.raises(UserError, match=r"pip install 'mnv2_jax\[detection\]'") as error:
        coco_scores([], [], np.zeros((0, 1, 4)), np.zeros((0, 1)), np.zeros((0, 1)), NAMES)
    assert "\n" not in str(error.value)
