"""Evaluations without images, of damaged images, of held-out images, and of a run with another network."""

import types

import numpy as np
import pytest

from mnv2_jax import verbs
from mnv2_jax.config import Config, build, load
from mnv2_jax.data.images import DamagedImageError
from mnv2_jax.data.sources import Dataset
from mnv2_jax.data.split import Split
from mnv2_jax.errors import UserError
from mnv2_jax.training import evaluate
from mnv2_jax.training.evaluate import evaluate_run, make_evaluate
from mnv2_jax.training.experiment import open_setup
from mnv2_jax.training.feeds import Part
from mnv2_jax.training.mesh import make_mesh
from mnv2_jax.weights.file import WeightsInfo
from tests import cli


@pytest.mark.parametrize("skips", [True, False])
def test_where_no_image_can_be_decoded_all_are_named(skips, monkeypatch):
    damaged = {0: "a.jpg: cut off; mend it", 1: "b.jpg: empty; mend it"}
    split = Split("val", np.zeros(2, np.int32), lambda index: pytest.fail("read an image"))
    setup = types.SimpleNamespace(
        config=build({"data": {"skip_corrupt": skips}}),
        task=types.SimpleNamespace(metrics=lambda variables, batch: ({}, {})),
        mesh=make_mesh(),
        dataset=Dataset("pets", ("cat", "dog"), split, split),
    )

    def through(damaged_images):
        damaged_images.update(damaged)
        yield from ()

    monkeypatch.setattr(evaluate, "eval_parts", lambda setup, should_stop: [Part(np.arange(2), through)])
    with pytest.raises(DamagedImageError, match=r"^2 of the 2 .* val .*a\.jpg: .*b\.jpg: ") as error:
        make_evaluate(setup)({})
    assert str(error.value).endswith("skip_corrupt=True") != skips


def test_what_is_held_out_of_images_without_splits_stands_in_the_config(tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        for number in range(5):
            (tmp_path / name / f"{number}.png").touch()
    config = build({"data": {"name": "folder", "path": str(tmp_path)}})
    trained = open_setup(config, evaluates=False)
    assert (trained.config.data.holdout_fraction, len(trained.dataset.train)) == (0.2, 8)
    reopened = open_setup(trained.config, classes=("run", WeightsInfo(labels=("cat", "dog", "emu")), 3))
    assert reopened.dataset.eval.digest() == trained.dataset.eval.digest()
    whole = open_setup(config, classes=("run", WeightsInfo(labels=("ant", "dog", "cat")), 3))
    assert (whole.config, whole.dataset.eval.labels.tolist()) == (config, 5 * [2] + 5 * [1])


@pytest.mark.parametrize("overrides", [{"norm": {"epsilon": 0.1}}, {"model": {"width": 0.5}}])
def test_a_run_of_another_network_is_not_evaluated(overrides, monkeypatch, tmp_path):
    monkeypatch.setattr(evaluate, "read_run", lambda workdir: (Config(), ["cat", "dog"]))
    monkeypatch.setattr(evaluate, "restore_variables", lambda workdir, checkpoint: (3, {}))
    (key,) = (f"{section}.{leaf}" for section, leaves in overrides.items() for leaf in leaves)
    with pytest.raises(UserError, match=f"^{tmp_path} .*{key}"):
        evaluate_run(build(overrides), tmp_path, None)


def test_where_there_is_no_run_weights_can_be_evaluated(tmp_path):
    said = "none: .*--config.init.weights=FILE$"
    with pytest.raises(UserError, match=said) as error:
        verbs.evaluate(load(f"{cli.W0_25}:data=digits"), tmp_path / "none", None, verbs.Output(False))
    assert "\n" not in str(error.value)
