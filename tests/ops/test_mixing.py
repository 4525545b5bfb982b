"""A batch is mixed within its groups, with one draw; pixels that aren't mixed stay the same to the bit."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mnv2_jax.ops import mixing

SIZE = (12, 20)
OPTIONS = {
    "mixup": dict(mixup_alpha=0.2, cutmix_alpha=0.0),
    "cutmix": dict(mixup_alpha=0.0, cutmix_alpha=1.0),
    "both": dict(mixup_alpha=0.2, cutmix_alpha=1.0, probability=0.8, cutmix_share=0.25),
}


@functools.cache
def drawn(name):
    """Draws weights [n, h, w] and shares [n]."""
    draw = jax.jit(jax.vmap(lambda key: mixing.draw_weights(key, *SIZE, **OPTIONS[name])))
    return jax.device_get(draw(jax.random.split(jax.random.key(0), 2000)))


@pytest.mark.parametrize("name", OPTIONS)
def test_the_share_is_the_mean_weight(name):
    weights, shares = drawn(name)
    np.testing.assert_allclose(shares, weights.mean(axis=(1, 2)), atol=1e-6)
    assert weights.min() >= 0
    assert weights.max() <= 1


def test_mixup_shares_follow_the_beta_distribution():
    weights, shares = drawn("mixup")
    assert np.ptp(weights, axis=(1, 2)).max() == 0
    variance = 1 / (4 * (2 * 0.2 + 1))
    assert abs(shares.mean() - 0.5) < 4 * (variance / len(shares)) ** 0.5
    assert shares.var() == pytest.approx(variance, rel=0.05)


def test_cutmix_cuts_one_rectangle_of_the_images_aspect():
    weights, _ = drawn("cutmix")
    assert set(np.unique(weights)) == {0, 1}
    rows, columns = (weights == 0).any(axis=2), (weights == 0).any(axis=1)
    np.testing.assert_array_equal(weights == 0, rows[:, :, None] & columns[:, None, :])
    heights, widths = rows.sum(axis=1), columns.sum(axis=1)
    inner = ~(rows[:, 0] | rows[:, -1] | columns[:, 0] | columns[:, -1]) & (heights > 0) & (widths > 0)
    assert inner.sum() > 100
    # Each half is rounded down to whole pixels by itself.
    assert (np.abs(heights[inner] / 12 - widths[inner] / 20) < 2 / 12).all()
    assert rows.any(axis=0).all()
    assert columns.any(axis=0).all()
    # It is empty where half its height, 6 px times the root of a share that is uniform, is less than a pixel.
    assert (weights == 1).all(axis=(1, 2)).mean() == pytest.approx(1 / 36, abs=0.015)


def test_probability_and_the_share_of_cutmix():
    weights, shares = drawn("both")
    cut = np.ptp(weights, axis=(1, 2)) > 0
    blended = ~cut & (shares < 1 - 1e-6)
    # Some rectangles are empty, and Beta(0.2, 0.2) comes within 1e-6 of 1 in one of 33 draws.
    assert cut.mean() == pytest.approx(0.8 * 0.25, abs=0.04)
    assert blended.mean() == pytest.approx(0.8 * 0.75 * 32 / 33, abs=0.04)
    assert (shares == 1).mean() == pytest.approx(0.2, abs=0.06)


def test_partners_stand_in_the_same_group():
    rows = jnp.arange(12)
    partner_of = np.asarray(mixing.partners(rows, 4))
    assert (partner_of // 4 == np.arange(12) // 4).all()
    assert sorted(partner_of.tolist()) == list(range(12))
    assert (partner_of != np.arange(12)).all()
    images = jnp.asarray(np.random.default_rng(0).random((12, 3, 2, 1)))
    np.testing.assert_array_equal(mixing.partners(images, 4), images[partner_of])


def test_weights_of_0_and_1_take_pixels_as_they_are():
    rng = np.random.default_rng(0)
    a, b = jnp.asarray(rng.normal(size=(2, 4, *SIZE, 3)), jnp.float32)
    weights = jnp.asarray(rng.integers(0, 2, SIZE), jnp.float32)
    expected = np.where(weights[None, :, :, None] == 1, a, b)
    np.testing.assert_array_equal(jax.jit(mixing.mix)(a, b, weights), expected)
    np.testing.assert_allclose(mixing.mix(a, b, jnp.full(SIZE, 0.25)), 0.25 * a + 0.75 * b, rtol=1e-5, atol=1e-6)


def test_the_larger_share_has_the_label():
    labels, partners = jnp.asarray([1, 2]), jnp.asarray([3, 4])
    for share, expected in ((0.7, [1, 2]), (0.5, [1, 2]), (0.3, [3, 4])):
        assert mixing.Targets(labels, partners, jnp.float32(share)).larger.tolist() == expected
    assert mixing.Targets(labels).larger is labels
