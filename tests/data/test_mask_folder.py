"""Data sets of images and masks: each layout on disk and in a tar, what is left out, and one line for each problem."""

import pathlib
import pickle
import shutil
import tarfile

import numpy as np
import pytest

from mnv2_jax.config import DataConfig
from mnv2_jax.data import mask_classes
from mnv2_jax.data.sources import check_trainable, known_num_classes, open_dataset
from mnv2_jax.errors import UserError
from tests.data.masked import image, mask, pair, palette, streets, write


def opened(path, name="mask_folder", evaluates=False, **fields):
    return open_dataset(DataConfig(name=name, path=str(path), **fields), evaluates)


def refused(path, says, **fields):
    with pytest.raises(UserError, match=says) as caught:
        opened(path, **fields)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def packed(top, prefix="."):
    path = top.parent / f"{top.name}.tar"
    with tarfile.open(path, "w") as archive:
        archive.add(top, arcname=prefix)
    return path


def masks_of(split):
    return [np.asarray(split.example(index)["mask"]) for index in range(len(split))]


def names_of(split):
    return [pathlib.Path(split.path_of(index)).stem for index in range(len(split))]


# --- folders of images and masks ----------------------------------------------------------------------------


def test_the_three_layouts_on_disk_and_in_a_tar(tmp_path):
    first = streets(tmp_path / "first")
    second = tmp_path / "second"
    for split in ("train", "val"):
        for kind in ("images", "masks"):
            shutil.copytree(first / kind / split, second / split / kind)
    shutil.copy(first / "classes.txt", second)
    third = tmp_path / "third"
    shutil.copytree(first / "images", third / "img_dir")
    shutil.copytree(first / "masks", third / "ann_dir")
    shutil.copy(first / "classes.txt", third)
    for top in (first, second, third):
        for path in (top, packed(top), packed(top, "wrapped")):
            dataset = opened(path)
            assert (len(dataset.train), dataset.eval.name, len(dataset.eval)) == (3, "val", 2)
            assert dataset.class_names == ("sky", "road", "car")
            split = pickle.loads(pickle.dumps(dataset.train))
            assert split.labels.dtype == np.int32
            assert not split.labels.any()
            example = split.example(1)
            assert set(example) == {"image", "label", "mask"}
            assert example["image"].shape[:2] == example["mask"].shape == (6, 8)
            np.testing.assert_array_equal(np.asarray(example["mask"]), mask(0, 1, 2, 255))
            masks = split.targets["mask"]
            assert [masks.path_of(1)[-5:], split.path_of(1)[-5:]] == ["b.png", "b.jpg"]
            assert {"names", "mask.names"} <= set(split.digest())
            assert known_num_classes(DataConfig(name="mask_folder", path=str(path))) == 3


def test_without_splits_a_fifth_of_the_images_is_held_out(tmp_path):
    for number in range(10):
        pair(tmp_path / "images" / "more", tmp_path / "masks" / "more", f"n{number}", 0, 1)
    (tmp_path / "classes.txt").write_text("sky\nroad\n")
    dataset = opened(tmp_path)
    assert (len(dataset.train), len(dataset.eval), dataset.holdout_fraction) == (8, 2, 0.2)
    assert dataset.notes[0].startswith("no splits: 20% of the images is held out")
    assert {*names_of(dataset.train), *names_of(dataset.eval)} == {f"n{number}" for number in range(10)}
    for split in (dataset.train, dataset.eval):
        for index, name in enumerate(names_of(split)):
            assert split.targets["mask"].path_of(index).endswith(f"masks/more/{name}.png")
    assert len(opened(tmp_path, holdout_fraction=0.5).eval) == 5
    assert len(opened(tmp_path, evaluates=True).eval) == 10
    assert len(opened(tmp_path, eval_split="train").eval) == 10
    refused(tmp_path, r"no splits, and so no val; .*data\.eval_split", eval_split="val")


def test_a_share_of_one_image_is_refused(tmp_path):
    pair(tmp_path / "images", tmp_path / "masks", "only", 0, 1)
    (tmp_path / "classes.txt").write_text("sky\nroad\n")
    assert "class" not in refused(tmp_path, "leaves no image to train on")


def test_holdout_takes_a_share_of_train_where_there_are_splits(tmp_path):
    streets(tmp_path)
    shutil.rmtree(tmp_path / "masks" / "val")
    dataset = opened(tmp_path, holdout_fraction=0.34)
    assert (len(dataset.train), len(dataset.eval), dataset.eval.name) == (2, 1, "holdout")


def test_what_has_no_partner_is_counted_and_named(tmp_path):
    streets(tmp_path)
    (tmp_path / "masks" / "train" / "b.png").unlink()
    (tmp_path / "images" / "val" / "d.jpg").unlink()
    (tmp_path / "images" / "train" / "notes.md").touch()
    write(tmp_path / "images" / "stray.png", image())
    dataset = opened(tmp_path)
    assert (names_of(dataset.train), names_of(dataset.eval)) == (["a", "c"], ["e"])
    assert dataset.notes[1:] == (
        "left out: 1 file: .md 1; as images/train/notes.md",
        "left out: 1 image outside of the folders that are read, as images/stray.png",
        "train: 1 image without a mask, as images/train/b.jpg",
        "val: 1 mask without an image, as masks/val/d.png",
    )


def test_a_split_without_masks_is_refused_and_not_chosen(tmp_path):
    streets(tmp_path)
    error = refused(tmp_path, "no image of test has masks", eval_split="test")
    assert error.endswith("set data.eval_split=val")
    shutil.rmtree(tmp_path / "images" / "val")
    shutil.rmtree(tmp_path / "masks" / "val")
    assert "data.holdout_fraction" in refused(tmp_path, "no image of test has masks")
    shutil.rmtree(tmp_path / "images" / "test")
    assert "data.holdout_fraction" in refused(tmp_path, "no val/ nor test/ .*only train/")


def test_to_evaluate_a_split_is_enough(tmp_path):
    streets(tmp_path)
    for kind in ("images", "masks"):
        shutil.rmtree(tmp_path / kind / "train")
    refused(tmp_path, r"no train/ .*only val/, test/; arrange")
    dataset = opened(tmp_path, evaluates=True)
    assert (len(dataset.train), len(dataset.eval), dataset.class_names) == (0, 2, ("sky", "road", "car"))
    with pytest.raises(UserError, match=r"--mode=eval"):
        check_trainable(dataset)


def test_masks_may_have_another_size(tmp_path):
    streets(tmp_path)
    write(tmp_path / "masks" / "train" / "a.png", mask(0, 1, 2, size=(12, 16)))
    example = opened(tmp_path).train.example(0)
    assert (example["image"].shape[:2], example["mask"].shape) == ((6, 8), (12, 16))


# --- classes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("sky\nroad\n\ncar", ("sky", "road", "car")),
        ("\ufeff0 sky\r\n1 road side\r\n2 car\r\n", ("sky", "road side", "car")),
        ("2\tcar\n0\tsky\n1\troad", ("sky", "road", "car")),
        ("0 sky 1 2 3\n1 road 4 5 6\n2 car 7 8 9", ("sky", "road", "car")),
        ("sky 1 2 3\ntraffic light 4 5 6\ncar 7 8 9", ("sky", "traffic light", "car")),
        ("sky\nclass 2\ncar", ("sky", "class 2", "car")),
    ],
)
def test_classes_are_read_in_every_form(tmp_path, text, expected):
    path = tmp_path / "street"
    streets(path, text)
    assert opened(path).class_names == expected
    (path / "classes.txt").rename(tmp_path / "classes.txt")
    assert opened(packed(path)).class_names == expected


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("0 sky\n1 road\n3 car", "no line has number 2"),
        ("0 sky\n1 road\n1 car", "no line has number 2"),
        ("sky\nroad\nsky", "class 'sky' is given twice"),
        ("sky\n", "names 1 classes, .*background"),
        ("\n".join(f"c{n}" for n in range(255)), "names 255 classes"),
        (b"\xff\xfe\x00", "not text in UTF-8"),
    ],
)
def test_classes_that_cannot_be_used(tmp_path, text, says):
    streets(tmp_path)
    (tmp_path / "classes.txt").write_bytes(text if isinstance(text, bytes) else text.encode())
    assert "classes.txt: " in refused(tmp_path, says)


def test_without_classes(tmp_path):
    streets(tmp_path)
    (tmp_path / "classes.txt").unlink()
    error = refused(tmp_path, r"classes\.txt: does not exist")
    assert f"python -m mnv2_jax.inspect {tmp_path}" in error
    with pytest.raises(UserError, match="does not exist"):
        known_num_classes(DataConfig(name="mask_folder", path=str(tmp_path)))
    with pytest.raises(UserError, match=r"w1_0:classes=10"):
        known_num_classes(DataConfig(name="mask_folder"))
    assert opened(tmp_path, mask_values="binary").class_names == ("background", "foreground")


def test_ignored_classes_close_the_gap(tmp_path):
    streets(tmp_path)
    fields = {"ignored_classes": ("road",)}
    dataset = opened(tmp_path, **fields)
    assert dataset.class_names == ("sky", "car")
    assert known_num_classes(DataConfig(name="mask_folder", path=str(tmp_path), **fields)) == 2
    for found in (*masks_of(dataset.train), *masks_of(dataset.eval)):
        np.testing.assert_array_equal(found, mask(0, 255, 1, 255))
    refused(tmp_path, "'raod' is not a class of mask_folder; did you mean 'road'", ignored_classes=("raod",))
    refused(tmp_path, "leaves 1 of 3 classes", ignored_classes=("road", "sky"))


def test_palette_needs_colours_which_are_those_of_the_classes(tmp_path):
    streets(tmp_path)
    refused(tmp_path, "gives no colours", mask_values="palette")
    colours = [(0, 0, 9), (9, 0, 0), (0, 9, 0)]
    lines = [f"{name} {' '.join(map(str, colour))}" for name, colour in zip("abc", colours, strict=True)]
    (tmp_path / "classes.txt").write_text("\n".join(lines))
    for name in "abc":
        write(tmp_path / "masks" / "train" / f"{name}.png", palette(mask(2, 1, 0), colours))
    np.testing.assert_array_equal(masks_of(opened(tmp_path, mask_values="palette").train)[0], mask(2, 1, 0))
    for wrong, says in ((lines[0].replace("9", "256"), "is no colour"), ("x 9 0 0", "colour .* is given twice")):
        (tmp_path / "classes.txt").write_text("\n".join([wrong, *lines[1:]]))
        refused(tmp_path, says, mask_values="palette")


def test_masks_of_0_and_255_are_not_taken_for_one_class_and_ignored_pixels(tmp_path):
    for number in range(4):
        pair(tmp_path / "images", tmp_path / "masks", f"n{number}", 0, 255)
    (tmp_path / "classes.txt").write_text("ground\ncrack\n")
    assert "masks/n0.png" in refused(tmp_path, r"only 0 and 255, .*data\.mask_values=binary")
    np.testing.assert_array_equal(masks_of(opened(tmp_path, mask_values="binary").train)[0], mask(0, 1))
    write(tmp_path / "masks" / "n3.png", mask(0, 1, 255))  # an honest 255
    assert opened(tmp_path).class_names == ("ground", "crack")
    (tmp_path / "classes.txt").write_text("a\nb\nc\n")
    refused(tmp_path, r"names 3 classes, but data\.mask_values=binary has two", mask_values="binary")


# --- files that are refused ---------------------------------------------------------------------------------


def test_no_such_layout(tmp_path):
    (tmp_path / "classes.txt").write_text("sky\nroad\n")
    refused(tmp_path, "no images/ in it, and no folders at all; arrange")
    (tmp_path / "train" / "cat").mkdir(parents=True)
    refused(tmp_path, "no images/ in it, only train/; arrange")
    refused("no/where", r"data\.path='no/where'")


def test_names_that_do_not_agree(tmp_path):
    for name in "ab":
        pair(tmp_path / "images", tmp_path / "masks", name, 0, 1)
        (tmp_path / "masks" / f"{name}.png").rename(tmp_path / "masks" / f"{name}_mask.png")
    (tmp_path / "classes.txt").write_text("sky\nroad\n")
    error = refused(tmp_path, "2 images without a mask, as images/a.jpg; 2 masks without an image, as masks/a_mask.png")
    assert "the same name" in error


def test_images_without_a_folder_of_masks_and_splits_without_a_file(tmp_path):
    streets(tmp_path)
    shutil.rmtree(tmp_path / "masks")
    assert "masks/train/NAME.png" in refused(
        tmp_path, "train: 3 images without a mask, .*and so no pair; arrange", holdout_fraction=0.5
    )
    shutil.rmtree(tmp_path / "images")
    (tmp_path / "images" / "train").mkdir(parents=True)
    refused(tmp_path, "train: holds no image and no mask; arrange", holdout_fraction=0.5)


def test_two_images_of_one_name(tmp_path):
    streets(tmp_path)
    write(tmp_path / "images" / "train" / "a.png", image())
    refused(tmp_path, "images/train/a.jpg and images/train/a.png have the same name without")


def test_masks_in_jpeg_are_refused_when_they_are_read(tmp_path):
    streets(tmp_path)
    (tmp_path / "masks" / "train" / "a.png").unlink()
    write(tmp_path / "masks" / "train" / "a.jpg", mask(0, 1))
    with pytest.raises(UserError, match=r"masks/train/a\.jpg: a mask in JPEG"):
        opened(tmp_path).train.example(0)


# --- published data sets ------------------------------------------------------------------------------------


def test_names_of_classes_are_those_that_are_published():
    names = mask_classes.ADE20K
    assert (len(names), len(set(names)), len(mask_classes.VOC), len(mask_classes.CITYSCAPES)) == (150, 150, 21, 19)
    places = {0: "wall", 12: "person", 20: "car", 53: "stairs", 83: "truck", 107: "washer", 130: "screen", 149: "flag"}
    assert {place: names[place] for place in places} == places
    for name, count in (("ade20k", 150), ("voc_segmentation", 21), ("cityscapes", 19)):
        assert known_num_classes(DataConfig(name=name)) == count
    assert known_num_classes(DataConfig(name="cityscapes", ignored_classes=("train", "bus"))) == 17


def test_ade20k(tmp_path):
    top = tmp_path / "ADEChallengeData2016"
    for split, values in (("training", (0, 1, 150)), ("validation", (0, 12))):
        pair(top / "images" / split, top / "annotations" / split, f"ADE_{split}", *values)
    (top / "objectInfo150.txt").touch()
    for path in (top, tmp_path, packed(top, "ADEChallengeData2016")):
        dataset = opened(path, "ade20k")
        assert (dataset.eval.name, len(dataset.class_names)) == ("validation", 150)
        np.testing.assert_array_equal(masks_of(dataset.train)[0], mask(255, 0, 149))
    write(top / "annotations" / "training" / "ADE_training.png", mask(151))
    with pytest.raises(UserError, match=r"ADE_training\.png: 48 pixels have the value 151,.*restore the original"):
        masks_of(opened(top, "ade20k").train)
    refused(top, "mask_values=palette: the masks of ade20k", name="ade20k", mask_values="palette")
    refused(top / "images", r"no annotations/ of ade20k in it, only training/, validation/", name="ade20k")


def voc(top):
    for name, values in (("a", (0, 15, 255)), ("b", (0, 20)), ("c", (0, 1)), ("d", (0, 2))):
        write(top / "JPEGImages" / f"{name}.jpg", image())
        if name != "d":
            write(top / "SegmentationClass" / f"{name}.png", palette(mask(*values), [(n, n, 0) for n in range(256)]))
    lists = top / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    for name, entries in (("train", "ab"), ("val", "c"), ("trainval", "abc"), ("test", "d")):
        (lists / f"{name}.txt").write_text("\n".join(entries) + "\n")
    return top


def test_voc(tmp_path):
    top = voc(tmp_path / "VOCdevkit" / "VOC2012")
    for path in (top, top.parent, tmp_path, packed(top.parent, "VOCdevkit")):
        dataset = opened(path, "voc_segmentation")
        assert (names_of(dataset.train), names_of(dataset.eval)) == (["a", "b"], ["c"])
        np.testing.assert_array_equal(masks_of(dataset.train)[0], mask(0, 15, 255))
        assert len(dataset.class_names) == 21
    refused(top, "no image of test has masks", name="voc_segmentation", eval_split="test")
    (top / "ImageSets" / "Segmentation" / "train.txt").write_text("a\nb\nd\nz\n")
    assert opened(top, "voc_segmentation").notes[1:] == (
        "train.txt lists 1 name that no file has, as z",
        "train: 1 image without a mask, as JPEGImages/d.jpg",
    )


def test_voc_with_the_further_masks_of_sbd(tmp_path):
    top = voc(tmp_path)
    lists = top / "ImageSets" / "Segmentation"
    for name in "abcd":
        write(top / "SegmentationClassAug" / f"{name}.png", mask(0, 3))
    (lists / "trainaug.txt").write_text("".join(f"/JPEGImages/{n}.jpg /SegmentationClassAug/{n}.png\n" for n in "abd"))
    dataset = opened(top, "voc_segmentation")
    assert (names_of(dataset.train), names_of(dataset.eval)) == (["a", "b", "d"], ["c"])
    assert [found.max() for found in (*masks_of(dataset.train), *masks_of(dataset.eval))] == [3, 3, 3, 1]
    assert any("trainaug.txt: 3 images" in note for note in dataset.notes)
    (lists / "trainaug.txt").write_text("a\nc\n")
    refused(top, r"trainaug\.txt lists 1 image of val\.txt, as c", name="voc_segmentation")


def test_cityscapes_by_train_ids_and_by_label_ids(tmp_path):
    top = tmp_path / "streets"
    for split, city, ids in (("train", "aachen", (7, 33, 0, 29)), ("val", "ulm", (11, 4)), ("test", "bonn", (3,))):
        name = f"{city}_000000_000019"
        write(top / "leftImg8bit" / split / city / f"{name}_leftImg8bit.png", image())
        write(top / "gtFine" / split / city / f"{name}_gtFine_labelIds.png", mask(*ids))
        write(top / "gtFine" / split / city / f"{name}_gtFine_color.png", image())
    for path in (top, packed(top)):
        dataset = opened(path, "cityscapes", ignored_classes=("sidewalk",))
        np.testing.assert_array_equal(masks_of(dataset.train)[0], mask(0, 17, 255, 255))
        assert (dataset.class_names[:2], len(dataset.class_names)) == (("road", "building"), 18)
        assert any("label ids" in note for note in dataset.notes)
    folder = top / "gtFine" / "train" / "aachen"
    write(folder / "aachen_000000_000019_gtFine_labelTrainIds.png", mask(0, 18, 255))
    dataset = opened(top, "cityscapes")
    np.testing.assert_array_equal(masks_of(dataset.train)[0], mask(0, 18, 255))
    np.testing.assert_array_equal(masks_of(dataset.eval)[0], mask(2, 255))
    refused(top, "no image of test has masks", name="cityscapes", eval_split="test")
    write(folder / "aachen_000000_000019_gtFine_labelTrainIds.png", mask(19))
    with pytest.raises(UserError, match=r"labelTrainIds\.png: .*value 19.*restore the original"):
        masks_of(opened(top, "cityscapes").train)


# --- real data ----------------------------------------------------------------------------------------------


def test_camvid(real_data):
    path = real_data / "segmentation" / "camvid.tar"
    if not path.exists():
        pytest.skip(f"no {path}")
    dataset = opened(path, ignored_classes=("Unlabelled",))
    assert (len(dataset.train), len(dataset.eval), len(dataset.class_names)) == (367, 101, 11)
    test = opened(path, eval_split="test", ignored_classes=("Unlabelled",)).eval
    assert len(test) == 233
    for index in range(0, 233, 20):
        example = test.example(index)
        classes = np.asarray(example["mask"])
        assert (classes.shape, example["image"].shape) == ((360, 480), (360, 480, 3))
        assert set(np.unique(classes).tolist()) <= {*range(11), 255}
