"""Augmentation policies: what is drawn, and every operation by its formula."""

import dataclasses

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_image

from mnv2_jax.config import AugmentConfig
from mnv2_jax.data.policies import apply_policy, check_policy, draw_policy, tables
from mnv2_jax.data.policies.operations import PILLOW, TENSORFLOW, Canvas
from mnv2_jax.errors import UserError

POLICIES = {
    "autoaugment": tables.AUTOAUGMENT,
    "autoaugment_tf": tables.AUTOAUGMENT_TF,
    "randaugment": tables.RANDAUGMENT,
    "randaugment_timm": tables.RANDAUGMENT_TIMM,
    "randaugment_tf": tables.RANDAUGMENT_TF,
    "trivialaugment": tables.TRIVIALAUGMENT,
}
PHOTO = np.ascontiguousarray(load_sample_image("flower.jpg")[150:197, 250:313])
GRID = np.repeat(np.arange(35, dtype=np.uint8).reshape(5, 7, 1), 3, axis=-1)


def applied(operations, name, argument, image=PHOTO, fill=(9, 8, 7)):
    canvas = Canvas(fill=fill, filters=(Image.Resampling.NEAREST,), rng=np.random.default_rng(0))
    result = operations[name](image, argument, canvas)
    assert result.dtype == np.uint8
    assert result.shape == image.shape
    return result


def augmented(augment, seed, image=PHOTO):
    return apply_policy(image, augment, np.random.default_rng((seed, 0)))


# --- the policies -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", POLICIES)
def test_an_image_follows_from_its_generator(policy):
    augment = AugmentConfig(policy=policy, policy_magnitude_std=0.5)
    before = PHOTO.copy()
    first = [augmented(augment, seed) for seed in range(40)]
    for seed, image in enumerate(first):
        np.testing.assert_array_equal(image, augmented(augment, seed))
    assert len({image.tobytes() for image in first}) > 20
    np.testing.assert_array_equal(PHOTO, before)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 2), (2, 9), (31, 17), (64, 64)])
def test_any_size_stays_as_it_is(policy, height, width):
    image = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    augment = AugmentConfig(policy=policy, policy_layers=6)
    for seed in range(8):
        result = augmented(augment, seed, image)
        assert result.dtype == np.uint8
        assert result.shape == (height, width, 3)


def test_no_policy_leaves_the_image():
    assert augmented(AugmentConfig(), 0) is PHOTO


def test_every_operation_of_a_policy_exists():
    for policy, scales in POLICIES.items():
        operations = TENSORFLOW if policy.endswith("tf") else PILLOW
        assert set(scales) <= set(operations)
    assert {name for pair in tables.IMAGENET for name, _, _ in pair} <= set(tables.AUTOAUGMENT)
    assert {name for pair in tables.V0 for name, _, _ in pair} <= set(tables.AUTOAUGMENT_TF)
    assert len(tables.IMAGENET) == len(tables.V0) == 25


@pytest.mark.parametrize("policy", ["randaugment", "randaugment_timm", "randaugment_tf"])
def test_options_of_randaugment(policy):
    def steps(**options):
        augment = AugmentConfig(policy=policy, **options)
        return [step for seed in range(200) for step in draw_policy(augment, 30, 40, np.random.default_rng(seed))]

    assert len(steps(policy_layers=5)) == 1000
    assert {name for name, _ in steps()} == set(POLICIES[policy])
    assert "Rotate" not in {name for name, _ in steps(policy_excluded=("Rotate",))}
    assert {abs(angle) for name, angle in steps(policy_magnitude=0) if name == "Rotate"} == {0.0}
    if policy != "randaugment":
        assert not steps(policy_probability=0.0)
        assert 120 < len(steps(policy_probability=0.4)) < 200


def test_magnitudes_of_timm_are_spread_and_bounded():
    def angles(**options):
        augment = AugmentConfig(policy="randaugment_timm", policy_layers=50, **options)
        steps = [step for seed in range(40) for step in draw_policy(augment, 30, 40, np.random.default_rng(seed))]
        return np.array([abs(angle) for name, angle in steps if name == "Rotate"])

    np.testing.assert_allclose(angles(policy_magnitude=9.0), 27.0)
    noisy = angles(policy_magnitude=5.0, policy_magnitude_std=0.5)
    assert 14.4 < noisy.mean() < 15.6
    assert 1.0 < noisy.std() < 2.0  # 0.5 of 10 of 30 degrees
    assert angles(policy_magnitude=10.0, policy_magnitude_std=3.0).max() == 30.0
    uniform = angles(policy_magnitude=8.0, policy_magnitude_std=101.0)
    assert uniform.min() < 4.0
    assert 22.0 < uniform.max() < 24.0


def test_timm_fills_with_the_mean_of_the_data():
    white = np.full((40, 40, 3), 255, np.uint8)
    augment = AugmentConfig(
        policy="randaugment_timm", policy_excluded=tuple(tables.RANDAUGMENT_TIMM.keys() - {"ShearX"})
    )
    found = apply_policy(white, augment, np.random.default_rng(0), mean=(0.5, 0.1, 1.0))
    assert {tuple(pixel) for pixel in found[-1].tolist()} >= {(128, 26, 255)}


TF_STRONGEST = dict(ShearX=0.3, Rotate=30, Posterize=4, Solarize=256, SolarizeAdd=110, Color=1.9, Contrast=1.9)
STRONGEST = {
    # transforms/autoaugment.py: _augmentation_space, for images of 331 px.
    "autoaugment": dict(ShearY=0.3, TranslateX=150, Rotate=30, Contrast=1.9, Posterize=4, Solarize=0),
    "randaugment": dict(ShearX=0.3, TranslateY=150, Rotate=30, Sharpness=1.9, Posterize=4, Solarize=0),
    "trivialaugment": dict(ShearX=0.99, TranslateX=32, Rotate=135, Color=1.99, Posterize=2, Solarize=0),
    # auto_augment.py of timm and augment.py of TF model garden, translate_const and cutout_const of its configs.
    "randaugment_timm": TF_STRONGEST | dict(TranslateX=0.45 * 331),
    "randaugment_tf": TF_STRONGEST | dict(TranslateY=10, Cutout=40, ShearY=0.3),
    "autoaugment_tf": TF_STRONGEST | dict(TranslateX=250),
}
ONE_WAY = {"Posterize", "Solarize", "SolarizeAdd", "Cutout"}
"""Operations whose argument has no sign; so are the colour operations of TensorFlow and timm."""


@pytest.mark.parametrize("policy", STRONGEST)
def test_the_strongest_operations_are_the_librarys(policy):
    for name, expected in STRONGEST[policy].items():
        scale = POLICIES[policy][name]
        assert scale.argument(1.0, 331) == pytest.approx(expected), name
        colors = name in ("Color", "Contrast", "Sharpness") and STRONGEST[policy].items() >= TF_STRONGEST.items()
        assert scale.signed == (name not in ONE_WAY and not colors), name


def test_operations_are_stronger_with_the_magnitude():
    """The exceptions are operations that get weaker in TensorFlow's and timm's tables."""
    for scales, maximum in ((tables.RANDAUGMENT, 1.0), (tables.RANDAUGMENT_TIMM_INCREASING, 0.999)):
        for name in ("Posterize", "Solarize", "Rotate", "Color"):
            weak, strong = (
                np.abs(applied(PILLOW, name, scales[name].argument(share, 40)).astype(int) - PHOTO).mean()
                for share in (0.3, maximum)
            )
            assert weak < strong, name
    assert tables.RANDAUGMENT_TIMM["Posterize"].argument(0.9, 0) == 3
    assert tables.RANDAUGMENT_TIMM_INCREASING["Posterize"].argument(0.9, 0) == 1


# --- what is refused ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(policy="randaugment_tf", policy_excluded=("Cutot",)), "'Cutot'; .*'Cutout'"),
        (dict(policy="randaugment", policy_excluded=("Cutout",)), "randaugment .*'Cutout'"),
        (dict(policy="randaugment", policy_excluded=tuple(tables.RANDAUGMENT)), "policy_excluded .*no operation"),
        (dict(policy="randaugment", policy_magnitude=9.5), r"policy_magnitude is 9\.5; .*0 to 30"),
        (dict(policy="randaugment_timm", policy_magnitude=11.0), r"policy_magnitude is 11\.0; .* 10"),
    ],
)
def test_what_a_policy_cant_follow_is_refused(options, message):
    with pytest.raises(UserError, match=message) as error:
        check_policy(AugmentConfig(**options))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("policy", ["none", *POLICIES])
def test_defaults_are_accepted(policy):
    check_policy(AugmentConfig(policy=policy))
    check_policy(dataclasses.replace(AugmentConfig(policy="randaugment_tf"), policy_magnitude=15.0))


# --- the operations -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("operations", [PILLOW, TENSORFLOW], ids=["pillow", "tensorflow"])
def test_operations_that_do_nothing(operations):
    nothing = {"Posterize": 8, "Solarize": 256 if operations is PILLOW else 255, "SolarizeAdd": 0, "Identity": 0}
    nothing |= dict.fromkeys(("Color", "Contrast", "Brightness", "Sharpness"), 1.0)
    nothing |= dict.fromkeys(("Rotate", "ShearX", "ShearY", "TranslateX", "TranslateY"), 0.0)
    for name, argument in nothing.items():
        image = np.minimum(PHOTO, 254)
        np.testing.assert_array_equal(applied(operations, name, argument, image), image, err_msg=name)
    full = PHOTO.copy()
    full[0, 0], full[0, 1] = 0, 255
    np.testing.assert_array_equal(applied(operations, "AutoContrast", 0, full), full)
    np.testing.assert_array_equal(applied(operations, "Invert", 0, applied(operations, "Invert", 0)), PHOTO)


@pytest.mark.parametrize("operations", [PILLOW, TENSORFLOW], ids=["pillow", "tensorflow"])
def test_values_by_their_formulas(operations):
    values = np.arange(256, dtype=np.int64)
    ramp = np.repeat(values.astype(np.uint8).reshape(16, 16, 1), 3, axis=-1)
    expected = {
        ("Invert", 0): 255 - values,
        ("Posterize", 3): values // 32 * 32,
        ("Solarize", 100): np.where(values < 100, values, 255 - values),
        ("SolarizeAdd", 110): np.where(values < 128, np.minimum(values + 110, 255), values),
        ("Brightness", 0.5): values // 2,
        ("Brightness", 1.9): np.minimum(values * 19 // 10, 255),
        ("Equalize", 0): values,
    }
    for (name, argument), row in expected.items():
        found = applied(operations, name, argument, ramp)[..., 0].ravel()
        assert np.abs(found - row).max() <= (name == "Brightness"), name  # truncated in float32
    half = applied(operations, "AutoContrast", 0, ramp // 2 + 40)[..., 0].ravel()
    assert np.abs(half - values // 2 * 255 / 127).max() <= 1
    two = np.tile(np.where(ramp < 192, np.uint8(10), np.uint8(200)), (4, 4, 1))
    assert set(np.unique(applied(operations, "Equalize", 0, two)).tolist()) == {0, 255}


@pytest.mark.parametrize("operations", [PILLOW, TENSORFLOW], ids=["pillow", "tensorflow"])
def test_what_factor_0_gives(operations):
    grey = PHOTO @ [0.2989, 0.5870, 0.1140]
    found = applied(operations, "Color", 0.0)
    assert np.abs(found - grey[..., None]).max() <= 1.001
    assert not applied(operations, "Brightness", 0.0).any()
    around = sum(
        PHOTO[y : y + 45, x : x + 61].astype(float) * (5 if y == x == 1 else 1) for y in range(3) for x in range(3)
    )
    smooth = applied(operations, "Sharpness", 0.0)
    assert np.abs(smooth[1:-1, 1:-1] - around / 13).max() <= 1
    for edge in (np.s_[0], np.s_[-1], np.s_[:, 0], np.s_[:, -1]):
        np.testing.assert_array_equal(smooth[edge], PHOTO[edge])
    flat = applied(operations, "Contrast", 0.0)
    mean = grey.mean() if operations is PILLOW else PHOTO.shape[0] * PHOTO.shape[1] / 256
    assert np.abs(flat - mean).max() <= 1


def test_pillow_shifts_shears_and_turns():
    fill = np.array((9, 8, 7), np.uint8)
    shifted = applied(PILLOW, "TranslateX", 2, GRID)
    np.testing.assert_array_equal(shifted[:, :5], GRID[:, 2:])
    assert (shifted[:, 5:] == fill).all()
    shifted = applied(PILLOW, "TranslateY", -1, GRID)
    np.testing.assert_array_equal(shifted[1:], GRID[:-1])
    assert (shifted[0] == fill).all()
    sheared = applied(PILLOW, "ShearX", 1.0, GRID)  # about the corner: row 2's centre is 2.5 px down
    np.testing.assert_array_equal(sheared[2, :4], GRID[2, 3:])
    sheared = applied(PILLOW, "ShearY", 1.0, GRID)
    np.testing.assert_array_equal(sheared[:2, 2], GRID[3:, 2])
    square = GRID[:, :5]
    np.testing.assert_array_equal(applied(PILLOW, "Rotate", 90.0, square), np.rot90(square))
    np.testing.assert_array_equal(applied(PILLOW, "Rotate", -180.0, GRID), GRID[::-1, ::-1])


def test_tensorflow_mirrors_at_the_edge():
    """The places are those that TensorFlow's ImageProjectiveTransformV3 gave."""
    rows, columns = np.arange(5), np.arange(7)
    np.testing.assert_array_equal(applied(TENSORFLOW, "TranslateX", -2.6, GRID), GRID[:, [2, 1, 0, 0, 1, 2, 3]])
    np.testing.assert_array_equal(applied(TENSORFLOW, "TranslateY", 9.0, GRID), GRID[[0, 0, 1, 2, 3]])
    sheared = np.minimum(columns + (rows[:, None] >= 2), 6)
    np.testing.assert_array_equal(applied(TENSORFLOW, "ShearX", 0.3, GRID), GRID[rows[:, None], sheared])
    down = applied(TENSORFLOW, "ShearY", 1.0, GRID)
    np.testing.assert_array_equal(down[:, 3], GRID[[3, 4, 4, 3, 2], 3])
    square = GRID[:, :5]
    for quarter in range(4):
        np.testing.assert_array_equal(applied(TENSORFLOW, "Rotate", 90.0 * quarter, square), np.rot90(square, quarter))


def test_tensorflow_wraps_and_clamps():
    np.testing.assert_array_equal(applied(TENSORFLOW, "Solarize", 256), 255 - PHOTO)
    np.testing.assert_array_equal(applied(TENSORFLOW, "Solarize", 384), np.where(PHOTO < 128, PHOTO, 255 - PHOTO))
    np.testing.assert_array_equal(applied(TENSORFLOW, "Posterize", 0), PHOTO // 128 * 128)
    assert not applied(PILLOW, "Posterize", 0).any()


def test_cutout_is_a_grey_square_cut_at_the_edge():
    image = np.zeros((40, 40, 3), np.uint8)
    rng = np.random.default_rng(0)
    canvas = Canvas(fill=(0, 0, 0), filters=(Image.Resampling.NEAREST,), rng=rng)
    areas = []
    for _ in range(50):
        result = TENSORFLOW["Cutout"](image, 8, canvas)
        y, x = np.nonzero(result[..., 0])
        assert (result[y.min() : y.max() + 1, x.min() : x.max() + 1] == 128).all()
        assert (len(np.unique(y)) == 16) or y.min() == 0 or y.max() == 39
        areas.append(len(y))
    assert max(areas) == 16 * 16
    assert 8 * 8 <= min(areas) < 16 * 16
