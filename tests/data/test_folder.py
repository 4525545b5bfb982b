"""Image folders on disk and in a tar: the same images either way, and a one-line error for each problem."""

import gzip
import io
import os
import pathlib
import pickle
import shutil
import tarfile

import numpy as np
import pytest
from PIL import Image

from mnv2_jax.config import DataConfig
from mnv2_jax.data import folder, imagenet, images
from mnv2_jax.data.images import EXTENSIONS
from mnv2_jax.data.sources import check_trainable, known_num_classes, open_dataset
from mnv2_jax.errors import UserError


def opened(path, **fields):
    return open_dataset(DataConfig(name="folder", path=str(path), **fields))


@pytest.fixture
def own(photos, tmp_path) -> pathlib.Path:
    """A copy of the folder that a test may change."""
    return pathlib.Path(shutil.copytree(photos, tmp_path / "own"))


def test_directory_and_tar_hold_the_same(photos, photos_tar):
    on_disk, in_tar = opened(photos), opened(photos_tar)
    assert on_disk.class_names == in_tar.class_names == ("cat", "dog", "emu")
    for split in ("train", "eval"):
        a, b = getattr(on_disk, split), getattr(in_tar, split)
        np.testing.assert_array_equal(a.labels, b.labels)
        for i in range(len(a)):
            np.testing.assert_array_equal(a.read(i), b.read(i))
    np.testing.assert_array_equal(np.bincount(on_disk.train.labels), [7, 5, 5])
    assert on_disk.train.labels.dtype == np.int32
    assert on_disk.eval.name == "val"


def test_eval_may_have_a_subset_of_the_classes(photos):
    np.testing.assert_array_equal(opened(photos).eval.labels, [0, 0, 0, 0, 2, 2, 2])


@pytest.mark.parametrize("source", ["photos", "photos_tar"])
def test_split_survives_pickling(source, request):
    split = opened(request.getfixturevalue(source)).train
    again = pickle.loads(pickle.dumps(split))
    np.testing.assert_array_equal(again.read(4), split.read(4))


def test_images_are_read_from_where_their_names_say(photos):
    split = opened(photos).train
    names = [os.fsdecode(name) for name in split.read.names]
    assert names == sorted(names)
    assert "train/cat/more/2.webp" in names
    i = names.index("train/dog/0.png")
    np.testing.assert_array_equal(split.read(i), np.asarray(Image.open(photos / names[i])))
    assert split.labels[i] == 1


def test_where_an_image_lies_is_known_wherever_one_is(photos, photos_tar, monkeypatch):
    monkeypatch.chdir(photos.parent)
    for fields in ({}, {"holdout_fraction": 0.3}):
        on_disk, in_tar = (opened(path, **fields).eval for path in (photos.name, photos_tar))
        for i in range(len(on_disk)):
            path = pathlib.Path(on_disk.path_of(i))
            assert path.is_absolute()
            np.testing.assert_array_equal(np.asarray(Image.open(path).convert("RGB")), on_disk.read(i))
            assert in_tar.path_of(i) == f"{photos_tar}: {path.relative_to(photos)}"
    assert open_dataset(DataConfig(name="digits", holdout_fraction=0.2)).eval.path_of(0) is None


def test_corenets_names(own):
    (own / "train").rename(own / "training")
    (own / "val").rename(own / "validation")
    assert opened(own).eval.name == "validation"
    assert opened(own, eval_split="val").eval.name == "validation"
    assert len(opened(own).train) == 17


def test_eval_split_prefers_val_then_test(own):
    shutil.copytree(own / "val", own / "test")
    assert opened(own).eval.name == "val"
    assert opened(own, eval_split="test").eval.name == "test"
    shutil.rmtree(own / "val")
    assert opened(own).eval.name == "test"


@pytest.mark.parametrize(
    ("names", "requested", "expected", "unused"),
    [
        (("train", "valid", "test"), None, "valid", "'test'"),
        (("Training", "Dev-Set"), None, "Dev-Set", None),
        (("train_set", "test_set"), None, "test_set", None),
        (("TRAIN", "Evaluation", "val_old", "extra"), None, "Evaluation", "'val_old'"),
        (("train", "eval", "testing"), "test", "testing", "'eval'"),
        (("train", "valid"), "dev", "valid", None),
        (("train", "val", "valid"), "valid", "valid", "'val'"),
        (("train", "training_set", "val"), "val", "val", "'training_set'"),
        (("train", "val", "valid"), None, r"val and valid .*data\.eval_split=val", None),
        (("Train", "training", "val"), None, "Train and training ", None),
    ],
)
def test_splits_go_by_many_names_and_unused_ones_are_named(own, tmp_path, names, requested, expected, unused):
    place = tmp_path / "named"
    for name in names:
        shutil.copytree(own / "val", place / name)
    if " and " in expected:
        refused(place, expected, eval_split=requested)
        return
    dataset = opened(place, eval_split=requested)
    assert (len(dataset.train), dataset.eval.name) == (7, expected)
    assert [note.rpartition(": ")[2] for note in dataset.notes] == ([unused] if unused else [])


def test_what_pillow_reads_is_taken(own, monkeypatch):
    """Every extension that we accept is Pillow's or a JPEG's, and its files open; a missing codec is an error."""
    known = Image.registered_extensions()
    assert {ending for ending in EXTENSIONS if ending not in known} == {".jfi", ".jif"}
    sample = Image.open(own / "train" / "cat" / "0.png").convert("RGB").resize((32, 32))
    written = 0
    for ending in EXTENSIONS:
        form = known.get(ending, "JPEG")
        if form in Image.SAVE and form not in ("PNG", "BMP"):
            written += 1
            image = sample.convert("1") if ending == ".pbm" else sample.convert("L") if ending == ".pgm" else sample
            image.save(own / "train" / "dog" / f"0{ending.upper()}", form)
    split = opened(own).train
    assert len(split) == 17 + written
    assert all(np.asarray(split.read(index)).shape[-1] == 3 for index in range(len(split)))
    monkeypatch.setattr(images.features, "check", lambda codec: codec != "avif")
    refused(own, r"train/dog/0\.AVIF: .*avif")


def test_what_is_left_out_is_counted_and_named(own, tmp_path):
    shutil.rmtree(own / "train" / ".hidden")
    for name in ("b.HEIC", "a.heic", "raw.nef", "more/c.heic", "notes", ".trash/x.png"):
        (own / "train" / "dog" / name).parent.mkdir(exist_ok=True)
        (own / "train" / "dog" / name).write_text("not an image")
    shutil.copy(own / "train" / "cat" / "0.png", own / "val" / "stray.png")
    path = tmp_path / "own.tar"
    with tarfile.open(path, "w") as archive:
        archive.add(own, arcname="own")
    note = (
        "left out: 9 files: .heic 3, .db 1, .nef 1, images outside of class folders 1, without an extension 1, hidden"
        " 2; as train/dog/a.heic"
    )
    assert opened(own).notes == opened(path).notes == (note,)
    assert (len(opened(path).train), len(opened(path).eval)) == (17, 7)
    (own / "val" / "stray.png").unlink()
    assert "left out: 8 files" in opened(own, holdout_fraction=0.3).notes[1]


# --- without anything to train on ---------------------------------------------------------------------------


def evaluated(path, **fields):
    return open_dataset(DataConfig(**{"name": "folder", "path": str(path)} | fields), evaluates=True)


def test_to_evaluate_on_a_split_or_class_folders_are_enough(own, tmp_path):
    whole = evaluated(own)  # also of a class that only train has
    assert (whole.class_names, len(whole.train), len(whole.eval)) == (("cat", "dog", "emu"), 0, 7)
    shutil.rmtree(own / "train")
    tops = [own, own / "val"]
    for top, prefix in ((own, "."), (own / "val", "."), (own / "val", "photos")):
        tops.append(tmp_path / f"{len(tops)}.tar")
        with tarfile.open(tops[-1], "w") as archive:
            archive.add(top, arcname=prefix)
    for top, name in zip(tops, ("val", "val", "val", "3", "4"), strict=True):
        dataset = evaluated(top)
        assert (dataset.eval.name, dataset.class_names, len(dataset.train)) == (name, ("cat", "emu"), 0)
        np.testing.assert_array_equal(dataset.eval.labels, [0, 0, 0, 0, 1, 1, 1])
        np.testing.assert_array_equal(dataset.eval.read(6), Image.open(own / "val" / "emu" / "more" / "2.webp"))
        with pytest.raises(UserError, match=r"--mode=eval"):
            check_trainable(dataset)
    (own / "val").rename(own / "dev")
    assert evaluated(own).eval.name == evaluated(own, eval_split="val").eval.name == "dev"
    for fields, missing in (({"eval_split": "test"}, "no test/"), ({"holdout_fraction": 0.5}, "no train/")):
        with pytest.raises(UserError, match=missing):
            evaluated(own, **fields)


def test_class_folders_without_splits_hold_a_fifth_of_each_class_out(photos, tmp_path):
    with tarfile.open(tmp_path / "train.tar", "w") as archive:
        archive.add(photos / "train", arcname="photos")
    digests = set()
    for path in (photos / "train", tmp_path / "train.tar"):
        dataset = opened(path)
        assert (dataset.class_names, dataset.holdout_fraction) == (("cat", "dog", "emu"), 0.2)
        assert (dataset.eval.name, dataset.notes[0].startswith("no splits: 20%")) == ("holdout", True)
        assert [np.bincount(split.labels).tolist() for split in (dataset.train, dataset.eval)] == [[6, 4, 4], [1, 1, 1]]
        digests.add(dataset.train.digest()["names"])
        other = opened(path, holdout_fraction=0.4)
        assert (len(other.eval), other.holdout_fraction, other.notes) == (7, 0.4, dataset.notes[1:])
        assert known_num_classes(DataConfig(name="folder", path=str(path))) == 3
        assert len(evaluated(path).eval) == 17
        assert len(evaluated(path, holdout_fraction=0.2).eval) == 3  # as the config of such a run has it
    assert len(digests) == 1
    assert opened(photos).holdout_fraction == 0
    assert len(opened(photos / "train", eval_split="train").train) == 17
    refused(photos / "train", r"no val; .*data\.eval_split", eval_split="val")


def test_a_folder_around_another_is_no_class(own, tmp_path):
    own.rename(tmp_path / "wrapped")
    (tmp_path / "photos").mkdir()
    (tmp_path / "wrapped").rename(tmp_path / "photos" / "all")
    refused(tmp_path / "photos", "all/ .*photos/all,")


def test_classes_may_be_called_like_splits(own):
    """A folder named train is a class where it lies beside bus."""
    for name in ("bus", "train"):
        shutil.copytree(own / "val" / "cat", own / "vehicles" / name)
    dataset = evaluated(own / "vehicles")
    assert (dataset.class_names, len(dataset.eval)) == (("bus", "train"), 8)
    for name in ("test", "extra"):  # images without labels, as of a competition, beside splits of class folders
        shutil.copytree(own / "val" / "cat", own / name)
    assert (evaluated(own).eval.name, evaluated(own).class_names) == ("val", ("cat", "dog", "emu"))


@pytest.mark.parametrize("listed", ["synsets", "indices", "kaggle"])
def test_the_flat_val_of_imagenet(own, tmp_path, listed):
    ids = imagenet.class_ids()
    labels = [7, 7, 999, 0]
    names = [f"ILSVRC2012_val_{number:08d}" for number in range(1, 5)]
    name, lines = {
        "synsets": ("imagenet_2012_validation_synset_labels.txt", [ids[label] for label in labels]),
        "indices": ("val.txt", [f"{name}.JPEG {label}" for name, label in zip(names, labels, strict=True)]),
        "kaggle": (
            "LOC_val_solution.csv",
            ["ImageId,PredictionString"]
            + [f"{name},{ids[label]} 1 2 3 4" for name, label in zip(names, labels, strict=True)],
        ),
    }[listed]
    top = tmp_path / "ILSVRC" / "Data" / "CLS-LOC"
    for image in names:
        (top / "val").mkdir(parents=True, exist_ok=True)
        Image.open(own / "train" / "cat" / "0.png").save(top / "val" / f"{image}.JPEG", "JPEG")
    with pytest.raises(UserError, match=r"ILSVRC2012_devkit_t12\.tar\.gz.* class folders"):
        evaluated(top, name="imagenet")
    (tmp_path / name if listed == "kaggle" else top / name).write_text("\n".join(lines))
    with tarfile.open(top / "ILSVRC2012_img_val.tar", "w") as archive:
        archive.add(top / "val", arcname=".")
    for place in (top, top / "val", top / "ILSVRC2012_img_val.tar"):
        dataset = evaluated(place, name="imagenet")
        assert dataset.class_names == (ids[0], ids[7], ids[999])
        np.testing.assert_array_equal(dataset.eval.labels, [0, 1, 1, 2])
    (tmp_path / name if listed == "kaggle" else top / name).write_text("\n".join(lines[:2]))
    with pytest.raises(UserError, match=r"ILSVRC2012_val_0000000\d\.JPEG .*\d label"):
        evaluated(top, name="imagenet")


def test_a_class_folder_may_be_a_link(own, tmp_path):
    (own / "train" / "cat").rename(tmp_path / "elsewhere")
    (own / "train" / "cat").symlink_to(tmp_path / "elsewhere")
    assert len(opened(own).train) == 17


def test_names_beyond_ascii_and_one_that_begins_with_another(own, tmp_path):
    (own / "train" / "cat" / "0.png").rename(own / "train" / "cat" / "0 è日.png")
    (own / "train" / "dog").rename(own / "train" / "cat è")  # a space comes before a slash
    with tarfile.open(tmp_path / "own.tar", "w") as archive:
        archive.add(own, arcname=".")
    for path in (own, tmp_path / "own.tar"):
        split = opened(path).train
        np.testing.assert_array_equal(np.bincount(split.labels), [7, 5, 5])
        assert [split.read(i).shape[-1] for i in range(7)] == [3] * 7


def test_known_num_classes(photos, photos_tar):
    for path in (photos, photos_tar):
        assert known_num_classes(DataConfig(name="folder", path=str(path))) == 3
        assert known_num_classes(DataConfig(name="imagenet", path=str(path))) == 3
    with pytest.raises(UserError, match=r"w1_0:classes=10"):
        known_num_classes(DataConfig(name="folder", path="nowhere"))


# --- one line each ------------------------------------------------------------------------------------------


def refused(path, says, **fields):
    with pytest.raises(UserError, match=says) as caught:
        opened(path, **fields)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_no_path():
    with pytest.raises(UserError, match=r"--config\.data\.path=PATH"):
        open_dataset(DataConfig(name="folder"))


def test_missing_path():
    refused("no/where", r"data\.path='no/where'")


def test_missing_train(own):
    shutil.rmtree(own / "train")
    refused(own, r"no train/ .*only val/; .*train/CLASS")


def test_empty_directory(tmp_path):
    refused(tmp_path, "no train/ .*no folders")


def test_missing_eval(own):
    shutil.rmtree(own / "val")
    refused(own, r"no val/ nor test/ .*only train/; .*data\.holdout_fraction")
    assert len(opened(own, holdout_fraction=0.3).eval) == 6


def test_asked_split_missing(photos):
    refused(photos, r"no test/ .*only train/, val/; .*data\.eval_split", eval_split="test")


def test_no_class_folders(own):
    shutil.rmtree(own / "val")
    (own / "val").mkdir()
    refused(own, "val/ .*no class folders; .*train/CLASS")


def test_empty_class_folder(own):
    (own / "train" / "fox").mkdir()
    (own / "train" / "fox" / "readme.txt").write_text("no foxes yet")
    refused(own, r"train/fox .*only \.txt 1; ")


def test_class_that_only_eval_has(own):
    shutil.copytree(own / "val" / "cat", own / "val" / "fox")
    refused(own, "'fox' .*val/ .*train.* 3 classes")


@pytest.mark.parametrize(("suffix", "command"), [("gz", "gunzip"), ("bz2", "bunzip2"), ("xz", "unxz")])
def test_compressed_tar(photos, tmp_path, suffix, command):
    path = tmp_path / f"photos.tar.{suffix}"
    with tarfile.open(path, f"w:{suffix}") as archive:
        archive.add(photos / "val", arcname="val")
    refused(path, f"\\({command} ")


def test_not_a_tar(tmp_path):
    path = tmp_path / "photos.tar"
    path.write_bytes(b"something else" * 100)
    refused(path, "as a tar")


def test_cut_tar(photos_tar, tmp_path):
    path = tmp_path / "photos.tar"
    path.write_bytes(photos_tar.read_bytes()[:20_000])
    refused(path, "as a tar ")


def test_tar_with_links(photos, tmp_path):
    path = tmp_path / "photos.tar"
    with tarfile.open(path, "w") as archive:
        archive.add(photos, arcname=".")
        link = tarfile.TarInfo("train/cat/link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "0.png"
        archive.addfile(link)
    refused(path, r"train/cat/link\.png .*tar --dereference")


def test_empty_class_folder_in_a_tar(photos, tmp_path):
    path = tmp_path / "photos.tar"
    with tarfile.open(path, "w") as archive:
        archive.add(photos, arcname=".")
        empty = tarfile.TarInfo("./val/dog")
        empty.type = tarfile.DIRTYPE
        archive.addfile(empty)
    refused(path, "val/dog ")


def test_tar_with_one_split_is_not_taken_for_a_wrapper(photos, tmp_path):
    path = tmp_path / "photos.tar"
    with tarfile.open(path, "w") as archive:
        archive.add(photos / "val", arcname="val")
    refused(path, "no train/ .*only val/")


def test_a_file_that_vanishes_or_breaks_is_named(own):
    split = opened(own).train
    (own / "train" / "cat" / "0.png").unlink()
    (own / "train" / "cat" / "1.JPEG").write_bytes(b"")
    with pytest.raises(UserError, match=r"train/cat/0\.png: .*\(No such file"):
        split.read(0)
    with pytest.raises(UserError, match=r"train/cat/1\.JPEG: .*empty"):
        split.read(1)


def test_a_broken_image_in_a_tar_is_named(tmp_path):
    path = tmp_path / "photos.tar"
    with tarfile.open(path, "w") as archive:
        for name in ("train/a/x.jpg", "val/a/y.jpg"):
            member = tarfile.TarInfo(name)
            member.size = 4
            archive.addfile(member, io.BytesIO(b"junk"))
    with pytest.raises(UserError, match=r"photos\.tar: train/a/x\.jpg: "):
        opened(path).train.read(0)


def test_a_tar_with_a_damaged_header_in_its_middle_or_without_its_end_is_refused(photos_tar, tmp_path):
    whole = photos_tar.read_bytes()
    with tarfile.open(photos_tar) as archive:
        header = archive.getmembers()[-3].offset
    path = tmp_path / "photos.tar"
    for content in (whole[:header] + b"?" + whole[header + 1 :], whole[:header]):
        path.write_bytes(content)
        refused(path, f"byte {header:,}")


def test_gzip_without_the_name(photos_tar, tmp_path):
    path = tmp_path / "photos.tar"
    path.write_bytes(gzip.compress(photos_tar.read_bytes(), 1))
    refused(path, r"compressed.*\(gunzip ")


# --- real data ----------------------------------------------------------------------------------------------


def test_clothing(real_data):
    path = real_data / "transfer" / "clothing.tar"
    if not path.exists():
        pytest.skip(f"no {path}")
    dataset = opened(path)
    assert (len(dataset.train), len(dataset.eval), len(dataset.class_names)) == (1147, 341, 10)
    test = opened(path, eval_split="test").eval
    counts = dict(zip(dataset.class_names, np.bincount(test.labels).tolist(), strict=True))
    assert counts["shoes"] == 73
    assert counts["hat"] == counts["skirt"] == 12
    assert all(min(test.read(i).shape[:2]) == 160 for i in range(0, len(test), 37))


def test_imagenet_samples_decode_to_their_listed_sizes(real_data):
    path = real_data / "imagenet-samples" / "imagenet_samples_200.tar"
    if not path.exists():
        pytest.skip(f"no {path}")
    lines = path.with_suffix(".csv").read_text().splitlines()
    header = lines[0].split(",")
    listed = {row[0]: row for row in (line.split(",") for line in lines[1:])}
    with tarfile.open(path) as archive:
        members = archive.getmembers()
    names = [member.name for member in members]
    places = np.array([(member.offset_data, member.size) for member in members])
    reader = folder.TarReader(str(path), np.array([os.fsencode(name) for name in names]), places)
    for i in range(0, 200, 4):
        row = dict(zip(header, listed[names[i]], strict=True))
        assert reader(i).shape == (int(row["height"]), int(row["width"]), 3)
    assert len(names) == 200


@pytest.mark.parametrize("top", ["", "train"])
def test_images_and_their_masks_are_no_classes(tmp_path, top):
    for name in ("images", "masks"):
        (tmp_path / top / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / top / name / "a.png")
    if top:
        (tmp_path / "val").mkdir()
    with pytest.raises(UserError, match="segment_folder") as error:
        opened(tmp_path)
    assert "\n" not in str(error.value)
