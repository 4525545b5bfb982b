"""What 0.4.0 wrote is evaluated, predicts, converts and goes on, with 0.4.0's numbers; see golden/v0_4_0/README.md."""

import io
import json
import os
import shutil
import signal
import tarfile

import numpy as np
import pytest
import safetensors.numpy

from mnv2_jax import config
from mnv2_jax.json_files import write_json
from tests import cli

GOLDEN = cli.ROOT / "tests" / "golden" / "v0_4_0"
ROUNDED = 1e-5
"""Relative. Where they were made it is 2e-7 at most, with XLA's optimisations or without, on 1 device or on 8."""
SINCE = {
    "data.antialias": True,
    "data.image_root": None,
    "data.synthetic_classes": 1000,
    "data.synthetic_images": [1_281_167, 50_000],
    "data.size": None,
    "data.eval_short_side": None,
    "data.eval_canvas": None,
    "data.eval_window": None,
    "data.eval_mirror": False,
    "data.eval_min_score": 0.001,
    "data.eval_nms_iou": 0.55,
    "data.eval_max_boxes": 100,
    "data.expand": 1.0,
    "data.max_boxes": 100,
    "data.train_split": "train",
    "data.mask_values": "index",
    "data.ignored_classes": [],
    "data.crop_scale": [0.5, 2.0],
    "data.crop_short_side": None,
    "data.crop_long_side": None,
    "data.crop_class_share": 1.0,
    "log.trace": False,
    "loss.aux_weight": 0.4,
    "model.head": "classifier",
    "model.anchors": "tensorflow",
    "model.box_scores": "softmax",
    "model.reduced_tail": None,
    "model.head_channels": 256,
    "model.aspp_rates": [],
    "model.aspp_conv": False,
    "model.dilation_from": "next",
    "model.aux_head": False,
    "model.align_corners": False,
    "norm.statistics": "batch",
    "optim.poly_power": 0.9,
    "task": "classification",
    "modules": [],
}
"""What a run of 0.4.0 is in the keys that it lacked."""


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The folder of all that 0.4.0 wrote. Nobody may write to it."""
    top = tmp_path_factory.mktemp("v0_4_0")
    with tarfile.open(GOLDEN / "files.tar.xz") as archive:
        archive.extractall(top, filter="data")
    return top


@pytest.fixture
def run(written, tmp_path):
    """Makes copies of runs, to be gone on with."""
    return lambda name: shutil.copytree(written / name, tmp_path / name)


def told(name, answer):
    return json.loads((GOLDEN / name / answer).read_text())


def assert_evaluated(result, name):
    found, expected = cli.answer(result), told(name, "eval.json")
    for key in ("split", "resolution", "confusion"):
        assert found[key] == expected[key]
    assert found["eval"] == pytest.approx(expected["eval"], rel=ROUNDED)


def assert_predicted(result, name):
    found, expected = (
        {
            answer["path"].rpartition("/")[2]: {row["label"]: row["probability"] for row in answer["top"]}
            for answer in answers
        }
        for answers in (cli.answer(result), told(name, "predict.json"))
    )
    assert found.keys() == expected.keys()
    for image, probabilities in expected.items():
        assert next(iter(found[image])) == next(iter(probabilities))  # the most probable
        assert found[image] == pytest.approx(probabilities, rel=10 * ROUNDED)


@pytest.mark.parametrize("name", ["digits", "finetune"])
def test_a_run_is_evaluated_and_predicts(written, name, monkeypatch):
    run, before = f"--workdir={written / name}", cli.contents(written / name)
    monkeypatch.setattr(os, "access", lambda path, mode, **_: not str(path).startswith(str(written)))
    evaluated = cli.here("main", "--mode=eval", run, "--json")
    assert_evaluated(evaluated, name)
    assert f"{written / name} is read-only" in evaluated.stderr
    assert cli.contents(written / name) == before
    assert_predicted(cli.here("predict", run, "--top=10", "--json", written / "images"), name)


def test_weights_are_evaluated_and_predict(written, tmp_path):
    file, settings = written / "finetune.safetensors", f"--config={written / 'finetune'}/config.json"
    predictions = f"--predictions={tmp_path / 'all.csv'}"
    evaluated = cli.here("main", "--mode=eval", settings, f"--config.init.weights={file}", predictions, "--json")
    assert_evaluated(evaluated, "finetune")
    count = json.loads(evaluated.stdout)["eval"]["count"]
    assert (tmp_path / "all.csv").read_text().count("\n") == 1 + count
    assert_predicted(cli.here("predict", f"--weights={file}", "--top=10", "--json", written / "images"), "finetune")


def converted(source, tmp_path):
    file = tmp_path / "converted.safetensors"
    result = cli.here("convert", source, file)
    assert result.returncode == 0, result.stderr
    assert "\n  antialias true\n" in f"{result.stdout}\n"  # which 0.4.0 didn't know, and these images don't show
    return file


def test_a_run_is_converted(written, tmp_path):
    file = converted(written / "digits", tmp_path)
    assert_predicted(cli.here("predict", f"--weights={file}", "--top=10", "--json", written / "images"), "digits")


@pytest.mark.parametrize("source", ["finetune", "finetune.safetensors"])
def test_a_run_and_weights_are_converted_to_the_same_weights(written, source, tmp_path):
    old, new = (
        safetensors.numpy.load_file(file)
        for file in (written / "finetune.safetensors", converted(written / source, tmp_path))
    )
    assert old.keys() == new.keys()
    for leaf in old:
        np.testing.assert_array_equal(new[leaf], old[leaf])


@pytest.mark.parametrize(
    ("name", "at", "end"), [("digits", 45, 54), pytest.param("finetune", 23, 32, marks=pytest.mark.slow)]
)
def test_a_killed_run_goes_on_with_the_same_losses(run, name, at, end):
    workdir = run(name)
    result = cli.run("main", f"--config={workdir}/config.json")
    assert result.returncode == 0, result.stderr
    assert f"going on at step {at} of {end}" in result.stdout
    for split in ("train", "eval"):
        found, expected = cli.metrics(workdir, split), cli.metrics(GOLDEN / name, split)
        assert [line["step"] for line in found] == [line["step"] for line in expected]
        for ours, its in zip(found, expected, strict=True):
            assert ours.get("batch_hash") == its.get("batch_hash")
            for line in (ours, its):
                del line["split"]
                line.pop("score", None)  # the name of the value that an evaluation is judged by
            assert ours == pytest.approx(its, rel=ROUNDED)


class Stops(io.StringIO):
    """A standard output that asks for a stop once a state is restored: no step is compiled."""

    def write(self, text):
        if "restored the state" in text:
            signal.raise_signal(signal.SIGTERM)
        return super().write(text)


def test_an_average_slots_and_stages_are_restored(run):
    workdir = run("finetune")
    before = cli.digests(workdir)
    result = cli.here("main", f"--config={workdir}/config.json", stdout=Stops())
    assert result.returncode == 0, result.stderr
    assert "going on at step 23 of 32" in result.stdout
    assert "stopped and saved" in result.stdout
    assert cli.digests(workdir) == before


def of_0_4_0(written):
    return config.flatten(json.loads((written / "digits" / "config.json").read_text()))


def test_keys_that_0_4_0_lacked_are_as_it_was(written):
    now = config.load(f"{written / 'digits'}/config.json").config
    keys = config.flatten(config.to_dict(now))
    assert {key: value for key, value in keys.items() if key not in of_0_4_0(written)} == SINCE


def test_a_key_that_is_gone_is_refused_at_another_value_than_its_default(written, tmp_path):
    """All the tests above have it at its default. The first was never there."""
    gone = ["optim.mometum", *(of_0_4_0(written).keys() - config.flatten(config.to_dict(config.Config())).keys())]
    for key in gone:
        tree = json.loads((written / "digits" / "config.json").read_text())
        section, _, leaf = key.partition(".")
        tree[section][leaf] = {False: True, None: 1}.get(tree[section].get(leaf), 7)
        write_json(tmp_path / "config.json", tree)
        result = cli.here("main", "--mode=eval", f"--workdir={tmp_path}")
        assert result.returncode == 2
        assert key in result.stderr
        assert result.stderr.count("\n") == 1
