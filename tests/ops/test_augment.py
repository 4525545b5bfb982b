"""What is done to an image follows from its own key."""

import colorsys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mnv2_jax.ops import augment
from mnv2_jax.ops.random import STREAMS, example_keys, stream_key

IMAGES = jnp.asarray(np.random.default_rng(0).integers(1, 256, (12, 10, 8, 3)), jnp.uint8)


def keys(seed=0, epoch=0, index=range(12)):
    index = jnp.asarray(index, jnp.int32)
    return example_keys(stream_key(seed, "augment"), jnp.full_like(index, epoch), index)


AUGMENTATIONS = {
    "flip": lambda k, x: augment.random_flip(k, x),
    "shift": lambda k, x: augment.random_shift(k, x, 3),
    "color": lambda k, x: augment.inception_color(k, x.astype(jnp.float32) / 255),
}


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_an_image_is_treated_alike_in_any_batch(name):
    f = jax.jit(AUGMENTATIONS[name])
    whole = f(keys(), IMAGES)
    some = jnp.asarray([7, 2, 2, 11])
    np.testing.assert_allclose(f(keys(index=some), IMAGES[some]), whole[some], rtol=1e-6)


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_epoch_and_seed_change_the_treatment(name):
    f = jax.jit(AUGMENTATIONS[name])
    assert not np.array_equal(f(keys(), IMAGES), f(keys(epoch=1), IMAGES))
    assert not np.array_equal(f(keys(), IMAGES), f(keys(seed=1), IMAGES))


def test_streams_have_keys_of_their_own():
    assert len({str(jax.random.key_data(stream_key(0, name))) for name in STREAMS}) == len(STREAMS)


def test_flip_mirrors_about_half():
    many = jnp.tile(IMAGES[:1], (400, 1, 1, 1))
    flipped = augment.random_flip(keys(index=range(400)), many)
    is_same = (flipped == many).all(axis=(1, 2, 3))
    is_mirror = (flipped == many[:, :, ::-1]).all(axis=(1, 2, 3))
    assert (is_same ^ is_mirror).all()
    assert 150 < is_same.sum() < 250


def test_shift_moves_whole_pixels_over_zeros_and_reaches_every_corner():
    ones = jnp.ones((600, 6, 6, 1), jnp.uint8)
    shifted = np.asarray(augment.random_shift(keys(index=range(600)), ones, 2))[..., 0]
    seen = set()
    for image in shifted:
        rows, columns = np.flatnonzero(image.any(axis=1)), np.flatnonzero(image.any(axis=0))
        assert image.sum() == len(rows) * len(columns)
        top, left = 6 - len(rows), 6 - len(columns)
        seen.add((top if rows[0] else -top, left if columns[0] else -left))
    assert seen == {(y, x) for y in range(-2, 3) for x in range(-2, 3)}


@pytest.mark.parametrize("factor", [0.5, 1.0, 1.5, 4.0])
def test_saturation_is_that_of_hsv(factor):
    images = np.random.default_rng(1).random((2, 4, 4, 3)).astype(np.float32)
    images[0, 0] = 0.3  # grey has no saturation to scale
    found = augment.adjust_saturation(jnp.asarray(images), jnp.full((2, 1, 1, 1), factor))
    for pixel, result in zip(images.reshape(-1, 3), np.asarray(found).reshape(-1, 3), strict=True):
        h, s, v = colorsys.rgb_to_hsv(*pixel.tolist())
        np.testing.assert_allclose(result, colorsys.hsv_to_rgb(h, min(s * factor, 1), v), atol=1e-6)


def test_color_stays_in_range():
    out = augment.inception_color(keys(), IMAGES.astype(jnp.float32) / 255)
    assert out.min() >= 0
    assert out.max() <= 1


def test_normalise():
    out = augment.normalise(IMAGES, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
    expected = (np.asarray(IMAGES) / 255 - np.array([0.5, 0.4, 0.3])) / np.array([0.2, 0.3, 0.4])
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-6)
    assert out.dtype == jnp.float32
    as_float = augment.normalise(IMAGES.astype(jnp.float32) / 255, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
    np.testing.assert_allclose(out, as_float, atol=1e-6)
