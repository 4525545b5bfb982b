"""The augmentation of an image depends on its own key only."""

import colorsys
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage

from mnv2_jax.ops import augment
from mnv2_jax.ops.random import STREAMS, example_keys, stream_key

IMAGES = jnp.asarray(np.random.default_rng(0).integers(1, 256, (12, 10, 8, 3)), jnp.uint8)


def keys(seed=0, epoch=0, index=range(12)):
    index = jnp.asarray(index, jnp.int32)
    return example_keys(stream_key(seed, "augment"), jnp.full_like(index, epoch), index)


AUGMENTATIONS = {
    "flip": lambda k, x: augment.random_flip(k, x),
    "shift": lambda k, x: augment.random_shift(k, x, 3),
    "inception color": lambda k, x: augment.inception_color(k, augment.as_float(x)),
    "color jitter": lambda k, x: augment.color_jitter(k, augment.as_float(x), (0.4, 0.4, 0.4, 0.1)),
    "rotation": lambda k, x: augment.random_affine(k, k, augment.as_float(x), 30.0, 0.0),
    "translation": lambda k, x: augment.random_affine(k, k, augment.as_float(x), 0.0, 0.3),
    "erasing": lambda k, x: augment.random_erasing(k, augment.as_float(x), 0.9, (0.02, 0.33), "noise"),
}


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_an_image_is_treated_alike_in_any_batch(name):
    f = jax.jit(AUGMENTATIONS[name])
    whole = f(keys(), IMAGES)
    some = jnp.asarray([7, 2, 2, 11])
    np.testing.assert_allclose(f(keys(index=some), IMAGES[some]), whole[some], rtol=1e-6, atol=1e-6)


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
    shifts = set()
    for image in shifted:
        rows, columns = np.flatnonzero(image.any(axis=1)), np.flatnonzero(image.any(axis=0))
        assert image.sum() == len(rows) * len(columns)
        top, left = 6 - len(rows), 6 - len(columns)
        shifts.add((top if rows[0] else -top, left if columns[0] else -left))
    assert shifts == {(y, x) for y in range(-2, 3) for x in range(-2, 3)}


@pytest.mark.parametrize("factor", [0.5, 1.0, 1.5, 4.0])
def test_saturation_is_that_of_hsv(factor):
    images = np.random.default_rng(1).random((2, 4, 4, 3)).astype(np.float32)
    images[0, 0] = 0.3  # grey has no saturation to scale
    actual = augment.adjust_saturation(jnp.asarray(images), jnp.full((2, 1, 1, 1), factor))
    for pixel, result in zip(images.reshape(-1, 3), np.asarray(actual).reshape(-1, 3), strict=True):
        h, s, v = colorsys.rgb_to_hsv(*pixel.tolist())
        np.testing.assert_allclose(result, colorsys.hsv_to_rgb(h, min(s * factor, 1), v), atol=1e-6)


@pytest.mark.parametrize("name", ["inception color", "color jitter"])
def test_color_stays_in_range(name):
    out = jax.jit(AUGMENTATIONS[name])(keys(), IMAGES)
    assert out.min() >= 0
    assert out.max() <= 1


STRENGTHS = (0.4, 0.5, 1.5, 0.1)


def draw_jitter(strengths, n=12):
    """Draws orders [n, number of strengths above 0] and factors [n, 4]."""
    draw = jax.jit(jax.vmap(lambda key: augment.draw_jitter(key, strengths)))
    return map(np.asarray, draw(keys(index=range(n))))


def test_jitter_draws_every_order_and_factors_within_their_bounds():
    order, factors = draw_jitter(STRENGTHS, n=600)
    orders, counts = np.unique(order, axis=0, return_counts=True)
    assert sorted(map(tuple, orders.tolist())) == sorted(itertools.permutations(range(4)))
    assert counts.min() > 5
    low, high = [0.6, 0.5, 0, -0.1], [1.4, 1.5, 2.5, 0.1]
    assert (factors >= low).all()
    assert (factors <= high).all()
    np.testing.assert_allclose(factors.min(axis=0), low, atol=0.02)
    np.testing.assert_allclose(factors.max(axis=0), high, atol=0.02)


def test_jitter_leaves_out_what_is_0():
    images = augment.as_float(IMAGES)
    np.testing.assert_array_equal(augment.color_jitter(keys(), images, (0.0, 0.0, 0.0, 0.0)), images)


@pytest.mark.parametrize("place", [0, 1, 2])
def test_jitter_blends_with_black_with_the_mean_grey_and_with_the_grey_image(place):
    images, strengths = augment.as_float(IMAGES), tuple(0.6 * (at == place) for at in range(4))
    factor = list(draw_jitter(strengths))[1][:, place, None, None, None]
    grey = (np.asarray(images) @ [0.2989, 0.587, 0.114])[..., None]
    other = [0, grey.mean(axis=(1, 2), keepdims=True), grey][place]
    expected = np.clip(np.asarray(images) * factor + other * (1 - factor), 0, 1)
    actual = jax.jit(augment.color_jitter, static_argnums=2)(keys(), images, strengths)
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)


def test_hue_is_that_of_hsv():
    images = np.random.default_rng(1).random((12, 3, 3, 3)).astype(np.float32)
    images[:, 0, 0] = 0.3
    images[:, 0, 1] = [[0.7, 0.7, 0.2], [0.2, 0.7, 0.7]] * 6  # two channels share the maximum
    strengths = (0.0, 0.0, 0.0, 0.5)
    _, factors = draw_jitter(strengths)
    actual = np.asarray(jax.jit(augment.color_jitter, static_argnums=2)(keys(), images, strengths))
    for turns, image, result in zip(factors[:, 3].tolist(), images, actual, strict=True):
        for pixel, shown in zip(image.reshape(-1, 3), result.reshape(-1, 3), strict=True):
            h, s, v = colorsys.rgb_to_hsv(*pixel.tolist())
            np.testing.assert_allclose(shown, colorsys.hsv_to_rgb((h + turns) % 1, s, v), atol=2e-6)


affine = jax.jit(augment.affine)


@pytest.mark.parametrize("shape", [(17, 23), (8, 8), (1, 5)])
@pytest.mark.parametrize("degrees", [0.0, 12.0, -75.0, 180.0])
@pytest.mark.parametrize("shift", [(0.0, 0.0), (2.3, -0.75)])
def test_a_turn_and_a_shift_are_scipys_in_one_resampling(shape, degrees, shift):
    image = np.random.default_rng(0).random((*shape, 3)).astype(np.float32)
    cos, sin = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    matrix, centre = np.array([[cos, sin], [-sin, cos]]), (np.array(shape) - 1) / 2
    offset = centre - matrix @ (centre + shift)
    expected = [
        ndimage.affine_transform(image[..., c].astype(np.float64), matrix, offset, order=1, mode="nearest")
        for c in range(3)
    ]
    actual = affine(image, jnp.radians(degrees), jnp.asarray(shift))
    np.testing.assert_allclose(actual, np.stack(expected, axis=-1), atol=2e-5)


def test_a_quarter_turn_is_counter_clockwise():
    image = jnp.asarray(np.random.default_rng(0).random((6, 6, 3)), jnp.float32)
    np.testing.assert_allclose(affine(image, jnp.pi / 2, jnp.zeros(2)), np.rot90(image), atol=1e-5)


def test_rotations_are_spread_over_both_directions():
    step = jnp.zeros((400, 3, 33, 1)).at[:, 1, 16:].set(1)  # the row in the middle, from the centre on
    many = keys(index=range(400))
    lit = augment.random_affine(many, many, step, 2.0, 0.0)[:, 0, 32, 0]  # 16 px · sin(angle), if upwards
    assert 150 < (lit > 0.001).sum() < 250
    assert 0.5 < lit.max() <= 16 * np.sin(np.radians(2.0)) + 1e-5


@pytest.mark.parametrize("shift", [(0, 0), (3, -5), (-4, 1), (9, 20)])
def test_a_shift_by_whole_pixels_is_exact_and_repeats_the_edge(shift):
    image = np.random.default_rng(0).random((9, 13, 3)).astype(np.float32)
    rows, columns = (np.clip(np.arange(n) - s, 0, n - 1) for n, s in zip(image.shape, shift, strict=False))
    actual = affine(image, jnp.float32(0), jnp.asarray(shift, jnp.float32))
    np.testing.assert_array_equal(actual, image[rows][:, columns])
    padded = np.pad(image, ((20, 20), (20, 20), (0, 0)), mode="edge")
    top, left = 20 - shift[0], 20 - shift[1]
    np.testing.assert_array_equal(actual, padded[top : top + 9, left : left + 13])


def test_shifts_are_uniform_and_each_axis_has_its_own():
    height, width, n = 24, 40, 1000
    shifts = np.asarray(jax.jit(jax.vmap(lambda k: augment.draw_shift(k, height, width, 0.25)))(keys(index=range(n))))
    shares = shifts / [height, width]
    assert (np.abs(shares) <= 0.25).all()
    assert len(np.unique(shares)) > 1.99 * n
    for share in shares.T:
        counts, _ = np.histogram(share, bins=5, range=(-0.25, 0.25))
        assert abs(counts - n / 5).max() < 4 * (n * 0.2 * 0.8) ** 0.5
    assert abs(np.corrcoef(shares.T)[0, 1]) < 4 / n**0.5


@pytest.mark.parametrize("fraction", [0.0, 0.3])
def test_angles_and_shifts_have_keys_of_their_own(fraction):
    turn, images = keys(), augment.as_float(IMAGES)
    angles = jax.vmap(lambda key: jax.random.uniform(key, (), jnp.float32, -jnp.pi / 6, jnp.pi / 6))(turn)
    shifts = jax.vmap(lambda key: augment.draw_shift(key, 10, 8, fraction))(keys(seed=1))
    actual = jax.jit(lambda *args: augment.random_affine(*args, 30.0, fraction))(turn, keys(seed=1), images)
    expected = jax.jit(jax.vmap(augment.affine))(images, angles, shifts)
    np.testing.assert_allclose(actual, expected, atol=2e-6)  # the two programs may round differently
    other = jax.jit(lambda *args: augment.random_affine(*args, 30.0, fraction))(turn, keys(seed=2), images)
    assert np.array_equal(actual, other) == (fraction == 0)


def erase_ones(probability, area, fill="zero", n=400):
    erase = jax.jit(lambda k, x: augment.random_erasing(k, x, probability, area, fill))
    return np.asarray(erase(keys(index=range(n)), jnp.ones((n, 12, 20, 3))))


def erased(*args):
    """Marks the pixels of images of ones that were erased."""
    return (erase_ones(*args) != 1).all(axis=-1)


@pytest.mark.parametrize("fill", ["zero", "noise"])
def test_what_is_erased_is_a_rectangle_of_the_asked_area_anywhere(fill):
    mask = erased(1.0, (0.1, 0.3), fill)
    rows, columns = mask.any(axis=2), mask.any(axis=1)
    np.testing.assert_array_equal(mask, rows[:, :, None] & columns[:, None, :])
    for side in (rows, columns):
        assert (
            np.abs(np.diff(np.pad(side, ((0, 0), (1, 1))).astype(int))).sum(axis=1) == 2
        ).all()  # the rectangle is in one piece
        assert side.any(axis=0).all()
    shares = mask.mean(axis=(1, 2))
    assert 0.07 < shares.min() < 0.12
    assert 0.27 < shares.max() < 0.33


@pytest.mark.parametrize("fill", ["zero", "noise"])
def test_what_is_erased_is_as_often_tall_as_wide(fill):
    images = jnp.ones((500, 96, 96, 1))
    erase = jax.jit(lambda k, x: augment.random_erasing(k, x, 1.0, (0.05, 0.1), fill))
    mask = np.asarray(erase(keys(index=range(500)), images) != 1)[..., 0]
    logs = np.log(mask.any(axis=2).sum(axis=1) / mask.any(axis=1).sum(axis=1))
    # Uniform from log 0.3 to log 3.3; a side of 12 px or more is rounded to whole pixels.
    assert np.abs([logs.min() - np.log(0.3), logs.max() - np.log(3.3)]).max() < 0.08
    assert abs(logs.mean()) < 4 * logs.std() / 500**0.5
    assert logs.std() == pytest.approx(np.log(3.3 / 0.3) / 12**0.5, rel=0.08)


def test_erasing_happens_with_its_probability_or_where_it_fits():
    def is_erased(key, probability, area):
        start, stop = augment.draw_erased(key, 12, 20, probability, area, (0.3, 3.3))
        return (stop > start).all()

    count = jax.jit(lambda *options: jax.vmap(lambda key: is_erased(key, *options))(keys(index=range(400))).sum())
    assert count(0.0, (0.1, 0.3)) == 0
    assert count(1.0, (0.1, 0.3)) == 400
    assert count(1.0, (1.0, 1.0)) == 0
    assert 60 < count(0.25, (0.1, 0.3)) < 140


def test_noise_is_normal_and_no_two_images_share_it():
    out = erase_ones(1.0, (0.1, 0.3), "noise")
    noise = out[out != 1]
    assert abs(noise.mean()) < 4 / len(noise) ** 0.5
    assert abs(noise.var() - 1) < 4 * (2 / len(noise)) ** 0.5
    assert len(np.unique(noise)) > 0.99 * len(noise)


def test_normalise():
    out = augment.normalise(IMAGES, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
    expected = (np.asarray(IMAGES) / 255 - np.array([0.5, 0.4, 0.3])) / np.array([0.2, 0.3, 0.4])
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-6)
    assert out.dtype == jnp.float32
    as_float = augment.normalise(IMAGES.astype(jnp.float32) / 255, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
    np.testing.assert_allclose(out, as_float, atol=1e-6)
