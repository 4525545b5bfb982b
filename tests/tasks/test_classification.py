"""View and loss of a batch: they depend on its images and the step, not on how the batch is divided."""

import dataclasses
import functools
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mnv2_jax.config import AugmentConfig, Config, DataConfig, LossConfig, NormConfig, build
from mnv2_jax.errors import UserError
from mnv2_jax.ops import augment
from mnv2_jax.ops.losses import softmax_cross_entropy
from mnv2_jax.ops.metrics import NO_ANSWER
from mnv2_jax.ops.mixing import Targets
from mnv2_jax.ops.random import example_keys, stream_key
from mnv2_jax.tasks.base import Evaluation
from mnv2_jax.tasks.classification import Classification, make_task, worst_mistakes
from mnv2_jax.training import mesh as meshes
from mnv2_jax.training.step import split_batch

NUM_CLASSES = 5
EVERYTHING = AugmentConfig(
    color="jitter",
    color_jitter=(0.4, 0.4, 0.4, 0.1),
    rotation_degrees=15.0,
    shift_fraction=0.1,
    erase_probability=0.5,
    erase_fill="noise",
    mixup_alpha=0.2,
    cutmix_alpha=1.0,
)


def apply(variables, x, train=False, dropout_keys=None):
    """A simple network: logits are linear in the mean of each quarter of the image."""
    b, h, w, c = x.shape
    pooled = x.reshape(b, 2, h // 2, 2, w // 2, c).mean(axis=(2, 4)).reshape(b, -1)
    return pooled @ variables["params"], {"batch_stats": {}}


PARAMS = jnp.asarray(np.random.default_rng(0).normal(size=(12, NUM_CLASSES)), jnp.float32)


def make(options=EVERYTHING, **fields):
    data = DataConfig(crop="shift", pad_pixels=2, flip=True)
    task = Classification(
        model=SimpleNamespace(apply=apply),
        data=data,
        augment=options,
        class_names=tuple("abcde"),
        label_smoothing=0.1,
        seed=0,
        group_size=4,
    )
    return dataclasses.replace(task, **fields)


def make_batch(size=16, resolution=12):
    rng = np.random.default_rng(0)
    return {
        "image": rng.integers(0, 256, (size, resolution, resolution, 3)).astype(np.uint8),
        "label": rng.integers(0, NUM_CLASSES, size).astype(np.int32),
        "index": np.arange(100, 100 + size, dtype=np.int32),
        "epoch": np.full(size, 3, np.int32),
    }


def test_a_view_is_the_same_however_the_batch_is_cut_up_and_needs_no_communication():
    # Erasing, rotation and shift, image by image, are in `ops/test_augment.py`; they would double the time of
    # compilation.
    options = dataclasses.replace(EVERYTHING, erase_probability=0.0, rotation_degrees=0.0, shift_fraction=0.0)
    task, traced = make(options), []

    def view(batch, key):
        traced.append(batch["image"].shape[0])
        return task.view(batch, key)

    compiled, batch, mesh = jax.jit(view), jax.device_put(make_batch()), meshes.make_mesh(jax.devices()[:4])
    place = meshes.sharded(mesh)
    spread = meshes.make_feed(mesh, None)(make_batch())
    on_four = jax.jit(
        task.view, in_shardings=(place, meshes.replicated(mesh)), out_shardings=(place, Targets(place, place, None))
    )
    on_four = on_four.lower(spread, jax.random.key(0)).compile()
    assert not re.findall(r"all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter", on_four.as_text())
    shares = set()
    for step in range(6):
        key = jax.random.key(step)
        images, targets = compiled(batch, key)
        shares.add(float(targets.share))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), on_four(spread, key), (images, targets))
        for part in range(2):
            found = compiled(jax.tree.map(lambda x, i=part: split_batch(x, 2, 4)[i], batch), key)
            expected = jax.tree.map(lambda x, i=part: split_batch(x, 2, 4)[i] if x.ndim else x, (images, targets))
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), found, expected)
    assert traced == [16, 8]
    assert len(shares) == 6


def test_a_view_has_the_size_of_its_batch():
    for size, resolution in ((8, 20), (16, 12)):
        images, targets = jax.eval_shape(make().view, make_batch(size, resolution), jax.random.key(0))
        assert images.shape == (size, resolution, resolution, 3)
        assert targets.labels.shape == targets.partners.shape == (size,)


def test_what_is_off_costs_nothing():
    task, batch, key = make(AugmentConfig()), make_batch(), jax.random.key(0)

    def plain(batch, key):
        keys = example_keys(stream_key(0, "augment"), batch["epoch"], batch["index"])
        shift, flip = (jax.vmap(jax.random.fold_in, (0, None))(keys, i) for i in range(2))
        images = augment.random_flip(flip, augment.random_shift(shift, batch["image"], 2))
        return augment.normalise(images, task.data.mean, task.data.std)

    def loss(params, batch, key):
        logits, _ = apply({"params": params}, plain(batch, key))
        return softmax_cross_entropy(logits, batch["label"], 0.1).mean()

    images, targets = jax.jit(task.view)(batch, key)
    np.testing.assert_array_equal(images, jax.jit(plain)(batch, key))
    assert targets.partners is None
    assert targets.share is None
    found = jax.jit(lambda *args: task.loss(args[0], {}, {}, *args[1:])[0])(PARAMS, batch, key)
    assert float(found) == float(jax.jit(loss)(PARAMS, batch, key))

    def primitives(f):
        return sorted(eqn.primitive.name for eqn in jax.make_jaxpr(f)(batch, key).eqns)

    assert primitives(lambda *args: task.view(*args)[0]) == primitives(plain)


@pytest.mark.parametrize("degrees", [0.0, 15.0])
@pytest.mark.parametrize("fraction", [0.0, 0.2])
def test_rotation_and_shift_have_keys_of_their_own_whatever_else_is_on(degrees, fraction):
    task, batch = make(AugmentConfig(rotation_degrees=degrees, shift_fraction=fraction)), make_batch()
    task = dataclasses.replace(task, data=dataclasses.replace(task.data, crop="none", flip=False))

    def plain(batch):
        base = example_keys(stream_key(0, "augment"), batch["epoch"], batch["index"])
        turn, shift = (jax.vmap(jax.random.fold_in, (0, None))(base, i) for i in (3, 5))
        limit = np.radians(degrees).item()
        angles = jax.vmap(lambda key: jax.random.uniform(key, (), jnp.float32, -limit, limit))(turn)
        shifts = jax.vmap(lambda key: 12 * jax.random.uniform(key, (2,), jnp.float32, -fraction, fraction))(shift)
        moved = jax.vmap(augment.affine)(augment.as_float(batch["image"]), angles, shifts)
        return augment.normalise(moved, task.data.mean, task.data.std)

    images, _ = jax.jit(task.view)(batch, jax.random.key(0))
    np.testing.assert_array_equal(images, jax.jit(plain)(batch))


EACH = ["erase_probability", "erase_fill", "rotation_degrees", "shift_fraction", "color", "mixup_alpha"]


@pytest.mark.parametrize("name", EACH)
def test_each_option_does_something(name):
    off, traced = AugmentConfig(), []
    for options in (EVERYTHING, dataclasses.replace(EVERYTHING, **{name: getattr(off, name)})):
        traced.append(str(jax.make_jaxpr(make(options).view)(make_batch(), jax.random.key(0))))
    assert traced[0] != traced[1]


@pytest.mark.parametrize("is_own_larger", [True, False])
def test_mixed_loss_is_that_of_dense_targets_and_top1_goes_by_the_larger_share(is_own_larger):
    found, weights = mixed_loss()

    def top1s(images, targets):
        prediction = apply({"params": PARAMS}, images)[0].argmax(axis=1)
        return float((prediction == targets.labels).mean()), float((prediction == targets.partners).mean())

    (images, targets), (loss, (_, logged, _)) = next(
        ((images, targets), rest)
        for (images, targets), rest in found
        if 0.1 < targets.share < 0.9
        and (targets.share > 0.5) == is_own_larger
        and len(set(top1s(images, targets))) == 2
    )
    log_probs = np.asarray(jax.nn.log_softmax(apply({"params": PARAMS}, images)[0]))
    share, expected = float(targets.share), 0.0
    for labels, part in ((targets.labels, share), (targets.partners, 1 - share)):
        dense = 0.9 * np.eye(NUM_CLASSES)[labels] + 0.1 / NUM_CLASSES
        expected += part * (np.asarray(weights)[labels] * -(dense * log_probs).sum(axis=1)).mean()
    assert float(loss) == pytest.approx(expected, rel=1e-4)
    larger = targets.labels if is_own_larger else targets.partners
    assert float(logged["top1"]) == pytest.approx((log_probs.argmax(axis=1) == larger).mean())


@functools.cache
def mixed_loss():
    """View and loss of a batch in twenty steps, and the weights of the classes."""
    weights = (0.5, 1.0, 1.5, 2.0, 0.25)
    task = make(AugmentConfig(mixup_alpha=1.0), class_weights=weights)
    both = jax.jit(lambda batch, key: (task.view(batch, key), task.loss(PARAMS, {}, {}, batch, key)))
    return [both(make_batch(), jax.random.key(step)) for step in range(20)], weights


def made(counts, class_weights="balanced"):
    config = Config(loss=LossConfig(class_weights=class_weights), norm=NormConfig(group_size=8))
    return make_task(config, ("cat", "dog", "emu"), counts)


def test_balanced_classes_weigh_the_same():
    counts = np.array([10, 40, 50])
    task = made(counts.tolist())
    np.testing.assert_allclose(task.class_weights * counts, 100 / 3)
    assert task.group_size == 8
    assert made(counts, "none").class_weights is None
    assert hash(task) == hash(made(counts.tolist()))


def test_weights_by_name_are_proportions():
    counts = np.array([10, 40, 50])
    weights = np.asarray(made(counts.tolist(), (("emu", 4.0), ("cat", 0.5))).class_weights)
    np.testing.assert_allclose(weights / weights[1], [0.5, 1, 4])
    assert (weights * counts).sum() == pytest.approx(100)
    assert made([0, 1, 0], (("cat", 2.0),)).class_weights == (2.0, 1.0, 1.0)
    assert made(None, (("fox", 2.0),)).class_weights is None  # nothing is trained
    with pytest.raises(UserError, match=r"'emo'.*'emu'"):
        made(counts.tolist(), (("emo", 2.0),))


def test_a_class_without_images_cannot_be_balanced():
    with pytest.raises(UserError, match="'dog'") as caught:
        made([3, 0, 2])
    assert "\n" not in str(caught.value)


def evaluated(task, batch):
    sums, rows = jax.device_get(jax.jit(task.metrics)({"params": PARAMS}, batch))
    return task.summarise(sums, {**rows, "index": np.arange(16)})


def test_evaluation_chooses_between_the_scored_classes():
    batch = make_batch()
    scored = (0, 2, 3)
    batch["label"] = np.asarray(scored, np.int32)[batch["label"] % 3]
    batch["mask"] = np.ones(16, bool)
    task = make(AugmentConfig(), scored=scored)
    evaluation, whole = (evaluated(each, batch) for each in (task, make(AugmentConfig())))

    normal = augment.normalise(jnp.asarray(batch["image"]), task.data.mean, task.data.std)
    logits = np.asarray(apply({"params": PARAMS}, normal)[0])[:, list(scored)]
    labels = np.searchsorted(scored, batch["label"])
    assert evaluation.scalars["top1"] == pytest.approx((logits.argmax(axis=1) == labels).mean())
    losses = softmax_cross_entropy(jnp.asarray(logits), jnp.asarray(labels))
    assert evaluation.scalars["loss"] == pytest.approx(float(losses.mean()), rel=1e-5)
    assert np.asarray(evaluation.tables["confusion"])[:, [1, 4]].sum() == 0
    assert np.asarray(whole.tables["confusion"])[:, [1, 4]].sum() > 0


def test_all_answers_are_told_by_the_names_of_the_classes():
    task, batch = make(AugmentConfig()), make_batch() | {"mask": np.ones(16, bool)}
    answers = evaluated(task, batch).predictions
    logits = apply({"params": PARAMS}, augment.normalise(jnp.asarray(batch["image"]), task.data.mean, task.data.std))[0]
    probabilities = np.asarray(jax.nn.softmax(logits))
    order = np.argsort(-probabilities, axis=1)
    for rank, end in enumerate(("", "_2", "_3", "_4", "_5")):
        assert answers[f"prediction{end}"].tolist() == ["abcde"[label] for label in order[:, rank]]
        np.testing.assert_allclose(answers[f"confidence{end}"], np.sort(probabilities)[:, -1 - rank], rtol=1e-5)
    assert answers["label"].tolist() == ["abcde"[label] for label in batch["label"]]
    np.testing.assert_allclose(answers["loss"], -np.log(probabilities[np.arange(16), batch["label"]]), rtol=1e-4)
    assert [*answers] == ["index", "label", "prediction", "confidence", "loss", *list(answers)[5:]]
    # A network whose outputs are not numbers has said nothing.
    sums, rows = jax.device_get(jax.jit(task.metrics)({"params": PARAMS * np.nan}, batch))
    silent = task.summarise(sums, {**rows, "index": np.arange(16)}).predictions
    assert {*silent["prediction"], *silent["prediction_5"]} == {""}
    assert np.isnan([silent["confidence"], silent["confidence_5"]]).all()


# --- worst mistakes -------------------------------------------------------------------------------------------


def judged(size):
    """Random predictions for a number of images."""
    rng = np.random.default_rng(0)
    return {
        "index": np.arange(100, 100 + size, dtype=np.int32),
        "label": rng.integers(0, 3, size).astype(np.int32),
        "prediction": rng.integers(0, 3, size).astype(np.int32),
        "confidence": rng.uniform(size=size).astype(np.float32),
        "loss": rng.exponential(size=size).astype(np.float32),
    }


def test_the_worst_come_first():
    rows = judged(86)
    found = worst_mistakes(rows)
    wrong = [i for i in range(86) if rows["label"][i] != rows["prediction"][i]]
    expected = sorted(wrong, key=lambda i: -rows["loss"][i])[:24]
    assert [mistake["index"] for mistake in found] == [100 + i for i in expected]
    assert all(mistake["loss"] == rows["loss"][mistake["index"] - 100] for mistake in found)


def test_the_terminal_names_the_classes_and_the_files_of_mistakes():
    rows = {
        "index": np.arange(3),
        "label": np.array([0, 1, 1]),
        "prediction": np.array([0, 0, 1]),
        "confidence": np.array([0.9, 0.75, 0.8]),
        "loss": np.array([0.1, 2.0, 0.2]),
    }
    mistakes = [{**mistake, "path": "photos/val/dog/1.jpg"} for mistake in worst_mistakes(rows)]
    task = make_task(build({"model": {"width": 0.25}}), ("cat", "dog"))
    tables = {
        "per_class": [{"label": name, "accuracy": 1.0, "count": 1} for name in task.class_names],
        "confusion": [[1, 0], [1, 1]],
    }
    *_, cat, dog, _, mistake = map(str.split, task.details(Evaluation({}, tables, mistakes)))
    assert (cat, dog) == (["cat", "1", "0"], ["dog", "1", "1"])
    assert mistake == ["photos/val/dog/1.jpg:", "dog,", "predicted", "as", "cat", "(75%)"]


def test_without_mistakes_there_are_none():
    rows = judged(8)
    assert worst_mistakes(rows | {"prediction": rows["label"]}) == []
    assert worst_mistakes(rows | {"prediction": np.full(8, NO_ANSWER, np.int32)}) == []
