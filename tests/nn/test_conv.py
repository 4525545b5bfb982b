import itertools

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from mnv2_jax.nn import conv, forms
from mnv2_jax.nn.window import Window

WINDOWS = [Window(*options) for options in itertools.product((1, 2), (1, 2), ("same", "symmetric"))]
KINDS = {
    # tests/nn/test_depthwise_triton.py tests Triton's kernels, which run on GPUs only, or interpreted.
    "depthwise": {name: form for name, form in forms.DEPTHWISE.items() if name != "triton"},
    "pointwise": forms.POINTWISE,
    "image": forms.IMAGE,
}


def arrays(kind, size, kernel_size, dtype, seed=0):
    """Draws x of height size and width size + 1, and a kernel."""
    rng = np.random.default_rng(seed)
    i, o = {"depthwise": (1, 5), "pointwise": (5, 6), "image": (3, 6)}[kind]
    x = rng.standard_normal((4, size, size + 1, 5 if kind == "depthwise" else i))
    return jnp.asarray(x, dtype), jnp.asarray(rng.standard_normal((kernel_size, kernel_size, i, o)), dtype)


def test_a_shape_that_the_signature_denies_is_refused():
    x, kernel = arrays("pointwise", 4, 1, jnp.float32)
    with pytest.raises(jaxtyping.TypeCheckError, match="'kernel'"):
        conv.conv(x, kernel[0])


def value_and_gradients(form, x, kernel, window):
    """Returns the output, and the gradients of x and the kernel for a random cotangent."""
    y, pull = jax.vjp(lambda x, kernel: form(x, kernel, window), x, kernel)
    dy = jnp.asarray(np.random.default_rng(1).standard_normal(y.shape), y.dtype)
    return y, *pull(dy)


def assert_forms_agree(kind, size, kernel_size, dtype, windows, tolerance):
    x, kernel = arrays(kind, size, kernel_size, dtype)
    in_all = jax.jit(
        lambda x, k: {name: [value_and_gradients(form, x, k, w) for w in windows] for name, form in KINDS[kind].items()}
    )
    results = in_all(x, kernel)
    expected_results = results.pop("lax")
    for name, form_results in results.items():
        for window, result, other in zip(windows, form_results, expected_results, strict=True):
            for array_name, a, b in zip(("y", "dx", "dkernel"), result, other, strict=True):
                assert (a.shape, a.dtype) == (b.shape, b.dtype), (name, window, array_name)
                a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
                assert np.abs(a - b).max() <= tolerance * np.abs(b).max(), (name, window, array_name)


@pytest.mark.parametrize(("kernel_size", "size"), [(3, 6), (5, 7)])
def test_depthwise_forms_agree_with_gradients(kernel_size, size, x64):
    assert_forms_agree("depthwise", size, kernel_size, jnp.float64, WINDOWS, 1e-13)


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 1e-5), (jnp.bfloat16, 1e-2)])
def test_depthwise_forms_agree_in_other_types(dtype, tolerance):
    windows = [Window(1, 1, "same"), Window(2, 1, "symmetric")]
    assert_forms_agree("depthwise", 6, 3, dtype, windows, tolerance)


@pytest.mark.parametrize(("kind", "kernel_size"), [("pointwise", 1), ("image", 3)])
def test_matrix_forms_agree_with_gradients(kind, kernel_size, x64):
    assert_forms_agree(kind, 7, kernel_size, jnp.float64, WINDOWS[::3], 1e-13)


@pytest.mark.parametrize(("kernel_size", "size"), [(3, 6), (3, 7), (5, 7)])
def test_depthwise_forms_agree_where_the_padding_is_trailing(kernel_size, size, x64):
    windows = [Window(2, 1, "trailing"), Window(2, 2, "trailing")]
    assert_forms_agree("depthwise", size, kernel_size, jnp.float64, windows, 1e-13)


@pytest.mark.parametrize("kernel_size", [3, 5])
def test_trailing_padding_is_same_at_even_sizes_and_shifts_odd_ones(kernel_size):
    x, kernel = arrays("depthwise", 6, kernel_size, jnp.float32)  # 6 rows, 7 columns
    run = {padding: conv.depthwise_conv(x, kernel, stride=2, padding=padding) for padding in ("same", "trailing")}
    assert (run["same"].shape, run["trailing"].shape) == ((4, 3, 4, 5), (4, 3, 3, 5))
    even = {p: conv.depthwise_conv(x[:, :, :6], kernel, stride=2, padding=p) for p in run}
    np.testing.assert_array_equal(even["same"], even["trailing"])
    # Without a stride it is "symmetric"; with a stride each window begins one column later.
    dense = conv.depthwise_conv(x, kernel, padding="symmetric")
    np.testing.assert_allclose(run["trailing"], dense[:, 1::2, 1::2], atol=1e-5)
    still = [conv.depthwise_conv(x, kernel, padding=padding) for padding in ("symmetric", "trailing")]
    np.testing.assert_array_equal(*still)


def test_bfloat16_is_summed_in_float32():
    # In bfloat16, 256 + 1 is 256 again.
    kernel = jnp.ones((3, 3, 1, 1), jnp.bfloat16).at[0, 0].set(256)
    assert conv.depthwise_conv(jnp.ones((1, 3, 3, 1), jnp.bfloat16), kernel)[0, 1, 1, 0] == 264
    x = jnp.ones((1, 32, 32, 1), jnp.bfloat16)
    gradient = jax.grad(lambda k: conv.depthwise_conv(x, k).sum())(jnp.ones((1, 1, 1, 1), jnp.bfloat16))
    assert gradient[0, 0, 0, 0] == 1024


@pytest.mark.parametrize(
    ("layer", "shape"), [(conv.depthwise_conv, (3, 3, 1, 8)), (conv.conv, (1, 1, 8, 8)), (conv.conv, (3, 3, 3, 8))]
)
def test_the_form_is_that_of_the_platform_lowered_for(layer, shape):
    x = jnp.zeros((2, 6, 6, 3 if shape[2] == 3 else 8))
    gradient = jax.jit(jax.grad(lambda x, k: layer(x, k).sum(), (0, 1))).trace(x, jnp.zeros(shape))
    assert "stablehlo.convolution" not in gradient.lower(lowering_platforms=("cpu",)).as_text()
    for platform in ("tpu", "cuda"):
        assert "stablehlo.convolution" in gradient.lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize("kind", ["depthwise", "pointwise", "image"])
def test_a_form_that_is_named_is_taken_on_every_platform(kind):
    x, kernel = arrays(kind, 6, 1 if kind == "pointwise" else 3, jnp.float32)
    layer = conv.depthwise_conv if kind == "depthwise" else conv.conv
    for name in KINDS[kind]:
        named = forms.Forms(**{kind: name})
        traced = jax.jit(jax.grad(lambda x, k, named=named: layer(x, k, forms=named).sum(), (0, 1))).trace(x, kernel)
        for platform in ("cpu", "cuda"):
            lowered = traced.lower(lowering_platforms=(platform,)).as_text()
            assert ("stablehlo.convolution" in lowered) == (name == "lax"), (name, platform)


@pytest.mark.parametrize(
    ("size", "kernel", "window", "expected"),
    [
        (224, 3, Window(2, 1, "same"), (0, 1)),  # an even size: all the padding comes after
        (225, 3, Window(2, 1, "same"), (1, 1)),
        (224, 3, Window(2, 1, "symmetric"), (1, 1)),
        (14, 5, Window(1, 2, "same"), (4, 4)),
        (14, 5, Window(1, 2, "symmetric"), (4, 4)),
        (14, 1, Window(2, 1, "same"), (0, 0)),
        (224, 3, Window(2, 1, "trailing"), (0, 1)),
        (225, 3, Window(2, 1, "trailing"), (0, 1)),  # 112 outputs remain, not 113
        (225, 5, Window(2, 1, "trailing"), (1, 2)),
        (225, 3, Window(1, 1, "trailing"), (1, 1)),
    ],
)
def test_padding(size, kernel, window, expected):
    assert window.pad(size, kernel) == expected


@pytest.mark.parametrize(("size", "dilation"), [((5, 9), 6), ((4, 3), 4), ((13, 8), 6), ((7, 7), 3)])
def test_taps_beyond_the_map_change_nothing(size, dilation, x64):
    """DeepLab's rates reach beyond small maps, where only the taps near the centre meet pixels."""
    keys = jax.random.split(jax.random.key(0), 2)
    x, kernel = jax.random.normal(keys[0], (2, *size, 5)), jax.random.normal(keys[1], (3, 3, 5, 4))

    def whole(x, kernel):
        return forms.LAX.value(x, kernel, Window(1, dilation, "same"))

    def ours(x, kernel):
        return conv.conv(x, kernel, dilation=dilation)

    kept = conv.within_reach(kernel, size, dilation).shape[:2]
    assert kept == tuple(1 if dilation >= side else 3 for side in size)
    for f in (lambda g: g, lambda g: jax.grad(lambda *args: jnp.sin(g(*args)).sum(), (0, 1))):
        for one, other in zip(jax.tree.leaves(f(ours)(x, kernel)), jax.tree.leaves(f(whole)(x, kernel)), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-12, atol=1e-12)
