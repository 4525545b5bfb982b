import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from mnv2_jax.nn.blocks import InvertedResidual, bind_layers
from mnv2_jax.nn.conv import Conv, DepthwiseConv
from mnv2_jax.nn.initializers import INITS
from mnv2_jax.nn.norm import GroupedBatchNorm


def images(*shape, dtype=np.float32):
    return np.random.default_rng(0).normal(2.0, 3.0, shape).astype(dtype)


def variables(channels, dtype=np.float32):
    rng = np.random.default_rng(1)
    draw = lambda: jnp.asarray(rng.uniform(0.5, 2.0, channels), dtype)  # noqa: E731
    return {"params": {"scale": draw(), "bias": draw()}, "batch_stats": {"mean": draw(), "var": draw()}}


def train(x, group_size, state=None, **options):
    norm = GroupedBatchNorm(group_size=group_size, **options)
    y, new = norm.apply(state or variables(x.shape[-1], x.dtype), x, train=True, mutable=["batch_stats"])
    return y, new["batch_stats"]


def test_order_within_a_group_does_not_matter(x64):
    x, order = images(8, 3, 3, 5, dtype=np.float64), np.array([2, 0, 3, 1, 4, 7, 6, 5])
    (y, stats), (permuted, permuted_stats) = train(x, 4), train(x[order], 4)
    np.testing.assert_allclose(y[order], permuted, atol=1e-12)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12), stats, permuted_stats)


def test_groups_do_not_see_each_other(x64):
    x = images(8, 3, 3, 5, dtype=np.float64)
    changed = x.copy()
    changed[4:] *= 7
    np.testing.assert_array_equal(train(x, 4)[0][:4], train(changed, 4)[0][:4])
    np.testing.assert_allclose(train(x, 4)[0][4:], train(x[4:], 4)[0], atol=1e-12)


def test_running_statistics_are_averaged_over_groups(x64):
    x = images(8, 3, 3, 5, dtype=np.float64)
    stats = [train(part, 4)[1] for part in (x, x[:4], x[4:])]
    whole, mean = stats[0], jax.tree.map(lambda a, b: (a + b) / 2, *stats[1:])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12), whole, mean)


def test_evaluation_is_by_image():
    x, state = images(4, 3, 3, 5), variables(5)
    norm = GroupedBatchNorm(group_size=32)
    y = norm.apply(state, x)
    np.testing.assert_array_equal(y[2:3], norm.apply(state, x[2:3]))
    p, s = state["params"], state["batch_stats"]
    expected = (x - s["mean"][None, None, None]) / np.sqrt(s["var"] + 1e-3)[None, None, None]
    expected = expected * p["scale"][None, None, None] + p["bias"][None, None, None]
    np.testing.assert_allclose(y, expected, atol=1e-5)


@pytest.mark.parametrize("shape", [(6, 4, 4, 5), (6, 5)])
def test_one_group_is_flax_batch_norm_with_gradients(shape, x64):
    x, state = images(*shape, dtype=np.float64), variables(5, np.float64)
    flax_norm = nn.BatchNorm(use_running_average=False, momentum=0.8, epsilon=1e-3, dtype=jnp.float64)
    norm = GroupedBatchNorm(group_size=6, decay=0.8)

    def run(norm, **arguments):
        def loss(params, x):
            both = {"params": params, "batch_stats": state["batch_stats"]}
            y, new = norm.apply(both, x, mutable=["batch_stats"], **arguments)
            return jnp.sum(jnp.sin(y)), (y, new["batch_stats"])

        return jax.value_and_grad(loss, (0, 1), has_aux=True)(state["params"], x)

    (_, (y, stats)), gradients = run(norm, train=True)
    (_, (flax_y, flax_stats)), flax_gradients = run(flax_norm)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-9), (y, gradients), (flax_y, flax_gradients))
    np.testing.assert_allclose(stats["mean"], flax_stats["mean"], atol=1e-12)
    # Flax keeps the variance of the group; we keep its estimate for the population, like PyTorch and fused TensorFlow.
    count = x.size / 5
    batch_var = (flax_stats["var"] - 0.8 * state["batch_stats"]["var"]) / 0.2
    expected = 0.8 * state["batch_stats"]["var"] + 0.2 * batch_var * count / (count - 1)
    np.testing.assert_allclose(stats["var"], expected, atol=1e-9)


def test_statistics_are_float32_where_the_network_is_bfloat16():
    x = images(8, 4, 4, 5).astype(jnp.bfloat16)
    y, stats = train(x, 8, variables(5))
    assert y.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(stats)} == {jnp.dtype("float32")}
    np.testing.assert_allclose(np.asarray(y, np.float32), train(x.astype(np.float32), 8, variables(5))[0], atol=0.05)


@pytest.mark.parametrize("form", ["derived", "written"])
def test_a_constant_channel_gives_the_bias(form):
    """The one-pass variance of a constant channel may come out negative."""
    channels = np.linspace(200, 600, 64, dtype=np.float32)
    y, _ = train(jnp.asarray(np.broadcast_to(channels, (6, 3, 3, 64))), 6, variables(64), form=form)
    np.testing.assert_allclose(y, np.broadcast_to(variables(64)["params"]["bias"], y.shape), atol=0.05)


def test_refuses_a_batch_that_the_groups_do_not_divide():
    with pytest.raises(ValueError, match=r"group_size=4 .*6 images"):
        train(images(6, 2, 2, 3), 4)


def test_the_number_of_devices_changes_rounding_only(x64):
    layers = bind_layers(
        conv=functools.partial(Conv, dtype=jnp.float64),
        depthwise=functools.partial(DepthwiseConv, dtype=jnp.float64),
        norm=functools.partial(GroupedBatchNorm, 2),
        dtype=jnp.float64,
        inits=INITS["torchvision_v3"],
    )
    block = InvertedResidual(features=8, hidden=24, act="relu6", squeezed=8, layers=layers)
    x = images(8, 4, 4, 8, dtype=np.float64)
    state = jax.jit(lambda: block.init(jax.random.key(0), jnp.asarray(x), False))()

    def step(params, x):
        both = {"params": params, "batch_stats": state["batch_stats"]}
        y, new = block.apply(both, x, True, mutable=["batch_stats"])
        return jnp.mean(jnp.sin(y)), new

    results = []
    for devices in (1, 2, 4):
        mesh = jax.make_mesh((devices,), ("data",), (AxisType.Auto,), devices=jax.devices()[:devices])
        whole, split = (NamedSharding(mesh, spec) for spec in (PartitionSpec(), PartitionSpec("data")))
        compiled = jax.jit(jax.value_and_grad(step, has_aux=True), in_shardings=(whole, split), out_shardings=whole)
        results.append(jax.tree.map(np.asarray, compiled(state["params"], x)))
    for other in results[1:]:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-9), results[0], other)
