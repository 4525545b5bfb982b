"""Digits, CIFAR-10, the held-out share, and the data sets for evaluation only."""

import dataclasses
import errno
import importlib.util
import json
import os
import pathlib

import numpy as np
import pytest
from PIL import Image

from mnv2_jax.config import DataConfig
from mnv2_jax.data import imagenet, imagenet_subsets
from mnv2_jax.data.sources import CIFAR10_CLASSES, check_trainable, known_num_classes, open_dataset
from mnv2_jax.errors import UserError
from tests.data.classified import load_arrays

SUBSETS = pathlib.Path(imagenet_subsets.__file__).with_suffix(".json")
DIGITS = DataConfig(name="digits", resolution=32, crop="shift", eval_crop_fraction=1.0)


def keys_of(split) -> set[tuple[int, bytes]]:
    return {(int(split.labels[i]), np.asarray(split.read(i)).tobytes()) for i in range(len(split))}


# --- digits -------------------------------------------------------------------------------------------------


def test_digits_are_split_once_and_for_all():
    dataset = open_dataset(DIGITS)
    assert (len(dataset.train), len(dataset.eval)) == (1437, 360)
    assert dataset.eval.name == "test"
    np.testing.assert_array_equal(np.bincount(dataset.eval.labels), [36] * 10)
    again = open_dataset(DIGITS)
    np.testing.assert_array_equal(dataset.eval.labels, again.eval.labels)
    np.testing.assert_array_equal(dataset.eval.read(7), again.eval.read(7))
    assert not keys_of(dataset.train) & keys_of(dataset.eval)
    # Which images are held out is part of every number ever published with them.
    assert dataset.eval.labels[:12].tolist() == [5, 9, 2, 4, 6, 7, 9, 3, 4, 6, 8, 5]
    assert int(sum(dataset.eval.read(i).astype(int).sum() for i in range(360))) == 5369028


def test_digits_are_grey_and_use_the_whole_range():
    images, labels = load_arrays(DIGITS, open_dataset(DIGITS).train)
    assert images.shape == (1437, 32, 32, 3)
    assert (images[..., 0] == images[..., 2]).all()
    assert open_dataset(DIGITS).train.read(0).shape == (8, 8, 3)
    assert max(open_dataset(DIGITS).train.read(i).max() for i in range(20)) == 255
    assert labels.dtype == np.int32


def test_digits_have_no_val():
    with pytest.raises(UserError, match=r"data\.eval_split='val': .*test"):
        open_dataset(DataConfig(name="digits", eval_split="val"))


def test_a_folder_given_as_a_name_is_recognised(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    with pytest.raises(UserError, match="data=folder:photos"):
        open_dataset(DataConfig(name="photos"))


# --- synthetic ----------------------------------------------------------------------------------------------


def test_synthetic_images_are_as_many_as_imagenet_s_and_follow_from_their_number():
    dataset = open_dataset(DataConfig(name="synthetic"))
    assert [len(split) for split in (dataset.train, dataset.eval)] == [1_281_167, 50_000]
    assert dataset.class_names == imagenet.class_ids()
    images = [split.read(index) for split in (dataset.train, dataset.eval) for index in (0, 1000, 2000)]
    assert {(image.shape, image.dtype) for image in images} == {((375, 500, 3), np.dtype(np.uint8))}
    assert len({image.tobytes() for image in images}) == 6  # though all are of a class
    means = np.array([image.mean((0, 1)) for image in images])
    assert np.ptp(means, axis=0).max() < 1
    np.testing.assert_array_equal(dataset.train.read(1000), images[1])
    assert images[0].reshape(-1)[:6].tolist() == [222, 173, 27, 216, 186, 68]  # whatever the version of NumPy


def test_a_crop_of_a_synthetic_image_tells_its_class():
    dataset = open_dataset(DataConfig(name="synthetic", synthetic_classes=50, synthetic_images=(150, 50)))
    train, held_out = (
        np.array([split.read(i)[100:275, 100:400].mean((0, 1)) for i in range(len(split))])
        for split in (dataset.train, dataset.eval)
    )
    nearest = np.square(held_out[:, None] - train[None]).sum(-1).argmin(1)
    np.testing.assert_array_equal(dataset.train.labels[nearest], dataset.eval.labels)


def test_other_synthetic_images_are_other_data():
    def digests(**fields):
        dataset = open_dataset(DataConfig(name="synthetic", **fields))
        return [tuple(split.digest().values()) for split in (dataset.train, dataset.eval)]

    few = dict(synthetic_images=(100, 20))
    others = [digests(**few), digests(synthetic_images=(101, 20)), digests(**few, synthetic_classes=7)]
    assert len({digest for both in others for digest in both}) == 6
    assert digests(**few, resolution=32) == others[0]
    assert known_num_classes(DataConfig(name="synthetic", synthetic_classes=7)) == 7
    with pytest.raises(UserError, match=r"data\.eval_split"):
        open_dataset(DataConfig(name="synthetic", eval_split="test"))


# --- CIFAR-10 -----------------------------------------------------------------------------------------------


def arrays(num_train: int = 30, num_test: int = 10) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "x_train": rng.integers(0, 256, (num_train, 32, 32, 3), dtype=np.uint8),
        "y_train": (np.arange(num_train) % 10).astype(np.uint8),
        "x_test": rng.integers(0, 256, (num_test, 32, 32, 3), dtype=np.uint8),
        "y_test": (np.arange(num_test) % 10).astype(np.uint8)[:, None],  # as Keras has it
    }


@pytest.mark.parametrize("give_the_file", [True, False])
def test_cifar10_from_npz(tmp_path, give_the_file):
    given = arrays()
    np.savez(tmp_path / "cifar10.npz", **given)
    path = tmp_path / "cifar10.npz" if give_the_file else tmp_path
    data = DataConfig(name="cifar10", path=str(path), resolution=32, crop="shift", eval_crop_fraction=1.0)
    dataset = open_dataset(data)
    assert dataset.class_names == CIFAR10_CLASSES
    images, labels = load_arrays(data, dataset.eval)
    np.testing.assert_array_equal(images, given["x_test"])
    np.testing.assert_array_equal(labels, given["y_test"][:, 0])
    assert known_num_classes(data) == 10


def wrong(**changes):
    given = arrays() | changes
    return {key: value for key, value in given.items() if value is not None}


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (wrong(x_train=None, data=np.zeros(3)), "data, x_test, y_test, y_train; x_train "),
        (wrong(x_test=np.zeros((10, 32, 32, 3), np.float32)), r"x_test .*float32 \[10, 32, 32, 3\]; .*uint8"),
        (wrong(x_train=np.zeros((30, 3072), np.uint8)), r"x_train .*uint8 \[30, 3072\]"),
        (wrong(y_train=np.zeros(29, np.uint8)), r"y_train .*uint8 \[29\]; .* 30"),
        (wrong(y_test=np.full(10, 10)), "y_test .*10 to 10; .*0 to 9"),
    ],
)
def test_cifar10_with_wrong_arrays(tmp_path, given, says):
    np.savez(tmp_path / "cifar10.npz", **given)
    with pytest.raises(UserError, match=says) as caught:
        open_dataset(DataConfig(name="cifar10", path=str(tmp_path)))
    assert "\n" not in str(caught.value)


def test_cifar10_with_a_damaged_archive(tmp_path):
    (tmp_path / "cifar10.npz").write_bytes(b"PK\x03\x04 and no more")
    with pytest.raises(UserError, match=r"cifar10\.npz: .*archive"):
        open_dataset(DataConfig(name="cifar10", path=str(tmp_path)))


def test_cifar10_that_cannot_be_read(tmp_path):
    (tmp_path / "cifar10.npz").symlink_to("/proc/self/mem")  # as on a disk with a bad block
    with pytest.raises(UserError, match=rf"cifar10\.npz: .*\({os.strerror(errno.EIO)}\)"):
        open_dataset(DataConfig(name="cifar10", path=str(tmp_path)))


def test_cifar10_in_a_folder(photos):
    assert open_dataset(DataConfig(name="cifar10", path=str(photos))).class_names == ("cat", "dog", "emu")


def test_cifar10_needs_a_path():
    assert known_num_classes(DataConfig(name="cifar10")) == 10
    with pytest.raises(UserError, match=r"data\.path=PATH"):
        open_dataset(DataConfig(name="cifar10"))


def test_real_cifar10(real_data, tmp_path):
    script = real_data / "cifar10" / "unpack.py"
    if not script.exists():
        pytest.skip(f"no {script}")
    spec = importlib.util.spec_from_file_location("unpack", script)
    assert spec is not None
    assert spec.loader is not None
    unpack = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(unpack)
    test = [unpack.read_sheet("test", name) for name in CIFAR10_CLASSES]
    labels = np.repeat(np.arange(10), 1000)
    np.savez(tmp_path / "cifar10.npz", **wrong(x_test=np.concatenate(test), y_test=labels))
    data = DataConfig(name="cifar10", path=str(tmp_path), resolution=32, crop="shift", eval_crop_fraction=1.0)
    images, labels = load_arrays(data, open_dataset(data).eval)
    np.testing.assert_array_equal(np.bincount(labels), [1000] * 10)
    np.testing.assert_allclose(images.mean((0, 1, 2)) / 255, (0.4942, 0.4851, 0.4504), atol=2e-4)


# --- the held-out share -------------------------------------------------------------------------------------


def test_holdout_is_taken_out_of_training_by_class(photos):
    whole = open_dataset(DataConfig(name="folder", path=str(photos)))
    dataset = open_dataset(DataConfig(name="folder", path=str(photos), holdout_fraction=0.3))
    assert dataset.eval.name == "holdout"
    np.testing.assert_array_equal(np.bincount(dataset.eval.labels), [2, 2, 2])  # of 2.1, 1.5 and 1.5
    assert keys_of(dataset.train) | keys_of(dataset.eval) == keys_of(whole.train)
    assert not keys_of(dataset.train) & keys_of(dataset.eval)


def test_holdout_takes_at_least_one_of_a_class(photos):
    dataset = open_dataset(DataConfig(name="folder", path=str(photos), holdout_fraction=0.01))
    np.testing.assert_array_equal(np.bincount(dataset.eval.labels), [1, 1, 1])


def test_holdout_of_digits_leaves_the_test_images_alone():
    held = open_dataset(DataConfig(name="digits", holdout_fraction=0.1))
    assert len(held.train) + len(held.eval) == 1437
    assert not keys_of(held.eval) & keys_of(open_dataset(DIGITS).eval)


def test_holdout_that_would_take_all_of_a_class(tmp_path):
    given = wrong(x_train=np.zeros((3, 32, 32, 3), np.uint8), y_train=np.array([0, 0, 4]))
    np.savez(tmp_path / "cifar10.npz", **given)
    with pytest.raises(UserError, match=r"data\.holdout_fraction=0\.1 .*'deer'"):
        open_dataset(DataConfig(name="cifar10", path=str(tmp_path), holdout_fraction=0.1))


# --- names --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ask", [open_dataset, known_num_classes])
def test_unknown_name(ask):
    with pytest.raises(UserError, match=r"data\.name='cifar' .*'cifar10'"):
        ask(DataConfig(name="cifar"))


def test_classes_that_are_known_without_data():
    assert known_num_classes(DataConfig(name="digits")) == 10
    assert known_num_classes(DataConfig(name="imagenet")) == 1000
    with pytest.raises(UserError, match=r"data\.path .*classes=10"):
        known_num_classes(DataConfig(name="folder"))


# --- robustness ---------------------------------------------------------------------------------------------


def subset(root, folders):
    """A folder with one image for each class, and two for the last."""
    for place, name in enumerate(folders):
        (root / name).mkdir(parents=True)
        Image.fromarray(np.full((4, 5, 3), place % 256, np.uint8)).save(root / name / "a.png")
    Image.fromarray(np.zeros((6, 5, 3), np.uint8)).save(root / folders[-1] / "b.png")
    (root / "README.txt").write_text("not an image")
    return root


def subset_folders(name):
    if name == "imagenet_v2":
        return [str(i) for i in range(1000)]
    wnids = json.loads(SUBSETS.read_text()).get(name, imagenet.class_ids())
    return list(wnids)


@pytest.mark.parametrize("name", imagenet_subsets.NAMES)
def test_robustness(tmp_path, name):
    folders = subset_folders(name)
    data = DataConfig(name=name, path=str(subset(tmp_path, folders)))
    dataset = open_dataset(data)
    assert dataset.class_names == imagenet.class_ids()
    assert known_num_classes(data) == known_num_classes(DataConfig(name=name)) == 1000
    numbers = [int(f) if name == "imagenet_v2" else imagenet.class_ids().index(f) for f in folders]
    np.testing.assert_array_equal(dataset.eval.labels, [*numbers, numbers[-1]])
    (tmp_path / folders[3] / "a.heic").touch()
    assert open_dataset(data).notes == (f"left out: 1 file: .heic 1; as {folders[3]}/a.heic",)
    assert dataset.scored == (tuple(numbers) if len(folders) == 200 else None)
    for place in (0, 2, 10, 100, len(folders) - 1):  # of "2", "10" and "100", sorted as text, the order would differ
        assert np.asarray(dataset.eval.read(place))[0, 0, 0] == place % 256
    assert np.asarray(dataset.eval.read(len(folders))).shape == (6, 5, 3)
    with pytest.raises(UserError, match=f"data.name='{name}': .*--mode=eval"):
        check_trainable(dataset)
    with pytest.raises(UserError, match=rf"data\.holdout_fraction=0\.1: {name} "):
        open_dataset(dataclasses.replace(data, holdout_fraction=0.1))
    with pytest.raises(UserError, match=rf"data\.eval_split='val': {name} "):
        open_dataset(dataclasses.replace(data, eval_split="val"))


def test_the_classes_of_imagenet_r_and_a():
    """The first and last classes in the authors' eval.py, and how many there are."""
    r, a = (imagenet_subsets.scored(name) for name in ("imagenet_r", "imagenet_a"))
    assert (len(r), r[:4], r[-3:], sum(r)) == (200, (1, 2, 4, 6), (981, 983, 988), sum(sorted(set(r))))
    assert (len(a), a[:4], a[-3:], sum(a)) == (200, (6, 11, 13, 15), (986, 987, 988), sum(sorted(set(a))))
    assert imagenet_subsets.scored("imagenet_v2") is imagenet_subsets.scored("imagenet_sketch") is None


def test_robustness_with_other_classes(tmp_path):
    folders = subset_folders("imagenet_a")
    path = subset(tmp_path / "a", folders)
    data = DataConfig(name="imagenet_a", path=str(path))
    (path / "n01440764").mkdir()
    with pytest.raises(UserError, match=r"'n01440764' .* 200 classes of imagenet_a;"):
        open_dataset(data)
    (path / "n01443537").mkdir()
    (path / "others").mkdir()
    with pytest.raises(UserError, match=r"'n01440764' .* 200 classes .* 2 more;"):
        open_dataset(data)
    for name in ("n01440764", "n01443537", "others"):
        (path / name).rmdir()
    for image in (path / folders[7]).iterdir():
        image.unlink()
    with pytest.raises(UserError, match=f"'{folders[7]}' .* 200 of 200"):
        open_dataset(data)
    (path / folders[7]).rmdir()
    with pytest.raises(UserError, match=f"'{folders[7]}' .* 199 of 200"):
        open_dataset(data)
    with pytest.raises(UserError, match=r"not a folder; .*imagenet_a"):
        open_dataset(DataConfig(name="imagenet_a", path=str(path / "README.txt")))
