"""A user's task, which the package doesn't know, works with every command without changes elsewhere."""

import json
import sys

import jax
import numpy as np
import pytest
from PIL import Image

from mnv2_jax import config as configs
from mnv2_jax.errors import UserError
from mnv2_jax.registry import TASKS
from mnv2_jax.training import mesh as meshes
from mnv2_jax.training.experiment import open_experiment
from mnv2_jax.training.feeds import train_batches
from tests import cli

CONFIG = """
from mnv2_jax import presets
import tests.tasks.mean_colour

def get_config(arg):
    config = presets.preset("batch=32,res=16", data="digits", recipe="digits", name="mobilenet_v2", width=0.25)
    config.task = "mean_colour"
    return config
"""
FLAGS = (
    "--config.train.steps=12",
    "--config.train.eval_every_epochs=0.1",
    "--config.log.every_steps=1",
    "--config.log.batch_hash=True",
    "--config.checkpoint.every_steps=3",
    "--config.optim.ema_decay=None",
    "--json",
)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("colour") / "colour.py"
    path.write_text(CONFIG)
    return path


@pytest.fixture(scope="module")
def whole(file, tmp_path_factory):
    """An uninterrupted run and its summary."""
    workdir = tmp_path_factory.mktemp("colour") / "whole"
    return workdir, cli.answer(cli.here("main", f"--config={file}", *FLAGS, f"--workdir={workdir}"))


def test_it_is_trained_stopped_and_gone_on_with_to_the_bit(file, whole, tmp_path):
    cli.stop_after(tmp_path / "run", 4)
    arguments = (f"--config={file}", *FLAGS, f"--workdir={tmp_path / 'run'}")
    assert cli.answer(cli.here("main", *arguments)) == {"stopped": True}
    assert 3 <= cli.checkpoints(tmp_path / "run")[-1] < 12
    again = cli.here("main", *arguments)
    assert cli.answer(again)["steps"] == 12
    assert "going on at step" in again.stderr
    assert "colours are learnt" in again.stderr
    cli.assert_same(tmp_path / "run", whole[0])


def test_its_own_score_decides_what_is_best(whole):
    workdir, summary = whole
    scores = {line["step"]: line["closeness"] for line in cli.metrics(workdir, "eval")}
    assert len(scores) > 2
    best = max(scores, key=lambda step: (scores[step], -step))
    assert summary["best"] == {"step": best, "closeness": scores[best]}
    assert scores[12] > scores[min(scores)]
    assert summary["params"] == 3 * 3 * 3 * 8 + 8 * 3
    assert best in cli.checkpoints(workdir)


def test_another_process_imports_its_module_again_and_evaluates(whole):
    workdir, summary = whole
    assert json.loads((workdir / "config.json").read_text())["modules"] == ["tests.tasks.mean_colour"]
    answer = cli.answer(cli.run("main", "--mode=eval", f"--workdir={workdir}", "--json"))
    assert answer["eval"]["parts"] == summary["eval"]["parts"]
    assert answer["eval"]["loss"] == pytest.approx(summary["eval"]["loss"], rel=1e-5)
    assert answer["images"] == 360


def test_its_report_has_its_section_and_its_pictures(whole):
    page, evaluation = (whole[0] / "report.html").read_text(), json.loads((whole[0] / "evaluation.json").read_text())
    assert "<h2>Colours</h2>360 images<img" in page
    assert "closeness" in page
    assert "Confusion" not in page
    assert page.count("data:image/png") == len(evaluation["examples"]) == 3


def test_it_predicts(whole, tmp_path):
    Image.new("RGB", (20, 24), (200, 200, 200)).save(tmp_path / "grey.png")
    (answer,) = json.loads(cli.here("predict", f"--workdir={whole[0]}", "--json", tmp_path / "grey.png").stdout)
    assert answer["path"].endswith("grey.png")
    assert len(answer["rgb"]) == 3
    assert "#" in cli.here("predict", f"--workdir={whole[0]}", tmp_path / "grey.png").stdout


def test_its_weights_are_converted_and_predict_the_same(whole, tmp_path):
    Image.new("RGB", (20, 24), (200, 100, 50)).save(tmp_path / "a.png")
    file = tmp_path / "colour.safetensors"
    converted = cli.here("convert", whole[0], file)
    assert converted.returncode == 0, converted.stderr
    told = [
        cli.here("predict", flag, "--json", tmp_path / "a.png").stdout
        for flag in (f"--workdir={whole[0]}", f"--weights={file}")
    ]
    assert json.loads(told[0]) == json.loads(told[1])


def test_weights_of_a_task_that_is_not_imported_yet(whole, tmp_path, monkeypatch):
    """A file names its task but no module, so the caller must name the module."""
    Image.new("RGB", (20, 24), (200, 100, 50)).save(tmp_path / "a.png")
    file = tmp_path / "colour.safetensors"
    assert cli.here("convert", whole[0], file).returncode == 0
    for flags, code in (((), 2), (("--modules=tests.tasks.mean_colour",), 0)):
        monkeypatch.delitem(sys.modules, "tests.tasks.mean_colour", raising=False)
        monkeypatch.setattr(TASKS, "_registered", {})
        assert cli.here("predict", f"--weights={file}", *flags, "--json", tmp_path / "a.png").returncode == code
    assert cli.here("predict", f"--workdir={whole[0]}", "--modules=x", tmp_path / "a.png").returncode == 2


@pytest.mark.parametrize("devices", [1, 4])
def test_parts_of_a_batch_count_by_their_weight(file, devices, x64):
    """A loss that is a mean over valid parts is the same with accumulation and on several devices."""
    found = []
    for accumulate, on in ((1, 1), (4, devices)):
        overrides = [f"optim.accumulate_steps={accumulate}", "norm.group_size=8", "model.dtype=float64"]
        opened = open_experiment(configs.load(str(file), overrides).config, jax.devices()[:on])
        step = meshes.compile_train_step(opened.mesh, opened.train_step(0))
        state = meshes.compile_init(opened.mesh, opened.init_state)()
        losses = []
        for _, batch in zip(range(10), train_batches(opened), strict=False):
            state, metrics = step(state, {}, batch)
            losses.append([float(metrics["loss"]), float(metrics["grad_norm"])])
        found.append(losses)
    np.testing.assert_allclose(found[1], found[0], rtol=1e-12)
    assert found[0][-1][0] < found[0][0][0]


def test_a_module_that_is_gone_and_a_name_that_is_taken_are_one_line(file):
    for overrides, error_text in (
        (["modules=no.such.module"], "modules: 'no.such.module' can't be imported"),
        (["modules=()", "task=mean_color"], "task='mean_color' is not registered.*did you mean 'mean_colour'"),
    ):
        with pytest.raises(UserError, match=error_text) as error:
            open_experiment(configs.load(str(file), overrides).config)
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=r"^task='classification' "):
        TASKS.add("classification", None, "mine")
