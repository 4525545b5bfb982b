"""Detection is the same function on any devices, in any batches and after a restart, and counts every box once."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mnv2_jax import config as configs
from mnv2_jax.config import DataConfig, ModelConfig
from mnv2_jax.errors import UserError
from mnv2_jax.models.anchors import anchors
from mnv2_jax.models.registry import for_classes
from mnv2_jax.ops import boxes as ops
from mnv2_jax.tasks.box_lists import BoxLists, box_lists, framing
from mnv2_jax.tasks.detection import Found, examples, known_classes
from mnv2_jax.tasks.predictor import Predictor
from mnv2_jax.training import mesh as meshes
from mnv2_jax.training.evaluate import make_evaluate
from mnv2_jax.training.experiment import open_experiment
from mnv2_jax.training.feeds import train_batches
from mnv2_jax.training.initial import resolve_weights, with_weights
from mnv2_jax.weights.file import Preprocessing, Weights, WeightsInfo, save_weights
from tests import cli
from tests.tasks import framed

CONFIG = """
from mnv2_jax import presets
import tests.tasks.framed

def get_config(arg):
    return presets.preset(arg, data="framed", recipe="detect", name="mobilenet_v2", width=0.1)
"""
SMALL = ("model.depth=0.3", "data.resolution=64", "norm.group_size=4", "data.max_boxes=4")
FLAGS = (
    *(f"--config.{override}" for override in SMALL),
    "--config.train.steps=12",
    "--config.train.eval_every_epochs=2",
    "--config.log.every_steps=1",
    "--config.log.batch_hash=True",
    "--config.checkpoint.every_steps=3",
    "--json",
)


@pytest.fixture(autouse=True)
def coco():
    pytest.importorskip("pycocotools", reason="pip install .[detection]")


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("framed") / "framed.py"
    path.write_text(CONFIG)
    return path


@pytest.fixture(scope="module")
def whole(file, tmp_path_factory):
    """An uninterrupted run and its summary."""
    workdir = tmp_path_factory.mktemp("framed") / "whole"
    return workdir, cli.answer(cli.here("main", f"--config={file}", *FLAGS, f"--workdir={workdir}"))


def opened(file, *overrides, devices=1):
    return open_experiment(configs.load(str(file), [*SMALL, *overrides]).config, jax.devices()[:devices])


def variables_of(experiment):
    state = meshes.compile_init(experiment.mesh, experiment.init_state)()
    return {"params": state.params, **state.model_state}


def test_it_is_stopped_and_gone_on_with_to_the_bit_and_counts_every_box_once(file, whole, tmp_path):
    cli.stop_after(tmp_path / "run", 3)
    arguments = (f"--config={file}", *FLAGS, f"--workdir={tmp_path / 'run'}")
    assert cli.answer(cli.here("main", *arguments)) == {"stopped": True}
    assert 3 <= cli.checkpoints(tmp_path / "run")[-1] < 12
    assert cli.answer(cli.here("main", *arguments))["steps"] == 12
    cli.assert_same(tmp_path / "run", whole[0])
    crowds = [framed.Framer(1, "crowd")(index) for index in range(13)]
    assert whole[1]["eval"]["boxes"] == sum(int((~crowd).sum()) for crowd in crowds)
    assert whole[1]["eval"]["count"] == 13
    evaluation = json.loads((whole[0] / "evaluation.json").read_text())
    assert [row["label"] for row in evaluation["per_class"]] == list(framed.CLASSES)


@pytest.mark.slow
def test_accumulation_and_devices_do_not_change_the_function(file, x64):
    """Microbatches have different numbers of anchors with objects, by which their means are weighed."""
    found = []
    for accumulate, on in ((1, 1), (2, 4)):
        sizes = ("norm.group_size=2", "augment.color=none")  # colours are drawn in float32
        overrides = (f"optim.accumulate_steps={accumulate}", "model.dtype=float64", *sizes)
        experiment = opened(file, *overrides, devices=on)
        step = meshes.compile_train_step(experiment.mesh, experiment.train_step(0))
        state = meshes.compile_init(experiment.mesh, experiment.init_state)()
        losses = []
        for _, batch in zip(range(3), train_batches(experiment), strict=False):
            state, metrics = step(state, {}, batch)
            losses.append([float(metrics["loss"]), float(metrics["grad_norm"])])
        found.append(losses)
    np.testing.assert_allclose(found[1], found[0], rtol=1e-8)
    # A batch without a box trains the background, and isn't divided by zero.
    none = {"classes": jnp.full_like(batch["classes"], -1), "boxes": jnp.zeros_like(batch["boxes"])}
    none = {name: jax.device_put(array, batch[name].sharding) for name, array in none.items()}
    _, metrics = step(state, {}, {**batch, **none})
    assert float(metrics["box_loss"]) == 0
    assert 0 < float(metrics["class_loss"]) < 100


@pytest.mark.parametrize("scores", ["softmax", "sigmoid"])
def test_the_loss_is_that_of_a_plain_loop(file, scores):
    task = opened(file, f"model.box_scores={scores}").task
    at, rng = anchors("tensorflow", 64, 64), np.random.default_rng(0)
    outputs = {
        "boxes": jnp.asarray(rng.normal(size=(3, len(at), 4)), jnp.float32),
        "logits": jnp.asarray(rng.normal(size=(3, len(at), 3)), jnp.float32),
    }
    rows = [task.train_view(framed.split("train", 0, 24).example(index), None) for index in (0, 4, 6)]
    batch = {name: jnp.asarray(np.stack([row[name] for row in rows])) for name in rows[0]}
    assert (batch["classes"][1] == -1).all()
    found = task.image_losses(outputs, batch)
    for number, row in enumerate(rows):
        matches = np.asarray(
            ops.match(jnp.asarray(at, jnp.float32), *(jnp.asarray(row[k]) for k in ("boxes", "classes", "ignored")))
        )
        labels = np.where(matches >= 0, row["classes"][matches] + 1, 0)
        logits = np.asarray(outputs["logits"][number], np.float64)
        if scores == "softmax":
            each = -(logits - np.log(np.exp(logits).sum(1, keepdims=True)))[np.arange(len(at)), labels]
        else:
            is_class = np.arange(3)[None] == labels[:, None]
            each = np.where(is_class, np.log1p(np.exp(-logits)), np.log1p(np.exp(logits))).sum(1)
        count = int((matches >= 0).sum())
        hardest = sorted(each[matches == -1], reverse=True)[: max(3 * count, 3)]
        assert found[2][number] == max(count, 1)
        np.testing.assert_allclose(found[1][number], each[matches >= 0].sum() + sum(hardest), rtol=1e-4)
        codes = np.asarray(ops.encode(jnp.asarray(row["boxes"])[np.maximum(matches, 0)], jnp.asarray(at, jnp.float32)))
        apart = np.abs(np.asarray(outputs["boxes"][number]) - codes)
        smooth = np.where(apart < 1, apart**2 / 2, apart - 0.5).sum(1)
        np.testing.assert_allclose(found[0][number], smooth[matches >= 0].sum(), rtol=1e-4)


def test_the_scores_are_the_same_on_any_devices_in_any_batches_and_in_predictions(file, x64):
    tables = []
    for on, batch in ((1, 13), (4, 3)):
        overrides = ("model.dtype=float64", f"data.eval_batch_size={batch}", "data.eval_min_score=0.3")
        experiment = opened(file, *overrides, devices=on)
        variables = variables_of(experiment)
        evaluation = make_evaluate(experiment)(variables)
        tables.append((evaluation.tables, dict(evaluation.scalars) | {"loss": 0}))
        losses = evaluation.scalars["loss"]
    assert tables[0] == tables[1]
    assert np.isfinite(losses)
    info = WeightsInfo(
        task="detection", labels=framed.CLASSES, preprocessing=Preprocessing(resolution=64, eval_min_score=0.3)
    )
    split = framed.split("val", 1, 13)
    images = [split.example(index)["image"] for index in range(13)]
    host = jax.tree.map(np.asarray, variables)
    answers = Predictor(Weights(experiment.task.model, host, info)).arrays(images)
    found = Found(*(np.stack([answer[name] for answer in answers]) for name in ("box", "class", "probability")))
    for index, image in enumerate(images):
        assert (found.boxes[index] <= np.tile(image.shape[:2], 2) + 1e-3).all()
    chosen = examples(range(13), [{k: t(i) for k, t in split.targets.items()} for i in range(13)], found)
    assert [{k: v for k, v in row.items() if k != "path"} for row in evaluation.examples] == chosen


def test_answers_are_boxes_in_pixels_the_most_probable_first(file, tmp_path):
    experiment = opened(file)
    info = WeightsInfo(task="detection", labels=framed.CLASSES, preprocessing=Preprocessing(resolution=64))
    weights = Weights(experiment.task.model, {}, info)
    answers = box_lists(weights, 2)
    at = anchors("tensorflow", 64, 64)
    logits = np.full((1, len(at), 3), [9.0, 0, 0], np.float32)
    logits[0, 5], logits[0, 80] = [0, 0, 5], [0, 3, 0]
    outputs = {"boxes": jnp.zeros((1, len(at), 4)), "logits": jnp.asarray(logits)}
    answer = jax.tree.map(lambda x: np.asarray(x[0]), jax.jit(answers.decode)(outputs))
    answer = framing(weights).restore(answer, (100, 200))
    entries = answers.to_json(answer)["boxes"]
    assert [(row["index"], row["label"]) for row in entries] == [(1, "blue"), (0, "red")]
    y0, x0, y1, x1 = np.clip(at[5], 0, 1) * (100, 200, 100, 200)
    found = [entries[0][name] for name in ("x0", "y0", "x1", "y1")]
    assert found == pytest.approx([x0, y0, x1, y1], abs=0.02)
    assert len(answers.to_text({"boxes": entries})) == 2
    (content,) = answers.files(np.zeros((100, 200, 3), np.uint8), answer).values()
    assert content.startswith(b"\x89PNG")


def test_a_trained_head_of_other_classes_starts_with_what_fits(file):
    """Here random weights are zeros and trained ones are ones."""
    experiment = opened(file)
    model = experiment.task.model
    state = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), jax.eval_shape(experiment.init_state))
    other = for_classes(model.options, model.norm, 5)
    shapes = jax.eval_shape(other.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32))
    held = jax.tree.map(lambda x: np.ones(x.shape, x.dtype), shapes)
    started = with_weights(state, Weights(other, held, WeightsInfo()), "new", model).params
    for name, branch in started.items():
        values = {value for leaf in jax.tree.leaves(branch) for value in np.unique(leaf)}
        assert values == {0 if name.endswith("classifier") else 1}
    assert {f"map_{number}_{kind}" for number in range(1, 7) for kind in ("boxes", "classifier")} <= {*started}


def test_weights_with_more_classes_are_evaluated_on_data_that_have_some_of_them():
    dataset = framed.open_framed(None, True)
    names = ("N/A", "blue", "N/A", "green", "red")
    known = known_classes(dataset, WeightsInfo(labels=names), 5)
    assert known.class_names == names
    for index in range(13):
        ours, theirs = (each.eval.targets["classes"](index) for each in (dataset, known))
        assert [framed.CLASSES[number] for number in ours] == [names[number] for number in theirs]
    with pytest.raises(UserError, match="blue"):
        known_classes(dataset, WeightsInfo(labels=("red", "green")), 2)


@pytest.mark.parametrize(
    "override",
    [
        "data.crop=scale",
        "model.strides=(1,2,2,2,2)",
        "model.output_stride=16",
        "loss.label_smoothing=0.1",
        "augment.mixup_alpha=0.2",
        "model.head=classifier",
        "task=segmentation",
    ],
)
def test_options_of_other_tasks_are_refused(file, override):
    with pytest.raises(UserError, match=override.partition("=")[0]):
        opened(file, override)


def test_a_box_in_a_crowd_is_no_mistake_and_any_class_has_a_colour():
    truth = {
        "boxes": np.array([[0, 0, 100, 100], [0, 200, 50, 250]], np.float32),
        "classes": np.array([0, 0]),
        "crowd": np.array([True, False]),
    }
    found = Found(
        np.array([[[10, 10, 30, 30], [0, 200, 50, 250], [60, 300, 90, 330]]], np.float32),
        np.zeros((1, 3), int),
        np.full((1, 3), 0.9),
    )
    (example,) = examples([0], [truth], found)
    assert (example["boxes"], example["missed"], example["wrong"]) == (1, 0, 1)
    answers = BoxLists(tuple(map(str, range(400))), ModelConfig(), DataConfig())
    answer = {"box": found.boxes[0], "class": np.array([255, 300, 399]), "probability": found.scores[0]}
    assert answers.files(np.zeros((100, 400, 3), np.uint8), answer)


@pytest.mark.parametrize("evaluates", [True, False])
def test_the_weights_say_what_their_scores_and_anchors_are(file, tmp_path, evaluates):
    trained = opened(file, "model.box_scores=sigmoid", "model.anchors=torchvision").task.model
    shapes = jax.eval_shape(trained.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32))
    variables = jax.tree.map(lambda x: np.ones(x.shape, x.dtype), shapes)
    info = WeightsInfo(task="detection", labels=framed.CLASSES)
    save_weights(tmp_path / "w.safetensors", trained, variables, info)
    weights = f"init.weights={tmp_path / 'w.safetensors'}"
    loaded = configs.load(str(file), [*SMALL, weights, "init.head=load"])
    options = resolve_weights(loaded, evaluates=evaluates)[0].model
    assert (options.box_scores, options.anchors) == ("sigmoid", "torchvision")
    other = configs.load(str(file), [*SMALL, weights, "init.head=load", "model.box_scores=softmax"])
    with pytest.raises(UserError, match="box_scores"):
        resolve_weights(other, evaluates=evaluates)
    new = opened(file)
    state = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), jax.eval_shape(new.init_state))
    started = with_weights(state, Weights(trained, variables, info), "new", new.task.model).params
    assert not any(leaf.any() for number in range(1, 7) for leaf in jax.tree.leaves(started[f"map_{number}_boxes"]))
