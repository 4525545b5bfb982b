"""Data sets of images and boxes: each layout on disk and in a tar, what is counted, and one line for each problem."""

import functools
import json
import pathlib
import pickle
import re
import shutil
import tarfile
import unicodedata

import numpy as np
import pytest

from mnv2_jax.config import DataConfig
from mnv2_jax.data import box_folder
from mnv2_jax.data.boxes import annotations_of
from mnv2_jax.data.folder import open_tree
from mnv2_jax.data.images import EncodedImage
from mnv2_jax.data.sources import check_trainable, known_num_classes, open_dataset
from mnv2_jax.errors import UserError
from tests.data.boxed import SIZE, coco, element, lines, official, picture, voc, xml, yolo

CAT, DOG = [10, 0, 30, 20], [30, 40, 60, 80]
"""The boxes of each image that `tests.data.boxed` writes."""


def opened(path, name="box_folder", evaluates=False, **fields):
    return open_dataset(DataConfig(name=name, path=str(path), **fields), evaluates)


def refused(path, says, name="box_folder", **fields):
    with pytest.raises(UserError, match=says) as caught:
        opened(path, name, **fields)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def packed(top, prefix="."):
    path = top.parent / f"{top.name}.tar"
    with tarfile.open(path, "w") as archive:
        archive.add(top, arcname=prefix)
    return path


def find_name(path):
    return box_folder.find_name(open_tree(str(path)))


def names_of(split):
    return [pathlib.Path(split.path_of(index)).stem for index in range(len(split))]


def faults_of(split):
    return {kind: fault.times for kind, fault in annotations_of(split).faults.items()}


def moved(source, top, *pairs):
    """Copies folders below ``source`` to other places below ``top``; both are patterns with SPLIT."""
    for split in ("train", "val"):
        for old, new in pairs:
            shutil.copytree(source / old.replace("SPLIT", split), top / new.replace("SPLIT", split), dirs_exist_ok=True)
    return top


# --- layouts ------------------------------------------------------------------------------------------------


def layouts(top):
    """Writes all layouts, and returns for each its folder, its name and whether dogs are difficult."""
    first, second = yolo(top / "yolo"), voc(top / "voc")
    named = (first / "classes.txt").read_bytes()
    roboflow = moved(first, top / "roboflow", ("images/SPLIT", "SPLIT/images"), ("labels/SPLIT", "SPLIT/labels"))
    (roboflow / "data.yaml").write_text("train: ../train/images\nnc: 2\nnames: ['cat', 'dog']\n")
    years = moved(first, top / "years", ("images/SPLIT", "images/SPLIT2017"), ("labels/SPLIT", "labels/SPLIT2017"))
    (years / "data.yaml").write_text("names:\n  0: cat\n  1: dog\n")
    beside = moved(first, top / "beside", ("images/SPLIT", "SPLIT"), ("labels/SPLIT", "SPLIT"))
    (beside / "classes.txt").write_bytes(named)
    inside = moved(first, top / "inside", ("images/SPLIT", "images/SPLIT"), ("labels/SPLIT", "labels/SPLIT"))
    (inside / "labels" / "classes.txt").write_bytes(named)
    yield from ((folder, "box_folder", False) for folder in (first, roboflow, years, beside, inside))
    for name, image_place, box_place in (
        ("labelimg", "images/SPLIT", "annotations/SPLIT"),
        ("xml_beside", "SPLIT", "SPLIT"),
        ("xml_in_images", "images/SPLIT", "images/SPLIT"),
        ("xml_within", "SPLIT/images", "SPLIT/annotations"),
    ):
        for split, names in (("train", "abc"), ("val", "de")):
            for image in names:
                picture(top / name / image_place.replace("SPLIT", split) / f"{image}.jpg")
                target = top / name / box_place.replace("SPLIT", split) / f"{image}.xml"
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(second / "Annotations" / f"{image}.xml", target)
        yield top / name, "box_folder", True
    yield second, "voc_detection", True
    devkit = top / "devkit" / "VOCdevkit" / "VOC2007"
    shutil.copytree(second, devkit)
    yield top / "devkit", "voc_detection", True
    third = official(top / "coco")
    yield third, "coco", True
    flat = top / "flat"
    for split in ("train", "val"):
        shutil.copytree(third / f"{split}2017", flat / "images", dirs_exist_ok=True)
        shutil.copy(third / "annotations" / f"instances_{split}2017.json", flat / f"{split}.json")
    yield flat, "coco", True
    robo = moved(third, top / "robo_coco", ("SPLIT2017", "SPLIT"))
    for split in ("train", "val"):
        source = third / "annotations" / f"instances_{split}2017.json"
        shutil.copy(source, robo / split / "_annotations.coco.json")
    yield robo, "coco", True
    darknet = moved(first, top / "darknet", ("images/SPLIT", "SPLIT"), ("labels/SPLIT", "SPLIT"))
    for split in ("train", "val"):
        (darknet / split / "_darknet.labels").write_bytes(named)
    yield darknet, "box_folder", False


def test_every_layout_on_disk_and_in_a_tar(tmp_path):
    for top, name, is_marked in layouts(tmp_path):
        for path in (top, packed(top), packed(top, "wrapped")):
            dataset = opened(path, name)
            assert (len(dataset.train), dataset.eval.name, len(dataset.eval)) == (3, "val", 2), path
            assert dataset.class_names == ("cat", "dog")
            assert names_of(dataset.train) == ["a", "b", "c"]
            split = pickle.loads(pickle.dumps(dataset.train))
            assert not split.labels.any()
            example = split.example(1)
            assert set(example) == {"image", "label", "boxes", "classes", "crowd"}
            np.testing.assert_allclose(example["boxes"], [CAT, DOG], atol=1e-4)
            assert example["classes"].tolist() == [0, 1]
            assert example["crowd"].tolist() == [False, is_marked]
            assert faults_of(split) == ({"ignored": 3} if is_marked else {})
            assert {"names", "boxes.corners"} <= set(split.digest())
            assert known_num_classes(DataConfig(name=name, path=str(path))) == 2
            assert box_folder.find_name(open_tree(str(path))) == name


def test_without_splits_a_fifth_of_the_images_is_held_out(tmp_path):
    for number in range(10):
        picture(tmp_path / "images" / "more" / f"n{number}.jpg")
        lines(tmp_path / "labels" / "more" / f"n{number}.txt", (0, 0.5, 0.5, number / 10 + 0.1, 0.1))
    (tmp_path / "classes.txt").write_text("cat\n")
    dataset = opened(tmp_path)
    assert (len(dataset.train), len(dataset.eval), dataset.holdout_fraction) == (8, 2, 0.2)
    for split in (dataset.train, dataset.eval):
        for index, name in enumerate(names_of(split)):
            (box,) = split.targets["boxes"](index)
            assert box[3] - box[1] == pytest.approx(8 * int(name[1:]) + 8, abs=1e-3)
    assert len(opened(tmp_path, evaluates=True).eval) == 10
    refused(tmp_path, r"no splits, and so no val; .*data\.eval_split", eval_split="val")


def test_all_files_in_one_folder(tmp_path):
    for name in "abcdef":
        picture(tmp_path / f"{name}.jpg")
        xml(tmp_path / f"{name}.xml", element("cat", (1, 1, 5, 5)))
    assert len(opened(tmp_path).train) + len(opened(tmp_path).eval) == 6
    only = tmp_path / "only.json"
    coco(only, {1: "a.jpg", 2: "b.jpg"}, [(1, 3, [0, 0, 9, 9], {})], categories=[(3, "cat")])
    for number in range(20):
        (tmp_path / f"meta{number}.json").write_text("{}")
    assert len(opened(tmp_path, "coco", evaluates=True).eval) == 2
    assert find_name(tmp_path) == "coco"


@pytest.mark.parametrize("folder", ["data", "images/default"])
def test_other_folders_of_images_for_a_json_file(tmp_path, folder):
    for name in "ab":
        picture(tmp_path / folder / f"{name}.jpg")
    coco(tmp_path / "labels.json", {1: "a.jpg", 2: "b.jpg"}, [(1, 3, [0, 0, 9, 9], {})])
    assert len(opened(tmp_path, "coco", evaluates=True).eval) == 2
    shutil.rmtree(tmp_path / folder)
    refused(tmp_path, "none of its 2 images .*as a.jpg", "coco")


def test_lists_with_other_names_are_no_splits_of_voc(tmp_path):
    voc(tmp_path, (("default", "abcdef"),))
    assert find_name(tmp_path) == "box_folder"
    assert len(opened(tmp_path).train) + len(opened(tmp_path).eval) == 6
    refused(tmp_path, "there is no train/", "voc_detection")


def test_images_that_are_called_as_lists_are(tmp_path):
    names = ("a", "classes", "test", "train")
    yolo(tmp_path / "folders", (("train", names), ("val", "d")))
    yolo(tmp_path / "one", (("", names),))
    (tmp_path / "one" / "classes.txt").unlink()
    (tmp_path / "one" / "data.yaml").write_text("names: [cat, dog]")
    for split in (opened(tmp_path / "folders").train, opened(tmp_path / "one", evaluates=True).eval):
        assert names_of(split) == list(names)
        assert (annotations_of(split).counts.tolist(), faults_of(split)) == ([2] * 4, {})


def test_names_in_both_forms_of_unicode(tmp_path):
    """macOS writes ä as two characters."""
    composed, decomposed = (unicodedata.normalize(form, "ä") for form in ("NFC", "NFD"))
    voc(tmp_path / "voc", (("train", (composed, "b")), ("val", "c")))
    folder = tmp_path / "voc" / "JPEGImages"
    (folder / f"{composed}.jpg").rename(folder / f"{decomposed}.jpg")
    assert len(opened(tmp_path / "voc", "voc_detection").train) == 2
    picture(tmp_path / "coco" / "images" / f"{decomposed}.jpg")
    coco(tmp_path / "coco" / "a.json", {1: f"{composed}.jpg"}, [(1, 3, [0, 0, 9, 9], {})])
    assert len(opened(tmp_path / "coco", "coco", evaluates=True).eval) == 1


def test_to_evaluate_a_split_is_enough(tmp_path):
    official(tmp_path)
    shutil.rmtree(tmp_path / "train2017")
    (tmp_path / "annotations" / "instances_train2017.json").unlink()
    refused(tmp_path, "no train/ .*only val/", "coco")
    dataset = opened(tmp_path, "coco", evaluates=True)
    assert (len(dataset.train), len(dataset.eval)) == (0, 2)
    with pytest.raises(UserError, match=r"--mode=eval"):
        check_trainable(dataset)


def test_no_image_is_decoded(tmp_path, monkeypatch):
    """Sizes that aren't stated are read from headers; everything else needs no image at all."""
    split = opened(yolo(tmp_path / "yolo")).train
    monkeypatch.setattr(EncodedImage, "crop", None)
    monkeypatch.setattr(EncodedImage, "part", None)
    np.testing.assert_allclose(split.targets["boxes"](0), [CAT, DOG], atol=1e-4)
    split = opened(voc(tmp_path / "voc"), "voc_detection").train
    monkeypatch.setattr(EncodedImage, "__init__", None)
    assert split.targets["boxes"](0).tolist() == [CAT, DOG]


# --- what is counted ----------------------------------------------------------------------------------------


def test_defects_of_xml_are_counted_and_named_in_one_note(tmp_path):
    voc(tmp_path)
    xml(
        tmp_path / "Annotations" / "a.xml",
        element("cat", (5, 5, 5, 5)),
        element("cat", (90, 5, 99, 9)),
        element("cat", (70, 5, 99, 9)),
        element("cat", (20, 30, 10, 5)),
        element("dog", (1, 1, 4.5, 4), difficult=1),
    )
    xml(tmp_path / "Annotations" / "b.xml")
    (tmp_path / "JPEGImages" / "c.jpg").unlink()
    picture(tmp_path / "JPEGImages" / "f.jpg")
    (tmp_path / "ImageSets" / "Main" / "train.txt").write_text("a\nb\nc\nf\ngone\n")
    dataset = opened(tmp_path, "voc_detection")
    assert names_of(dataset.train) == ["a", "b"]
    assert dataset.train.targets["boxes"](0).tolist() == [[4, 69, 9, 80], [4, 9, 30, 20], [0, 0, 4, 4.5]]
    kinds = ("no area", "outside", "clipped", "reversed", "ignored", "no boxes", "no annotation", "no image")
    assert faults_of(dataset.train) == dict.fromkeys(kinds, 1)
    assert len([note for note in dataset.notes if note.startswith("train:")]) == 1
    assert any("train.txt lists 1 name" in note for note in dataset.notes)


def test_an_image_of_yolo_without_a_file_has_no_boxes(tmp_path):
    yolo(tmp_path, (("train", "abcd"), ("val", "e")))
    (tmp_path / "labels" / "train" / "a.txt").unlink()
    (tmp_path / "labels" / "train" / "b.txt").write_text("\n")
    (tmp_path / "images" / "train" / "c.jpg").unlink()
    (tmp_path / "images" / "train" / "notes.md").touch()
    dataset = opened(tmp_path)
    assert (names_of(dataset.train), faults_of(dataset.train)) == (["a", "b", "d"], {"no boxes": 2, "no image": 1})
    assert any(".md 1" in note for note in dataset.notes)
    assert dataset.train.example(0)["boxes"].shape == (0, 4)


def test_a_split_without_any_file_of_boxes_is_not_one_of_images_without_boxes(tmp_path):
    yolo(tmp_path)
    picture(tmp_path / "images" / "test" / "z.jpg")
    assert opened(tmp_path).eval.name == "val"
    error = refused(tmp_path, "no image of test has boxes", eval_split="test")
    assert error.endswith("set data.eval_split=val")
    shutil.rmtree(tmp_path / "labels" / "train")
    refused(tmp_path, "train: images without annotation, left out: 3")


@pytest.mark.parametrize(
    ("rows", "example"),
    [({}, "as in labels/train/a.txt"), ({"a.jpg": [(0, 0.5, 0.5, 0.1, 0.1)]}, "without image, left out: 1, as in")],
)
def test_a_split_without_a_box_is_refused(tmp_path, rows, example):
    yolo(tmp_path)
    for path in (tmp_path / "labels" / "train").iterdir():
        path.write_text("")
    for name, row in rows.items():
        lines(tmp_path / "labels" / "train" / f"{name}.txt", *row)
    assert "no boxes, kept: 3" not in refused(tmp_path, f"no box of train .*{example}")
    assert len(opened(tmp_path, evaluates=True).eval) == 2
    assert box_folder.take_inventory(open_tree(str(tmp_path)), "box_folder").splits["train"]


def test_ids_of_images_must_have_one_type(tmp_path):
    path = official(tmp_path) / "annotations" / "instances_train2017.json"
    path.write_text(re.sub(r'"image_id": (\d+)', r'"image_id": "\1"', path.read_text()))
    refused(tmp_path, r"no box of train .*left out: 6, as in .*json", "coco")


def test_images_that_no_split_has_are_counted(tmp_path):
    top = yolo(tmp_path / "folders")
    for name in ("images/x.jpg", "images/fold/y.jpg", "train/images/z.jpg"):
        picture(top / name)
    xml(top / "annotations" / "a.xml")
    (top / "readme.txt").touch()
    notes = opened(top).notes
    assert [re.findall(r"\d+ image|\d+ annotation", note) for note in notes] == [["3 image"], ["1 annotation"]]
    top = voc(tmp_path / "voc")
    picture(top / "JPEGImages" / "x.jpg")
    assert any("1 image in no list" in note for note in opened(top, "voc_detection").notes)
    top = tmp_path / "coco"
    for name in "abcd":
        picture(top / "images" / f"{name}.jpg")
    for number, (split, name) in enumerate({"train": "a", "val": "b", "extra": "c"}.items()):
        coco(top / f"{split}.json", {number: f"{name}.jpg"}, [(number, 3, [0, 0, 9, 9], {})])
    notes = box_folder.take_inventory(open_tree(str(top)), "coco").notes
    assert [note.rpartition(", as ")[2].rpartition("; as ")[2] for note in notes] == ["extra.json", "images/c.jpg"]


def test_defects_of_coco(tmp_path):
    official(tmp_path)
    path = tmp_path / "annotations" / "instances_train2017.json"
    files = {1: "b.jpg", 2: "a.jpg", 9: "gone.jpg"}
    boxes = [
        (1, 3, [1.5, 2, -1, 4], {}),
        (1, 3, [1, 2, 0, 4], {}),
        (9, 3, [1, 2, 3, 4], {}),
        (77, 3, [1, 2, 3, 4], {}),
    ]
    coco(path, files, boxes)
    split = opened(tmp_path, "coco").train
    assert names_of(split) == ["a", "b"]
    assert split.targets["boxes"](1).tolist() == [[2, 0.5, 6, 1.5]]
    assert faults_of(split) == {"no area": 1, "reversed": 1, "no boxes": 1, "no annotation": 1, "no image": 2}
    found = annotations_of(split)
    assert (found.image_ids.tolist(), found.class_ids) == ([2, 1], (3, 7))


def test_ids_and_areas_of_coco_are_kept(tmp_path):
    found = annotations_of(opened(official(tmp_path), "coco").train)
    assert (found.image_ids.tolist(), found.class_ids) == ([100, 99, 98], (3, 7))
    assert found.areas.tolist() == [400, 99.5] * 3
    assert found.sizes.tolist() == [[60, 80]] * 3


def test_a_size_that_is_not_stated_is_the_images(tmp_path):
    voc(tmp_path)
    for name, size in (("a", None), ("b", (0, 0))):
        xml(tmp_path / "Annotations" / f"{name}.xml", element("cat", (71, 1, 99, 9)), size=size)
    split = opened(tmp_path, "voc_detection").train
    assert [split.targets["boxes"](index)[0].tolist() for index in range(2)] == [[0, 70, 9, 80]] * 2


def test_a_damaged_image_without_a_stated_size_stops_nothing(tmp_path):
    voc(tmp_path)
    xml(tmp_path / "Annotations" / "a.xml", element("cat", (71, 1, 999, 9)), size=None)
    (tmp_path / "JPEGImages" / "a.jpg").write_text("no image")
    assert opened(tmp_path, "voc_detection").train.targets["boxes"](0).tolist() == [[0, 70, 9, 999]]


def test_a_wrong_size_is_refused(tmp_path):
    """Boxes of a photo that EXIF turns may be those of the turned one."""
    voc(tmp_path / "voc")
    xml(tmp_path / "voc" / "Annotations" / "b.xml", element("cat", (1, 1, 9, 9)), size=SIZE[::-1])
    (tmp_path / "voc" / "JPEGImages" / "a.jpg").write_text("no image")
    assert "b.jpg" in refused(tmp_path / "voc", "80×60 .*60×80", "voc_detection")
    picture(official(tmp_path / "coco") / "val2017" / "d.jpg", (600, 800))
    assert "d.jpg" in refused(tmp_path / "coco", "800×600 .*80×60", "coco")


def test_shares_where_pixels_are_meant(tmp_path):
    top = voc(tmp_path / "voc")
    for name in "abc":
        xml(top / "Annotations" / f"{name}.xml", element("cat", (0.1, 0.2, 0.3, 0.9)), element("dog", (0, 0, 1, 1)))
    refused(top, "between 0 and 1, as in .*a.xml", "voc_detection")
    path = official(tmp_path / "coco") / "annotations" / "instances_train2017.json"
    path.write_text(re.sub(r'"bbox": \[[^]]*', '"bbox": [0.1, 0.2, 0.3, 0.4', path.read_text()))
    refused(tmp_path / "coco", "between 0 and 1, as in .*a.jpg", "coco")


def test_outlines_of_yolo_give_boxes(tmp_path):
    yolo(tmp_path)
    rows = ((1, 0.5, 0.5, 0.75, 0.25, 1, 0.5), (0, 0, 0, 0.5, 0, 0.5, 0.5, 0, 0.5))
    lines(tmp_path / "labels" / "train" / "b.txt", *rows)
    split = opened(tmp_path).train
    assert split.targets["boxes"](1).tolist() == [[15, 40, 30, 80], [0, 0, 30, 40]]
    assert (split.targets["classes"](1).tolist(), faults_of(split)) == ([1, 0], {"outline": 2})


@pytest.mark.parametrize(
    ("text", "is_crowd"), [("False", 0), (" no ", 0), ("", 0), ("0", 0), ("true", 1), ("1", 1), ("Yes", 1)]
)
def test_difficult_and_crowd_as_text(tmp_path, text, is_crowd):
    for name in "ab":
        xml(picture(tmp_path / f"{name}.jpg").with_suffix(".xml"), element("cat", (1, 1, 9, 9)))
    xml(tmp_path / "b.xml", element("cat", (1, 1, 9, 9), difficult=text))
    assert opened(tmp_path, evaluates=True).eval.targets["crowd"](1).tolist() == [is_crowd]
    boxes = [(key, 3, [0, 0, 9, 9], {"iscrowd": flag}) for key, flag in ((1, 0), (2, text))]
    coco(tmp_path / "a.json", {1: "a.jpg", 2: "b.jpg"}, boxes)
    assert opened(tmp_path, "coco", evaluates=True).eval.targets["crowd"](1).tolist() == [is_crowd]


def test_names_with_dots_and_blanks_in_lists(tmp_path):
    names = ("a.rf.12", "my cat", "x_jpg.rf.3.jpg")
    voc(tmp_path, (("train", names), ("val", "d")))
    path = tmp_path / "ImageSets" / "Main" / "train.txt"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert names_of(opened(tmp_path, "voc_detection").train) == list(names)
    assert len(opened(tmp_path, "voc_detection", eval_split="val").eval) == 1


# --- classes ------------------------------------------------------------------------------------------------


def test_classes_of_xml(tmp_path):
    voc(tmp_path)
    assert opened(tmp_path, "voc_detection").class_names == ("cat", "dog")
    (tmp_path / "classes.txt").write_text("dog\ncat\nemu\n")
    dataset = opened(tmp_path, "voc_detection")
    assert (dataset.class_names, dataset.train.targets["classes"](0).tolist()) == (("dog", "cat", "emu"), [1, 0])
    (tmp_path / "classes.txt").unlink()
    every = [element(name, (1, 1, 9, 9)) for name in reversed(box_folder.VOC)]
    xml(tmp_path / "Annotations" / "a.xml", *every)
    assert opened(tmp_path, "voc_detection").class_names == box_folder.VOC
    assert len(box_folder.VOC) == 20
    xml(tmp_path / "Annotations" / "a.xml", *every, element("emu", (1, 1, 9, 9)))
    assert opened(tmp_path, "voc_detection").class_names == tuple(sorted([*box_folder.VOC, "emu"]))


def test_one_class_is_enough(tmp_path):
    voc(tmp_path / "voc")
    for path in (tmp_path / "voc" / "Annotations").iterdir():
        xml(path, element("cat", (1, 1, 9, 9)))
    assert opened(tmp_path / "voc", "voc_detection").class_names == ("cat",)
    yolo(tmp_path / "yolo")
    for path in (tmp_path / "yolo" / "labels").rglob("*.txt"):
        lines(path, (0, 0.5, 0.5, 0.1, 0.1))
    (tmp_path / "yolo" / "classes.txt").write_text("cat")
    assert opened(tmp_path / "yolo").class_names == ("cat",)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("classes.txt", None, r"classes\.txt: does not exist"),
        ("classes.txt", "cat\n", r"\.txt: class 1 is not in .*classes\.txt.* 0 to 0"),
        ("classes.txt", "cat\ncat\n", "class 'cat' is given twice"),
        ("classes.txt", "\n", "names no class"),
        ("data.yaml", "names: [cat, fox]", "names other classes"),
        ("data.yaml", "names: [cat", "can't be parsed as YAML"),
        ("data.yaml", "nc: 2", "has no list of names"),
        ("data.yaml", "names: {1: cat, 2: dog}", "numbers 0 to 1"),
        ("data.yaml", "names: {0: cat, 0: dog}", "numbers 0 to 1"),
        ("data.yaml", "names: [cat, [dog]]", "one of its names"),
        ("data.yaml", "names: [cat, dog]\nnc: 5", "nc is 5, but there are 2"),
        ("data.yaml", "names: [cat, dog]\nkpt_shape: [17, 2]", "key points"),
        ("data.yaml", "[" * 1000, "can't be parsed as YAML"),
    ],
)
def test_classes_that_cannot_be_used(tmp_path, name, content, says):
    yolo(tmp_path)
    (tmp_path / name).unlink(missing_ok=True)
    if content:
        (tmp_path / name).write_text(content)
    refused(tmp_path, says)


@pytest.mark.parametrize("names", ["[no, 1.0]", "{1: 1.0, 0: no}", "{'1': 1.0, '0': no}"])
def test_names_in_yaml_are_what_is_written(tmp_path, names):
    yolo(tmp_path)
    (tmp_path / "classes.txt").unlink()
    (tmp_path / "data.yaml").write_text(f"nc: 2\nnames: {names}")
    assert opened(tmp_path).class_names == ("no", "1.0")


def test_categories_of_coco_must_agree(tmp_path):
    official(tmp_path)
    boxes = [(1, 3, [0, 0, 9, 9], {})]
    path = tmp_path / "annotations" / "instances_val2017.json"
    coco(path, {1: "d.jpg"}, boxes, categories=[(3, "cat"), (7, "fox")])
    refused(tmp_path, "its categories are not those of .*train2017.json", "coco")
    coco(path, {1: "d.jpg"}, [])
    refused(tmp_path, "no image of val has boxes", "coco")


# --- files that are refused ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("<annotation><object>", "can't be parsed as XML"),
        ("", "can't be parsed as XML"),
        ("<html></html>", "top element is 'html'"),
        (f"<annotation>{element('cat', (1, 'nan', 3, 4))}</annotation>", "<ymin> of object 1 is 'nan'"),
        (f"<annotation>{element('cat', (1, 2, 'x', 4))}</annotation>", "<xmax> of object 1 is 'x'"),
        (f"<annotation>{element('', (1, 2, 3, 4))}</annotation>", "object 1 has no <name>"),
        ("<annotation><object><name>cat</name></object></annotation>", "object 1 has no <bndbox>"),
        ("<annotation><size><width>1e30</width></size></annotation>", "<size> is 1e.30"),
        ('<?xml version="1.0" encoding="gb2312"?><annotation/>', "can't be parsed as XML .*UTF-8"),
        (f"<annotation>{element('emu', (1, 2, 3, 4))}</annotation>", "class 'emu' is not in .*classes.txt"),
    ],
)
def test_xml_that_cannot_be_used(tmp_path, content, says):
    voc(tmp_path)
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    (tmp_path / "Annotations" / "b.xml").write_text(content)
    assert "Annotations/b.xml: " in refused(tmp_path, says, "voc_detection")
    assert "Annotations/b.xml: " in refused(packed(tmp_path / "."), says, "voc_detection")


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("0 0.5 0.5 0.1", "has 4 numbers"),
        ("0 0.5 0.5 0.1 0.1 0.9", "has 6 numbers"),
        ("0 0.5 0.5 0.1 0.1 0.1 0.2 0.3", "has 8 numbers"),
        ("0 0.5 nan 0.1 0.1", "is 'nan'"),
        ("0 0.5 inf 0.1 0.1", "is 'inf'"),
        ("0 0.5 x 0.1 0.1", "is 'x'"),
        ("0 40 30 10 10", "are no shares"),
        ("cat 0.5 0.5 0.1 0.1", "the class is 'cat'"),
        ("-1 0.5 0.5 0.1 0.1", "the class is '-1'"),
    ],
)
def test_lines_of_yolo_that_cannot_be_used(tmp_path, line, says):
    yolo(tmp_path)
    path = tmp_path / "labels" / "train" / "b.txt"
    path.write_text(f"0 0.5 0.5 0.1 0.1\n\n{line}\n")
    assert f"{path}, line 3: " in refused(tmp_path, says)


def test_a_class_that_is_too_large_a_number(tmp_path):
    path = yolo(tmp_path) / "labels" / "train" / "b.txt"
    path.write_text(f"{'9' * 5000} 0.5 0.5 0.1 0.1")
    assert len(refused(tmp_path, f"{path}: class 9.* 0 to 1").replace(str(tmp_path), "")) < 300


def test_links_to_nothing(tmp_path):
    top = voc(tmp_path / "voc")
    (top / "Annotations" / "b.xml").unlink()
    (top / "Annotations" / "b.xml").symlink_to("gone.xml")
    for path in (top, packed(top)):
        refused(path, r"Annotations/b\.xml: is a link", "voc_detection")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda tree: tree.pop("images"), "no lists of images and categories"),
        (lambda tree: tree.pop("categories"), "no lists of images and categories"),
        (lambda tree: tree["annotations"][1].update(category_id=4), "annotation 1 has category_id 4"),
        (lambda tree: tree["annotations"][1].update(bbox=[1, 2, 3]), r"bbox \[1, 2, 3\]"),
        (lambda tree: tree["annotations"][1].update(bbox=[1, 2, float("nan"), 4]), "is nan"),
        (lambda tree: tree["annotations"][1].pop("bbox"), "has no bbox"),
        (lambda tree: tree["annotations"][1].update(area="x"), "the area of annotation 1 is 'x'"),
        (lambda tree: tree["annotations"].append(3), "annotation at place 6 3 has no image_id"),
        (lambda tree: tree["images"][0].pop("file_name"), "has no file_name"),
        (lambda tree: tree["images"][0].update(height="x"), "the height of image 100"),
        (lambda tree: tree["images"][1].update(id=100), "several images have the id 100"),
        (lambda tree: tree["images"][1].update(file_name="./a.jpg"), "several images have the file .*a.jpg"),
        (lambda tree: tree["images"][1].update(height=10**30), "the height of image 99 is 1e.30"),
        (lambda tree: tree["annotations"][1].update(bbox=[1, 2, 3, 10**400]), "in the bbox of annotation 1 is 1000"),
        (lambda tree: tree["categories"][1].update(id=7), "several categories have the id 7"),
        (lambda tree: tree["categories"][0].update(name="cat"), "class 'cat' is given twice"),
        (lambda tree: tree["categories"][0].update(id="x"), "no whole numbers"),
        (
            lambda tree: [image.update(file_name=f"no/{image['id']}") for image in tree["images"]],
            "none of its 3 images",
        ),
    ],
)
def test_json_that_cannot_be_used(tmp_path, change, says):
    path = official(tmp_path) / "annotations" / "instances_train2017.json"
    tree = json.loads(path.read_text())
    change(tree)
    path.write_text(json.dumps(tree))
    assert f"{path}: " in refused(tmp_path, says, "coco")


def test_json_that_is_cut_off(tmp_path):
    path = official(tmp_path) / "annotations" / "instances_train2017.json"
    path.write_text(path.read_text()[:-40])
    refused(tmp_path, "instances_train2017.json: can't be parsed as JSON", "coco")


def test_no_such_layout(tmp_path):
    for name in box_folder.NAMES:
        refused(tmp_path, "no folders at all; (arrange|give)", name)
        with pytest.raises(UserError, match=r"w1_0:classes=10"):
            known_num_classes(DataConfig(name=name))
    refused("no/where", r"data\.path='no/where'")
    for split in ("train", "val"):
        picture(tmp_path / "images" / split / "a.jpg")
    refused(tmp_path, "no image of val has boxes")
    refused(tmp_path, "train: images without annotation, left out: 1", holdout_fraction=0.5)


def test_what_could_be_either_is_refused(tmp_path):
    both = yolo(tmp_path / "both")
    xml(both / "labels" / "train" / "a.xml", element("cat", (1, 1, 9, 9)))
    refused(both, "both in .xml and in .txt")
    twice = yolo(tmp_path / "twice")
    shutil.copytree(twice / "images" / "train", twice / "images" / "train2017")
    refused(twice, "could each be the split train")
    years = tmp_path / "years"
    for year in (2007, 2012):
        voc(years / "VOCdevkit" / f"VOC{year}")
    refused(years, "holds .*VOC2012 and .*VOC2007", "voc_detection")
    files = official(tmp_path / "coco")
    shutil.copy(files / "annotations" / "instances_train2017.json", files / "annotations" / "instances_train2014.json")
    refused(files, "could each be the split train", "coco")


def test_splits_that_share_images_are_refused(tmp_path):
    voc(tmp_path, (("train", "abcd"), ("val", "de")))
    assert "d.jpg" in refused(tmp_path, "1 image of val is also in train", "voc_detection")
    assert len(opened(tmp_path, "voc_detection", evaluates=True).eval) == 2
    assert len(opened(tmp_path, "voc_detection", holdout_fraction=0.5).train) == 2


def test_the_split_to_train_on(tmp_path):
    voc(tmp_path, (("train", "ab"), ("val", "c"), ("test", "d")))
    (tmp_path / "ImageSets" / "Main" / "trainval.txt").write_text("a\nb\nc\n")
    dataset = opened(tmp_path, "voc_detection", train_split="trainval", eval_split="test")
    assert (names_of(dataset.train), names_of(dataset.eval)) == (["a", "b", "c"], ["d"])
    refused(tmp_path, r"1 image of val is also in trainval.*data\.eval_split", "voc_detection", train_split="trainval")
    refused(tmp_path, r"data\.train_split='x' is no split; one of: test, train", "voc_detection", train_split="x")
    assert names_of(opened(tmp_path, "voc_detection", train_split="validation", eval_split="test").train) == ["c"]
    inventory = functools.partial(box_folder.take_inventory, open_tree(str(tmp_path)), "voc_detection")
    assert list(inventory().splits) == ["train", "val", "test"]
    for split in ("train", "val"):
        (tmp_path / "ImageSets" / "Main" / f"{split}.txt").unlink()
    assert {name: len(split) for name, split in inventory().splits.items()} == {"test": 1, "trainval": 3}
    refused(tmp_path, r"data\.train_split=trainval", "voc_detection")
    for name in "abcd":
        xml(picture(tmp_path / "flat" / f"{name}.jpg").with_suffix(".xml"), element("cat", (1, 1, 9, 9)))
    assert len(opened(tmp_path / "flat", train_split="training").train) == 3
    refused(tmp_path / "flat", "no splits, and so no val", train_split="val")


def test_class_folders_are_told_from_images_and_boxes(tmp_path):
    refused(yolo(tmp_path), "box_folder", "folder")


def test_blood_cells(real_data):
    path = real_data / "detection" / "bccd.tar"
    if not path.exists():
        pytest.skip(f"no {path}")
    dataset = opened(path, "voc_detection")
    assert dataset.class_names == ("RBC", "WBC", "Platelets")
    test = opened(path, "voc_detection", eval_split="test").eval
    splits = (dataset.train, dataset.eval, test)
    assert [len(split) for split in splits] == [205, 87, 72]
    counts = [np.bincount(annotations_of(split).classes, minlength=3) for split in splits]
    assert np.sum(counts, 0).tolist() == [4155 - 2, 372, 361]
    assert [faults_of(split) for split in splits] == [{"no area": 1}, {"no area": 1}, {}]
    for index in range(0, 205, 41):
        example = dataset.train.example(index)
        height, width = example["image"].shape[:2]
        assert (example["boxes"][:, 2:] <= [height, width]).all()
        assert (example["boxes"][:, :2] < example["boxes"][:, 2:]).all()
