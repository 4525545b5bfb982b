"""The teacher sees the student's view on any devices; stored logits are refused for other data."""

import dataclasses
import itertools
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mnv2_jax import config as configs
from mnv2_jax.config import DistillConfig
from mnv2_jax.data.sources import Dataset, open_dataset
from mnv2_jax.data.split import Split
from mnv2_jax.errors import UserError
from mnv2_jax.models.registry import create_model, variable_shapes
from mnv2_jax.tasks import teacher
from mnv2_jax.tasks.classes import columns_of
from mnv2_jax.tasks.teacher import TEACHER_LOGITS
from mnv2_jax.training import mesh as meshes
from mnv2_jax.training.experiment import open_experiment
from mnv2_jax.training.feeds import train_batches
from mnv2_jax.training.state import init_state
from mnv2_jax.training.step import make_train_step
from mnv2_jax.training.storing import store_logits
from mnv2_jax.weights.file import Preprocessing, Weights, WeightsInfo, save_weights
from mnv2_jax.weights.load import load_weights
from tests import cli

MEAN, STD = (0.5, 0.4, 0.3), (0.25, 0.5, 0.3)
NAMES = tuple("0123456789")
SHRUNK = [
    "data.batch_size=32",
    "norm.group_size=8",
    "model.dropout=0.1",
    "train.steps=20",
    "optim.peak_lr=0.001",
]


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Writes a file of a small network whose classes are the digits in reverse."""
    model = create_model("mobilenet_v1", 10, width=0.05)
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        kind = path[-1].key
        if kind == "kernel":
            return rng.normal(0, (2 / np.prod(leaf.shape[:-1])) ** 0.5, leaf.shape).astype(np.float32)
        return np.full(leaf.shape, kind in ("scale", "var"), np.float32)

    drawn = jax.tree_util.tree_map_with_path(draw, variable_shapes(model))
    drawn["params"]["classifier"]["kernel"] *= 1e5  # a random network's maps get weaker and weaker
    preprocessing = Preprocessing(resolution=16, mean=MEAN, std=STD, eval_crop_fraction=1.0)
    info = WeightsInfo(preprocessing=preprocessing, labels=NAMES[::-1])
    path = tmp_path_factory.mktemp("teacher") / "teacher.safetensors"
    save_weights(path, model, drawn, info)
    return path


def experiment(*overrides, devices=1):
    config = configs.load(f"{cli.W0_25}:data=digits,batch=32,res=16", [*SHRUNK, *overrides]).config
    return open_experiment(config, jax.devices()[:devices])


def batches_of(opened, count):
    return list(itertools.islice(train_batches(opened), count))


@pytest.fixture
def exact(monkeypatch, x64):
    """Makes the teacher compute in float64, for invariances up to rounding."""
    monkeypatch.setattr(teacher, "DTYPE", "float64")


# --- the live teacher ---------------------------------------------------------------------------------------


def test_it_answers_for_the_students_view_in_its_own_normalisation(weights, exact):
    opened = experiment(f"distill.teacher={weights}")
    (batch,) = batches_of(opened, 1)
    view, _ = opened.task.student.view(batch, jax.random.key(3))
    answers = jax.jit(opened.task.teacher.answer)(opened.task.frozen, view)
    pixels = np.asarray(view, np.float64) * np.array(opened.config.data.std) + np.array(opened.config.data.mean)
    model = create_model("mobilenet_v1", 10, width=0.05, dtype="float64")
    held = load_weights(weights)
    logits, _ = jax.jit(model.apply)(held.variables, (pixels - np.array(MEAN)) / np.array(STD))
    assert np.ptp(logits, axis=0).min() > 0.01
    np.testing.assert_allclose(answers, logits[:, ::-1], rtol=1e-4, atol=1e-5)


def test_the_loss_takes_its_weights_as_an_argument_and_asks_it_in_bfloat16(weights):
    opened = experiment(f"distill.teacher={weights}")
    (batch,), state = batches_of(opened, 1), jax.eval_shape(opened.init_state)
    arguments = state.params, state.model_state, opened.task.frozen, batch, jax.random.key(0)
    closed = jax.make_jaxpr(opened.task.loss)(*arguments)
    assert sum(np.size(const) for const in closed.consts) < 100
    assert str(closed).count("bf16") > 100
    task_without_teacher = dataclasses.replace(
        opened.task, teacher=dataclasses.replace(opened.task.teacher, answer=None)
    )
    alone = jax.make_jaxpr(task_without_teacher.loss)(
        *arguments[:3], {**batch, TEACHER_LOGITS: np.zeros((32, 10))}, arguments[-1]
    )
    assert "bf16" not in str(alone)
    assert abs(str(closed).count("random_bits") - str(alone).count("random_bits")) == 0  # the view is made once


@dataclasses.dataclass(frozen=True)
class Linear:
    """A linear `Model`, which compiles at once."""

    def init(self, key, x):
        return {"params": {"kernel": jax.random.normal(key, (x.size, 10), jnp.float64) / 30}}

    def apply(self, variables, x, train=False, dropout_keys=None):
        del train, dropout_keys
        return x.reshape(len(x), -1) @ variables["params"]["kernel"], {}


def test_the_step_is_the_same_cut_up_and_on_two_devices(weights, x64, monkeypatch):
    # A teacher that repeats some pixels, and no beta distribution: both take long to compile.
    monkeypatch.setattr(teacher, "answers_of", lambda *_: lambda variables, images: images[:, 4:14, 8, 0])
    monkeypatch.setattr(jax.random, "beta", lambda key, a, b, dtype: jax.random.uniform(key, (), dtype))
    found = {}
    for accumulate, devices in ((1, 1), (2, 2)):
        opened = experiment(
            f"distill.teacher={weights}",
            "augment.mixup_alpha=0.5",
            "distill.temperature=2",
            f"optim.accumulate_steps={accumulate}",
            devices=devices,
        )
        task = dataclasses.replace(opened.task, student=dataclasses.replace(opened.task.student, model=Linear()))
        optimizer = opened.optimizers[0]
        state = meshes.compile_init(opened.mesh, lambda t=task, o=optimizer: init_state(t, o, 0, use_ema=False))()
        step = meshes.compile_train_step(opened.mesh, make_train_step(task, optimizer, opened.config))
        found[accumulate] = []
        for batch in batches_of(opened, 2):
            state, metrics = step(state, {}, batch)
            found[accumulate].append([float(metrics[key]) for key in ("loss", "hard_loss", "soft_loss", "grad_norm")])
    # The teacher's logits are float32 even under x64, and XLA rounds a few of them differently on two devices.
    np.testing.assert_allclose(found[2], found[1], rtol=1e-7)
    loss, hard, soft, _ = found[1][0]
    assert loss == pytest.approx((hard + soft) / 2)
    assert soft > 1e-3


# --- classes ------------------------------------------------------------------------------------------------


def of_classes(*names):
    split = Split("train", np.zeros(1, np.int32), lambda index: np.zeros((8, 8, 3), np.uint8))
    return Dataset("pets", names, split, split)


@pytest.mark.parametrize(
    ("labels", "class_ids", "expected"),
    [
        (("cat", "dog", "emu"), (), [0, 1, 2]),
        (("emu", "cat", "dog"), (), [1, 2, 0]),
        (("1", "2", "3"), ("dog", "emu", "cat"), [2, 0, 1]),
        (("x", "dog", "y", "emu", "cat"), (), [4, 1, 3]),  # further classes are ignored
        ((), (), [0, 1, 2]),
    ],
)
def test_classes_are_found_by_name(labels, class_ids, expected):
    count = len(labels) or 3
    info = WeightsInfo(labels=labels, class_ids=class_ids)
    assert columns_of(info, count, of_classes("cat", "dog", "emu")).tolist() == expected


@pytest.mark.parametrize(
    ("labels", "count", "named"),
    [
        (("cat", "dog", "eel"), 3, "have no class 'emu' of pets"),
        (("cat", "dog", "emu", "emu"), 4, "have no class 'emu' of pets"),  # two files fit the name
        ((), 4, "have 4 classes without names, and pets has 3; .* --labels"),
    ],
)
def test_other_classes_are_refused(labels, count, named):
    with pytest.raises(UserError, match=named):
        columns_of(WeightsInfo(labels=labels), count, of_classes("cat", "dog", "emu"))


# --- which teacher ------------------------------------------------------------------------------------------


def test_a_teacher_that_cannot_be_had_is_one_line_before_anything_is_made(tmp_path, weights):
    (tmp_path / "foreign.pth").write_bytes(bytes(16))
    for option, named in (
        ([f"distill.teacher={tmp_path / 'no.safetensors'}"], "distill.teacher=.*no.safetensors.*correct the path"),
        ([f"distill.teacher={tmp_path}"], f"^distill.teacher='{tmp_path}': no run is there .no config.json.; give the"),
        ([f"distill.teacher={weights}", "distill.teacher_model=resnet50"], "mobilenet_v1; leave distill.teach"),
        ([f"distill.teacher={tmp_path / 'foreign.pth'}"], "distill.teacher=.*foreign.pth.*get it again"),
        ([f"distill.logits={tmp_path / 'no.npz'}"], "can't be read .No such file or directory.; correct the path"),
        ([f"distill.logits={tmp_path}"], "can't be read .Is a directory.; correct the path"),
        ([f"distill.logits={tmp_path / 'no.npz'}", "augment.mixup_alpha=0.2"], "augment.mixup_alpha=0.2 "),
        ([f"distill.logits={tmp_path / 'no.npz'}", "augment.cutmix_alpha=1"], "augment.cutmix_alpha=1 "),
    ):
        with pytest.raises(UserError, match=named) as error:
            experiment(*option)
        assert "\n" not in str(error.value)


def test_a_foreign_file_is_of_the_network_that_is_named(monkeypatch):
    requests = []
    monkeypatch.setattr(teacher, "open_weights", lambda source, model: requests.append((source, model.name)) or _RESNET)
    distill = DistillConfig(teacher="resnet50.pth", teacher_model="resnet50")
    assert teacher._open(distill) is _RESNET
    assert requests == [("resnet50.pth", "resnet50")]


_RESNET = Weights(create_model("resnet50", 10), {}, WeightsInfo())


# --- stored logits ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stored(weights, tmp_path_factory):
    """Stores the teacher's logits of the digits."""
    path = tmp_path_factory.mktemp("stored") / "logits.npz"
    config = configs.load(f"{cli.W0_25}:data=digits,batch=32,res=16", ["data.eval_resolution=32"]).config
    assert store_logits(path, load_weights(weights), config) == 1437
    return path


def test_stored_logits_are_those_of_a_live_teacher_where_nothing_is_augmented(weights, stored):
    plain = ("data.crop=none", "data.flip=false", "data.eval_crop_fraction=1.0")
    live = experiment(*plain, f"distill.teacher={weights}")
    (stored_batch,) = batches_of(experiment(*plain, f"distill.logits={stored}", devices=2), 1)
    assert stored_batch[TEACHER_LOGITS].dtype == jnp.float32
    view, _ = live.task.student.view(stored_batch, jax.random.key(0))
    live_logits = jax.jit(live.task.teacher.answer)(live.task.frozen, view)
    np.testing.assert_allclose(
        stored_batch[TEACHER_LOGITS], live_logits, rtol=0, atol=0.05 * float(np.std(live_logits))
    )
    assert stored_batch[TEACHER_LOGITS].sharding == stored_batch["label"].sharding


def changed(path, to, **arrays):
    with np.load(path) as archive:
        np.savez(to, **{**archive, **arrays})
    return to


UNREADABLE = r"^\S+: .*stored logits.* python -m mnv2_jax\.predict --store-logits$"


def test_logits_of_other_data_or_damaged_ones_are_one_line(stored, weights, tmp_path):
    dataset = open_dataset(configs.DataConfig(name="digits"))
    assert teacher.read_logits(stored, dataset).shape == (1437, 10)
    with np.load(stored) as archive:
        held = dict(archive)
    nan = held["logits"].copy()
    nan[17, 3] = np.nan
    cut = tmp_path / "cut.npz"
    cut.write_bytes(stored.read_bytes()[:-2000])
    pickled = tmp_path / "pickled.npz"
    np.savez(pickled, **{**held, "logits": np.array([{}], object)})
    flipped = tmp_path / "flipped.npz"
    content = bytearray(stored.read_bytes())
    content[5000] ^= 1
    flipped.write_bytes(content)
    other_labels = np.roll(held["labels"], 1)
    for path, named in (
        (cut, UNREADABLE),
        (pickled, UNREADABLE),
        (flipped, UNREADABLE),
        (weights, UNREADABLE),
        (changed(stored, tmp_path / "nan.npz", logits=nan), "image 17 are not finite"),
        (changed(stored, tmp_path / "names.npz", class_names=NAMES[::-1]), "classes .*10 .*digits"),
        (changed(stored, tmp_path / "labels.npz", labels=other_labels), "the labels differ"),
        (changed(stored, tmp_path / "short.npz", logits=held["logits"][:-1]), r"its logits are float16 \[1436, 10\]"),
        (changed(stored, tmp_path / "few.npz", labels=other_labels[:9]), "9 images, .*digits .*1437"),
        (changed(stored, tmp_path / "scalar.npz", labels=np.int32(3)), "other data"),
        (changed(stored, tmp_path / "text.npz", colours=np.array("x")), "other data"),
    ):
        with pytest.raises(UserError, match=named) as error:
            teacher.read_logits(path, dataset)
        assert "\n" not in str(error.value)
        assert str(path) in str(error.value)
    (tmp_path / "bare.npz").write_bytes(stored.read_bytes()[:0])
    np.savez(tmp_path / "other.npz", x=np.zeros(3))
    np.save(tmp_path / "array.npy", np.zeros(3))
    for name in ("bare.npz", "other.npz", "array.npy"):
        with pytest.raises(UserError, match=UNREADABLE):
            teacher.read_logits(tmp_path / name, dataset)


def test_other_images_with_the_same_labels_are_noticed(stored):
    dataset = open_dataset(configs.DataConfig(name="digits"))
    train = dataset.train

    def read(index):
        return np.asarray(train.read(index)) // 2 if index == 1436 else train.read(index)

    other = dataclasses.replace(dataset, train=dataclasses.replace(train, read=read))
    with pytest.raises(UserError, match="image 1436 "):
        teacher.read_logits(stored, other)


def test_a_file_that_cannot_be_written_is_refused_first(tmp_path, weights):
    for path, named in ((tmp_path / "x.npy", r"\.npz;"), (tmp_path / "no" / "x.npz", "make the folder")):
        with pytest.raises(UserError, match=named):
            store_logits(path, load_weights(weights), configs.Config())


# --- a run --------------------------------------------------------------------------------------------------


def test_a_run_learns_from_a_run_and_goes_on_to_the_bit(trained, tmp_path):
    flags = (
        *cli.SHORT_RUN,
        "--config.train.steps=4",
        f"--config.distill.teacher={trained[0]}",
    )
    whole, resumed = tmp_path / "whole", tmp_path / "again"
    summary = cli.answer(cli.here("main", *flags, f"--workdir={whole}", "--json", devices=1))
    assert summary["steps"] == 4
    for line in cli.metrics(whole, "train"):
        assert line["loss"] == pytest.approx((line["hard_loss"] + line["soft_loss"]) / 2, rel=1e-5)
        assert line["soft_loss"] > 0
    shutil.copytree(whole, resumed)
    for name in ("summary.json", "report.html"):
        (resumed / name).unlink()
    shutil.rmtree(resumed / "checkpoints" / "4")
    result = cli.here("main", *flags, f"--workdir={resumed}", "--json", devices=1)
    assert cli.answer(result)["eval"] == summary["eval"]
    assert "going on at step 2" in result.stderr
    assert cli.metrics(resumed, "train") == cli.metrics(whole, "train")
    assert cli.digests(resumed) == cli.digests(whole)
    assert json.loads((pathlib.Path(resumed) / "config.json").read_text())["distill"]["weight"] == 0.5
