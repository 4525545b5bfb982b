"""Stochastic depth, by example and by depth."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mnv2_jax import config
from mnv2_jax.models import network
from mnv2_jax.models.network import DROP_PATH_RULES
from mnv2_jax.models.registry import create_model, variable_shapes
from mnv2_jax.nn.blocks import drop_path
from mnv2_jax.nn.forms import LIBRARY

ROOT = pathlib.Path(__file__).parents[2]


def test_a_branch_is_kept_on_average_and_whole_or_not_at_all():
    branch = jnp.full((4096, 1, 1, 2), 3.0)
    dropped = np.asarray(drop_path(branch, jax.random.split(jax.random.key(0), 4096), 0.2))[:, 0, 0]
    assert set(np.unique(dropped).tolist()) == {0.0, 3.75}
    assert (dropped[:, 0] == dropped[:, 1]).all()
    sigma = 3.75 * np.sqrt(0.2 * 0.8 / 4096)
    assert abs(dropped[:, 0].mean() - 3) < 4 * sigma


def traced(monkeypatch, keys, **options):
    """Returns the rates of the blocks of a network in training, in order, by tracing alone."""
    rates = []

    def noted(y, keys, rate):
        rates.append(rate)
        return drop_path(y, keys, rate)

    monkeypatch.setattr(network, "drop_path", noted)
    model = create_model(**{"name": "mobilenet_v2", "num_classes": 4, "dropout": 0.0} | options).with_forms(LIBRARY)
    variables = variable_shapes(model)
    images = jax.ShapeDtypeStruct((32, 32, 32, 3), jnp.float32)
    jax.eval_shape(lambda v, x, k: model.apply(v, x, train=True, dropout_keys=k), variables, images, keys)
    return rates


def test_rates_grow_with_depth_and_only_residual_blocks_have_them(monkeypatch):
    keys = jax.random.split(jax.random.key(0), 32)
    # Of MobileNetV2's 17 blocks these ten are residual (table 2: n - 1 of each stage).
    residual = [3, 5, 6, 8, 9, 10, 12, 13, 15, 16]
    linear = traced(monkeypatch, keys, drop_path=0.32)
    np.testing.assert_allclose(linear, [0.32 * (block - 1) / 16 for block in residual])
    assert traced(monkeypatch, keys, drop_path=0.32, drop_path_rule="flat") == [0.32] * 10
    assert traced(monkeypatch, keys) == []


def test_every_block_and_example_has_a_key_of_its_own(monkeypatch):
    model = create_model("mobilenet_v2", 4, width=0.25, dropout=0.0, drop_path=0.2).with_forms(LIBRARY)
    variables = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), variable_shapes(model))
    used_keys = []

    def noted(y, keys, rate):
        used_keys.append(jax.random.key_data(keys))
        return y

    monkeypatch.setattr(network, "drop_path", noted)

    @jax.jit
    def keys_of(keys):
        model.apply(variables, np.zeros((32, 16, 16, 3), np.float32), train=True, dropout_keys=keys)
        return jnp.concatenate(used_keys)

    assert len(np.unique(keys_of(jax.random.split(jax.random.key(0), 32)), axis=0)) == 10 * 32


def test_attention_of_the_gardens_networks_has_the_peak_and_the_other_blocks_count_stem_and_head(monkeypatch):
    keys = jax.random.split(jax.random.key(0), 32)
    model = config.load(f"{ROOT}/configs/v4_hybrid_m.py").config.model
    options = dict(drop_path=model.drop_path, drop_path_rule=model.drop_path_rule)
    # The residual ones among the 35 entries of its table of block specs, where the stem is 0, of which these attend.
    residual, attending = [3, *range(5, 16), *range(17, 32)], (8, 10, 12, 14, 24, 26, 28, 30)
    expected = [0.075 * (1 if entry in attending else (entry + 1) / 35) for entry in residual]
    rates = traced(monkeypatch, keys, name=model.name, width=0.125, **options)
    np.testing.assert_allclose(rates, expected)


@pytest.mark.parametrize(("name", "blocks"), [("mobilenet_v2", 17), ("mobilenet_v3_large", 16)])
def test_timm_divides_by_its_blocks_among_which_is_the_last_convolution_of_v3(name, blocks):
    plan = create_model(name, 2).plan
    shares = [DROP_PATH_RULES["timm"](plan, index) for index in range(1, len(plan.blocks) + 1)]
    np.testing.assert_allclose(shares, np.arange(len(plan.blocks)) / blocks)


def test_what_is_frozen_is_not_dropped_and_inference_neither(monkeypatch):
    keys = jax.random.split(jax.random.key(0), 32)
    model = create_model("mobilenet_v2", 4, width=0.25, dropout=0.0, drop_path=0.9).with_forms(LIBRARY)
    images = np.random.default_rng(0).normal(size=(32, 16, 16, 3)).astype(np.float32)
    rng = np.random.default_rng(1)
    variables = jax.tree.map(lambda leaf: rng.uniform(0.5, 1, leaf.shape).astype(leaf.dtype), variable_shapes(model))
    frozen = model.training_from("classifier")
    trained = jax.jit(lambda v, k: frozen.apply(v, images, train=True, dropout_keys=k)[0])(variables, keys)
    np.testing.assert_array_equal(trained, jax.jit(lambda v: model.apply(v, images)[0])(variables))
    with pytest.raises(ValueError, match="drop_path"):
        jax.eval_shape(lambda v: model.apply(v, images, train=True), variables)
