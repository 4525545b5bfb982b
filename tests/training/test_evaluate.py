"""Which images an evaluation names as its worst mistakes, and what it says where there is nothing to evaluate."""

import types

import numpy as np
import pytest

from mnv2_jax import verbs
from mnv2_jax.config import Config, build
from mnv2_jax.data.images import DamagedImageError
from mnv2_jax.data.sources import Dataset
from mnv2_jax.data.split import Split
from mnv2_jax.errors import UserError
from mnv2_jax.ops.metrics import NO_ANSWER
from mnv2_jax.training import evaluate
from mnv2_jax.training.evaluate import evaluate_run, make_evaluate, worst_mistakes
from mnv2_jax.training.mesh import make_mesh


def judged(first, size, rng, padding=0):
    """A batch of made-up judgements about images ``first`` and so on, its last rows mere padding."""
    return {
        "index": np.arange(first, first + size, dtype=np.int32),
        "label": rng.integers(0, 3, size).astype(np.int32),
        "prediction": rng.integers(0, 3, size).astype(np.int32),
        "confidence": rng.uniform(size=size).astype(np.float32),
        "loss": rng.exponential(size=size).astype(np.float32),
        "mask": np.arange(size) < size - padding,
    }


def test_the_worst_come_first_without_padding_however_the_images_are_batched():
    whole = judged(0, 96, np.random.default_rng(0), padding=10)
    cut = [{name: values[first : first + 32] for name, values in whole.items()} for first in (0, 32, 64)]
    found = worst_mistakes(cut)
    assert found == worst_mistakes([whole])
    wrong = [i for i in range(86) if whole["label"][i] != whole["prediction"][i]]
    expected = sorted(wrong, key=lambda i: -whole["loss"][i])[:24]
    assert [mistake["index"] for mistake in found] == expected
    assert all(mistake["loss"] == whole["loss"][mistake["index"]] for mistake in found)


def test_without_mistakes_there_are_none():
    batch = judged(0, 8, np.random.default_rng(0))
    assert worst_mistakes([batch | {"prediction": batch["label"]}]) == []
    assert worst_mistakes([batch | {"prediction": np.full(8, NO_ANSWER, np.int32)}]) == []


@pytest.mark.parametrize("skips", [True, False])
def test_where_no_image_can_be_decoded_all_are_named(skips):
    damaged = {0: "a.jpg: cut off; mend it", 1: "b.jpg: empty; mend it"}
    split = Split("val", np.zeros(2, np.int32), lambda index: pytest.fail("read an image"))
    experiment = types.SimpleNamespace(
        config=build({"data": {"skip_corrupt": skips}}),
        task=types.SimpleNamespace(metrics=lambda variables, batch: ({}, {})),
        mesh=make_mesh(),
        dataset=Dataset("pets", ("cat", "dog"), split, split),
        eval_batches=lambda should_stop: lambda found: iter(found.update(damaged) or ()),
    )
    with pytest.raises(DamagedImageError, match=r"^2 of the 2 images of val .*cut off; b\.jpg: empty; ") as error:
        make_evaluate(experiment)({})
    assert str(error.value).endswith("skip_corrupt=True") != skips


@pytest.mark.parametrize("asked", [{"norm": {"epsilon": 0.1}}, {"model": {"width": 0.5}}])
def test_a_run_of_another_network_is_not_evaluated(asked, monkeypatch, tmp_path):
    monkeypatch.setattr(evaluate, "read_run", lambda workdir: (Config(), ["cat", "dog"]))
    monkeypatch.setattr(evaluate, "restore_variables", lambda workdir, which: (3, {}))
    (key,) = (f"{section}.{leaf}" for section, leaves in asked.items() for leaf in leaves)
    with pytest.raises(UserError, match=f"holds another model: {key}"):
        evaluate_run(build(asked), tmp_path, None)


def test_where_there_is_no_run_weights_can_be_evaluated(tmp_path):
    said = "none: no run is there; .* or evaluate weights by --config.init.weights=FILE$"
    with pytest.raises(UserError, match=said) as error:
        verbs.evaluate(Config(), [], tmp_path / "none", None, verbs.Output(False))
    assert "\n" not in str(error.value)
