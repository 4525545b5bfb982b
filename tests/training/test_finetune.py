"""Freezing, staged unfreezing and separate learning rates, on the real experiment shrunk."""

import functools
import itertools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mnv2_jax import config as configs
from mnv2_jax.config import FinetuneConfig, OptimConfig
from mnv2_jax.errors import UserError
from mnv2_jax.runs.weights import read_run_weights
from mnv2_jax.training import mesh as meshes
from mnv2_jax.training.experiment import open_experiment
from mnv2_jax.training.feeds import train_batches
from mnv2_jax.training.finetune import Stage, make_optimizers, make_stages
from mnv2_jax.training.introduction import introduce
from mnv2_jax.training.optim import make_transformation
from tests import cli

W0_25 = str(pathlib.Path(__file__).parents[2] / "configs" / "w0_25.py")
PARTS = ("stem", "block_1", "head", "classifier")
SMALL = ["data.batch_size=32", "data.resolution=16", "model.depth=0.3", "optim.peak_lr=0.01"]
"""Overrides that shrink the experiment, to a network of eight blocks."""


def experiment(*overrides):
    return open_experiment(configs.load(f"{W0_25}:data=digits", [*SMALL, *overrides]).config, jax.devices()[:1])


@functools.cache
def take_steps(*overrides, steps=3):
    """Returns the state before training and after each of some steps."""
    opened = experiment(*overrides)
    state, batches = meshes.compile_init(opened.mesh, opened.init_state)(), train_batches(opened)
    states = [jax.tree.map(np.array, jax.device_get(state))]
    compiled = functools.cache(lambda stage: meshes.compile_train_step(opened.mesh, opened.train_step(stage)))
    for step in range(steps):
        state, _ = compiled(opened.plan.stage_of(step + 1))(state, {}, next(batches))
        states.append(jax.tree.map(np.array, jax.device_get(state)))
    return states


def changed(before, after):
    """Names the branches of the parameters and of the statistics in which anything differs."""
    pairs = (before.params, after.params), (before.model_state["batch_stats"], after.model_state["batch_stats"])
    return tuple(
        {name for name in old if not all(map(np.array_equal, jax.tree.leaves(old[name]), jax.tree.leaves(new[name])))}
        for old, new in pairs
    )


def test_the_first_lines_say_what_is_trained():
    opened = experiment("finetune.train_from=classifier", "loss.class_weights={'1': 3}")
    params = jax.eval_shape(opened.init_state).params
    trained, all_of_them = (sum(leaf.size for leaf in jax.tree.leaves(tree)) for tree in (params["classifier"], params))
    lines = "\n".join(introduce(opened, pathlib.Path("runs/x"), 0))
    assert f"{trained:,} of {all_of_them:,} parameters" in lines
    assert "class weights" in lines


def test_what_is_frozen_stays_to_the_bit_and_everything_else_moves():
    before, *_, after = take_steps("finetune.train_from=head", "optim.weight_decay=0.1", "optim.weight_decay_on=all")
    params, stats = changed(before, after)
    assert params == {"head", "head_norm", "classifier"}
    assert stats == {"head_norm"}


def test_a_frozen_backbone_infers_with_its_running_statistics():
    opened = experiment("finetune.train_from=classifier", "model.dropout=0")
    state = take_steps("finetune.train_from=classifier", "model.dropout=0", steps=0)[0]
    batch = next(train_batches(opened))
    task = opened.task.training_from("classifier")
    images, _ = task.view(batch, jax.random.key(0))
    trained, new = jax.jit(lambda v, x: task.model.apply(v, x, train=True))(state.variables, images)
    inferred, _ = jax.jit(lambda v, x: opened.task.model.apply(v, x))(state.variables, images)
    np.testing.assert_allclose(trained, inferred, rtol=1e-5, atol=1e-6)
    jax.tree.map(np.testing.assert_array_equal, new, state.model_state)


def test_stages_unfreeze_at_their_steps():
    # 1,437 images in batches of 32: 0.023 epochs are a step.
    states = take_steps("finetune.train_from=('classifier', 'block_8')", "finetune.unfreeze_epochs=(0.023,)", steps=2)
    moved = [changed(a, b)[0] for a, b in itertools.pairwise(states)]
    assert moved[0] == {"classifier"}
    assert moved[1] == {"block_8", "head", "head_norm", "classifier"}


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_an_optimiser_begins_afresh_with_what_is_unfrozen(name):
    optim = OptimConfig(name=name, weight_decay=0.1, weight_decay_on="all")
    params = {part: {"kernel": jnp.full((3, 3), 0.5)} for part in PARTS}
    grads = {part: {"kernel": jnp.full((3, 3), 2.0 + place)} for place, part in enumerate(PARTS)}
    stages = (Stage("classifier", 0), Stage("stem", 10))

    def schedule(count):
        return 0.1 / (1 + jnp.asarray(count, float))

    head_only, whole = make_optimizers(optim, 0.5, schedule, stages, PARTS)
    state = head_only.tx.init(params)
    assert jax.tree.structure(state) == jax.tree.structure(whole.tx.init(params))
    for _ in range(10):
        updates, state = head_only.tx.update(grads, state, params)
        assert not np.any(updates["stem"]["kernel"])
    updates, state = whole.tx.update(grads, state, params)
    fresh = make_transformation(optim, lambda count: 0.5 * schedule(count + 10))
    backbone = {part: tree for part, tree in params.items() if part != "classifier"}
    expected, _ = fresh.update({part: grads[part] for part in backbone}, fresh.init(backbone), backbone)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), {p: updates[p] for p in backbone}, expected)


def test_clipping_goes_by_the_norm_of_all_that_is_trained():
    optim = OptimConfig(name="sgd", momentum=0.0, clip_grad_norm=1.0)
    params = {part: {"kernel": jnp.zeros((2, 2))} for part in PARTS}
    grads = jax.tree.map(lambda p: jnp.full_like(p, 3.0), params)
    (split,) = make_optimizers(optim, 0.25, lambda count: 1.0, (Stage("stem", 0),), PARTS)
    updates, _ = split.tx.update(grads, split.tx.init(params), params)
    norm = float(optax.tree.norm(grads))
    np.testing.assert_allclose(updates["classifier"]["kernel"], -3 / norm, rtol=1e-6)
    np.testing.assert_allclose(updates["stem"]["kernel"], -0.25 * 3 / norm, rtol=1e-6)


def test_without_any_of_it_the_optimiser_is_the_plain_one():
    params = {part: {"kernel": jnp.ones((2, 2))} for part in PARTS}
    optim = OptimConfig()
    (only,) = make_optimizers(optim, 1.0, optax.constant_schedule(0.1), (Stage("stem", 0),), PARTS)
    plain = make_transformation(optim, optax.constant_schedule(0.1))
    assert jax.tree.structure(only.tx.init(params)) == jax.tree.structure(plain.init(params))


ONE_EPOCH = ("train.steps=none", "train.epochs=1")


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["finetune.train_from=clasifier"], "did you mean 'classifier'?"),
        (["finetune.train_from=('head', 'stem')"], "finetune.unfreeze_epochs"),
        (
            ["finetune.train_from=('stem', 'head')", "finetune.unfreeze_epochs=(1,)"],
            "train_from=['stem', 'head']",
        ),
        (["finetune.train_from=('head', 'stem')", "finetune.unfreeze_epochs=(0,)"], "above 0"),
        (
            ["finetune.train_from=('head', 'stem')", "finetune.unfreeze_epochs=(1e-9,)"],
            "unfreeze_epochs=[1e-09]",
        ),
        (["finetune.train_from=('head', 'stem')", "finetune.unfreeze_epochs=(1,)", *ONE_EPOCH], "earlier"),
        (["finetune.train_from=()"], "finetune.train_from=[]"),
    ],
)
def test_impossible_stages_are_one_line(overrides, named):
    with pytest.raises(UserError) as caught:
        experiment(*overrides)
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)


def test_stages_by_steps():
    finetune = FinetuneConfig(train_from=("classifier", "block_1"), unfreeze_epochs=(2.0,))
    stages = make_stages(finetune, 10.5, PARTS)
    assert stages == (Stage("classifier", 0), Stage("block_1", 21))


def test_training_ends_when_patience_does_and_the_same_command_says_so(tmp_path):
    still = (*cli.SHRUNK, "--config.optim.peak_lr=1e-12", "--config.train.patience=1", f"--workdir={tmp_path / 'run'}")
    result = cli.here("main", *still, "--json", devices=1)
    summary = cli.answer(result)
    assert summary["steps"] < 12
    assert summary["best"]["step"] < summary["steps"]
    assert "1 evaluations" in result.stderr
    rerun = cli.here("main", *still, "--json")
    assert cli.answer(rerun) == summary
    assert f"finished already, at step {summary['steps']}" in rerun.stderr
    # Commands that use the run take its best checkpoint, and its report names that checkpoint.
    assert read_run_weights(tmp_path / "run").info.notes[0].startswith(f"step {summary['best']['step']} ")
    assert read_run_weights(tmp_path / "run", "latest").info.notes[0].startswith(f"step {summary['steps']} ")
    assert f"best evaluation was at step {summary['best']['step']}" in (tmp_path / "run" / "report.html").read_text()
