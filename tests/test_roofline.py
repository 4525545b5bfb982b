"""The roofline's counts equal those by hand, and its measurements of a device follow the clock."""

import itertools
import types

import jax
import jax.numpy as jnp
import pytest

from mnv2_jax import config
from mnv2_jax.bench import roofline
from mnv2_jax.models.registry import create_model
from mnv2_jax.nn.conv import conv, depthwise_conv

IMAGE = jax.ShapeDtypeStruct((1, 8, 8, 3), jnp.float32)
FLOAT, KERNELS = 4, {"stem": (3, 3, 3, 4), "depthwise": (3, 3, 1, 4), "project": (1, 1, 4, 4), "classifier": (4, 5)}


def kernels(**shapes):
    return {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}


def stem(variables, x):
    return jax.nn.relu(conv(x, variables["stem"], stride=2))


def test_one_convolution_by_hand():
    counted = roofline.needs_of(stem, kernels(stem=KERNELS["stem"]), IMAGE)
    image, out, madds = 8 * 8 * 3, FLOAT * 4 * 4 * 4, 4 * 4 * 4 * 27
    # The image is read forward and backward. The output is written, and read backward together with its gradient.
    train = 2 * image + 3 * out
    assert counted == (train, image + out, madds, 2 * madds)


def residual_network(variables, x):
    x = stem(variables, x)
    y = depthwise_conv(x, variables["depthwise"])
    y = y * 2.0 + jnp.ones((1, 1, 1, 4))  # like a norm: an addition, but not of two maps
    x = x + conv(y, variables["project"])
    return x.mean((1, 2)) @ variables["classifier"]


def bytes_by_hand():
    """Counts the training and inference bytes of `residual_network` without its stem; all its maps have one size."""
    map_bytes = FLOAT * 4 * 4 * 4
    inputs_and_outputs = 4 * map_bytes + FLOAT * (4 + 5)
    train = 3 * inputs_and_outputs + 3 * map_bytes + map_bytes  # layers, addition, mean
    return train, inputs_and_outputs + map_bytes


def test_a_residual_network_by_hand():
    counted = roofline.needs_of(residual_network, kernels(**KERNELS), IMAGE)
    first = roofline.needs_of(stem, kernels(stem=KERNELS["stem"]), IMAGE)
    other_layers = bytes_by_hand()
    assert counted[:2] == tuple(a + b for a, b in zip(first, other_layers, strict=False))
    madds = 4 * 4 * 4 * 9 + 4 * 4 * 4 * 4 + 4 * 5
    assert counted[2:] == (first.madds + madds, first.train_madds + 3 * madds)
    jitted = roofline.needs_of(jax.jit(jax.checkpoint(residual_network)), kernels(**KERNELS), IMAGE)
    assert jitted == counted
    larger = roofline.needs_of(residual_network, kernels(**KERNELS), jax.ShapeDtypeStruct((1, 16, 16, 3), jnp.float32))
    assert all(3.5 * a < b <= 4 * a for a, b in zip(counted, larger, strict=True))


def test_attention_keeps_its_scores():
    def attention(variables, x):
        q, k, v = (jnp.einsum("bhwc,cd->bhwd", x, variables[name]).reshape(1, 64, -1) for name in "qkv")
        weights = jax.nn.softmax(jnp.einsum("bqd,bkd->bqk", q, k))
        return jnp.einsum("bqk,bkd->bqd", weights, v)

    counted = roofline.needs_of(attention, kernels(q=(3, 2), k=(3, 2), v=(3, 6)), IMAGE)
    query, value = FLOAT * 64 * 2, FLOAT * 64 * 6
    image, projected = 3 * 8 * 8 * 3, 2 * query + value
    assert counted.infer_bytes == image + projected + projected + value
    assert counted.train_bytes == 2 * image + 3 * projected + 3 * (projected + value)
    assert counted.madds == 64 * 3 * 10 + 64 * 64 * (2 + 6)


def test_mobilenet_v2():
    counted = roofline.needs(create_model("mobilenet_v2", 1000), 224, "bfloat16")
    assert counted.train_bytes == pytest.approx(82e6, rel=0.03)
    assert counted.madds == 300_774_272
    stem = 112 * 112 * 32 * 27
    assert counted.train_madds == 3 * counted.madds - stem
    assert counted.infer_bytes < counted.train_bytes


def test_the_type_is_that_of_the_maps():
    model = create_model("mobilenet_v2", 10, depth=0.3)
    half, whole = (roofline.needs(model, 64, dtype) for dtype in ("bfloat16", "float32"))
    assert all(1.7 * a < b < 2 * a for a, b in zip(half[:2], whole[:2], strict=True))
    assert half[2:] == whole[2:]


def test_the_device_is_measured(monkeypatch):
    """Replaces the clock by one on which each turn takes half a second."""
    ticks = itertools.count(step=0.5)
    monkeypatch.setattr(roofline, "time", types.SimpleNamespace(perf_counter=lambda: next(ticks)))
    assert roofline.measured_bandwidth() == 2 * (2 * 2**27) / 0.5  # two passes read and write 128 MiB
    assert roofline.measured_rate("float32") == 2 * 1024**3 / 0.5


def test_the_larger_time_is_the_bound():
    device = dict(bytes_per_s=100.0, madds_per_s=1000.0)
    assert roofline.bound_s(200, 1000, **device) == 2
    assert roofline.bound_s(200, 3000, **device) == 3
    assert roofline.share(4.0, 200, 1000, **device) == 0.5


def test_shares_of_measured_rows(monkeypatch):
    monkeypatch.setattr(roofline, "measured_bandwidth", lambda: 1e9)
    monkeypatch.setattr(roofline, "measured_rate", lambda dtype: 1e15)
    monkeypatch.setattr(roofline, "needs", lambda *arguments: roofline.Needs(3_000_000, 1_000_000, 5, 15))
    settings = config.build({"model": {"num_classes": 10}, "data": {"batch_size": 4}})
    rows = [{"name": "ours", "ms": 24.0}, {"name": "torch", "unavailable": "no torch"}]
    for mode, bound_ms, share in (("train", 12, 1 / 2), ("infer", 4, 1 / 6)):
        counted = roofline.of(settings, mode, rows)
        assert counted["bound_ms"] == pytest.approx(bound_ms)
        assert counted["shares"] == {"ours": pytest.approx(share)}
