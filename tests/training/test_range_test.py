"""The learning-rate range test, and the suggestions read off its curve."""

import json

import numpy as np
import pytest

from mnv2_jax.training.range_test import Point, advise
from tests import cli


def curve(losses, noise=0.0):
    """Makes the points of a range test from 1e-5 to 1 with these smoothed losses."""
    rates = np.geomspace(1e-5, 1, len(losses))
    signs = np.resize([1, -1], len(losses))
    return [Point(*values) for values in zip(rates, losses + noise * signs, losses, strict=True)]


def test_suggestions_lie_in_the_descent():
    losses = np.concatenate(
        [np.full(60, 2.0), np.linspace(2, 1, 21)[1:], np.linspace(1, 6, 20)]
    )  # the lowest loss is at 1e-1
    advice = advise(curve(losses))
    assert advice.fall == pytest.approx(1)
    assert advice.rates["tenth"] == pytest.approx(1e-2, rel=0.2)
    assert 1e-2 < advice.rates["valley"] < 1e-1
    assert 1e-2 < advice.rates["steepest"] < 1e-1


@pytest.mark.parametrize(
    ("losses", "noise"),
    [(np.linspace(1, 2, 50), 0.0), (np.linspace(2, 1.9, 50), 0.2), (np.full(30, 2.0), 0.0), (np.zeros(0), 0.0)],
)
def test_what_does_not_fall_by_more_than_batches_differ_suggests_nothing(losses, noise):
    assert advise(curve(losses, noise)).rates == {}


@pytest.mark.slow
def test_a_test_takes_the_steps_of_the_training_and_says_what_it_found(trained, tmp_path):
    flags = (*cli.SHRUNK, "--config.finetune.backbone_lr_factor=0.1", "--from=1e-3", "--to=1e9", "--steps=20")
    result = cli.here("lr_find", *flags, f"--out={tmp_path / 'lr'}", "--json")
    answer = cli.answer(result)
    assert json.loads((tmp_path / "lr" / "lr_find.json").read_text()) == answer
    page = (tmp_path / "lr" / "lr_find.html").read_text()
    assert "<svg" in page
    assert f"config: {answer['peak_lr']:.3g}" in page
    rates, losses = ([point[key] for point in answer["points"]] for key in ("lr", "loss"))
    assert rates == pytest.approx(np.geomspace(1e-3, 1e9, 20)[: len(rates)])
    assert answer["diverged"]
    assert answer["steps"] == len(rates) < 20
    # The first batch and the first weights are those of a training, and no step was taken before it.
    assert losses[0] == pytest.approx(cli.metrics(trained[0], "train")[0]["loss"], rel=1e-4)
    assert losses[1] != pytest.approx(losses[0], rel=1e-4)


@pytest.mark.parametrize(
    "flag", ["--from=0", "--from=nan", "--from=x", "--to=inf", "--to=1e-7", "--steps=3", "--steps=1.5", "--out={}/a"]
)
def test_bad_bounds_are_refused_in_a_line(flag, tmp_path):
    (tmp_path / "a").touch()
    result = cli.here("lr_find", *cli.SHRUNK, flag.format(tmp_path))
    assert (result.returncode, result.stdout, result.stderr.count("\n")) == (2, "", 1)
    assert flag.partition("=")[0] in result.stderr
