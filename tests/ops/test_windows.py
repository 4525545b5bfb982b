"""Windows and mirror images are looks at one image: what doesn't depend on the look doesn't change."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mnv2_jax.ops.windows import in_windows, starts, with_mirror

STRIDE = 4


def pointwise(images):
    """A network that sees of each position its own pixels alone."""
    return jnp.stack([images[:, ::STRIDE, ::STRIDE].sum(-1), images[:, ::STRIDE, ::STRIDE, 0]], -1)


def images_of(height, width):
    return jnp.asarray(np.random.default_rng(0).normal(size=(2, height, width, 3)), jnp.float32)


@pytest.mark.parametrize("side", [32, 36, 40, 64, 128, 260])
@pytest.mark.parametrize("window", [8, 20, 32])
def test_windows_cover_a_side_and_share_a_third_with_their_neighbours(side, window):
    places = starts(side, window, STRIDE)
    assert (places[0], places[-1] + window) == (0, side)
    assert all(place % STRIDE == 0 for place in places)
    assert all(0 < after - before <= max(2 * window / 3, STRIDE) for before, after in itertools.pairwise(places))


@pytest.mark.parametrize("extra", [0, 1])
@pytest.mark.parametrize("window", [(16, 16), (32, 8), (64, 64)])
def test_a_pointwise_network_gives_the_same_in_windows(window, extra):
    images = images_of(40 + extra, 56 + extra)
    window = tuple(side + extra for side in window)
    found = jax.jit(in_windows(pointwise, window, 2 * STRIDE, STRIDE))(images)
    np.testing.assert_allclose(found, pointwise(images), rtol=1e-6)


def test_where_windows_overlap_the_mean_of_their_logits_counts():
    images, calls = images_of(16, 24), []

    def network(images):
        calls.append(images.shape)
        return pointwise(images) * 0 + images.mean((1, 2, 3), keepdims=True)

    found = in_windows(network, (16, 16), STRIDE, STRIDE)(images)
    assert calls == [(2, 16, 16, 3)]
    left, right = images[:, :, :16].mean((1, 2, 3)), images[:, :, 8:].mean((1, 2, 3))
    np.testing.assert_allclose(
        found[:, 0, :, 0], np.stack([left] * 2 + [(left + right) / 2] * 2 + [right] * 2, 1), rtol=1e-5
    )


def test_the_mirror_image_has_the_mirrored_answer():
    def network(images):  # its answer leans to the left
        return jnp.cumsum(pointwise(images), axis=2)

    images = images_of(8, 16)
    both = with_mirror(network)
    own = both(images)
    np.testing.assert_allclose(both(images[:, :, ::-1]), own[:, :, ::-1], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(jnp.exp(own).sum(-1), 1, rtol=1e-5)
    mean = (jax.nn.softmax(network(images)) + jax.nn.softmax(network(images[:, :, ::-1]))[:, :, ::-1]) / 2
    np.testing.assert_allclose(jnp.exp(own), mean, rtol=1e-5)
