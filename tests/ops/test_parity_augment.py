"""Compares augmentation with torchvision's, timm's and Keras': results for equal draws, and distributions."""

import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mnv2_jax.ops import augment, losses, mixing
from mnv2_jax.ops.random import example_keys, stream_key

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch", reason="pip install .[parity]")

DRAWS = 4000
SIZE = (24, 40)


@pytest.fixture
def v2(operators):
    return pytest.importorskip("torchvision.transforms.v2", reason="pip install .[parity]")


@pytest.fixture
def timm_erasing(operators):
    return pytest.importorskip("timm.data.random_erasing", reason="pip install .[parity]").RandomErasing


@pytest.fixture
def keras():
    """Keras over JAX (see conftest.py)."""
    return pytest.importorskip("keras", reason="pip install .[parity]")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
    random.seed(0)


def keys(n):
    index = jnp.arange(n, dtype=jnp.int32)
    return example_keys(stream_key(0, "augment"), jnp.zeros_like(index), index)


def to_torch(images):
    return torch.from_numpy(np.moveaxis(np.asarray(images), -1, -3).copy())


def to_numpy(tensor):
    return np.moveaxis(tensor.numpy(), -3, -1)


def assert_same_mean(a, b):
    """Asserts that the means agree within four standard errors."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    error = (a.var() / len(a) + b.var() / len(b)) ** 0.5
    assert abs(a.mean() - b.mean()) < 4 * error, (a.mean(), b.mean(), error)


def assert_same_distribution(a, b):
    """Asserts that mean and spread agree."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    assert_same_mean(a, b)
    centre = np.concatenate([a, b]).mean()
    assert_same_mean((a - centre) ** 2, (b - centre) ** 2)


@pytest.mark.parametrize("strengths", [(0.4, 0.4, 0.4, 0.0), (0.8, 0.7, 1.5, 0.5), (0.0, 0.4, 0.0, 0.1)])
def test_color_jitter_is_torchvisions(strengths, v2):
    images = np.random.default_rng(0).random((64, 9, 11, 3)).astype(np.float32)
    images[0, :3] = 0.5
    actual = jax.jit(lambda k, x: augment.color_jitter(k, x, strengths))(keys(64), images)
    orders, factors = jax.vmap(lambda key: augment.draw_jitter(key, strengths))(keys(64))
    names = [f"{name}_factor" for name in ("brightness", "contrast", "saturation", "hue")]
    transform = v2.ColorJitter(*strengths)
    for image, result, order, factor_values in zip(images, actual, orders.tolist(), factors.tolist(), strict=True):
        drawn = {name: factor if x else None for name, factor, x in zip(names, factor_values, strengths, strict=True)}
        expected = transform.transform(to_torch(image), {"fn_idx": order, **drawn})
        np.testing.assert_allclose(result, to_numpy(expected), atol=1e-5)


def test_color_jitter_factors_are_drawn_as_torchvisions(v2):
    strengths = (0.4, 0.7, 1.5, 0.3)
    _, factors = jax.vmap(lambda key: augment.draw_jitter(key, strengths))(keys(DRAWS))
    transform = v2.ColorJitter(*strengths)
    their_draws = [transform.make_params([]) for _ in range(DRAWS)]
    for place, name in enumerate(("brightness", "contrast", "saturation", "hue")):
        assert_same_distribution(factors[:, place], [draw[f"{name}_factor"] for draw in their_draws])


def random_translation(keras):
    return keras.layers.RandomTranslation(0.25, 0.25, fill_mode="nearest", interpolation="bilinear", seed=0)


def test_a_shift_is_keras_for_the_same_draw(keras):
    images = np.random.default_rng(0).random((12, *SIZE, 3)).astype(np.float32)
    shifts = jax.vmap(lambda key: augment.draw_shift(key, *SIZE, 0.25))(keys(12)).at[0].set(jnp.asarray([3.0, -5.0]))
    with jax.numpy_rank_promotion("allow"):
        keras_draw = {"translations": shifts[:, ::-1], "input_shape": images.shape}
        expected = random_translation(keras).transform_images(images, keras_draw)
    actual = jax.vmap(augment.affine)(images, jnp.zeros(12), shifts)
    np.testing.assert_allclose(actual, expected, atol=1e-5)


def test_shifts_are_distributed_as_keras(keras):
    shifts = jax.vmap(lambda key: augment.draw_shift(key, *SIZE, 0.25))(keys(DRAWS))
    with jax.numpy_rank_promotion("allow"):
        their_draws = random_translation(keras).get_random_transformation(np.zeros((DRAWS, *SIZE, 1), np.float32))
    for place in (0, 1):
        assert_same_distribution(shifts[:, place], their_draws["translations"][:, 1 - place])


def erased_boxes(probability, area, fill):
    """Returns height, width, top and left of the erased boxes, [n, 4], and the share of images that have one."""
    ratio = augment._ERASE_RATIOS[fill]
    start, stop = jax.vmap(lambda key: augment.draw_erased(key, *SIZE, probability, area, ratio))(keys(DRAWS))
    boxes = np.concatenate([stop - start, start], axis=1)
    return boxes[boxes[:, 0] > 0], boxes[:, 0] > 0


@pytest.mark.parametrize("area", [(0.02, 0.33), (0.3, 0.9)])  # the second often doesn't fit
def test_erasing_is_distributed_as_torchvisions(area, v2):
    transform = v2.RandomErasing(p=0.5, scale=area)
    image, their_draws, used = torch.ones(3, *SIZE), [], []
    for _ in range(DRAWS):
        draw = transform.make_params([image])
        erases = draw["v"] is not None and float(torch.rand(1)) < transform.p
        used.append(erases)
        if erases:
            their_draws.append([draw["h"], draw["w"], draw["i"], draw["j"]])
    our_draws, ours_used = erased_boxes(0.5, area, "zero")
    their_draws = np.asarray(their_draws)
    assert_same_mean(ours_used, used)
    assert_same_distribution(our_draws[:, 0] * our_draws[:, 1], their_draws[:, 0] * their_draws[:, 1])
    assert_same_distribution(np.log(our_draws[:, 0] / our_draws[:, 1]), np.log(their_draws[:, 0] / their_draws[:, 1]))
    for place in (2, 3):
        assert_same_distribution(our_draws[:, place], their_draws[:, place])


def test_erasing_is_torchvisions_for_the_same_box(v2):
    images = np.random.default_rng(0).normal(size=(16, *SIZE, 3)).astype(np.float32)
    actual = augment.random_erasing(keys(16), jnp.asarray(images), 1.0, (0.1, 0.3), "zero")
    for image, result in zip(images, np.asarray(actual), strict=True):
        rows, columns = np.nonzero((result == 0).all(axis=-1))
        box = (rows.min(), columns.min(), np.ptp(rows) + 1, np.ptp(columns) + 1)
        expected = v2.functional.erase(to_torch(image), *map(int, box), torch.zeros(3, 1, 1))
        np.testing.assert_array_equal(result, to_numpy(expected))


def test_erasing_with_noise_is_distributed_as_timms(timm_erasing):
    area = (0.02, 1 / 3)
    transform = timm_erasing(probability=0.4, min_area=area[0], max_area=area[1], mode="pixel", device="cpu")
    their_images = np.stack([to_numpy(transform(torch.ones(3, *SIZE))) for _ in range(DRAWS)])
    ones = jnp.ones((DRAWS, *SIZE, 3))
    our_images = np.asarray(jax.jit(lambda k, x: augment.random_erasing(k, x, 0.4, area, "noise"))(keys(DRAWS), ones))
    areas = [(images != 1).all(axis=-1).sum(axis=(1, 2)) for images in (our_images, their_images)]
    assert_same_mean(areas[0] > 0, areas[1] > 0)
    assert_same_distribution(*(area[area > 0] for area in areas))
    heights = [(images != 1).any(axis=(2, 3)).sum(axis=1) for images in (our_images, their_images)]
    assert_same_distribution(*(height[height > 0] for height in heights))
    assert_same_distribution(*(images[images != 1][:20_000] for images in (our_images, their_images)))


NUM_CLASSES = 7


def mixed(key, **options):
    rng = np.random.default_rng(0)
    images = rng.random((8, *SIZE, 3)).astype(np.float32)
    labels = rng.integers(0, NUM_CLASSES, 8).astype(np.int32)
    weights, share = mixing.draw_weights(jax.random.key(key), *SIZE, **options)
    out = mixing.mix(jnp.asarray(images), mixing.partners(jnp.asarray(images), 8), weights)
    return images, labels, out, weights, share


@pytest.mark.parametrize("key", range(4))
@pytest.mark.parametrize("kind", ["MixUp", "CutMix"])
def test_mixing_is_torchvisions_with_its_labels_and_loss(kind, key, v2):
    alphas = dict(mixup_alpha=0.4, cutmix_alpha=0.0) if kind == "MixUp" else dict(mixup_alpha=0.0, cutmix_alpha=1.0)
    images, labels, out, weights, share = mixed(key, **alphas)
    transform, targets = getattr(v2, kind)(num_classes=NUM_CLASSES), torch.from_numpy(labels).long()
    cutmix_draw = {"labels": targets, "batch_size": 8, "lam": float(share), "lam_adjusted": float(share)}
    if kind == "CutMix":
        rows, columns = np.nonzero(np.asarray(weights) == 0)
        sides = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1) if len(rows) else (0, 0, 0, 0)
        cutmix_draw["box"] = tuple(map(int, sides))
    np.testing.assert_allclose(out, to_numpy(transform.transform(to_torch(images), cutmix_draw)), atol=1e-6)

    logits = np.random.default_rng(1).normal(size=(8, NUM_CLASSES)).astype(np.float32)
    soft = transform.transform(targets, cutmix_draw)
    expected = torch.nn.functional.cross_entropy(
        torch.from_numpy(logits), soft, label_smoothing=0.1, reduction="none"
    ).numpy()
    own_labels, other = (
        losses.softmax_cross_entropy(jnp.asarray(logits), x, 0.1)
        for x in (jnp.asarray(labels), mixing.partners(jnp.asarray(labels), 8))
    )
    np.testing.assert_allclose(share * own_labels + (1 - share) * other, expected, rtol=1e-5)


@pytest.mark.parametrize("alpha", [0.2, 1.0])
def test_shares_are_distributed_as_torchvisions(alpha, v2):
    image, split = torch.ones(2, 3, *SIZE), jax.random.split(jax.random.key(0), DRAWS)
    mixup, cutmix = v2.MixUp(alpha=alpha, num_classes=2), v2.CutMix(alpha=alpha, num_classes=2)
    expected_by_name = {
        "mixup_alpha": [mixup.make_params([image])["lam"] for _ in range(DRAWS)],
        "cutmix_alpha": [cutmix.make_params([image])["lam_adjusted"] for _ in range(DRAWS)],
    }
    for name, expected in expected_by_name.items():
        options = {"mixup_alpha": 0.0, "cutmix_alpha": 0.0} | {name: alpha}
        _, shares = jax.jit(jax.vmap(lambda key, o=options: mixing.draw_weights(key, *SIZE, **o)))(split)
        assert_same_distribution(shares, expected)
