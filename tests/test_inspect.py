"""Tests `inspect` on a folder that has every kind of defect, and on other forms of data."""

import pathlib
import shutil
import tarfile

import numpy as np
import pytest
from PIL import Image

from tests.cli import answer, here
from tests.data import boxed, masked
from tests.data.conftest import smooth_image
from tests.report.test_page import Page


def picture(seed, size=(70, 90)):
    return Image.fromarray(smooth_image(np.random.default_rng(seed), *size))


def fill(top):
    """Writes two classes in three splits, with one file for each defect, named after it."""
    for seed, place in enumerate(
        ("train/cat/a", "train/cat/b", "train/cat/c", "train/dog/a", "val/cat/a", "test/cat/a")
    ):
        (top / place).parent.mkdir(parents=True, exist_ok=True)
        picture(seed, (70 + seed, 90)).save(top / f"{place}.jpg")
    cat, first = top / "train" / "cat", (top / "train" / "cat" / "a.jpg").read_bytes()
    shutil.copy(cat / "a.jpg", top / "test" / "cat" / "leak.jpg")
    shutil.copy(cat / "b.jpg", top / "train" / "dog" / "both.jpg")
    shutil.copy(cat / "c.jpg", cat / "again.jpg")
    exif = Image.Exif()
    exif[0x0112] = 6
    start, rest = b"\xff\xd8", (top / "train" / "dog" / "a.jpg").read_bytes()[2:]
    block = exif.tobytes()
    segment = b"\xff\xe1" + (len(block) + 2).to_bytes(2, "big") + block
    (top / "val" / "cat" / "turned.jpg").write_bytes(start + segment + rest)
    (cat / "cut.jpg").write_bytes(first[: len(first) // 2])
    (cat / "empty.jpg").touch()
    (cat / "text.png").write_text("no image")
    small = picture(20, (40, 50))
    small.convert("L").save(cat / "grey.png")
    picture(21).convert("L").convert("RGB").save(cat / "greyish.webp", lossless=True)
    alpha = picture(22).convert("RGBA")
    alpha.putalpha(9)
    alpha.save(cat / "alpha.png")
    picture(23).save(cat / "moving.gif", save_all=True, append_images=[picture(24)])
    picture(25).convert("CMYK").save(cat / "cmyk.jpg")
    Image.fromarray(np.arange(1200, dtype=np.uint16).reshape(30, 40) * 50).save(cat / "deep.png")
    picture(26).save(cat / "called.jpg", "PNG")
    (top / "train" / "fox").mkdir()
    (top / "readme.md").touch()
    return top


@pytest.fixture(scope="module")
def messy(tmp_path_factory):
    return fill(tmp_path_factory.mktemp("messy") / "photos")


@pytest.fixture(scope="module")
def inspected(messy, tmp_path_factory):
    """The JSON output of `inspect` for the folder, and the path of its page."""
    page = tmp_path_factory.mktemp("page") / "photos.html"
    return answer(here("inspect", messy, f"--report={page}", "--json")), page


def test_counts(inspected):
    tree, _ = inspected
    assert (tree["images"], tree["looked_at"]) == (20, 20)
    assert tree["splits"] == {"train": 16, "val": 2, "test": 2}
    assert tree["class_names"] == ["cat", "dog", "fox"]
    rows = {row.pop("class"): row for row in tree["tables"]["classes"]}
    assert rows["dog"] == {"train": 2, "val": 0, "test": 0, "images": 2}
    assert rows["fox"]["images"] == 0
    assert tree["notes"] == ["left out: 1 file: .md 1; as readme.md"]


def test_what_is_special(inspected):
    tables = inspected[0]["tables"]
    kinds = {row["kind"]: row["images"] for row in tables["traits"]}
    named = ("greyscale", "grey in colour", "transparent", "turned", "animated", "16 bits", "CMYK")
    assert kinds == dict.fromkeys(named, 1) | {"greyscale": 2}
    assert [(row["format"], row["images"], row["endings"]) for row in tables["formats"]] == [
        ("JPEG", 11, ".jpg"),
        ("PNG", 4, ".png, .jpg"),
        ("WEBP", 1, ".webp"),
        ("GIF", 1, ".gif"),
    ]
    sizes = {row.pop("of"): row for row in tables["sizes"]}
    assert (sizes["width"]["least"], sizes["width"]["median"], sizes["short side"]["least"]) == (40, 90, 30)


def test_duplicates_across_splits_come_first(inspected):
    assert [(row["same"], row["across"], row["files"]) for row in inspected[0]["tables"]["duplicates"]] == [
        ("pixels", "splits and classes", "train/dog/a.jpg = val/cat/turned.jpg"),
        ("file", "splits", "train/cat/a.jpg = test/cat/leak.jpg"),
        ("file", "classes", "train/cat/b.jpg = train/dog/both.jpg"),
        ("file", "none", "train/cat/again.jpg = train/cat/c.jpg"),
    ]


def test_damage_is_named_and_a_file_that_cannot_be_read_is_none(inspected, messy, tmp_path):
    assert [row["file"].partition(":")[0] for row in inspected[0]["tables"]["damaged"]] == [
        f"train/cat/{name}" for name in ("cut.jpg", "empty.jpg", "text.png")
    ]
    assert inspected[0]["tables"]["unread"] == []
    (tmp_path / "cat").mkdir()
    shutil.copy(messy / "train" / "cat" / "a.jpg", tmp_path / "cat")
    (tmp_path / "cat" / "b.jpg").symlink_to("/proc/self/mem")
    tree = answer(here("inspect", tmp_path, "--json"))
    assert [len(tree["tables"][name]) for name in ("damaged", "unread")] == [0, 1]


def test_page(inspected):
    page = Page(inspected[1].read_text())
    assert all(link.startswith("data:image/jpeg;base64,") for link in page.links)
    assert 4 <= len(page.links) <= 8 + 2  # of each class that has some to train on, 8 at most
    for words in ("photos", "Duplicates", "train/cat/cut.jpg", "val/cat/turned.jpg", "20 images of 3 classes"):
        assert words in page.text


def test_text_and_limit(messy):
    result = here("inspect", messy, "--limit=6")
    assert result.returncode == 0, result.stderr
    assert "; 6 of them" in result.stdout.splitlines()[0]
    assert "--limit" in result.stdout.splitlines()[0]
    assert result.stderr == ""


def test_other_forms_of_data(messy, tmp_path):
    with tarfile.open(tmp_path / "photos.tar", "w") as archive:
        archive.add(messy, arcname="photos")
    packed, plain = (answer(here("inspect", path, "--json")) for path in (tmp_path / "photos.tar", messy))
    assert packed["tables"] == plain["tables"]
    rows = ["train/cat/a,cat,train", "train/dog/a.jpg,dog,train", "val/cat/a.jpg,cat,val", "gone.jpg,cat,val"]
    (tmp_path / "list.csv").write_text("\n".join(["id,label,split", *rows]))
    tree = answer(here("inspect", tmp_path / "list.csv", f"--image_root={messy}", "--json"))
    assert (tree["splits"], tree["class_names"]) == ({"train": 2, "val": 1}, ["cat", "dog"])
    assert any("gone.jpg" in note for note in tree["notes"])
    kaggle = tmp_path / "kaggle"
    shutil.copytree(messy / "train" / "dog", kaggle / "train")
    shutil.copytree(messy / "test" / "cat", kaggle / "test")
    (kaggle / "train.csv").write_text("id,label\nboth,cat\ntrain/a.jpg,dog")
    (kaggle / "test.csv").write_text("id\nleak\n")
    tree = answer(here("inspect", kaggle, "--json"))
    assert tree["splits"] == {"train": 2, "test": 1}
    assert tree["tables"]["classes"][-2] == {"class": "no class", "train": 0, "test": 1, "images": 1}
    flat = answer(here("inspect", messy / "val" / "cat", "--json"))
    assert (flat["class_names"], flat["tables"]["classes"][0]["class"]) == ([], "no class")
    unsplit = answer(here("inspect", messy / "train", "--json"))
    assert unsplit["splits"] == {"train": 16}
    assert "fox" in unsplit["training"]["problem"]
    assert "fox" in plain["training"]["problem"]
    assert "problem" in flat["training"]
    shutil.copytree(messy / "train", tmp_path / "classes")
    (tmp_path / "classes" / "fox").rmdir()
    whole = answer(here("inspect", tmp_path / "classes", "--json"))
    assert whole["training"] == {"train": 12, "eval": 4, "eval_split": "holdout"}


def test_masks(tmp_path):
    """A data set with every defect of masks, each of which is counted and stops nothing."""
    top = masked.streets(tmp_path / "streets")
    train = top / "masks" / "train"
    masked.write(train / "b.png", masked.mask(0, 3, 3))
    masked.write(train / "c.png", masked.mask(1, size=(12, 16)))
    (train / "d.png").write_text("no mask")
    masked.write(train / "e.jpg", masked.mask(1))
    for name in "defg":
        masked.write(top / "images" / "train" / f"{name}.jpg", masked.image(9))
    page = tmp_path / "streets.html"
    tree = answer(here("inspect", top, "--ignored_classes=sky", f"--report={page}", "--json"))
    assert (tree["splits"], tree["class_names"]) == ({"train": 5, "val": 2}, ["sky", "road", "car"])
    tables = tree["tables"]
    assert "classes" not in tables
    assert [(row["value"], row["class"], row["train images"], row["val images"]) for row in tables["masks"]] == [
        ("0", "sky (ignored)", 2, 2),
        ("1", "road", 2, 2),
        ("2", "car", 1, 2),
        ("3", "no class", 1, 0),
        ("255", "ignored", 1, 2),
    ]
    assert [row["val %"] for row in tables["masks"]] == [25, 25, 25, 0, 25]
    assert [row["train %"] for row in tables["masks"]][3] == pytest.approx(100 * 32 / (48 + 48 + 192))
    assert tables["unknown_values"] == [{"split": "train", "mask": "masks/train/b.png", "values": "3", "pixels": 32}]
    assert [(row["mask"], row["size"]) for row in tables["mask_sizes"]] == [("masks/train/c.png", "16×12")]
    assert [row["file"].partition(": ")[0] for row in tables["unusable_masks"]] == [
        "masks/train/d.png",
        "masks/train/e.jpg",
    ]
    assert "train: 2 images without a mask, as images/train/f.jpg" in tree["notes"]
    assert tree["training"] == {"train": 5, "eval": 2, "eval_split": "val"}
    assert "Values in masks" in Page(page.read_text()).text
    plain = here("inspect", top).stdout
    assert "1 mask, which a training refuses: if 0 is no class" in plain
    assert "ignored: 4.17% of the pixels of train, 25.00% of the pixels of val" in plain


def test_masks_whose_classes_are_not_known_yet(tmp_path):
    top = masked.streets(tmp_path / "streets")
    (top / "classes.txt").unlink()
    with tarfile.open(tmp_path / "streets.tar", "w") as archive:
        archive.add(top, arcname="streets")
    tree = answer(here("inspect", tmp_path / "streets.tar", "--json"))
    assert [(row["value"], row["class"]) for row in tree["tables"]["masks"]] == [
        (value, "no class") for value in ("0", "1", "2", "255")
    ]
    assert any("classes.txt" in note for note in tree["notes"])
    assert "classes.txt" in tree["training"]["problem"]
    for split, name in (("train", "a"), ("train", "b"), ("train", "c"), ("val", "d"), ("val", "e")):
        masked.write(top / "masks" / split / f"{name}.png", masked.mask(0, 255))
    assert "there are only 0 and 255: data.mask_values=binary" in here("inspect", top).stdout
    assert answer(here("inspect", top, "--mask_values=binary", "--json"))["class_names"] == ["background", "foreground"]
    for name in "abc":
        masked.write(top / "masks" / "train" / f"{name}.png", np.full((6, 8, 3), (1, 2, 3), np.uint8))
    assert "refuses: set data.mask_values=palette" in here("inspect", top).stdout
    tree = answer(here("inspect", top, "--mask_values=palette", "--json"))
    assert [(row["value"], row["train images"]) for row in tree["tables"]["masks"]][1] == ("(1, 2, 3)", 3)


def test_boxes(tmp_path):
    """A data set with every defect of boxes, each of which is counted and stops nothing."""
    top = boxed.voc(tmp_path / "pets")
    boxes = top / "Annotations"
    boxed.xml(
        boxes / "a.xml",
        *(boxed.element("cat", box) for box in ((5, 5, 5, 5), (90, 5, 99, 9), (70, 5, 99, 9), (20, 30, 10, 5))),
        boxed.element("dog", (1, 1, 40, 40)),
    )
    boxed.xml(boxes / "b.xml", size=(61, 80))
    boxed.picture(top / "JPEGImages" / "f.jpg", (200, 300))
    boxed.picture(top / "JPEGImages" / "g.jpg")
    boxed.xml(boxes / "f.xml", boxed.element("dog", (1, 1, 300, 200)), boxed.element("cat", (1, 1, 96, 96)), size=None)
    boxed.xml(boxes / "h.xml", boxed.element("cat", (1, 1, 9, 9)))
    (top / "ImageSets" / "Main" / "train.txt").write_text("a\nb\nc\nf\ng\nh\n")
    (top / "ImageSets" / "Main" / "trainval.txt").write_text("a\nb\nc\nd\ne\n")
    page = tmp_path / "pets.html"
    tree = answer(here("inspect", top, f"--report={page}", "--json"))
    assert (tree["splits"], tree["class_names"]) == ({"train": 4, "val": 2}, ["cat", "dog"])
    tables = tree["tables"]
    assert not {"classes", "masks"} & set(tables)
    assert tables["boxes"] == [
        {"class": "cat", "train": 4, "val": 2, "boxes": 6},
        {"class": "dog", "train": 3, "val": 2, "boxes": 5},
        {"class": "all", "train": 7, "val": 4, "boxes": 11},
    ]
    assert tables["box_sizes"] == [
        {"size": "small", "train": 3, "val": 2, "boxes": 5},
        {"size": "medium", "train": 2, "val": 2, "boxes": 4},
        {"size": "large", "train": 2, "val": 0, "boxes": 2},
    ]
    assert tables["boxes_per_image"] == [
        {"split": "train", "images": 4, "without boxes": 1, "least": 0, "median": 2, "most": 3},
        {"split": "val", "images": 2, "without boxes": 0, "least": 2, "median": 2, "most": 2},
    ]
    counts = {row["kind"]: (row["train"], row["val"]) for row in tables["box_faults"]}
    kinds = ("no area", "outside", "clipped", "reversed", "no boxes", "no annotation", "no image")
    assert counts == dict.fromkeys(kinds, (1, 0)) | {"ignored": (1, 2), "outline": (0, 0)}
    assert all(bool(row["example"]) == (row["kind"] != "outline") for row in tables["box_faults"])
    assert [(row["size"], row["stated"]) for row in tables["image_sizes"]] == [("80×60", "80×61")]
    assert "JPEGImages/b.jpg: has 80×60 pixels" in tree["training"]["problem"]
    assert "Boxes by size" in Page(page.read_text()).text
    assert "Boxes by size" in here("inspect", top).stdout


@pytest.mark.parametrize("write", [boxed.yolo, boxed.official])
def test_boxes_of_other_forms(tmp_path, write):
    tree = answer(here("inspect", write(tmp_path / "pets"), "--json"))
    assert tree["splits"] == {"train": 3, "val": 2}
    assert [row["boxes"] for row in tree["tables"]["boxes"]] == [5, 5, 10]
    assert [row["boxes"] for row in tree["tables"]["box_sizes"]] == [5, 5, 0]
    assert "problem" not in tree["training"]


def test_splits_that_are_called_as_columns(tmp_path):
    top = boxed.yolo(tmp_path / "meaning", (("", "abcde"),))
    table = answer(here("inspect", top, "--json"))["tables"]["box_faults"]
    assert [(row["split meaning"], row["meaning"][:5]) for row in table][:1] == [(0, "boxes")]
    for number, place in enumerate(("images/cat", "images/dog", "train/cat", "val/cat")):
        (tmp_path / "photos" / place).mkdir(parents=True)
        picture(number).save(tmp_path / "photos" / place / "a.jpg")
    rows = answer(here("inspect", tmp_path / "photos", "--json"))["tables"]["classes"]
    assert rows[0] == {"class": "cat", "train": 1, "val": 1, "split images": 1, "images": 3}


def test_a_folder_with_masks_and_boxes(tmp_path):
    top = boxed.voc(tmp_path / "VOC2012")
    shutil.copytree(top / "ImageSets" / "Main", top / "ImageSets" / "Segmentation")
    for name in "abcde":
        masked.write(top / "SegmentationClass" / f"{name}.png", masked.mask(0, 1, 255, size=boxed.SIZE))
    for option, table in (("", "masks"), ("--name=voc_segmentation", "masks"), ("--name=voc_detection", "boxes")):
        assert table in answer(here("inspect", top, *filter(None, [option]), "--json"))["tables"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no/where"], "no/where: no such file or folder"),
        (["{empty}"], "no image that can be read is in it"),
        (["{empty}", "--limit=-1"], "--limit"),
        (["{empty}", "--report=x.pdf"], "--report"),
        (["{empty}", "--report=no/where/x.html"], "--report"),
        (["{empty}", "--image_root=x"], "not a list"),
        (["{empty}", "--config.data.name=x"], "--config.data.name=x"),
        (["{empty}", "--jsn"], "--json"),
        (["{empty}", "--mask_values=x"], "--mask_values"),
        (["{empty}", "--name=x"], "--name"),
        (["{empty}", "--name=coco"], "no JSON file of coco"),
        (["{empty}", "--ignored_classes=x"], "no folders of images and masks"),
    ],
)
def test_refused_in_one_line(tmp_path, arguments, message):
    result = here("inspect", *(argument.format(empty=tmp_path) for argument in arguments))
    assert (result.returncode, result.stdout) == (2, "")
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


def test_real_clothes(real_data, tmp_path):
    path = pathlib.Path(real_data) / "transfer" / "clothing.tar"
    if not path.exists():
        pytest.skip(f"no {path}")
    tree = answer(here("inspect", path, "--json"))
    assert tree["splits"] == {"train": 1147, "validation": 341, "test": 372}
    assert tree["tables"]["duplicates"] == tree["tables"]["damaged"] == []


def test_real_streets(real_data):
    """The shares of pixels are those that were counted when the data were packed."""
    path = pathlib.Path(real_data) / "segmentation" / "camvid.tar"
    if not path.exists():
        pytest.skip(f"no {path}")
    tree = answer(here("inspect", path, "--ignored_classes=Unlabelled", "--json"))
    assert tree["splits"] == {"train": 367, "val": 101, "test": 233}
    rows = tree["tables"]["masks"]
    shares = (16.85, 23.26, 0.98, 31.66, 4.49, 9.72, 1.17, 1.13, 5.87, 0.64, 0.29, 3.95)
    assert [round(row["train %"], 2) for row in rows] == list(shares)
    assert rows[-1]["class"] == "Unlabelled (ignored)"
    assert [round(rows[-1][f"{split} %"], 2) for split in ("val", "test")] == [1.7, 3.83]
    assert tree["tables"]["unknown_values"] == tree["tables"]["mask_sizes"] == tree["tables"]["unusable_masks"] == []


def test_real_blood_cells(real_data):
    """The numbers of boxes are those that were counted when the data were packed, without two that have no area."""
    path = pathlib.Path(real_data) / "detection" / "bccd.tar"
    if not path.exists():
        pytest.skip(f"no {path}")
    tree = answer(here("inspect", path, "--json"))
    assert tree["splits"] == {"train": 205, "val": 87, "test": 72}
    assert {row["class"]: row["boxes"] for row in tree["tables"]["boxes"]} == {
        "RBC": 4155 - 2,
        "WBC": 372,
        "Platelets": 361,
        "all": 4888 - 2,
    }
    assert [row["boxes"] for row in tree["tables"]["box_sizes"]] == [32, 1386, 3468]
    counts = {row["kind"]: sum(row[split] for split in tree["splits"]) for row in tree["tables"]["box_faults"]}
    assert {kind: count for kind, count in counts.items() if count} == {"no area": 2}
    assert tree["training"] == {"train": 205, "eval": 87, "eval_split": "val"}
