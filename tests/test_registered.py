"""Models and data sets of users' own, which the package doesn't know by name."""

import dataclasses
import json
import sys

import pytest

from mnv2_jax import config, create_model, list_models, register_dataset, register_model
from mnv2_jax.data.sources import known_num_classes
from mnv2_jax.errors import UserError
from mnv2_jax.models import mobilenet_v2
from mnv2_jax.registry import DATASETS, MODELS
from mnv2_jax.testing import check_model
from tests import cli

CONFIG = """
from mnv2_jax import presets
import tests.data.two_circles
import tests.models.squeezed_v2

def get_config(arg):
    model = dict(name="squeezed_v2", width=0.1, depth=0.1)
    return presets.preset("batch=16,res=16", data="two_circles", recipe="digits", **model)
"""
FLAGS = ("--config.train.steps=2", "--config.finetune.train_from=('classifier',)", "--json")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A short run of both, and its summary."""
    top = tmp_path_factory.mktemp("own")
    (top / "own.py").write_text(CONFIG)
    answer = cli.answer(cli.here("main", f"--config={top / 'own.py'}", *FLAGS, f"--workdir={top / 'run'}"))
    return top / "run", answer


def test_they_are_trained_by_a_config_file(run):
    workdir, summary = run
    assert (summary["model"], summary["data"], summary["eval"]["count"]) == ("squeezed_v2", "two_circles", 32)
    held = json.loads((workdir / "config.json").read_text())
    assert held["modules"] == ["tests.data.two_circles", "tests.models.squeezed_v2"]


def test_whoever_opens_the_run_imports_them_again(run, monkeypatch):
    for module, registry in (("tests.data.two_circles", DATASETS), ("tests.models.squeezed_v2", MODELS)):
        monkeypatch.delitem(sys.modules, module)
        monkeypatch.setattr(registry, "_found", {})
    answer = cli.answer(cli.here("main", "--mode=eval", f"--workdir={run[0]}", "--json"))
    assert answer["eval"]["top1"] == run[1]["eval"]["top1"]
    assert "squeezed_v2" in list_models()


def test_a_model_of_ones_own_holds_what_the_package_s_do():
    check_model("squeezed_v2", width=0.1, depth=0.1)


def test_what_does_not_hold_is_said():
    def too_long(model):
        whole = mobilenet_v2.plan(model, mobilenet_v2.TABLE_2)
        return dataclasses.replace(whole, blocks=(*whole.blocks, dataclasses.replace(whole.blocks[-1], stride=2)))

    register_model("too_long", too_long)
    with pytest.raises(AssertionError):
        check_model("too_long", width=0.1)


@pytest.mark.parametrize(
    ("register", "said"),
    [
        (lambda: register_model("mobilenet_v2", mobilenet_v2.plan), "'mobilenet_v2' is the package's own"),
        (lambda: register_model("My Net", mobilenet_v2.plan), "lower-case letters"),
        (lambda: register_model("squeezed_v2", mobilenet_v2.plan), "registered by tests.models.squeezed_v2"),
        (lambda: register_dataset("digits", print), "'digits' is the package's own"),
        (lambda: register_dataset("a:b", print), "colon"),
    ],
)
def test_names_that_are_taken_or_cannot_be(run, register, said):
    with pytest.raises(UserError, match=said):
        register()


def test_classes_are_counted_without_the_data(run):
    assert known_num_classes(config.build({"data": {"name": "two_circles"}}).data) == 2


def test_an_option_that_it_does_not_have_is_refused(run):
    with pytest.raises(UserError, match=r"model.activation=.relu.: squeezed_v2 has none"):
        create_model("squeezed_v2", 2, activation="relu")
