"""Idioms: what several operators compute together is one operator, and the function is the same."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mnv2_jax import graph
from mnv2_jax.export.idioms import recognise
from mnv2_jax.nn.activations import ACTIVATIONS

SPEC = jax.ShapeDtypeStruct((1, 4, 5, 8), "float32")
IMAGES = np.random.default_rng(0).normal(0, 3, SPEC.shape).astype(np.float32)
KERNEL = np.random.default_rng(1).normal(size=(8, 6)).astype(np.float32)
CHANNELS = np.arange(1, 9, dtype=np.float32).reshape(1, 1, 1, 8)


@pytest.mark.parametrize(
    ("function", "ops"),
    [
        *((ACTIVATIONS[name], [("clip", None)]) for name in ("relu", "relu6")),
        (ACTIVATIONS["hard_swish"], [("hard_swish", None)]),
        (ACTIVATIONS["gelu"], [("gelu", None)]),
        (jax.nn.softmax, [("softmax", None)]),
        (lambda x: x.mean((1, 2)), [("mean", None)]),
        (lambda x: x.sum((1, 2)) / 7, [("reduce_sum", None), ("mul", None)]),
        (lambda x: ((x / 255 - CHANNELS) / 3 + 1) * 2, [("mul", None), ("add", None)]),
        (lambda x: 3 - x, [("mul", None), ("add", None)]),
        (lambda x: x + 0, [("mul", None)]),
        (lambda x: jnp.minimum(jnp.maximum(x, -1), 2), [("clip", None)]),
        (lambda x: jnp.maximum(jnp.minimum(x, -1), 2), [("clip", None), ("clip", None)]),
        (lambda x: jax.nn.relu(x @ KERNEL), [("dot_general", (0, np.inf))]),
        (lambda x: jax.nn.hard_sigmoid(x @ KERNEL), [("dot_general", (0, 1))]),
        (lambda x: jax.nn.relu6(x + x), [("add", (0, 6))]),
        (lambda x: jax.nn.relu6((x + x) * -2), [("add", None), ("mul", (0, 6))]),
    ],
)
def test_a_graph_names_what_operators_compute_together(function, ops):
    traced = graph.trace(function, SPEC)
    recognised = recognise(traced)
    found = [(node.op, node.clip) for node in recognised.nodes]
    assert [op for op, _ in found] == [op for op, _ in ops]
    for (_, clip), (_, right) in zip(found, ops, strict=True):
        assert clip == pytest.approx(right)
    np.testing.assert_allclose(graph.run(recognised, IMAGES), function(IMAGES), rtol=1e-5, atol=1e-5)


def test_a_value_that_is_read_twice_keeps_its_own_operator():
    def function(x):
        y = x @ KERNEL
        return jax.nn.relu(y), y

    recognised = recognise(graph.trace(function, SPEC))
    assert [(node.op, node.clip) for node in recognised.nodes] == [("dot_general", None), ("clip", None)]
