"""Compares the kernels in Pallas' interpreter with lax, and lowers them for a GPU; needs no GPU."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mnv2_jax.nn import depthwise_triton
from mnv2_jax.nn.depthwise_triton import PLANS, WIDE, Plan
from mnv2_jax.nn.window import Window
from mnv2_jax.training.mesh import make_mesh, replicated, sharded
from tests.gpus import h100

# Sizes, channels and strides of MobileNetV2's layers at 224 px.
LAYERS = [
    (112, 32, 1),
    (112, 96, 2),
    (56, 144, 1),
    (56, 144, 2),
    (28, 192, 1),
    (28, 192, 2),
    (14, 384, 1),
    (14, 576, 1),
    (14, 576, 2),
    (7, 960, 1),
]
WINDOWS = [Window(*options) for options in itertools.product((1, 2), (1, 2), ("same", "symmetric", "trailing"))]


def lax_value(x, kernel, window):
    wide = jnp.promote_types(x.dtype, jnp.float32)
    y = jax.lax.conv_general_dilated(
        x.astype(wide),
        kernel.astype(wide),
        (window.stride, window.stride),
        window.pads(x, kernel),
        rhs_dilation=(window.dilation, window.dilation),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=x.shape[-1],
    )
    return y.astype(x.dtype)


def assert_agree_with_lax(shape, kernel_size, window, dtype=jnp.float32, tolerance=5e-6, plan=WIDE):
    """Compares with lax. The tolerance is for lax on the CPU: its sums over 12544 positions are less exact."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal(shape), dtype)
    kernel = jnp.asarray(rng.standard_normal((kernel_size, kernel_size, 1, shape[-1])), dtype)
    y, pull = jax.vjp(lambda x, kernel: lax_value(x, kernel, window), x, kernel)
    dy = jnp.asarray(rng.standard_normal(y.shape), dtype)
    results = (
        depthwise_triton.value(x, kernel, window, interpret=True),
        depthwise_triton.input_gradient(dy, kernel, window, shape[1:3], interpret=True),
        depthwise_triton.kernel_gradient(x, dy, window, kernel.shape[:2], interpret=True, plan=plan),
    )
    for array_name, actual, expected in zip(("y", "dx", "dkernel"), results, (y, *pull(dy)), strict=True):
        assert (actual.shape, actual.dtype) == (expected.shape, dtype), array_name
        actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
        assert np.abs(actual - expected).max() <= tolerance * np.abs(expected).max(), array_name


def lower(size, channels, kernel_size, window, batch=128, dtype=jnp.bfloat16):
    """Lowers the three kernels for an H100; returns their texts."""
    outputs = window.outputs(size, kernel_size)
    x, y = (jax.ShapeDtypeStruct((batch, side, side, channels), dtype) for side in (size, outputs))
    kernel = jax.ShapeDtypeStruct((kernel_size, kernel_size, 1, channels), dtype)
    calls = [
        (lambda x, kernel: depthwise_triton.value(x, kernel, window), x, kernel),
        (lambda dy, kernel: depthwise_triton.input_gradient(dy, kernel, window, (size, size)), y, kernel),
        (lambda x, dy: depthwise_triton.kernel_gradient(x, dy, window, kernel.shape[:2]), x, y),
    ]
    with h100():
        return [jax.jit(f).trace(*args).lower(lowering_platforms=("cuda",)).as_text() for f, *args in calls]


@pytest.mark.parametrize(("window", "plan"), [(Window(1, 2, "same"), "wide"), (Window(2, 1, "symmetric"), "narrow")])
def test_kernels_agree_with_lax(window, plan, monkeypatch):
    monkeypatch.setattr(depthwise_triton, "ROWS", 2)  # compiles in a third of the time
    assert_agree_with_lax(
        (2, 5, 8, 24), 3, window, plan=PLANS[plan]
    )  # a shape that no other test has, because traces are cached


def test_devices_compute_with_their_own_images(monkeypatch):
    monkeypatch.setattr(depthwise_triton, "ROWS", 1)
    mesh, window, (height, width) = make_mesh(), Window(2), (5, 4)
    cut, whole = sharded(mesh), replicated(mesh)
    rng = np.random.default_rng(0)
    x, kernel, dy = (
        jnp.asarray(rng.standard_normal(shape), jnp.float32)
        for shape in [(2 * mesh.size, height, width, 8), (3, 3, 1, 8), (2 * mesh.size, 3, 2, 8)]
    )

    def compute(x, kernel, dy):
        return (
            depthwise_triton.value(x, kernel, window, interpret=True),
            depthwise_triton.input_gradient(dy, kernel, window, (height, width), interpret=True),
            depthwise_triton.kernel_gradient(x, dy, window, (3, 3), interpret=True),
        )

    arrays = jax.device_put((x, kernel, dy), (cut, whole, cut))
    program = jax.jit(compute).lower(*arrays).compile()
    y, pull = jax.vjp(lambda x, kernel: lax_value(x, kernel, window), x, kernel)
    for actual, expected, place in zip(program(*arrays), (y, *pull(dy)), (cut, cut, whole), strict=True):
        assert actual.sharding.is_equivalent_to(place, actual.ndim)
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)
    text = program.as_text()
    assert mesh.size > 1
    assert "all-gather" not in text
    assert text.count(" all-reduce(") == 1  # of the gradient of the kernel


@pytest.mark.slow
@pytest.mark.parametrize("window", WINDOWS, ids=str)
@pytest.mark.parametrize(("kernel_size", "plan"), [(3, "narrow"), (5, "wide")])
def test_all_windows_agree_with_lax(kernel_size, plan, window, monkeypatch):
    monkeypatch.setattr(depthwise_triton, "ROWS", 3)  # compiles in half the time
    assert_agree_with_lax((2, 9, 12, 24), kernel_size, window, plan=PLANS[plan])
    assert_agree_with_lax((1, 14, 7, 20), kernel_size, window, plan=PLANS[plan])


@pytest.mark.slow
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize(("size", "channels", "stride"), LAYERS)
def test_layers_of_mobilenetv2_agree_with_lax(size, channels, stride, plan):
    shape = (1 if size > 28 else 3, size, size, channels)
    assert_agree_with_lax(shape, 3, Window(stride, 1, "same"), plan=PLANS[plan])


@pytest.mark.slow
@pytest.mark.parametrize(("channels", "kernel_size"), [(1, 3), (3, 3), (20, 3), (40, 5), (144, 7)])
def test_any_number_of_channels(channels, kernel_size):
    assert_agree_with_lax((2, 8, 7, channels), kernel_size, Window())


@pytest.mark.slow
@pytest.mark.parametrize("stride", [1, 2])
def test_half_precision_is_rounded_once(stride):
    assert_agree_with_lax((2, 14, 14, 40), 3, Window(stride), jnp.bfloat16, 2**-8)


@pytest.mark.slow
def test_sums_over_several_tasks():
    plan = Plan(warps=2, sums=50, columns=2, ahead=2, programs=6)
    assert_agree_with_lax((7, 15, 15, 72), 3, Window(1, 1, "same"), plan=plan)


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")
def test_kernels_are_lowered_for_gpus():
    for text in lower(112, 96, 3, Window(2)):
        assert "__gpu$xla.gpu.triton" in text


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_layers_of_mobilenetv2_are_lowered_for_gpus(dtype):
    for size, channels, stride in LAYERS:
        for text in lower(size, channels, 3, Window(stride), dtype=dtype):
            assert "__gpu$xla.gpu.triton" in text


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")
def test_all_windows_are_lowered_for_gpus():
    for window, (kernel_size, channels) in itertools.product(WINDOWS, [(3, 24), (5, 120), (7, 20)]):
        for text in lower(13, channels, kernel_size, window, batch=3):
            assert "__gpu$xla.gpu.triton" in text
