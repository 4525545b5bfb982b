"""The loss with a teacher's targets, against the formula written out, and the task that adds it to another."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mnv2_jax import config as configs
from mnv2_jax.data.sources import open_dataset
from mnv2_jax.tasks.base import kind_of
from mnv2_jax.tasks.classification import Classification, make_task
from mnv2_jax.tasks.distillation import Distillation, soft_loss
from mnv2_jax.tasks.teacher import TEACHER_LOGITS, Teacher

CONFIG = configs.build(
    {
        "data": {"name": "digits", "resolution": 8, "batch_size": 8, "crop": "shift"},
        "norm": {"group_size": 4},
        "loss": {"label_smoothing": 0.1},
        "distill": {"logits": "x.npz", "temperature": 3.0, "weight": 0.25},
    }
)
NAMES = tuple("0123456789")


def drawn(*shape):
    return np.random.default_rng(0).normal(0, 3, shape)


def softmax(x):
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_it_and_its_gradient_are_the_formulas(x64, temperature):
    student, teacher = drawn(2, 6, 10)
    q, p = softmax(student / temperature), softmax(teacher / temperature)
    expected = temperature**2 * (p * np.log(p / q)).sum(axis=-1)
    np.testing.assert_allclose(soft_loss(student, teacher, temperature), expected, rtol=1e-12)
    gradient = jax.grad(lambda z: soft_loss(z, teacher, temperature).sum())(student)
    np.testing.assert_allclose(gradient, temperature * (q - p), rtol=1e-10, atol=1e-14)


def test_it_is_zero_for_equal_distributions_alone(x64):
    logits, other = drawn(2, 6, 10)
    np.testing.assert_allclose(soft_loss(logits, logits + 5, 2.0), 0, atol=1e-14)
    assert (np.asarray(soft_loss(logits, other, 2.0)) > 0.1).all()


def test_a_high_temperature_compares_logits(x64):
    student, teacher = drawn(2, 6, 10)
    away = (student - student.mean(-1, keepdims=True)) - (teacher - teacher.mean(-1, keepdims=True))
    np.testing.assert_allclose(soft_loss(student, teacher, 1e5), (away**2).mean(-1) / 2, rtol=1e-3)
    gradient = jax.grad(lambda z: soft_loss(z, teacher, 1e5).sum())(student)
    np.testing.assert_allclose(gradient, away / 10, rtol=1e-2, atol=1e-4)


def test_far_logits_stay_finite():
    logits = jnp.asarray([[300.0, -300.0, 0.0], [0.0, 0.0, 1e4]])
    value, gradient = jax.value_and_grad(lambda z: soft_loss(z, -logits, 1.0).sum())(logits)
    assert np.isfinite(value)
    assert np.isfinite(gradient).all()


@dataclasses.dataclass(frozen=True)
class Linear:
    """A `Model` that compiles quickly."""

    first: str = "stem"

    def init(self, key, x):
        return {
            "params": {"kernel": jax.random.normal(key, (x.size, 10))},
            "batch_stats": {"mean": jnp.zeros(x.size)},
        }

    def training_from(self, part):
        return Linear(part)

    def apply(self, variables, x, train=False, dropout_keys=None):
        del dropout_keys
        x = x.reshape(len(x), -1)
        mean = x.mean(axis=0) if train else variables["batch_stats"]["mean"]
        return (x - mean[None]) @ variables["params"]["kernel"], {"batch_stats": {"mean": mean}}


@pytest.fixture(scope="module")
def parts():
    """A task and the arguments of its loss."""
    student = dataclasses.replace(make_task(CONFIG, NAMES), model=Linear())
    task = Distillation(student=student, teacher=Teacher(), temperature=3.0, weight=0.25)
    rng = np.random.default_rng(0)
    batch = {
        "image": rng.integers(0, 256, (8, 8, 8, 3), np.uint8),
        "label": rng.integers(0, 10, 8, np.int32),
        "index": np.arange(8, dtype=np.int32),
        "epoch": np.zeros(8, np.int32),
        TEACHER_LOGITS: drawn(8, 10).astype(np.float32),
    }
    variables = task.init(jax.random.key(0))
    return task, variables["params"], {"batch_stats": variables["batch_stats"]}, jax.tree.map(jnp.asarray, batch)


def test_the_loss_is_the_weighted_sum_of_both(parts):
    task, params, state, batch = parts
    key = jax.random.key(3)
    loss, (new_state, metrics, _) = jax.jit(task.loss)(params, state, {}, batch, key)
    hard, (alone_state, alone, _) = jax.jit(task.student.loss)(params, state, {}, batch, key)
    images, _ = task.student.view(batch, key)
    logits, _ = task.student.forward(params, state, images, batch, key)
    soft = np.mean(np.asarray(soft_loss(logits, batch[TEACHER_LOGITS], 3.0)))
    assert set(metrics) == {"loss", "hard_loss", "soft_loss", "top1"}
    assert float(metrics["hard_loss"]) == pytest.approx(float(hard), rel=1e-5)
    assert float(metrics["soft_loss"]) == pytest.approx(float(soft), rel=1e-4)
    assert float(loss) == float(metrics["loss"]) == pytest.approx(0.75 * float(hard) + 0.25 * float(soft), rel=1e-4)
    assert float(metrics["top1"]) == float(alone["top1"])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), new_state, alone_state)


def test_weight_and_temperature_are_honoured(parts):
    task, params, state, batch = parts

    def loss(**changes):
        changed = dataclasses.replace(task, **changes)
        return jax.jit(changed.loss)(params, state, {}, batch, jax.random.key(3))

    none, (_, metrics, _) = loss(weight=0.0)
    assert float(none) == float(metrics["hard_loss"])
    every, (_, hot, _) = loss(weight=1.0, temperature=10.0)
    assert float(every) == float(hot["soft_loss"])
    assert float(hot["soft_loss"]) != pytest.approx(float(metrics["soft_loss"]), rel=1e-3)


def test_no_gradient_reaches_the_teacher(parts):
    task, params, state, batch = parts

    def loss(teacher_logits):
        return task.loss(params, state, {}, {**batch, TEACHER_LOGITS: teacher_logits}, jax.random.key(0))[0]

    assert not np.asarray(jax.grad(loss)(batch[TEACHER_LOGITS])).any()


def test_it_is_evaluated_as_the_student(parts):
    task, params, state, batch = parts
    variables, whole = {"params": params, **state}, {**batch, "mask": jnp.ones(8, bool)}
    results, alone = (jax.device_get(each.metrics(variables, whole)) for each in (task, task.student))
    rows = {**results[1], "index": np.arange(8)}
    ours, own = task.summarise(results[0], rows), task.student.summarise(alone[0], rows)
    assert ours._replace(predictions={}) == own._replace(predictions={})
    assert all((ours.predictions[name] == own.predictions[name]).all() for name in own.predictions)
    assert task.model is task.student.model
    frozen = task.training_from("classifier")
    assert frozen == dataclasses.replace(task, student=task.student.training_from("classifier"))


def test_without_a_teacher_and_in_an_evaluation_it_is_the_student():
    dataset = open_dataset(CONFIG.data)
    plain = dataclasses.replace(CONFIG, distill=configs.DistillConfig())
    student = kind_of(plain).make(plain, dataset, False)
    assert isinstance(student, Classification)
    assert kind_of(CONFIG).make(CONFIG, dataset, True) == student  # the file of logits isn't asked for
