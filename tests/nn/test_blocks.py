import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from mnv2_jax.nn import blocks
from mnv2_jax.nn.conv import Conv, DepthwiseConv, Window
from mnv2_jax.nn.initializers import INITS
from mnv2_jax.nn.norm import GroupedBatchNorm

UIB = functools.partial(blocks.UniversalInvertedBottleneck, features=8, expand_ratio=2, act="relu", layer_scale=True)
MQA = functools.partial(blocks.MobileAttention, features=8, heads=2, key_dim=4)
BLOCKS = {
    "conv": functools.partial(blocks.ConvBlock, features=8, act="gelu"),
    "depthwise_separable": functools.partial(blocks.DepthwiseSeparable, features=8, act="relu6"),
    "squeeze_excite": functools.partial(blocks.InvertedResidual, features=8, hidden=16, act="hard_swish", squeezed=8),
    "fused": functools.partial(blocks.FusedInvertedResidual, features=8, expand_ratio=2, act="relu"),
    "inverted_bottleneck": functools.partial(UIB, start_kernel_size=0, kernel_size=3),
    "convnext_like": functools.partial(UIB, start_kernel_size=3, kernel_size=0),
    "extra_depthwise": functools.partial(UIB, start_kernel_size=3, kernel_size=3),
    "feed_forward": functools.partial(UIB, start_kernel_size=0, kernel_size=0),
    "attention": functools.partial(MQA, kv_stride=1),
    "attention_on_a_smaller_map": functools.partial(MQA, kv_stride=2),
    "bottleneck": functools.partial(blocks.Bottleneck, features=8, hidden=4),
    "bottleneck_with_shortcut": functools.partial(blocks.Bottleneck, features=12, hidden=4),
}
CANCELLED = ("start_depthwise_norm/bias", "key_depthwise_norm/bias")
"""Parameters without effect in training: the next norm cancels a constant, and softmax what all keys have in common."""
WITHOUT_STRIDE = ("feed_forward", "attention", "attention_on_a_smaller_map")


def bind(dtype, padding="same"):
    return blocks.bind_layers(
        conv=functools.partial(Conv, dtype=dtype, padding=padding),
        depthwise=functools.partial(DepthwiseConv, dtype=dtype, padding=padding),
        norm=functools.partial(GroupedBatchNorm, 2),
        dtype=dtype,
        inits=INITS["torchvision_v3"],
    )


def images(*shape):
    return np.random.default_rng(0).normal(2.0, 3.0, shape)


def variables(block, x):
    """Draws variables, with random values where the initialiser has 0, 1 or 1e-5."""
    shapes = jax.eval_shape(lambda key: block.init(key, jnp.zeros(x.shape, x.dtype), False), jax.random.key(0))
    rng = np.random.default_rng(1)

    def draw(path, leaf):
        sign = 1 if path[-1].key == "var" else rng.choice([-1, 1], leaf.shape)
        return jnp.asarray(sign * rng.uniform(0.2, 0.8, leaf.shape), leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def step_of(block, stats):
    """Makes a function that returns loss and new statistics, and the gradients of the parameters and of the input."""

    def loss(params, x):
        y, new = block.apply({"params": params, "batch_stats": stats}, x, True, mutable=["batch_stats"])
        return jnp.mean(jnp.sin(y)), new

    return jax.value_and_grad(loss, (0, 1), has_aux=True)


@pytest.mark.parametrize("name", BLOCKS)
def test_the_number_of_devices_changes_rounding_only_and_every_parameter_is_reached(name, x64):
    block, x = BLOCKS[name](layers=bind(jnp.float64)), images(8, 4, 4, 8)
    state = variables(block, x)
    step, results = step_of(block, state["batch_stats"]), []
    for devices in (1, 4):
        mesh = jax.make_mesh((devices,), ("data",), (AxisType.Auto,), devices=jax.devices()[:devices])
        whole, split = (NamedSharding(mesh, spec) for spec in (PartitionSpec(), PartitionSpec("data")))
        compiled = jax.jit(step, in_shardings=(whole, split), out_shardings=whole)
        results.append(jax.tree.map(np.asarray, compiled(state["params"], x)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-9), *results)
    for path, leaf in jax.tree_util.tree_leaves_with_path(results[0][1]):
        name = jax.tree_util.keystr(path[1:], simple=True, separator="/")
        assert np.isfinite(leaf).all(), name
        assert (np.abs(leaf).max() > 1e-12) == (name not in CANCELLED), name


@pytest.mark.parametrize("padding", ["same", "symmetric"])
@pytest.mark.parametrize("name", BLOCKS)
def test_maps_shrink_by_the_stride_rounded_up(name, padding):
    for stride in (1,) if name in WITHOUT_STRIDE else (1, 2):
        block = BLOCKS[name](layers=bind(jnp.float32, padding), stride=stride)
        y, _ = jax.eval_shape(
            lambda key, x, block=block: block.init_with_output(key, x, False),
            jax.random.key(0),
            jax.ShapeDtypeStruct((2, 7, 10, 8), jnp.float32),
        )
        assert y.shape == (2, -(-7 // stride), -(-10 // stride), block.features)


@pytest.mark.parametrize("name", ["attention", "attention_on_a_smaller_map"])
def test_attention_sees_the_whole_image_and_no_other(name):
    block = BLOCKS[name](layers=bind(jnp.float32))
    x = images(2, 4, 4, 8).astype(np.float32) / 10  # with larger values softmax would see a single position
    state = variables(block, x)
    changed = x.copy()
    changed[0, 0, 0] += 0.5
    a, b = (block.apply(state, values, False) for values in (x, changed))
    np.testing.assert_array_equal(a[1], b[1])
    assert (np.abs(a[0] - b[0]).max(-1) > 0).all()


def test_squeeze_excite_is_a_factor_between_0_and_1_for_each_channel():
    block, x = blocks.SqueezeExcite(4, bind(jnp.bfloat16)), jnp.asarray(images(3, 5, 6, 8), jnp.bfloat16)
    state = jax.jit(block.init)(jax.random.key(0), x)
    y = block.apply(state, x)
    factor = np.asarray(y / x, np.float32)
    assert y.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(state)} == {jnp.dtype("float32")}
    np.testing.assert_allclose(factor, np.broadcast_to(factor[:, :1, :1], factor.shape), atol=0.01)
    assert (factor >= 0).all()
    assert (factor <= 1).all()


def test_max_pool_keeps_the_largest_below_zero_too():
    x = jnp.asarray(images(2, 5, 6, 3) - 100, jnp.float32)
    for padding, pad in (("symmetric", (1, 1)), ("same", None)):
        y = blocks.max_pool(x, Window(2, padding=padding))
        rows = pad or Window(2).pad(5, 3)
        columns = pad or Window(2).pad(6, 3)
        padded = np.pad(x, ((0, 0), rows, columns, (0, 0)), constant_values=-np.inf)
        expected = [[padded[:, i : i + 3, j : j + 3].max((1, 2)) for j in (0, 2, 4)] for i in (0, 2, 4)]
        np.testing.assert_array_equal(y, np.array(expected).transpose(2, 0, 1, 3))


@pytest.mark.parametrize(("stride", "features", "adds"), [(1, 8, True), (2, 8, False), (1, 12, False)])
def test_blocks_add_their_input_where_the_shape_allows(stride, features, adds):
    x = jnp.asarray(images(2, 4, 4, 8), jnp.float32)
    for name in ("squeeze_excite", "fused", "extra_depthwise"):
        block = BLOCKS[name](layers=bind(jnp.float32), stride=stride, features=features)
        state = jax.tree.map(jnp.zeros_like, variables(block, x))
        y = block.apply(state, x, False)
        np.testing.assert_array_equal(y, x if adds else np.zeros_like(y))
