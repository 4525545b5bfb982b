"""The network as a list of operators: the same function as the network's, folded or not, and nothing left to fold."""

import collections
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mnv2_jax import create_model, graph

FOLDED = {
    "mobilenet_v1": {"conv_general_dilated": 27, "dot_general": 1},
    "mobilenet_v2": {"conv_general_dilated": 52, "dot_general": 1, "add": 10},
    "mobilenet_v3_small": {"conv_general_dilated": 34, "dot_general": 20},
    "mobilenet_v4_hybrid_medium": {"conv_general_dilated": 119, "dot_general": 18},
    "resnet50": {"conv_general_dilated": 53, "dot_general": 1, "add": 16, "reduce_window_max": 1},
}
"""Numbers of some operators of the folded networks, which are those of their papers' tables."""


def drawn(model):
    """Draws variables in which no norm is the identity."""
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        if path[-1].key == "kernel":
            return (rng.normal(size=leaf.shape) / np.prod(leaf.shape[:-1]) ** 0.5).astype(np.float32)
        low, high = (0.5, 1.5) if path[-1].key in ("scale", "var") else (-0.1, 0.1)
        return rng.uniform(low, high, leaf.shape).astype(np.float32)

    shapes = jax.eval_shape(model.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 64, 64, 3), "float32"))
    return jax.tree_util.tree_map_with_path(draw, shapes)


@pytest.mark.parametrize(
    ("name", "batch", "options"),
    [
        ("mobilenet_v2", 1, {"width": 0.35}),
        pytest.param("mobilenet_v2", 2, {"padding": "symmetric", "output_stride": 16}, marks=pytest.mark.slow),
        pytest.param("mobilenet_v1", 1, {"width": 0.25, "padding": "keras_v1"}, marks=pytest.mark.slow),
        pytest.param("mobilenet_v3_small", 2, {"width": 0.35}, marks=pytest.mark.slow),
        pytest.param("mobilenet_v4_hybrid_medium", 1, {"width": 0.25}, marks=pytest.mark.slow),
        pytest.param("resnet50", 1, {}, marks=pytest.mark.slow),
    ],
)
def test_a_folded_network_is_the_same_function_without_norms(name, batch, options):
    model = create_model(name, 5, **options)
    variables, spec = drawn(model), jax.ShapeDtypeStruct((batch, 65, 57, 3), "float32")
    images = jnp.asarray(np.random.default_rng(1).normal(size=spec.shape), "float32")

    def make(held):
        return graph.fold(graph.trace(lambda x: model.apply(held, x)[0], spec))

    template = graph.abstract(make, variables)
    counts = collections.Counter(node.op for node in template.nodes)
    for op, count in FOLDED[name].items():
        assert counts[op] == count, (op, counts)
    assert not counts["rsqrt"]
    arrays = jax.jit(lambda held: graph.known(make(held)))(variables)
    ours = jax.jit(lambda held, x: graph.run(graph.with_known(template, held), x))(arrays, images)
    expected = jax.jit(lambda held, x: model.apply(held, x)[0])(variables, images)
    np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-5 * float(abs(expected).max()))


def test_what_something_else_reads_is_not_folded():
    kernel, factor = jnp.ones((1, 1, 3, 4)), jnp.arange(4.0).reshape(1, 1, 1, 4)

    def function(x):
        y = jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        return y * factor + y.sum((1, 2), keepdims=True)

    spec = jax.ShapeDtypeStruct((1, 5, 5, 3), "float32")
    traced = graph.trace(function, spec)
    assert [node.op for node in graph.fold(traced).nodes] == [node.op for node in traced.nodes]
    x = jnp.arange(75.0).reshape(spec.shape)
    np.testing.assert_allclose(graph.run(graph.fold(traced), x), function(x), rtol=1e-6)


def test_known_values_are_computed_choices_by_platform_are_the_library_s_and_gradients_flow():
    def function(scale, x):
        y = jax.lax.platform_dependent(x, cpu=lambda x: x + 1, default=lambda x: jax.nn.relu6(x) * (jnp.exp(scale) + 2))
        return {"y": jnp.transpose(y).reshape(-1), "constant": jnp.ones(3) * 2}

    spec = jax.ShapeDtypeStruct((2, 3), "float32")
    traced = graph.trace(lambda x: function(1.0, x), spec)
    assert [node.op for node in traced.nodes] == ["max", "min", "mul", "transpose", "reshape"]
    x = jnp.linspace(-1, 8, 6).reshape(2, 3)
    result = graph.run(traced, x)
    np.testing.assert_allclose(result["y"], (jnp.clip(x, 0, 6) * (np.e + 2)).T.reshape(-1), rtol=1e-6)
    np.testing.assert_array_equal(result["constant"], [2, 2, 2])
    slope = jax.grad(lambda scale: graph.run(graph.trace(lambda x: function(scale, x), spec), x)["y"].sum())(1.0)
    np.testing.assert_allclose(slope, jnp.clip(x, 0, 6).sum() * np.e, rtol=1e-5)


def test_a_broadcast_waits_until_something_needs_it():
    def function(x):
        mean = x.mean((1, 2), keepdims=True)  # [b, 1, 1, c]
        wide, shifted = (jnp.broadcast_to(y, x.shape) for y in (mean, mean + 1))
        return {"product": wide * shifted, "sum": (wide * shifted + x).sum((1, 2)), "turned": (wide * 2).T}

    spec = jax.ShapeDtypeStruct((1, 3, 5, 2), "float32")
    traced, x = graph.trace(function, spec), jnp.arange(30.0).reshape(spec.shape)
    assert [node.output.shape for node in traced.nodes if node.op == "mul"] == [(1, 1, 1, 2)] * 3
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), graph.run(traced, x), function(x))


def test_loops_and_choices_by_value_count():
    w = jnp.ones((4, 4))

    def function(x):
        x, _ = jax.lax.scan(lambda x, _: (x @ w, None), x, length=3)
        return jax.lax.cond(x.sum() > 0, lambda x: x @ w @ w, lambda x: x @ w, x)

    traced = graph.trace(function, jax.ShapeDtypeStruct((2, 4), "float32"))
    assert sum(map(graph.madds_of, traced.nodes)) == 5 * 2 * 4 * 4
    x = jnp.arange(8.0).reshape(2, 4)
    np.testing.assert_allclose(graph.run(traced, x), function(x))
