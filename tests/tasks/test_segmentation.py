"""Segmentation is the same function on any devices, in any batches and after a restart, and counts every pixel once."""

import contextlib
import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mnv2_jax import config as configs
from mnv2_jax import predict
from mnv2_jax.config import IGNORED, DataConfig
from mnv2_jax.data import streams
from mnv2_jax.data.split import Split
from mnv2_jax.data.views.segmentation import Canvases, EvalView, TrainView, canvas_of, nearest
from mnv2_jax.errors import UserError
from mnv2_jax.models.registry import for_classes
from mnv2_jax.ops import segmentation as ops
from mnv2_jax.report.overlays import legend
from mnv2_jax.tasks.class_maps import Canvas, ClassMaps
from mnv2_jax.tasks.predictor import Predictor
from mnv2_jax.tasks.segmentation import check_head, same_classes
from mnv2_jax.training import mesh as meshes
from mnv2_jax.training.evaluate import make_evaluate
from mnv2_jax.training.experiment import open_experiment
from mnv2_jax.training.feeds import eval_parts, train_batches
from mnv2_jax.training.initial import check_network
from mnv2_jax.weights.file import Preprocessing, Weights, WeightsInfo
from tests import cli
from tests.tasks import painted
from tests.test_graph import drawn

CONFIG = """
from mnv2_jax import presets
import tests.tasks.painted

def get_config(arg):
    return presets.preset(arg, data="painted", recipe="segment", name="mobilenet_v2", width=0.1)
"""
SMALL = ("model.head_channels=8", "model.depth=0.3", "data.resolution=32", "norm.group_size=4")
FLAGS = (
    *(f"--config.{override}" for override in SMALL),
    "--config.model.head=lraspp",
    "--config.train.steps=12",
    "--config.train.eval_every_epochs=2",
    "--config.log.every_steps=1",
    "--config.log.batch_hash=True",
    "--config.checkpoint.every_steps=3",
    "--json",
)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("painted") / "painted.py"
    path.write_text(CONFIG)
    return path


@pytest.fixture(scope="module")
def whole(file, tmp_path_factory):
    """An uninterrupted run and its summary."""
    workdir = tmp_path_factory.mktemp("painted") / "whole"
    return workdir, cli.answer(cli.here("main", f"--config={file}", *FLAGS, f"--workdir={workdir}"))


def one_pixel_high():
    image, mask = np.zeros((1, 30, 3), np.uint8), np.zeros((1, 30), np.uint8)
    return Split("val", np.zeros(1, np.int32), lambda index: image, True, {"mask": lambda index: mask})


def opened(file, *overrides, devices=1):
    return open_experiment(configs.load(str(file), [*SMALL, *overrides]).config, jax.devices()[:devices])


def test_it_is_stopped_and_gone_on_with_to_the_bit(file, whole, tmp_path):
    cli.stop_after(tmp_path / "run", 3)
    arguments = (f"--config={file}", *FLAGS, f"--workdir={tmp_path / 'run'}")
    assert cli.answer(cli.here("main", *arguments)) == {"stopped": True}
    assert 3 <= cli.checkpoints(tmp_path / "run")[-1] < 12
    assert cli.answer(cli.here("main", *arguments))["steps"] == 12
    cli.assert_same(tmp_path / "run", whole[0])


def test_an_evaluation_counts_every_image_and_labelled_pixel_once(whole):
    workdir, summary = whole
    masks = [painted.Painter(1, True)(index) for index in range(13)]
    assert summary["eval"]["count"] == 13
    assert summary["eval"]["pixels"] == sum(int((mask != IGNORED).sum()) for mask in masks)
    again = cli.answer(
        cli.here("main", "--mode=eval", f"--workdir={workdir}", "--json", "--config.data.eval_batch_size=1")
    )
    assert again["eval"]["pixels"] == summary["eval"]["pixels"]
    assert again["eval"]["miou"] == pytest.approx(summary["eval"]["miou"], abs=1e-4)


def test_the_confusion_matrix_is_the_same_on_any_devices_and_in_any_batches(file, x64):
    tables = []
    for on, batch in ((1, 13), (4, 3)):
        overrides = ("model.dtype=float64", f"data.eval_batch_size={batch}", "data.eval_short_side=50")
        experiment = opened(file, *overrides, devices=on)
        state = meshes.compile_init(experiment.mesh, experiment.init_state)()
        evaluation = make_evaluate(experiment)({"params": state.params, **state.model_state})
        tables.append((evaluation.tables, evaluation.scalars["miou"], evaluation.scalars["count"]))
    assert tables[0] == tables[1]


def test_accumulation_and_devices_do_not_change_the_function(file, x64):
    """Microbatches have different numbers of labelled pixels, by which their means are weighed."""
    found = []
    for accumulate, on in ((1, 1), (2, 4)):
        sizes = ("norm.group_size=2", "augment.color=none")  # colours are drawn in float32
        overrides = (f"optim.accumulate_steps={accumulate}", "model.dtype=float64", *sizes, "model.aux_head=True")
        experiment = opened(file, *overrides, devices=on)
        step = meshes.compile_train_step(experiment.mesh, experiment.train_step(0))
        state = meshes.compile_init(experiment.mesh, experiment.init_state)()
        losses = []
        for _, batch in zip(range(3), train_batches(experiment), strict=False):
            state, metrics = step(state, {}, batch)
            losses.append([float(metrics["loss"]), float(metrics["grad_norm"])])
        found.append(losses)
    np.testing.assert_allclose(found[1], found[0], rtol=1e-9)
    # A batch without a labelled pixel has no loss, and only the weight decay moves the weights.
    empty = jnp.full_like(batch["class_map"], IGNORED)
    _, metrics = step(state, {}, {**batch, "class_map": jax.device_put(empty, batch["class_map"].sharding)})
    assert (float(metrics["loss"]), float(metrics["grad_norm"])) == (0, 0)


def test_the_counts_are_those_of_a_plain_loop():
    rng, k = np.random.default_rng(0), 4
    logits = rng.normal(size=(3, 5, 7, k)).astype(np.float32)
    logits[0, 0, 0, 1] = np.nan
    mask = rng.choice([0, 1, 2, 3, IGNORED], size=(3, 5, 7)).astype(np.uint8)
    expected = np.zeros((3, k, k + 1), int)
    for place in np.ndindex(mask.shape):
        if mask[place] != IGNORED:
            answer = k if np.isnan(logits[place]).any() else logits[place].argmax()
            expected[place[0], mask[place], answer] += 1
    counts = ops.confusion(ops.predictions(jnp.asarray(logits)), jnp.asarray(mask), k)
    np.testing.assert_array_equal(counts, expected)
    big = np.array([0, 65535, 65536, 2**31 - 1])
    sums = jax.tree.map(lambda x: 3 * x, ops.split_counts(jnp.asarray(big, jnp.int32)))
    np.testing.assert_array_equal(ops.join_counts(sums), 3 * big)
    whole = ops.summarise(expected.sum(0), "abcd")
    ious = [
        expected[:, c, c].sum() / (expected[:, c].sum() + expected[:, :, c].sum() - expected[:, c, c].sum())
        for c in range(k)
    ]
    assert whole["miou"] == pytest.approx(np.mean(ious))
    losses = ops.pixel_losses(jnp.asarray(logits), jnp.asarray(mask))
    np.testing.assert_array_equal(losses[mask == IGNORED], 0)
    plain = -np.log(np.exp(logits[1]) / np.exp(logits[1]).sum(-1, keepdims=True))
    for place in zip(*np.nonzero(mask[1] != IGNORED), strict=True):
        assert float(losses[1][place]) == pytest.approx(plain[(*place, mask[1][place])], rel=1e-5)


def test_an_evaluation_says_that_no_pixel_counts_or_outputs_are_no_numbers(file):
    task = opened(file).task
    rows = {name: np.zeros(2, np.int32) for name in ("index", "iou", "pixels", "right", "loss")}
    rows["map"] = np.zeros((2, 160, 160), np.uint8)
    counts = jnp.zeros((3, 4), jnp.int32)
    for count, words in ((counts, "no pixel"), (counts.at[1, 1].set(5), None), (counts.at[1, 3].set(2), "2 pixels")):
        rows["pixels"] = np.array([int(count.sum()), 0])
        notes = task.summarise(jax.device_get(ops.split_counts(count)), rows).notes
        assert (len(notes) == 1 and words in notes[0]) if words else not notes


def test_image_and_mask_move_together():
    """The image shows its mask as grey values, so every crop, scale and flip must give the same again."""
    rng = np.random.default_rng(0)
    mask = rng.integers(0, 3, (10, 12)).repeat(8, 0).repeat(8, 1).astype(np.uint8)
    image = np.stack([80 * mask] * 3, -1)
    data = DataConfig(crop="scale", resolution=48, mean=(1.0, 1.0, 1.0))
    seen = set()
    for index in range(20):
        row = TrainView(data)({"image": image, "mask": mask}, (0, 0, index))
        picture, classes = row["image"][..., 0].astype(int), row["class_map"]
        inside = classes != IGNORED
        assert (picture[~inside] == 255).all()
        assert (np.abs(picture - 80 * classes.astype(int))[inside] <= 40).mean() > 0.9
        seen.add(picture.tobytes())
    assert len(seen) > 15
    again = TrainView(data)({"image": image, "mask": mask}, (0, 0, 7))
    np.testing.assert_array_equal(
        again["class_map"], TrainView(data)({"image": image, "mask": mask}, (0, 0, 7))["class_map"]
    )


def test_a_crop_keeps_to_the_largest_share_where_it_can():
    mask = np.zeros((100, 100), np.uint8)
    mask[:, 60:] = 1
    data = DataConfig(crop="scale", resolution=50, crop_scale=(1.0, 1.0), crop_class_share=0.75)
    shares = []
    for index in range(30):
        classes = TrainView(data)({"image": np.zeros((100, 100, 3), np.uint8), "mask": mask}, (0, 0, index))[
            "class_map"
        ]
        shares.append(max((classes == value).mean() for value in (0, 1)))
    assert max(shares) <= 0.75


def test_an_image_of_another_size_than_its_mask_is_resized():
    row = EvalView(DataConfig(), held=Canvases((24, 40), (24, 40)))(
        {"image": np.full((90, 60, 3), 7, np.uint8), "mask": np.zeros((20, 30), np.uint8)}, None
    )
    assert row["size"].tolist() == [20, 30]
    assert (row["image"][:20, :30] == 7).all()
    assert (row["class_map"][20:] == IGNORED).all()
    assert nearest(np.arange(4, dtype=np.uint8)[None], 2, 8).tolist() == [[0, 0, 1, 1, 2, 2, 3, 3]] * 2


def test_canvases_hold_every_image_once():
    assert [canvas_of(side, side + 1, extra) for side in (1, 128) for extra in (0, 1)] == [
        *[(128, 128), (129, 129)],
        *[(128, 256), (129, 129)],
    ]
    split = painted.split("val", 1, 13)
    views = EvalView(DataConfig()).canvases(split)
    assert len(views) == 2
    assert sorted(index for _, indices in views for index in indices.tolist()) == list(range(13))
    for view, indices in views:
        for index in indices.tolist():
            assert view(split.example(index), None)["image"].shape == (*view.held.image, 3)


def test_predictions_are_those_of_an_evaluation_in_windows_and_mirrored(file):
    options = {"eval_window": (64, 32), "eval_mirror": True}
    experiment = opened(file, *(f"data.{key}={value}" for key, value in options.items()))
    variables = drawn(experiment.task.model)
    scalars = make_evaluate(experiment)(variables).scalars
    info = WeightsInfo(task="segmentation", labels=painted.CLASSES, preprocessing=Preprocessing(**options))
    weights = Weights(experiment.task.model, variables, info)
    split = painted.split("val", 1, 13)
    images, masks = zip(*((each["image"], each["mask"]) for each in map(split.example, range(13))), strict=True)
    answers = Predictor(weights).arrays(images)
    right = sum(int((answer["class"] == mask).sum()) for answer, mask in zip(answers, masks, strict=True))
    assert right / scalars["pixels"] == pytest.approx(scalars["pixel_accuracy"], abs=1e-4)
    at_once = weights._replace(info=dataclasses.replace(info, preprocessing=Preprocessing()))
    others = Predictor(at_once).arrays(images[:3])
    assert any((answer["class"] != other["class"]).any() for answer, other in zip(answers, others, strict=False))


@pytest.mark.parametrize(
    ("data", "seen", "canvas"),
    [
        (DataConfig(eval_short_side=20), [(20, 28), (20, 27), (28, 20), (47, 20)], (128, 128)),
        (DataConfig(eval_canvas=(48, 64)), [(40, 56), (36, 48), (48, 34), (48, 21)], (48, 64)),
        (DataConfig(eval_short_side=80, eval_canvas=(48, 64)), [(46, 64), (48, 64), (48, 34), (48, 21)], (48, 64)),
    ],
)
def test_an_image_that_is_resized_before_is_counted_at_its_own_size(data, seen, canvas):
    split = painted.split("val", 1, 4)
    for view, indices in EvalView(data).canvases(split):
        for index in indices.tolist():
            row, mask = view(split.example(index), None), split.example(index)["mask"]
            assert tuple(row["size"]) == mask.shape
            assert tuple(row["seen"]) == seen[index]
            np.testing.assert_array_equal(row["class_map"][: mask.shape[0], : mask.shape[1]], mask)
    image, framing = split.example(3)["image"], Canvas(data, configs.ModelConfig())
    prepared = framing(image)
    assert prepared.shape == (*canvas, 3)
    whole = {"class": np.zeros(prepared.shape[:2], np.uint8)}
    assert framing.restore(whole, image.shape[:2])["class"].shape == image.shape[:2]


@pytest.mark.parametrize("short_side", [None, 8, 20])
def test_logits_lie_on_masks_down_to_one_pixel_where_corners_are_aligned(file, short_side):
    task = opened(file, "model.align_corners=True", f"data.eval_short_side={short_side}").task
    view, _ = task.eval_view.canvases(one_pixel_high())[0]
    batch = {name: jnp.asarray(array)[None] for name, array in view(one_pixel_high().example(0), None).items()}
    stride = task.model.options.output_stride
    places = [1 + (side - 1) // stride for side in batch["image"].shape[1:3]]
    logits = jnp.stack(jnp.meshgrid(*(jnp.arange(float(count)) for count in places), indexing="ij"), -1)[None]
    found = task.on_masks(logits, batch)[0, :1, :30]
    seen = np.asarray(batch["seen"][0])
    np.testing.assert_allclose(found[0, :, 1], np.linspace(0, max(seen[1] - 1, 0) / stride, 30), atol=1e-4)
    np.testing.assert_allclose(found[0, :, 0], 0, atol=1e-5)


def test_canvases_share_the_memory_that_a_split_may_take(file, monkeypatch):
    kept = []
    load = streams.load_arrays
    monkeypatch.setattr(
        streams, "load_arrays", lambda data, view, *rest: kept.append(view.held.image) or load(data, view, *rest)
    )
    for limit, canvases in ((2**21, [(128, 128), (256, 128)]), (3 * 2**18, [(128, 128)]), (0, [])):
        monkeypatch.setattr(streams, "RESIDENT_BYTES", limit)
        assert len(eval_parts(opened(file))) == 2
        assert kept == canvases
        kept.clear()


@pytest.mark.parametrize(
    "overrides",
    [
        ["model.head=classifier"],
        ["model.head=lraspp", "model.aux_head=True"],
        ["data.eval_crop_fraction=0.5"],
        ["data.crop=random_resized"],
        ["loss.label_smoothing=0.1"],
        ["augment.mixup_alpha=0.2"],
        ["loss.class_weights={window: 2}"],
        ["model.num_classes=7"],
        ["task=classification"],
        ["data.name=digits"],
    ],
)
def test_what_a_segmentation_has_not_is_refused_in_one_line(file, overrides):
    with pytest.raises(UserError) as error:
        opened(file, *overrides)
    assert "\n" not in str(error.value)


def test_class_weights_weigh_pixels(file):
    plain, heavy = (opened(file, *extra).task for extra in ((), ("loss.class_weights={door: 3}",)))
    logits, mask = jnp.zeros((1, 2, 2, 3)), jnp.array([[[0, 2], [IGNORED, 1]]], jnp.uint8)
    np.testing.assert_allclose(
        heavy.pixel_loss(logits, mask), plain.pixel_loss(logits, mask) * jnp.array([[[1, 3], [0, 1]]]), rtol=1e-6
    )
    assert dataclasses.replace(heavy, class_weights=None) == plain


def test_data_of_other_classes_are_not_evaluated_and_not_trained_on_with_the_old_head(file):
    dataset = opened(file).dataset
    assert same_classes(dataset, WeightsInfo(labels=painted.CLASSES), 3) is dataset
    assert same_classes(dataset, WeightsInfo(), 3) is dataset
    for labels, words in ((("sky", "door", "wall"), "class 1 is 'door'"), (("sky", "wall"), "2 classes")):
        with pytest.raises(UserError, match=words):
            same_classes(dataset, WeightsInfo(labels=labels), len(labels))


@pytest.mark.parametrize(
    ("head", "first", "frozen"),
    [("deeplabv3", "classifier", None), ("lraspp", "classifier", "low_classifier"), ("lraspp", "low_classifier", None)],
)
def test_a_part_of_a_new_head_is_not_frozen(file, head, first, frozen):
    flags = (f"finetune.train_from={first}", f"model.head={head}", "init.head=new", "init.weights=x")
    config = configs.load(str(file), [*SMALL, *flags]).config
    model = opened(file, f"model.head={head}").task.model
    spec = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    variables = jax.tree.map(lambda leaf: np.zeros(leaf.shape), jax.eval_shape(model.init, jax.random.key(0), spec))
    dataset = painted.open_painted(None, False)
    with pytest.raises(UserError, match=frozen) if frozen else contextlib.nullcontext():
        check_head(config, Weights(model, variables, WeightsInfo()), dataset)
    del variables["params"][model.head_parts[0]]
    with pytest.raises(UserError, match=model.head_parts[0]):
        check_head(config, Weights(model, variables, WeightsInfo()), dataset)


def test_a_classification_gives_its_features_to_a_new_head_only(file):
    """The error says so, instead of asking for a classifier."""
    model = for_classes(configs.ModelConfig(width=0.1, depth=0.3), configs.NormConfig(), 5)
    weights = Weights(model, {}, WeightsInfo())
    config = configs.load(str(file), [*SMALL, "init.weights=x"]).config
    with pytest.raises(UserError, match=r"give --config\.init\.head=new to train a new head$"):
        check_network(config, weights)
    check_network(dataclasses.replace(config, init=configs.InitConfig(weights="x", head="new")), weights)


def test_a_file_of_one_size_is_evaluated_on_images_of_several_as_the_network_is_on_one_canvas(whole, tmp_path):
    flags = (whole[0], f"--out={tmp_path}", "--format=stablehlo", "--eval")
    assert cli.here("export.__main__", *flags, "--resolution=60x96").returncode == 2
    (row,) = cli.answer(cli.here("export.__main__", *flags, "--resolution=48x96", "--json"))["files"]
    assert row["file"] == pytest.approx(row["network"], abs=1e-4)
    canvas = "--config.data.eval_canvas=(48,96)"
    evaluated = cli.answer(cli.here("main", "--mode=eval", f"--workdir={whole[0]}", "--json", canvas))
    assert evaluated["eval"]["miou"] == row["network"]
    (facts,) = tmp_path.glob("*.json")
    assert json.loads(facts.read_text())["preprocessing"]["eval_canvas"] == [48, 96]


def test_files_of_answers_replace_neither_each_other_nor_an_image(tmp_path):
    answers, folder = ClassMaps(("a",), 16, False, 1), tmp_path / "masks"
    assert predict._Files(folder, [str(tmp_path / "a.jpg"), str(tmp_path / "x" / "a.jpg")], answers)
    for names, words in (
        (["a.jpg", "a.png"], "same a.png"),
        (["a.jpg", "a-overlay.jpg"], "same a-overlay.png"),
        (["masks/a.png"], "replace"),
    ):
        with pytest.raises(UserError, match=words):
            predict._Files(folder, [str(tmp_path / name) for name in names], answers)


def test_a_legend_tells_names_apart_whose_letters_the_font_lacks():
    names = ("\u65e5", "\u672c")
    first, second = (legend(names, [number])[:, 16:] for number in (0, 1))
    assert first.shape != second.shape or (first != second).any()


def test_confidence_is_asked_only_of_answers_that_have_a_probability():
    predict._check_confidence({"top": [{"probability": 0.1}], "boxes": []}, 0.5)
    predict._check_confidence({"size": [3, 4], "classes": [{"share": 0.1}]}, 0)
    with pytest.raises(UserError, match=r"--min-confidence=0\.5"):
        predict._check_confidence({"size": [3, 4], "classes": [{"share": 0.1}]}, 0.5)
