"""Schedules against written-out numbers, optimisers against written-out updates."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from mnv2_jax.config import Config, OptimConfig
from mnv2_jax.models.registry import create_model, variable_shapes
from mnv2_jax.tasks.base import Aux
from mnv2_jax.training.optim import Optimizer, decay_mask, make_transformation
from mnv2_jax.training.schedules import make_schedule
from mnv2_jax.training.state import NEVER, TrainState
from mnv2_jax.training.step import make_train_step


def optimizer_of(optim, peak, per_epoch, total):
    schedule = make_schedule(optim, peak, per_epoch, total)
    return Optimizer(make_transformation(optim, schedule), schedule)


def rates(optim, steps, peak=0.4, per_epoch=10.0, total=100):
    schedule = jax.jit(make_schedule(optim, peak, per_epoch, total))
    return [float(schedule(jnp.int32(step))) for step in steps]


def test_constant_with_linear_warmup():
    optim = OptimConfig(schedule="constant", warmup_epochs=1.0, warmup_init_lr=0.1)
    np.testing.assert_allclose(rates(optim, [0, 5, 10, 99]), [0.1, 0.25, 0.4, 0.4], rtol=1e-6)


def test_cosine_runs_from_the_warmup_to_the_end():
    optim = OptimConfig(schedule="cosine", warmup_epochs=2.0, final_lr=0.1)
    np.testing.assert_allclose(rates(optim, [20, 60, 100, 120]), [0.4, 0.25, 0.1, 0.1], rtol=1e-6)


def test_exponential_in_jumps_and_smoothly():
    stairs = OptimConfig(schedule="exponential", decay_factor=0.5, decay_every_epochs=2.0)
    np.testing.assert_allclose(rates(stairs, [0, 19, 20, 45]), [0.4, 0.4, 0.2, 0.1], rtol=1e-6)
    smooth = OptimConfig(schedule="exponential", decay_factor=0.5, decay_every_epochs=2.0, staircase=False)
    np.testing.assert_allclose(rates(smooth, [0, 10, 20]), [0.4, 0.4 * 0.5**0.5, 0.2], rtol=1e-6)


def test_the_papers_decay_falls_at_the_end_of_each_epoch():
    # 1,281,167 images in batches of 96: epochs end between steps.
    optim, per_epoch = OptimConfig(schedule="exponential", decay_factor=0.98), 1281167 / 96
    actual = rates(optim, [13345, 13346, 26690, 26691], 0.045, per_epoch, 5_500_000)
    np.testing.assert_allclose(actual, [0.045, 0.045 * 0.98, 0.045 * 0.98, 0.045 * 0.98**2], rtol=1e-6)


def test_step_schedule():
    optim = OptimConfig(schedule="step", decay_factor=0.1, milestones_epochs=(3.0, 6.0))
    np.testing.assert_allclose(rates(optim, [29, 30, 59, 60]), [0.4, 0.04, 0.04, 0.004], rtol=1e-6)


def test_a_warmup_in_steps_wins():
    optim = OptimConfig(schedule="constant", warmup_epochs=1.0, warmup_steps=40)
    np.testing.assert_allclose(rates(optim, [0, 10, 40]), [0, 0.1, 0.4], rtol=1e-6)


def test_a_decay_in_steps_wins():
    optim = OptimConfig(schedule="exponential", decay_factor=0.5, decay_every_steps=25)
    np.testing.assert_allclose(rates(optim, [0, 24, 25, 50]), [0.4, 0.4, 0.2, 0.1], rtol=1e-6)
    by_epoch = OptimConfig(schedule="exponential", decay_factor=0.5, decay_every_steps=25, update_every="epoch")
    np.testing.assert_allclose(rates(by_epoch, [29, 30, 49, 50]), [0.4, 0.2, 0.2, 0.1], rtol=1e-6)


@pytest.mark.parametrize("per_epoch", [10.0, 9.7, 0.4])
@pytest.mark.parametrize(
    "options",
    [
        dict(schedule="constant"),
        dict(schedule="cosine", final_lr=0.01),
        dict(schedule="exponential", decay_factor=0.5, decay_every_epochs=2.4),
        dict(schedule="step", decay_factor=0.1, milestones_epochs=(3.0, 6.0)),
    ],
    ids=lambda options: options["schedule"],
)
def test_by_epoch_the_rate_is_that_of_whole_epochs(options, per_epoch):
    """The rate is that of the same schedule with one step per epoch."""
    options = dict(options, warmup_epochs=2.0, warmup_init_lr=0.1, update_every="epoch")
    epochs = 20
    total = round(epochs * per_epoch)
    by_step = rates(OptimConfig(**options | {"update_every": "step"}), range(epochs), per_epoch=1.0, total=epochs)
    actual = rates(OptimConfig(**options), range(total), per_epoch=per_epoch, total=total)
    # The epoch of a step is the last one that has begun when the step begins.
    whole = [int(np.floor(np.round(step / per_epoch, 6))) for step in range(total)]
    np.testing.assert_allclose(actual, [by_step[epoch] for epoch in whole], rtol=2e-6)


def test_corenets_cosine():
    # corenet/optims/scheduler/cosine.py with mobilenet_v2's numbers: by iterations up to 7500, then by the epoch's
    # number over all of the 300, without adjust_period_for_epochs.
    optim = OptimConfig(
        schedule="cosine",
        cosine_from="start",
        update_every="epoch",
        final_lr=2e-4,
        warmup_steps=7500,
        warmup_init_lr=0.05,
    )
    steps = [0, 1, 3750, 7499, 7500, 7505, 7506, 150 * 1251, 299 * 1251, 300 * 1251 - 1]
    warm = [0.05 + 0.35 * step / 7500 for step in steps[:4]]
    epochs = [5, 5, 6, 150, 299, 299]
    cosine = [2e-4 + 0.5 * (0.4 - 2e-4) * (1 + np.cos(np.pi * epoch / 300)) for epoch in epochs]
    np.testing.assert_allclose(rates(optim, steps, 0.4, 1251.0, 300 * 1251), warm + cosine, rtol=1e-6)


def test_tf_model_gardens_warmup():
    # official/modeling/optimization/lr_schedule.py: LinearWarmup ends at what the schedule is then.
    options = dict(warmup_to="schedule", warmup_steps=20)
    stairs = OptimConfig(schedule="exponential", decay_factor=0.5, decay_every_steps=10, **options)
    np.testing.assert_allclose(rates(stairs, [0, 10, 19, 20, 30]), [0, 0.05, 0.095, 0.1, 0.05], rtol=1e-6)
    cosine = [0.2 * (1 + np.cos(np.pi * step / 100)) for step in (20, 50, 99)]
    actual = rates(OptimConfig(schedule="cosine", cosine_from="start", **options), [0, 10, 20, 50, 99])
    np.testing.assert_allclose(actual, [0, cosine[0] / 2, *cosine], rtol=1e-4)


def test_noise_is_of_the_epoch_and_bounded():
    steady = OptimConfig(schedule="constant", update_every="epoch")
    noisy = OptimConfig(schedule="constant", lr_noise=(0.2, 0.8))
    actual = np.array(rates(noisy, range(2000), per_epoch=4.0, total=2000)).reshape(500, 4)
    np.testing.assert_array_equal(actual, np.repeat(actual[:, :1], 4, axis=1))
    noise = actual[:, 0] / rates(steady, [0])[0] - 1
    assert np.abs(noise[:100]).max() == np.abs(noise[400:]).max() == 0
    inside = noise[100:400]
    assert np.unique(inside).size == 300
    assert 0.6 < np.abs(inside).max() < 0.67
    # A normal deviate within ±0.67 has mean 0 and a standard deviation of 0.3753.
    assert abs(inside.mean()) < 3 * 0.3753 / 300**0.5
    assert abs(inside.std() - 0.3753) < 0.03
    twice = rates(noisy, range(0, 1000, 2), per_epoch=2.0, total=1000)
    np.testing.assert_allclose(twice, actual[:, 0], rtol=1e-6)  # by the epoch alone


PARAMS = {"stem": jnp.full((3, 3, 3, 2), 2.0), "depthwise": jnp.full((3, 3, 1, 2), 2.0), "scale": jnp.full((2,), 2.0)}


@pytest.mark.parametrize(
    ("decayed", "expected"),
    [
        ("all", (True, True, True)),
        ("no_norm", (True, True, True)),
        ("no_norm_bias", (True, True, False)),
        ("no_depthwise", (True, False, False)),
    ],
)
def test_weight_decay_masks(decayed, expected):
    mask = decay_mask(PARAMS, decayed)
    assert (mask["stem"], mask["depthwise"], mask["scale"]) == expected


@pytest.mark.parametrize("name", ["mobilenet_v3_small", "mobilenet_v4_hybrid_medium"])
def test_no_norm_leaves_out_what_has_running_statistics(name):
    shapes = variable_shapes(create_model(name, num_classes=10))
    mask = traverse_util.flatten_dict(decay_mask(shapes["params"], "no_norm"))
    norms = {path[:-1] for path in traverse_util.flatten_dict(shapes["batch_stats"])}
    assert {path for path, decayed in mask.items() if not decayed} == {
        (*norm, leaf) for norm in norms for leaf in ("scale", "bias")
    }


def follow(optim, gradients, start=2.0, peak=0.1):
    """Follows one scalar weight (of a kernel) under an optimiser, step by step."""
    optimizer = optimizer_of(optim, peak, 10.0, 100)
    params = {"kernel": jnp.full((1, 1), start)}
    state, path = optimizer.tx.init(params), []
    update = jax.jit(optimizer.tx.update)
    for gradient in gradients:
        updates, state = update({"kernel": jnp.full((1, 1), gradient)}, state, params)
        params = jax.tree.map(jnp.add, params, updates)
        path.append(float(params["kernel"][0, 0]))
    return path


GRADIENTS = [0.5, -1.0, 2.0, 0.1, 0.3]


@pytest.mark.parametrize("nesterov", [False, True])
def test_sgd_is_pytorchs(nesterov):
    optim = OptimConfig(name="sgd", schedule="constant", nesterov=nesterov, weight_decay=0.01)
    w, velocity, expected = 2.0, 0.0, []
    for g in GRADIENTS:
        g += 0.01 * w
        velocity = 0.9 * velocity + g
        w -= 0.1 * (g + 0.9 * velocity if nesterov else velocity)
        expected.append(w)
    np.testing.assert_allclose(follow(optim, GRADIENTS), expected, rtol=1e-5)


HALVED = dict(schedule="exponential", decay_factor=0.5, decay_every_steps=1)
"""A rate that changes at each step, so that it shows which step's rate was used."""


def test_rmsprop_is_tensorflows():
    optim = OptimConfig(name="rmsprop", epsilon=1.0, rms_decay=0.9, **HALVED)
    w, square, momentum, expected = 2.0, 1.0, 0.0, []  # the mean square starts at 1
    for step, g in enumerate(GRADIENTS):
        square = 0.9 * square + 0.1 * g * g
        # Epsilon in the root, the rate in the momentum.
        momentum = 0.9 * momentum + 0.1 * 0.5**step * g / np.sqrt(square + 1.0)
        w -= momentum
        expected.append(w)
    np.testing.assert_allclose(follow(optim, GRADIENTS), expected, rtol=1e-5)


def test_adamw_decays_apart_from_the_gradient():
    optim = OptimConfig(name="adamw", schedule="constant", weight_decay=0.1)
    w, m, v, expected = 2.0, 0.0, 0.0, []
    for t, g in enumerate(GRADIENTS, 1):
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        w -= 0.1 * (m / (1 - 0.9**t) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8) + 0.1 * w)
        expected.append(w)
    np.testing.assert_allclose(follow(optim, GRADIENTS), expected, rtol=1e-5)


def test_clipping_comes_before_weight_decay():
    optim = OptimConfig(name="sgd", schedule="constant", momentum=0.0, clip_grad_norm=1.0, weight_decay=0.5)
    np.testing.assert_allclose(follow(optim, [30.0]), [2.0 - 0.1 * (1.0 + 0.5 * 2.0)], rtol=1e-6)


def test_rmsprop_is_pytorchs():
    optim = OptimConfig(
        name="rmsprop",
        **HALVED,
        epsilon=0.1,
        rms_init=0.0,
        epsilon_in_sqrt=False,
        lr_in_momentum=False,
    )
    w, square, momentum, expected = 2.0, 0.0, 0.0, []
    for step, g in enumerate(GRADIENTS):
        square = 0.9 * square + 0.1 * g * g
        momentum = 0.9 * momentum + g / (np.sqrt(square) + 0.1)
        w -= 0.1 * 0.5**step * momentum  # the rate outside
        expected.append(w)
    np.testing.assert_allclose(follow(optim, GRADIENTS), expected, rtol=1e-5)


def test_l2_of_adamw_goes_through_the_moments():
    optim = OptimConfig(name="adamw", schedule="constant", weight_decay=0.1, l2=0.2)
    w, m, v, expected = 2.0, 0.0, 0.0, []
    for t, g in enumerate(GRADIENTS, 1):
        g += 0.2 * w
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        w -= 0.1 * (m / (1 - 0.9**t) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8) + 0.1 * w)
        expected.append(w)
    np.testing.assert_allclose(follow(optim, GRADIENTS), expected, rtol=1e-5)


def descend(optim, steps, peak=1.0, power=1):
    """Trains a weight w that begins at 10 and costs w ** power; returns w after each step, its average, and the log."""

    def loss(params, model_state, frozen, batch, key):
        cost = (params["w"] ** power).sum()
        return cost, Aux(model_state, {"loss": cost})

    optimizer = optimizer_of(optim, peak, 10.0, 100)
    params = {"w": jnp.asarray([10.0])}
    state = TrainState(
        step=jnp.int32(0),
        seed=jnp.uint32(0),
        first_bad_step=jnp.int32(NEVER),
        params=params,
        model_state={},
        opt_state=optimizer.tx.init(params),
        ema={"params": params},
    )
    step = jax.jit(make_train_step(types.SimpleNamespace(loss=loss), optimizer, Config(optim=optim)))
    actual = []
    for _ in range(steps):
        state, metrics = step(state, {}, {})
        logged = (metrics[name] for name in ("lr", "loss", "grad_norm", "first_bad_step"))
        actual.append([float(x) for x in (state.params["w"][0], state.ema["params"]["w"][0], *logged)])
        assert int(state.first_bad_step) == int(metrics["first_bad_step"])
    return np.array(actual).T


def test_the_average_takes_in_every_fourth_step():
    optim = OptimConfig(schedule="constant", momentum=0.0, ema_decay=0.75, ema_every_steps=4, ema_warmup=False)
    _, actual, *_ = descend(optim, 9)
    first = 0.75 * 10 + 0.25 * 6  # the weight falls by 1 a step
    second = 0.75 * first + 0.25 * 2
    np.testing.assert_allclose(actual, [10] * 3 + [first] * 4 + [second] * 2, rtol=1e-6)


def test_the_average_warms_up_as_tensorflows_and_the_logged_rate_is_the_steps_own():
    optim = OptimConfig(momentum=0.0, ema_decay=0.25, **HALVED)
    weights, actual, logged, *_ = descend(optim, 6)
    np.testing.assert_allclose(-np.diff(weights, prepend=10), logged, rtol=1e-5)
    mean, expected = 10.0, []
    for num_updates, weight in enumerate(weights, 1):
        decay = min(0.25, (1 + num_updates) / (10 + num_updates))  # tf.train.ExponentialMovingAverage
        mean = decay * mean + (1 - decay) * weight
        expected.append(mean)
    np.testing.assert_allclose(actual, expected, rtol=1e-6)


def test_what_is_not_finite_is_remembered_as_the_first():
    optim = OptimConfig(schedule="constant", momentum=0.0, ema_decay=0.5)
    weights, _, _, losses, norms, bad = descend(optim, 4, peak=1e38, power=2)
    # The loss of the first step is finite but its weights are not, so that step must not be saved.
    assert np.isfinite([losses, norms])[:, 0].all()
    assert not np.isfinite(weights).any()
    assert not np.isfinite(losses[1:]).any()
    assert bad.tolist() == [1, 1, 1, 1]
    # Here the gradient of the second step is the first value that isn't finite.
    weights, _, _, losses, norms, bad = descend(optim, 4, peak=1e25, power=3)
    assert np.isfinite(weights).tolist() == [True, False, False, False]
    assert bad.tolist() == [NEVER, 2, 2, 2]
    assert descend(optim, 4)[-1].tolist() == [NEVER] * 4
