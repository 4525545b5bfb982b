"""Schedules against written-out numbers, optimisers against written-out updates."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mnv2_jax.config import OptimConfig
from mnv2_jax.training.optim import decay_mask, make_optimizer, make_schedule


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
    found = rates(optim, [13345, 13346, 26690, 26691], 0.045, per_epoch, 5_500_000)
    np.testing.assert_allclose(found, [0.045, 0.045 * 0.98, 0.045 * 0.98, 0.045 * 0.98**2], rtol=1e-6)


def test_step_schedule():
    optim = OptimConfig(schedule="step", decay_factor=0.1, milestones_epochs=(3.0, 6.0))
    np.testing.assert_allclose(rates(optim, [29, 30, 59, 60]), [0.4, 0.04, 0.04, 0.004], rtol=1e-6)


PARAMS = {"stem": jnp.full((3, 3, 3, 2), 2.0), "depthwise": jnp.full((3, 3, 1, 2), 2.0), "scale": jnp.full((2,), 2.0)}


@pytest.mark.parametrize(
    ("decayed", "expected"),
    [("all", (True, True, True)), ("no_norm_bias", (True, True, False)), ("no_depthwise", (True, False, False))],
)
def test_weight_decay_masks(decayed, expected):
    mask = decay_mask(PARAMS, decayed)
    assert (mask["stem"], mask["depthwise"], mask["scale"]) == expected


def follow(optim, gradients, start=2.0, peak=0.1):
    """One scalar weight (of a kernel) under an optimiser, step by step."""
    optimizer = make_optimizer(optim, peak, 10.0, 100)
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


def test_rmsprop_is_tensorflows():
    optim = OptimConfig(name="rmsprop", schedule="constant", epsilon=1.0, rms_decay=0.9)
    w, square, momentum, expected = 2.0, 1.0, 0.0, []  # the mean square starts at 1
    for g in GRADIENTS:
        square = 0.9 * square + 0.1 * g * g
        momentum = 0.9 * momentum + 0.1 * g / np.sqrt(square + 1.0)  # epsilon in the root, the rate in the momentum
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
