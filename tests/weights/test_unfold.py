"""Folded norms get statistics again: inference stays the same, and training begins with the same function."""

import jax
import numpy as np
import pytest

from mnv2_jax.config import NormConfig
from mnv2_jax.models.registry import create_model, variable_shapes
from mnv2_jax.weights.unfold import are_folded, unfold

# Without and with a norm after global pooling.
NETWORKS = (pytest.param("mobilenet_v2", marks=pytest.mark.slow), "mobilenet_v4_conv_small")


def folded(model, seed):
    """Random variables whose norms only add, as `convert` makes them from a TFLite file."""
    rng, epsilon = np.random.default_rng(seed), model.norm.epsilon

    def of(path, leaf):
        name, shape = path[-1].key, leaf.shape
        is_norm = path[-2].key.endswith("_norm")
        if name == "var":
            return np.full(shape, 1 - epsilon, leaf.dtype)
        if name == "bias" and is_norm:
            return rng.normal(0, 0.5, shape).astype(leaf.dtype)
        if name == "kernel":  # maps grow from block to block: statistics far from 0 and 1
            return rng.normal(0, 1.5 * np.sqrt(2 / np.prod(shape[:-1])), shape).astype(leaf.dtype)
        return np.full(shape, 1.0 if name == "scale" else 0.0, leaf.dtype)

    return jax.tree_util.tree_map_with_path(of, variable_shapes(model))


@pytest.mark.parametrize("name", NETWORKS)
def test_unfolding_keeps_inference_and_makes_training_begin_as_it(name, x64):
    images = np.random.default_rng(0).normal(size=(16, 32, 32, 3))
    norm = NormConfig(group_size=16)
    model = create_model(name, 5, width=0.25, dropout=0.0, dtype="float64", strides=(1, 2, 2, 2, 1), norm=norm)
    variables = folded(model, 0)
    assert are_folded(model, variables)
    other = unfold(model, variables, jax.jit(model.norm_inputs)(variables, images))
    assert not are_folded(model, other)
    infer = jax.jit(lambda v: model.apply(v, images)[0])
    train = jax.jit(lambda v: model.apply(v, images, train=True)[0])
    before, after = infer(variables), infer(other)
    size = float(np.abs(before).max())
    np.testing.assert_allclose(after, before, rtol=0, atol=1e-9 * size)
    # The batch's own statistics are the ones that it was given.
    np.testing.assert_allclose(train(other), before, rtol=0, atol=1e-6 * size)
    assert np.abs(train(variables) - before).max() > 0.1 * size


def test_variables_with_statistics_of_their_own_are_not_folded():
    model = create_model("mobilenet_v2", 5, width=0.25)
    fresh = jax.tree_util.tree_map_with_path(
        lambda path, leaf: np.full(leaf.shape, path[-1].key in ("var", "scale"), leaf.dtype), variable_shapes(model)
    )
    assert not are_folded(model, fresh)  # the variance is 1, not 1 - epsilon
    one = folded(model, 1)
    one["batch_stats"]["stem_norm"]["mean"] = one["batch_stats"]["stem_norm"]["mean"] + 1
    assert not are_folded(model, one)
