"""Lists of files and labels in the usual forms, and a one-line error for each problem."""

import tarfile

import numpy as np
import pytest
from PIL import Image

from mnv2_jax.config import DataConfig
from mnv2_jax.data.sources import known_num_classes, open_dataset
from mnv2_jax.errors import UserError

IDS = [f"{number:03d}" for number in range(10)]
PHOTOS = [f"photos/{name}/{name}{number} x.jpg" for name in ("cat", "dog") for number in range(5)]
LABELLED = [(path, path.split("/")[1]) for path in PHOTOS]
BY_ID = "\n".join(f"{image},{'dog' if int(image) > 4 else 'cat'}" for image in IDS)
SPLITS = ("train", "train", "valid", "test", "train")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Ten images as photos/CLASS/*.jpg and ten as train/NUMBER.png, each of its own shade."""
    top = tmp_path_factory.mktemp("listed")
    for shade, name in enumerate([*PHOTOS, *(f"train/{image}.png" for image in IDS)]):
        (top / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 8, 3), 9 * (shade % 10), np.uint8)).save(top / name)
    return top


@pytest.fixture
def listed(images, tmp_path):
    """Writes a list, and opens it beside links to the images."""
    for name in ("photos", "train"):
        (tmp_path / name).symlink_to(images / name)

    def opened(content, name="list.csv", path=None, evaluates=False, **fields):
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        data = DataConfig(name="folder", path=str(path or tmp_path / name), **fields)
        return open_dataset(data, evaluates)

    return opened


def lines(form, rows=LABELLED):
    return "\n".join(form.format(path, label) for path, label in rows)


WINDOWS = [(path.replace("/", "\\"), label) for path, label in LABELLED]
FORMS = {
    "kaggle": ("train.csv", "id,label\n" + BY_ID),
    "any word for the label": ("labels.csv", "id,breed\n" + BY_ID),
    "no header": ("a.csv", BY_ID),
    "windows": ("a.csv", b"\xef\xbb\xbf" + ("id,breed\n" + BY_ID + "\n").replace("\n", "\r\n").encode()),
    "utf-16": ("a.csv", ("id,label\n" + BY_ID).encode("utf-16")),
    "windows separators": ("a.TXT", lines("{} {}", WINDOWS).replace("\n", "\r\n\r\n")),
    "spaces": ("a.txt", lines("{} {}")),
    "spaces with a header": ("a.txt", "path label\n" + lines("{} {}")),
    "commas": ("a.txt", lines("{},{}")),
    "quotes": ("a.csv", '"file","label"\n' + lines('"{}", "{}"')),
    "semicolons and foreign words": ("a.csv", "Datei;Klasse\n" + lines("{};{}")),
    "tabs": ("a.tsv", "label\tfile\n" + lines("{1}\t{0}")),
    "the end of the path": ("a.csv", lines("{},{}", [(path.split("/")[2], label) for path, label in LABELLED])),
    "the class and its number": ("a.csv", "class id,filepaths,labels\n" + lines("0,{},{}")),
    "dots": ("a.csv", lines("./{},{}")),
}


@pytest.mark.parametrize("form", FORMS)
def test_forms(listed, form):
    """Each form gives the same ten images of two classes, one of each held out."""
    name, content = FORMS[form]
    dataset = listed(content, name)
    assert (dataset.class_names, dataset.eval.name, dataset.holdout_fraction) == (("cat", "dog"), "holdout", 0.2)
    for split, counts in ((dataset.train, [4, 4]), (dataset.eval, [1, 1])):
        assert np.bincount(split.labels).tolist() == counts
        for place, label in enumerate(split.labels):
            assert (np.asarray(split.read(place)).mean() > 40) == label
    assert dataset.notes[0].startswith("no splits")
    assert dataset.notes[1].startswith("not in the list: 10 images")


def test_numbers_are_classes_by_their_value(listed, images, tmp_path):
    rows = lines("{},{}", [(path, f"{2 + 8 * (label == 'cat')}.0") for path, label in LABELLED])
    assert listed("image_id,label\n" + rows).class_names == ("2", "10")
    assert known_num_classes(DataConfig(name="folder", path=str(tmp_path / "list.csv"))) == 2
    absolute = listed(lines(f"{images}/{{}},{{}}"), image_root=str(images))
    assert absolute.train.digest() == listed(lines("{},{}")).train.digest()


def test_a_column_of_splits(listed):
    rows = [f"{path},{label},{SPLITS[place % 5]}" for place, (path, label) in enumerate(LABELLED)]
    for head in ("", "filename,species,data set\n"):
        dataset = listed(head + "\n".join(rows))
        sizes = (len(dataset.train), dataset.eval.name, len(dataset.eval), dataset.holdout_fraction)
        assert sizes == (6, "valid", 2, 0)
        assert dataset.notes[0].endswith(": 'test'")
    assert listed("\n".join(rows), eval_split="test").eval.name == "test"
    only = listed("\n".join(row for row in rows if "valid" in row), evaluates=True)
    assert (len(only.train), only.eval.name, only.class_names) == (0, "valid", ("cat", "dog"))
    assert len(listed("\n".join(rows), holdout_fraction=0.4).eval) == 2
    whole = listed(lines("{},{}"), evaluates=True)
    assert (len(whole.train), whole.eval.name, len(whole.eval)) == (0, "list", 10)


def test_a_folder_of_lists(listed, images, tmp_path):
    alone = listed("id,label\n" + BY_ID, "train.csv", tmp_path)
    assert (len(alone.train), alone.holdout_fraction) == (8, 0.2)
    both = listed("photos/cat/cat0 x.jpg cat\ntrain/000.png cat", "val.txt", tmp_path)
    assert (len(both.train), both.eval.name, len(both.eval)) == (10, "val", 2)
    assert both.notes == (
        "listed in several splits: 1 image, as train/000.png",
        "not in the list: 9 images, as photos/cat/cat1 x.jpg",
    )
    with pytest.raises(UserError, match=r"val\.txt, line 1: .*train\.csv"):
        listed("000\n001", "val.txt", tmp_path)
    (tmp_path / "val.txt").unlink()
    (tmp_path / "train").unlink()
    (tmp_path / "train").symlink_to(images / "photos")  # class folders have nothing to do with a list beside them
    with pytest.raises(UserError, match="val/ nor test/"):
        listed("", "other.csv", tmp_path)


def test_images_in_a_tar(listed, images, tmp_path):
    with tarfile.open(tmp_path / "images.tar", "w") as archive:
        archive.add(images, arcname=".")
    packed, plain = (listed(BY_ID, image_root=root) for root in (str(tmp_path / "images.tar"), None))
    np.testing.assert_array_equal(packed.train.read(3), plain.train.read(3))


REFUSED = {
    "missing": (
        "id,label\n" + BY_ID + "\n\n011,cat\n012,dog",
        {},
        r"line 13: '011' .* 1 more of 12; .*image_root",
    ),
    "several": ("cat0 x,cat\n000,dog\n" + "img.png,cat", {}, r"line 3: 'img\.png'"),
    "ambiguous": ("x,cat\n", {}, r"line 1: 'x' .*photos/cat/x\.png .*photos/dog/x\.png"),
    "two classes": ("000,dog\n001,dog\n000,cat", {}, r"line 3: '000' .*'cat'.*'dog' .*line 1"),
    "fields": ("id,label\n" + BY_ID + "\n011", {}, r"line 12: 1 .*line 1 has 2"),
    "one column": ("id\n000\n001", {}, "line 1: .*one field"),
    "no label": ("id,label\n000,\n001,cat", {}, "line 2: no label"),
    "a measurement": ("id,score\n000,0.5\n001,1", {}, r"line 2: 0\.5 "),
    "empty": ("\n", {}, "empty"),
    "a header alone": ("id,label\n", {}, "no line"),
    "one-hot": ("id,healthy,rust\n000,1,0\n001,0,1", {}, "'healthy', 'rust' .*label"),
    "latin": ("id,label\n000,ä".encode("latin-1"), {}, "UTF-8"),
    "no such root": (BY_ID, {"image_root": "no/where"}, r"data\.image_root='no/where'"),
    "no such split": (
        BY_ID,
        {"eval_split": "val"},
        r"no val; .*data\.eval_split",
    ),
    "no train": ("000,cat,0\n001,dog,1".replace("000", "id,label,split\n000"), {}, "no train .*only 0, 1"),
    "a class of val": ("000,cat,train\n001,dog,val", {}, "'dog' .*val .*train"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_in_one_line(listed, images, case, tmp_path):
    content, fields, says = REFUSED[case]
    if case == "ambiguous":
        (tmp_path / "photos").unlink()
        for name in ("cat", "dog"):
            (tmp_path / "photos" / name).mkdir(parents=True)
            (tmp_path / "photos" / name / "x.png").touch()
    with pytest.raises(UserError, match=says) as error:
        listed(content, **fields)
    assert "\n" not in str(error.value)


def test_an_image_root_is_of_lists(photos):
    for name, path in (("folder", str(photos)), ("digits", None)):
        with pytest.raises(UserError, match=r"data\.image_root"):
            open_dataset(DataConfig(name=name, path=path, image_root="x"))


def test_listed_twice_is_one_image(listed):
    dataset = listed(BY_ID + "\n000,cat")
    assert len(dataset.train) == 8
    assert dataset.notes[1].startswith("listed twice")
    assert dataset.notes[1].endswith(": 1 image")
