"""Prepared shards: the images of the folder source, from any process; and a one-line error for each problem."""

import concurrent.futures
import contextlib
import dataclasses
import json
import os
import pathlib
import pickle
import shutil

import numpy as np
import pytest

from mnv2_jax.config import DataConfig
from mnv2_jax.data import imagenet, shards
from mnv2_jax.data.prepare import run
from mnv2_jax.data.sources import known_num_classes, open_dataset
from mnv2_jax.errors import UserError
from tests import cli
from tests.data.classified import eval_batches, train_batches
from tests.data.test_prepare import IDS, encoded, write_files

COUNTS = {"train": {0: 4, 3: 5, 60: 3, 999: 4}, "val": {0: 2, 60: 2, 999: 1}}


def make(out: pathlib.Path, form: str, counts=COUNTS) -> pathlib.Path:
    files = {
        f"{split}/{IDS[label]}/{i}.JPEG": encoded(1000 * label + 10 * i + len(split))
        for split, some in counts.items()
        for label, count in some.items()
        for i in range(count)
    }
    source = write_files(out.with_name(out.name + "_source"), files)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "_pool", concurrent.futures.ThreadPoolExecutor)
        run.prepare(source, out, form, 1, True, False, lambda *_: None, lambda _: None)
    return out


@pytest.fixture(scope="module")
def sharded(tmp_path_factory) -> pathlib.Path:
    return make(tmp_path_factory.mktemp("shards") / "out", "arrayrecord")


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> pathlib.Path:
    return make(tmp_path_factory.mktemp("folders") / "out", "folder")


def data(path, **fields) -> DataConfig:
    return DataConfig(name="imagenet", path=str(path), resolution=16, **fields)


def test_the_same_as_from_the_folder_source(sharded, folders):
    a, b = open_dataset(data(sharded)), open_dataset(data(folders))
    assert a.class_names == b.class_names == tuple(IDS[label] for label in (0, 3, 60, 999))
    assert known_num_classes(data(sharded)) == known_num_classes(data(folders)) == 4
    assert (a.eval.name, len(a.train), len(a.eval)) == ("val", 16, 5)
    for in_shards, in_folders in ((a.train, b.train), (a.eval, b.eval)):
        np.testing.assert_array_equal(in_shards.labels, in_folders.labels)
        assert np.asarray(in_shards.labels).dtype == np.int32
        for i in range(len(in_shards)):
            np.testing.assert_array_equal(np.asarray(in_shards.read(i)), np.asarray(in_folders.read(i)))
            shard, _, name = in_shards.path_of(i).rpartition(": ")
            assert os.path.isfile(shard)
            assert name == os.path.basename(in_folders.path_of(i))


def test_batches_don_t_depend_on_the_workers(sharded, folders):
    def batches(path, workers):
        given = data(path, batch_size=6, eval_batch_size=4, num_workers=workers)
        dataset = open_dataset(given)
        with contextlib.closing(train_batches(given, dataset.train, seed=3, start_step=2)) as stream:
            found = [next(stream), next(stream)]
        return found + list(eval_batches(dataclasses.replace(given, num_workers=0), dataset.eval))

    expected = batches(folders, 0)
    for others in (batches(sharded, 0), batches(sharded, 2)):
        for one, other in zip(expected, others, strict=True):
            for key in one:
                np.testing.assert_array_equal(one[key], other[key])


def test_a_reader_that_has_read_survives_pickling(sharded):
    split = open_dataset(data(sharded)).train
    image = np.asarray(split.read(9))
    again = pickle.loads(pickle.dumps(split))
    np.testing.assert_array_equal(np.asarray(again.read(9)), image)


def test_a_share_of_train_may_be_held_out(sharded):
    dataset = open_dataset(data(sharded, holdout_fraction=0.25))
    assert (dataset.eval.name, len(dataset.train), len(dataset.eval)) == ("holdout", 12, 4)


def test_only_val_is_evaluated_on_all_classes(tmp_path):
    path = make(tmp_path / "out", "arrayrecord", {"val": COUNTS["val"]})
    dataset = open_dataset(data(path))
    assert dataset.class_names == imagenet.class_ids()
    np.testing.assert_array_equal(dataset.eval.labels, [0, 0, 60, 60, 999])
    assert len(dataset.train) == 0
    with pytest.raises(UserError, match="--mode=eval"):
        open_dataset(data(path, holdout_fraction=0.5))


@pytest.fixture
def own(sharded, tmp_path) -> pathlib.Path:
    return pathlib.Path(shutil.copytree(sharded, tmp_path / "own"))


def test_they_are_known_by_their_hashes(sharded, folders, own, tmp_path):
    known = open_dataset(data(sharded)).train.digest()
    assert open_dataset(data(own)).train.digest() == known
    assert known["labels"] == open_dataset(data(folders)).train.digest()["labels"]
    held = [open_dataset(data(path, holdout_fraction=0.25)) for path in (sharded, own)]
    assert held[0].train.digest() == held[1].train.digest() != held[0].eval.digest()
    manifest = json.loads((own / "manifest.json").read_text())
    next(shard for shard in manifest["shards"] if shard["split"] == "train")["sha256"] = 64 * "0"
    (own / "manifest.json").write_text(json.dumps(manifest))
    others = open_dataset(data(own)).train.digest()
    assert (others["labels"], others["shards"] == known["shards"]) == (known["labels"], False)


def test_a_damaged_record_is_never_an_image(own):
    shard = own / "train-00000-of-00200.arrayrecord"
    content = bytearray(shard.read_bytes())
    content[content.index(encoded(25)) + 99] ^= 1  # the third image
    shard.write_bytes(content)
    split = open_dataset(data(own)).train
    for index in set(range(len(split))) - {2}:
        np.asarray(split.read(index))
    with pytest.raises(UserError, match=r"record 2 .*\(Corrupted") as caught:
        split.read(2)
    assert str(caught.value).startswith(f"{shard}: record 2")
    assert str(caught.value).endswith(f"python -m mnv2_jax.data.prepare verify {own}")
    assert "\n" not in str(caught.value)


def test_a_missing_shard(own):
    (own / "val-00001-of-00020.arrayrecord").unlink()
    split = open_dataset(data(own)).eval
    np.asarray(split.read(1))
    with pytest.raises(UserError, match=r"val-00001-of-00020\.arrayrecord: record 0 .*No such file"):
        split.read(2)


def test_other_splits(sharded):
    assert open_dataset(data(sharded, eval_split="valid"), evaluates=True).eval.name == "val"
    with pytest.raises(UserError, match=r"test .*train, val; .*data\.eval_split"):
        open_dataset(data(sharded, eval_split="test"))


def test_val_of_other_classes(tmp_path):
    path = make(tmp_path / "out", "arrayrecord", {"train": {0: 1, 1: 1}, "val": {2: 1}})
    with pytest.raises(UserError, match=f"'{IDS[2]}' .*val .*train.* 2 classes"):
        open_dataset(data(path))


@pytest.mark.parametrize("form", ["sharded", "folders"])
def test_what_isn_t_finished_is_not_opened(form, request, tmp_path):
    path = shutil.copytree(request.getfixturevalue(form), tmp_path / "own")
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps(manifest | {"complete": False}))
    for ask in (open_dataset, known_num_classes):
        with pytest.raises(UserError, match=r"mnv2_jax\.data\.prepare"):
            ask(data(path))


def test_a_record_is_what_was_packed():
    assert shards.unpack(shards.pack(999, "a\udcffb.JPEG", b"\xff\xd8")) == (999, "a\udcffb.JPEG", b"\xff\xd8")


@pytest.mark.slow
def test_training_on_shards(sharded, tmp_path):
    flags = (
        f"--config={cli.ROOT}/configs/w0_25.py:data=imagenet,path={sharded},recipe=scratch,batch=8,res=32",
        "--config.model.depth=0.3",
        "--config.train.steps=1",
        "--config.optim.warmup_epochs=0",
        "--config.data.num_workers=1",
        f"--workdir={tmp_path / 'run'}",
        "--json",
    )
    summary = cli.answer(cli.here("main", *flags))
    assert (summary["steps"], summary["eval_split"], summary["eval"]["count"]) == (1, "val", 5)
