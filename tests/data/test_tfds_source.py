"""Copies prepared by TFDS: a real one, which TFDS itself writes here without TensorFlow."""

import io
import json
import pathlib
import pickle
import re
import shutil
import socket
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from mnv2_jax.config import DataConfig
from mnv2_jax.data.sources import known_num_classes, open_dataset
from mnv2_jax.data.tfds_source import find_copy
from mnv2_jax.errors import UserError
from tests.data.classified import eval_batches, load_arrays

COUNTS = {"train": 11, "validation": 5, "test": 3}


def example(split: str, i: int) -> np.ndarray:
    rng = np.random.default_rng((len(split), i))
    return rng.integers(0, 256, (9, 8, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    import tensorflow_datasets as tfds

    class Toy(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        name = "toy"
        VERSION = tfds.core.Version("1.2.0")

        def _info(self):
            features = {
                "file_name": tfds.features.Text(),
                "image": tfds.features.Image(),
                "label": tfds.features.ClassLabel(names=["ant", "bee", "cow"]),
            }
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, dl_manager):
            return {split: self._generate_examples(split) for split in COUNTS}

        def _generate_examples(self, split):
            for i in range(COUNTS[split]):
                file = io.BytesIO()
                Image.fromarray(example(split, i)).save(file, "PNG")
                file.seek(0)
                yield i, {"file_name": str(i), "image": file, "label": i % 3}

    root = tmp_path_factory.mktemp("tfds")
    tfds.disable_progress_bar()
    Toy(data_dir=root, file_format="array_record").download_and_prepare()
    return root


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch):
    def refuse(*_):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def config(data_dir, name="tfds:toy", **fields):
    return DataConfig(name=name, path=str(data_dir), resolution=8, eval_crop="central", **fields)


def test_reads_what_was_written(data_dir):
    dataset = open_dataset(config(data_dir))
    assert dataset.class_names == ("ant", "bee", "cow")
    assert {split.name: len(split) for split in (dataset.train, dataset.eval)} == {"train": 11, "validation": 5}
    labels = np.asarray(dataset.train.labels)
    assert labels.dtype == np.int32
    np.testing.assert_array_equal(np.bincount(labels), [4, 4, 3])
    # TFDS shuffles as it writes; every image is there once, with its label.
    found = {np.asarray(dataset.train.read(i)).tobytes(): int(labels[i]) for i in range(11)}
    assert found == {example("train", i).tobytes(): i % 3 for i in range(11)}


def test_batches_and_arrays_agree(data_dir):
    data = config(data_dir, eval_batch_size=2)
    split = open_dataset(data).eval
    images, labels = load_arrays(data, split)
    for batch in eval_batches(data, split):
        rows = batch["mask"]
        np.testing.assert_array_equal(batch["image"][rows], images[batch["index"][rows]])
        np.testing.assert_array_equal(batch["label"][rows], labels[batch["index"][rows]])


def test_survives_pickling_after_it_was_read(data_dir):
    split = open_dataset(config(data_dir)).train
    image = split.read(3)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(split)).read(3), image)


def test_holdout(data_dir):
    dataset = open_dataset(config(data_dir, holdout_fraction=0.25))
    np.testing.assert_array_equal(np.bincount(dataset.eval.labels), [1, 1, 1])
    assert len(dataset.train) == 8
    assert re.fullmatch(rf"{data_dir}/.*: image \d+ of train", dataset.eval.path_of(0))


def test_a_copy_is_known_by_its_description(data_dir, tmp_path):
    own = pathlib.Path(shutil.copytree(data_dir, tmp_path / "own"))
    for record in own.rglob("*.array_record*"):
        record.write_bytes(b"")  # isn't opened for it
    split = open_dataset(config(data_dir)).train
    known, place = split.digest(), np.arange(len(split))
    assert split.subset(place < 3).digest()["copy"] != split.subset(place >= len(split) - 3).digest()["copy"]
    assert {*known} == {"copy"}  # the labels lie beside the pixels
    assert open_dataset(config(own)).train.digest() == known != open_dataset(config(own)).eval.digest()
    path = own / "toy" / "1.2.0" / "dataset_info.json"
    description = json.loads(path.read_text())
    for told in description["splits"]:
        told["numBytes"] = str(int(told["numBytes"]) + 1)
        if told["name"] == "validation":
            told["shardLengths"] = ["0"]
    path.write_text(json.dumps(description))
    changed = open_dataset(config(own))
    assert changed.train.digest() != known
    assert changed.eval.name == "test"  # where validation is empty


@pytest.mark.parametrize(("asked", "name"), [("val", "validation"), ("Dev", "validation"), ("testing", "test")])
def test_eval_split(data_dir, asked, name):
    dataset = open_dataset(config(data_dir, eval_split=asked), evaluates=True)
    assert (dataset.eval.name, len(dataset.train)) == (name, 0)
    other = {"validation": "test", "test": "validation"}[name]
    (note,) = dataset.notes
    assert re.search(f"evaluation .*{name!r}; .*: {other!r}$", note)


def test_version_may_be_named_and_classes_are_known(data_dir, tmp_path):
    assert known_num_classes(config(data_dir, "tfds:toy:1.2.0")) == 3
    for version in ("9.0.0", "10.0.0"):
        (tmp_path / "toy" / version).mkdir(parents=True)
        (tmp_path / "toy" / version / "dataset_info.json").touch()
    assert find_copy("toy", str(tmp_path)).endswith("10.0.0")
    assert find_copy("toy:9.0.0", str(tmp_path)).endswith("9.0.0")


def test_imagenet_and_cifar10_may_be_copies_of_tfds(data_dir, tmp_path):
    shutil.copytree(data_dir / "toy", tmp_path / "toy")
    for own_name, their_name in (("imagenet", "imagenet2012"), ("cifar10", "cifar10")):
        (tmp_path / "toy").rename(tmp_path / their_name)
        info = tmp_path / their_name / "1.2.0" / "dataset_info.json"
        info.write_text(info.read_text().replace('"toy"', f'"{their_name}"'))
        for file in info.parent.glob("toy-*"):
            file.rename(file.with_name(file.name.replace("toy", their_name)))
        data = config(tmp_path, own_name)
        assert known_num_classes(data) == 3
        dataset = open_dataset(data)
        assert dataset.train.read(0).shape == (9, 8, 3)
        assert dataset.name == own_name
        shutil.rmtree(tmp_path / their_name)
        shutil.copytree(data_dir / "toy", tmp_path / "toy")


def test_tensorflow_is_never_imported(data_dir):
    code = (
        "import sys\n"
        "from mnv2_jax.config import DataConfig\n"
        "from mnv2_jax.data.sources import open_dataset\n"
        f"split = open_dataset(DataConfig(name='tfds:toy', path={str(data_dir)!r})).train\n"
        "assert split.read(0).shape == (9, 8, 3) and split.labels[0] in (0, 1, 2)\n"
        "assert 'tensorflow' not in sys.modules\n"
        "assert not any(name.startswith('flax') for name in sys.modules)\n"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)


# --- one line each ------------------------------------------------------------------------------------------


def refused(data, says):
    with pytest.raises(UserError, match=says) as caught:
        open_dataset(data)
    assert "\n" not in str(caught.value)


def test_not_there(data_dir):
    refused(config(data_dir, "tfds:mnist"), "'mnist' .*tfds build mnist --file_format=array_record")
    refused(config(data_dir, "tfds:toy:9.9.9"), r"no version 9\.9\.9; did you mean '1\.2\.0'|one of: 1\.2\.0")
    refused(config(data_dir, "tfds:toy/small"), "no config 'small'")
    refused(config(data_dir, "tfds:to y"), r"tfds:NAME")
    refused(config("no/where"), "data.path='no/where'")
    refused(DataConfig(name="tfds:toy"), r"data\.path=PATH")


def test_unfinished_copy(data_dir, tmp_path):
    shutil.copytree(data_dir, tmp_path, dirs_exist_ok=True)
    (tmp_path / "toy" / "1.2.0" / "dataset_info.json").unlink()
    refused(config(tmp_path), "no finished version")


def test_damaged_description(data_dir, tmp_path):
    shutil.copytree(data_dir, tmp_path, dirs_exist_ok=True)
    (tmp_path / "toy" / "1.2.0" / "dataset_info.json").write_text("{")
    refused(config(tmp_path), r"toy/1\.2\.0: .*description")


def test_tfrecord_is_refused_with_the_command_that_converts_it(data_dir, tmp_path):
    shutil.copytree(data_dir, tmp_path, dirs_exist_ok=True)
    info = tmp_path / "toy" / "1.2.0" / "dataset_info.json"
    info.write_text(json.dumps(json.loads(info.read_text()) | {"fileFormat": "tfrecord"}))
    refused(
        config(tmp_path),
        r"1\.2\.0: .*tfrecord, .*: tfds convert_format --out_file_format=array_record --dataset_version_dir=.*0$",
    )


def test_missing_split(data_dir):
    refused(config(data_dir, eval_split="tset"), r"tset; .*'test'\?; .*data\.eval_split")


def test_missing_records(data_dir, tmp_path):
    shutil.copytree(data_dir, tmp_path, dirs_exist_ok=True)
    for file in (tmp_path / "toy" / "1.2.0").glob("*array_record*"):
        file.unlink()
    with pytest.raises(UserError, match=r"record 0 of train ") as caught:
        open_dataset(config(tmp_path)).train.read(0)
    assert "\n" not in str(caught.value)
