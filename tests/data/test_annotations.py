"""Boxes as the readers of a split give them: corners, what is dropped and counted, and subsets."""

import pickle

import numpy as np
import pytest

from mnv2_jax.data.boxes import FAULTS, Fault, Objects, annotations_of, in_order, note_of, readers
from mnv2_jax.data.split import Split


def objects(corners, image=None, size=(60, 80), num_images=1, **fields):
    count = len(corners)
    given = {
        "files": [f"{number}.xml" for number in range(num_images)],
        "sizes": np.full((num_images, 2), size),
        "image": np.zeros(count, int) if image is None else np.array(image, int),
        "corners": np.array(corners, float),
        "classes": np.arange(count),
        "crowd": np.zeros(count, bool),
    }
    return Objects(**given | fields)


def split_of(annotations, size=(60, 80)):
    images = np.zeros((len(annotations), *size, 3), np.uint8)
    split = Split.of_arrays("train", images, np.zeros(len(annotations), int))
    return Split("train", split.labels, split.read, targets=readers(annotations, split.read))


@pytest.mark.parametrize(
    ("corners", "kept", "kind"),
    [
        ((1, 2, 30, 40), (1, 2, 30, 40), None),
        ((0, 0, 60, 80), (0, 0, 60, 80), None),
        ((-5, 2, 30, 99), (0, 2, 30, 80), "clipped"),
        ((0, -0.001, 60.001, 80.001), (0, 0, 60, 80), None),
        ((30, 40, 1, 2), (1, 2, 30, 40), "reversed"),
        ((30, 2, 1, 40), (1, 2, 30, 40), "reversed"),
        ((30, 2, 30, 40), None, "no area"),
        ((30, 2, 30, 2), None, "no area"),
        ((20, 2, 20 + 1e-9, 40), None, "no area"),
        ((60, 2, 70, 40), None, "outside"),
        ((-9, 2, 0, 40), None, "outside"),
        ((1, 90, 30, 95), None, "outside"),
    ],
)
def test_a_box_is_kept_corrected_or_dropped(corners, kept, kind):
    found = in_order(objects([corners]))
    np.testing.assert_array_equal(found.corners, np.array([kept] if kept else [], np.float32).reshape(-1, 4))
    expected = ({kind} if kind else set()) | ({"no boxes"} if kept is None else set())
    assert found.faults == {key: Fault(1, "0.xml") for key in expected}
    relative = in_order(objects([np.array(corners) / [60, 80, 60, 80]], is_relative=True))
    assert set(relative.faults) == expected
    if kept:
        np.testing.assert_allclose(relative.boxes(0, (60, 80)), [kept], atol=1e-4)


@pytest.mark.parametrize(
    ("corners", "kept"),
    [
        ((1, 1, 60, 80), (0, 0, 60, 80)),
        ((11, 21, 11, 22), None),
        ((11, 21, 12, 22), (10, 20, 12, 22)),
        ((30, 40, 11, 21), (10, 20, 30, 40)),
        ((0, 1, 60, 80), (0, 0, 60, 80)),
    ],
)
def test_pixels_from_one_with_an_inclusive_end(corners, kept):
    found = in_order(objects([corners], is_one_based=True))
    np.testing.assert_array_equal(found.corners, np.array([kept] if kept else [], np.float32).reshape(-1, 4))


def test_objects_are_grouped_by_image_in_their_order():
    corners = [(0, 0, 10 * number + 10, 10) for number in range(5)]
    found = in_order(objects(corners, image=[2, 0, 2, 0, 2], num_images=4, crowd=np.array([1, 0, 0, 0, 0], bool)))
    split = split_of(found)
    assert [split.targets["classes"](index).tolist() for index in range(4)] == [[1, 3], [], [0, 2, 4], []]
    assert [split.targets["boxes"](index)[:, 2].tolist() for index in range(4)] == [[20, 40], [], [10, 30, 50], []]
    assert split.targets["crowd"](2).tolist() == [True, False, False]
    assert found.faults == {"ignored": Fault(1, "2.xml"), "no boxes": Fault(2, "1.xml")}


@pytest.mark.parametrize("is_relative", [False, True])
def test_types_do_not_depend_on_the_number_of_boxes(is_relative):
    split = split_of(in_order(objects([(0, 0, 0.5, 0.5)], image=[1], num_images=2, is_relative=is_relative)))
    for index in range(2):
        for name, kind in (("boxes", np.float32), ("classes", np.int32), ("crowd", bool)):
            value = split.targets[name](index)
            assert (value.dtype, value.shape) == (kind, (index, 4) if name == "boxes" else (index,))
    assert split.targets["boxes"](1).tolist() == ([[0, 0, 30, 40]] if is_relative else [[0, 0, 0.5, 0.5]])


def test_a_subset_keeps_ids_and_areas():
    given = objects(
        [(0, 0, 10, 10), (0, 0, 20, 20), (0, 0, 30, 30)],
        image=[0, 1, 2],
        num_images=3,
        areas=np.array([7.0, 8, 9]),
        image_ids=np.array([50, 40, 30]),
        class_ids=(2, 5, 9),
    )
    whole = split_of(in_order(given))
    split = whole.subset(np.array([False, True, True])).subset(np.array([False, True]))
    split = pickle.loads(pickle.dumps(split))
    found = annotations_of(split)
    assert (len(found), found.image_ids.tolist(), found.areas.tolist(), found.class_ids) == (1, [30], [9], (2, 5, 9))
    np.testing.assert_array_equal(found.boxes(0, (0, 0)), split.example(0)["boxes"])
    assert annotations_of(Split.of_arrays("train", np.zeros((1, 2, 2, 3), np.uint8), np.zeros(1, int))) is None


def test_the_digest_knows_boxes_classes_and_crowds():
    corners = [(0, 0, 10, 10), (0, 0, 20, 20)]
    first = objects(corners, image=[0, 1], num_images=2)
    changed = (
        objects([(0, 0, 10, 10), (0, 0, 20, 21)], image=[0, 1], num_images=2),
        objects(corners, image=[0, 0], num_images=2),
        objects(corners, image=[0, 1], num_images=2, classes=np.array([1, 1])),
        objects(corners, image=[0, 1], num_images=2, crowd=np.array([True, False])),
    )
    digests = [split_of(in_order(given)).digest() for given in (first, first, *changed)]
    assert digests[0] == digests[1]
    assert len({tuple(sorted(digest.items())) for digest in digests}) == 5
    keys = {"boxes.corners", "boxes.counts", "classes.values", "crowd.values", "labels", "pixels"}
    assert set(digests[0]) == keys


def test_a_note_has_one_line():
    assert note_of("train", {}) == ()
    (note,) = note_of("train", {kind: Fault(1234, f"{kind}.xml") for kind in FAULTS})
    assert (note.count("1,234"), note.count(".xml"), note.count("\n")) == (len(FAULTS), len(FAULTS), 0)
