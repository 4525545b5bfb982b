"""Digests of data, made without opening an image: equal wherever the data lie, different for other data."""

import os
import shutil
import tarfile

import numpy as np
import pytest

from mnv2_jax.config import DataConfig
from mnv2_jax.data.sources import open_dataset


def digests(path, name="folder", **fields):
    dataset = open_dataset(DataConfig(name=name, path=path and str(path), **fields))
    return {"train": dataset.train.digest(), "eval": dataset.eval.digest()}


def differing(one, other):
    """The pairs (split, kind) that both have, with different digests."""
    shared = ((split, kind) for split in one for kind in one[split].keys() & other[split].keys())
    return {(split, kind) for split, kind in shared if one[split][kind] != other[split][kind]}


def packed(folder, path):
    with tarfile.open(path, "w") as archive:
        archive.add(folder, arcname=".")
    return path


@pytest.fixture
def own(photos, tmp_path):
    return shutil.copytree(photos, tmp_path / "moved" / "own")


HOLDOUT = {"holdout_fraction": 0.3}


@pytest.mark.parametrize("fields", [{}, HOLDOUT])
def test_a_folder_that_was_moved_or_packed_is_the_same(photos, photos_tar, own, tmp_path, fields):
    before = digests(photos, **fields)
    assert {*before["train"]} == {*before["eval"]} == {"labels", "names"}
    assert digests(own, **fields) == before
    assert differing(digests(photos_tar, **fields), before) == set()
    again = digests(packed(own, tmp_path / "again.tar"), **fields)  # with other offsets
    assert again == digests(photos_tar, **fields)
    assert {*again["train"]} == {"labels", "names", "sizes"}


def test_no_image_is_opened_for_it(photos, own):
    before = digests(own)
    for path in own.rglob("*.*"):
        if path.is_file():
            path.unlink()
            path.symlink_to("/nowhere")
    assert digests(own) == before


def renamed(root):
    os.rename(root / "train" / "dog" / "0.png", root / "train" / "dog" / "0_.png")


def relabelled(root):
    for one, other in (("cat", "dog"), ("dog", "cat")):
        os.rename(root / "train" / one / "1.JPEG", root / "train" / other / "1_.JPEG")


def of_another_class(root):
    os.rename(root / "train" / "cat" / "1.JPEG", root / "train" / "emu" / "9.JPEG")


@pytest.mark.parametrize(
    ("change", "fields", "expected"),
    [
        (renamed, {}, {("train", "names")}),
        (relabelled, {}, {("train", "names")}),
        (of_another_class, {}, {("train", "names"), ("train", "labels")}),
        (
            lambda root: os.rename(root / "val" / "cat" / "0.png", root / "val" / "cat" / "8.png"),
            {},
            {("eval", "names")},
        ),
        (lambda root: (root / "val" / "cat" / "0.png").unlink(), HOLDOUT, set()),
    ],
)
def test_other_files_are_other_data(photos, own, change, fields, expected):
    change(own)
    assert differing(digests(own, **fields), digests(photos, **fields)) == expected


def test_a_tar_knows_how_large_its_files_are(own, tmp_path):
    before = digests(packed(own, tmp_path / "before.tar"))
    path = own / "train" / "cat" / "3.bmp"
    path.write_bytes(path.read_bytes() + b"\0")
    assert differing(digests(packed(own, tmp_path / "after.tar")), before) == {("train", "sizes")}


def test_arrays_are_known_by_their_pixels(tmp_path):
    rng = np.random.default_rng(0)
    arrays = {f"x_{name}": rng.integers(0, 256, (20, 32, 32, 3), dtype=np.uint8) for name in ("train", "test")}
    arrays |= {f"y_{name}": np.arange(20) % 10 for name in ("train", "test")}

    def saved(name, changed=None):
        np.savez(tmp_path / f"{name}.npz", **arrays | (changed or {}))
        return digests(tmp_path / f"{name}.npz", "cifar10")

    before = saved("a")
    assert saved("b") == before
    pixels, labels = arrays["x_train"].copy(), arrays["y_test"][::-1]
    pixels[7, 3, 2, 1] ^= 1
    assert differing(saved("c", {"x_train": pixels}), before) == {("train", "pixels")}
    assert differing(saved("d", {"y_test": labels}), before) == {("eval", "labels")}
    split = open_dataset(DataConfig(name="digits")).train
    place, half = np.arange(len(split)), len(split) // 2
    assert split.subset(place < half).digest()["pixels"] != split.subset(place >= len(split) - half).digest()["pixels"]
    digits = digests(None, "digits")
    assert digests(None, "digits") == digits
    assert differing(digests(None, "digits", **HOLDOUT), digits) == {
        (split, kind) for split in ("train", "eval") for kind in ("labels", "pixels")
    }
