"""The train step is the same function on any number of devices and microbatches, and never waits.

The experiment is the real one, shrunk: `configs/w0_25.py:data=digits` on small batches.
"""

import collections
import functools
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mnv2_jax import config as configs
from mnv2_jax.training import mesh as meshes
from mnv2_jax.training.experiment import open_experiment
from mnv2_jax.training.feeds import train_batches
from mnv2_jax.training.step import split_batch

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"
SHRUNK = [
    "data.batch_size=32",
    "norm.group_size=8",
    "data.resolution=16",
    "model.depth=0.3",  # one block a stage, two in one of them
    "model.strides=(2, 1, 2, 2, 1)",  # the last map is 2×2: statistics of 32 values, not of 8
    "model.init=kaiming_fan_out_grouped",
    "model.dropout=0.1",
    "train.steps=20",
    "optim.peak_lr=0.001",  # training is chaotic: at 0.01 a rounding grows tenfold a step
]


def experiment(*overrides, devices=1, config="w0_25"):
    config = configs.load(f"{CONFIGS / config}.py:data=digits", [*SHRUNK, *overrides]).config
    return open_experiment(config, jax.devices()[:devices])


@functools.lru_cache
def compiled_init(dtype, ema_decay, depth):
    """Compiles the initialisation once for all tests."""
    opened = experiment(f"model.dtype={dtype}", f"optim.ema_decay={ema_decay}", f"model.depth={depth}")
    return jax.device_get(meshes.compile_init(opened.mesh, opened.init_state)())


def begin(opened):
    """Makes the state before the first step, on the experiment's devices."""
    config = opened.config
    state = compiled_init(config.model.dtype, config.optim.ema_decay, config.model.depth)
    state = state.replace(opt_state=opened.optimizers[0].tx.init(state.params))
    # A copy: on a CPU the host array may become the device's buffer, which the step donates.
    return meshes.put(opened.mesh, jax.tree.map(np.copy, state))


def run(opened, steps):
    """Returns the metrics of each step, and the state after each."""
    step = meshes.compile_train_step(opened.mesh, opened.train_step(0))
    state, batches, history, states = begin(opened), train_batches(opened), [], []
    for _ in range(steps):
        state, metrics = step(state, {}, next(batches))
        history.append({name: float(value) for name, value in metrics.items()})
        states.append(jax.device_get(state))
    return history, states


@functools.lru_cache
def plain_run():
    """Takes 10 steps in float64 on one device, with one compilation for all tests."""
    return run(experiment("model.dtype=float64"), 10)


SPREAD = {  # on eight devices of 4 images
    "groups of 8": (),
    "microbatches of 16": ("optim.accumulate_steps=2",),
    "fine-tuning on mixed images in one group": (
        *("finetune.backbone_lr_factor=0.1", "norm.group_size=32", "model.width=0.25"),
        *("augment.mixup_alpha=0.2", "augment.cutmix_alpha=1.0"),
    ),
}
ALL_SPREAD = [
    pytest.param(case, n, marks=[pytest.mark.slow] * (n < 8 or not case.startswith("fine-tuning")))
    for n in (2, 4, 8)
    for case in SPREAD
]


@functools.lru_cache
def three_steps(case, devices):
    """Returns losses and running statistics of 3 steps in float64; on one device microbatches must be the same step."""
    if devices == 1 and case in ("groups of 8", "microbatches of 16"):
        metrics, states = plain_run()
    else:
        config = "finetune" if case.startswith("fine-tuning") else "w0_25"
        opened = experiment("model.dtype=float64", *SPREAD[case], devices=devices, config=config)
        metrics, states = run(opened, 3)
    return np.array([m["loss"] for m in metrics[:3]]), states[2].model_state


@pytest.mark.parametrize(("case", "devices"), ALL_SPREAD)
def test_float64_losses_and_statistics_agree_whatever_lies_over_several_devices(case, devices, x64):
    alone, statistics = three_steps(case, 1)
    assert np.ptp(alone) > 1e-4  # it does train
    losses, metrics = three_steps(case, devices)
    np.testing.assert_allclose(losses, alone, rtol=0, atol=1e-9)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-9), metrics, statistics)


def test_gradient_is_that_of_finite_differences(x64):
    opened = experiment("model.dtype=float64")
    state, batch = begin(opened), next(train_batches(opened))

    def loss(params):
        return opened.task.loss(params, state.model_state, {}, batch, jax.random.key(0))[0]

    value_and_grad = jax.jit(jax.value_and_grad(loss))
    value, gradient = value_and_grad(state.params)
    slope = sum(float((g * g).sum()) for g in jax.tree.leaves(gradient))
    step = 1e-9 / slope**0.5
    ahead, behind = (
        value_and_grad(jax.tree.map(lambda p, g, s=sign: p + s * step * g, state.params, gradient))[0]
        for sign in (1, -1)
    )
    assert float(ahead - behind) / (2 * step) == pytest.approx(slope, rel=1e-4)
    assert np.isfinite(float(value))


@functools.lru_cache
def first_step(devices):
    """Returns the loss and the gradient norm in float32."""
    # In larger networks some activation lies within a rounding of ReLU6's kink, and that one flip shows in the fourth
    # digit of the gradient: at 96 px and a depth of 0.5 with 4 of 8 seeds, here with none of them.
    few = ("data.resolution=96", "model.strides=(2, 2, 2, 2, 2)", "model.depth=0.1", "data.batch_size=16", "seed=3")
    found, _ = run(experiment(*few, "norm.group_size=4", devices=devices), 1)
    return found[0]["loss"], found[0]["grad_norm"]


@pytest.mark.slow
@pytest.mark.parametrize("devices", [2, 4, 8])
def test_float32_first_loss_and_gradient_agree(devices, optimized):
    assert first_step(devices) == pytest.approx(first_step(1), rel=1e-6)


def test_microbatches_keep_norm_groups_whole_and_stay_at_home():
    batch = jnp.arange(32)
    cut = split_batch(batch, accumulate_steps=2, group_size=4)
    groups = {tuple(g) for g in np.asarray(cut).reshape(-1, 4)}
    assert groups == {tuple(g) for g in np.asarray(batch).reshape(-1, 4)}
    homes = np.asarray(cut) // 8  # on four devices
    assert (homes == np.repeat(np.arange(4), 4)).all()


@functools.lru_cache
def on_four_devices():
    """Returns an experiment with averaged weights, its compiled step, and its number of traces, for several tests."""
    opened = experiment("optim.ema_decay=0.5", "optim.ema_warmup=False", devices=4)
    traced = []
    step = opened.train_step(0)

    def counted(state, frozen, batch):
        traced.append(1)
        return step(state, frozen, batch)

    return opened, meshes.compile_train_step(opened.mesh, counted), traced


def test_compiled_once_and_no_implicit_transfer():
    opened, compiled, traced = on_four_devices()
    state, batches, nothing = begin(opened), train_batches(opened), {}
    donated = state.params, state.ema
    for _ in range(4):
        batch = next(batches)
        with jax.transfer_guard("disallow"):
            state, _ = compiled(state, nothing, batch)
    assert len(traced) == 1
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(donated))


def test_at_most_two_all_reduces_on_four_devices():
    opened, step, _ = on_four_devices()
    compiled = step.lower(begin(opened), {}, next(train_batches(opened))).compile().as_text()
    collectives = collections.Counter(
        re.findall(r" (all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)(?:-start)?\(", compiled)
    )
    assert set(collectives) == {"all-reduce"}
    assert collectives["all-reduce"] <= 2


def test_ema_averages_weights_and_their_statistics():
    opened, step, _ = on_four_devices()
    first, batches = begin(opened), train_batches(opened)
    before = jax.tree.map(np.copy, jax.device_get(first.ema))  # the step donates the state's buffers
    state, _ = step(first, {}, next(batches))
    expected = jax.tree.map(lambda a, b: (a + b) / 2, before, {"params": state.params, **state.model_state})
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), state.ema, expected)
    assert set(state.variables) == {"params", "batch_stats"}
    assert state.variables is state.ema


def test_dropout_follows_the_step_and_the_example_not_the_place():
    # Without augmentation, which follows the example, too.
    opened = experiment("model.dropout=0.5", "norm.group_size=32", "data.crop=none", "data.flip=False")
    state, batch = begin(opened), next(train_batches(opened))
    loss = jax.jit(opened.task.loss)
    order = jnp.asarray(np.random.default_rng(0).permutation(32))
    shuffled = {name: value[order] for name, value in batch.items()}
    key = jax.random.key(0)
    loss_in_order, _ = loss(state.params, state.model_state, {}, batch, key)
    loss_shuffled, _ = loss(state.params, state.model_state, {}, shuffled, key)
    other, _ = loss(state.params, state.model_state, {}, batch, jax.random.key(1))
    alike, _ = loss(state.params, state.model_state, {}, batch | {"index": 0 * batch["index"]}, key)
    assert float(loss_in_order) == pytest.approx(float(loss_shuffled), rel=1e-5)
    assert float(loss_in_order) != pytest.approx(float(other), rel=1e-3)
    assert float(loss_in_order) != pytest.approx(float(alike), rel=1e-3)
