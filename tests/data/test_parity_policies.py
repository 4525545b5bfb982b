"""Augmentation policies beside torchvision's and timm's: every operation's pixels, and what is drawn how often."""

import collections
import functools
import importlib
import random

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_image

from mnv2_jax.config import AugmentConfig
from mnv2_jax.data.policies import draw_policy, tables
from mnv2_jax.data.policies.operations import PILLOW, TENSORFLOW, Canvas

pytestmark = pytest.mark.parity

DRAWS = 4000
HEIGHT, WIDTH = 97, 128
PHOTO = np.ascontiguousarray(load_sample_image("china.jpg")[100 : 100 + HEIGHT, 200 : 200 + WIDTH])


@pytest.fixture
def torchvision(operators):
    pytest.importorskip("torchvision", reason="pip install .[parity]")
    return importlib.import_module("torchvision.transforms.autoaugment")


@pytest.fixture
def timm(operators):
    pytest.importorskip("timm", reason="pip install .[parity]")
    return importlib.import_module("timm.data.auto_augment")


def applied(operations, name, argument, fill=(0, 0, 0), resample=Image.Resampling.NEAREST):
    canvas = Canvas(fill=fill, filters=(resample,), rng=np.random.default_rng(0))
    return operations[name](PHOTO, argument, canvas)


def signs(scale):
    return (1, -1) if scale.signed else (1,)


def side(name):
    return WIDTH if name.endswith("X") else HEIGHT


def agree(ours, theirs):
    """Both draw each outcome equally often, within four standard deviations of the difference."""
    ours, theirs = collections.Counter(ours), collections.Counter(theirs)
    for outcome in ours | theirs:
        spread = (ours[outcome] + theirs[outcome]) ** 0.5
        assert abs(ours[outcome] - theirs[outcome]) <= 4 * spread + 1, (outcome, ours[outcome], theirs[outcome])


# --- torchvision --------------------------------------------------------------------------------------------


SPACES = {
    "AutoAugment": (10, tables.AUTOAUGMENT),
    "RandAugment": (31, tables.RANDAUGMENT),
    "TrivialAugmentWide": (31, tables.TRIVIALAUGMENT),
}


def space(torchvision, policy, bins, *size):
    """Operation -> (its magnitude at each bin, whether it has a sign)."""
    found = getattr(torchvision, policy)()._augmentation_space(
        bins, *([size] if policy != "TrivialAugmentWide" else [])
    )
    return {name: (np.atleast_1d(magnitudes).tolist(), signed) for name, (magnitudes, signed) in found.items()}


def as_argument(name, magnitude):
    """What our operation takes where torchvision's takes a magnitude."""
    if name.startswith("Translate"):
        return -int(magnitude)  # a positive shift is to the right there; both are drawn equally often
    if name == "Posterize":
        return int(magnitude)
    return 1 + magnitude if name in ("Brightness", "Color", "Contrast", "Sharpness") else magnitude


@pytest.mark.parametrize("resample", ["NEAREST", "BILINEAR"])
@pytest.mark.parametrize("policy", SPACES)
def test_torchvision_operations(torchvision, policy, resample):
    bins, scales = SPACES[policy]
    for name, (magnitudes, _) in space(torchvision, policy, bins, HEIGHT, WIDTH).items():
        for magnitude in (sign * magnitude for magnitude in magnitudes for sign in signs(scales[name])):
            filters = torchvision.InterpolationMode[resample]
            expected = torchvision._apply_op(Image.fromarray(PHOTO), name, magnitude, filters, None)
            found = applied(PILLOW, name, as_argument(name, magnitude), resample=Image.Resampling[resample])
            np.testing.assert_array_equal(found, np.asarray(expected), err_msg=f"{name} {magnitude}")


@pytest.mark.parametrize("policy", SPACES)
def test_torchvision_magnitudes(torchvision, policy):
    bins, scales = SPACES[policy]
    for size in range(32, 449):
        theirs = space(torchvision, policy, bins, size, size)
        assert set(theirs) | {"Identity"} == set(scales)
        for name, (magnitudes, signed) in theirs.items():
            assert signed == scales[name].signed
            if len(magnitudes) == 1:
                continue
            for number, magnitude in enumerate(magnitudes):
                ours = scales[name].argument(number / (bins - 1), size)
                if name.startswith("Translate") and abs(magnitude - round(magnitude)) < 1e-4:
                    # 16 px can be 15.999999, and become 15: torch's linspace is in float32.
                    assert ours in (round(magnitude) - 1, round(magnitude))
                else:
                    assert ours == pytest.approx(abs(as_argument(name, magnitude)), rel=1e-5)


@pytest.mark.parametrize(
    ("augment", "make"),
    [
        (AugmentConfig(policy="autoaugment"), lambda t: t.AutoAugment(t.AutoAugmentPolicy.IMAGENET)),
        (AugmentConfig(policy="randaugment", policy_layers=3), lambda t: t.RandAugment(num_ops=3, magnitude=9)),
        (AugmentConfig(policy="trivialaugment"), lambda t: t.TrivialAugmentWide()),
    ],
    ids=lambda value: value.policy if isinstance(value, AugmentConfig) else "",
)
def test_torchvision_draws(torchvision, monkeypatch, augment, make):
    theirs = []

    def record(image, name, magnitude, interpolation, fill):
        magnitude = round(magnitude, 4) if name.startswith("Translate") else magnitude  # 15.999999 is 16
        theirs.append((name, round(as_argument(name, magnitude), 4) + 0.0))
        return image

    monkeypatch.setattr(torchvision, "_apply_op", record)
    importlib.import_module("torch").manual_seed(0)
    transform, image = make(torchvision), Image.fromarray(PHOTO)
    for _ in range(DRAWS):
        transform(image)
    ours = drawn(augment)
    agree([(name, round(argument, 4) + 0.0) for name, argument in ours], theirs)
    assert abs(len(ours) - len(theirs)) <= 4 * DRAWS**0.5


def drawn(augment):
    return [
        step
        for seed in range(DRAWS)
        for step in draw_policy(augment, HEIGHT, WIDTH, np.random.default_rng((1, 2, seed)))
    ]


# --- timm ---------------------------------------------------------------------------------------------------


def timm_name(name, increasing):
    if name.startswith("Translate"):
        return name + "Rel"
    graded = ("Posterize", "Solarize", "Color", "Contrast", "Brightness", "Sharpness")
    return name + "Increasing" if increasing and name in graded else name


@pytest.mark.parametrize("resample", ["BILINEAR", "BICUBIC"])
@pytest.mark.parametrize("increasing", [False, True])
def test_timm_operations(timm, monkeypatch, increasing, resample):
    scales = tables.RANDAUGMENT_TIMM_INCREASING if increasing else tables.RANDAUGMENT_TIMM
    names = timm.rand_augment_choices("", increasing=increasing)
    assert [timm_name(name, increasing) for name in scales] == sorted(names, key=order(scales, increasing))
    fill = (124, 116, 104)
    for name, scale in scales.items():
        for sign in signs(scale):
            monkeypatch.setattr(timm, "_randomly_negate", functools.partial(lambda sign, value: sign * value, sign))
            for level in np.linspace(0, 10, 21):
                op = timm.AugmentOp(
                    timm_name(name, increasing),
                    prob=1.0,
                    magnitude=level,
                    hparams={"img_mean": fill, "interpolation": Image.Resampling[resample]},
                )
                argument = scale.argument(sign * level / 10, side(name))
                found = applied(PILLOW, name, argument, fill, Image.Resampling[resample])
                if name == "Posterize" and argument == 0:
                    # Older Pillows made the image black; today's refuses.
                    assert not found.any()
                    continue
                expected = np.asarray(op(Image.fromarray(PHOTO)))
                np.testing.assert_array_equal(found, expected, err_msg=f"{name} {level} {sign}")


def order(scales, increasing):
    return [timm_name(name, increasing) for name in scales].index


@pytest.mark.parametrize(
    ("recipe", "augment"),
    [
        ("rand-m9-mstd0.5", dict(policy_magnitude_std=0.5, policy_probability=0.5)),
        ("rand-m8-mstd101-inc1", dict(policy_magnitude=8.0, policy_magnitude_std=101.0, policy_probability=0.5)),
        ("rand-m6-n3-p0.8-mstd1.0", dict(policy_magnitude=6.0, policy_layers=3, policy_magnitude_std=1.0)),
    ],
)
def test_timm_draws(timm, monkeypatch, recipe, augment):
    augment = {"policy_probability": 0.8, "policy_increasing": "inc1" in recipe, **augment}
    augment = AugmentConfig(policy="randaugment_timm", **augment)
    theirs = []

    def record(name):
        def call(image, *args, **kwargs):
            theirs.append((name.removesuffix("Increasing").removesuffix("Rel"), *args))
            return image

        return call

    monkeypatch.setattr(timm, "NAME_TO_OP", {name: record(name) for name in timm.NAME_TO_OP})
    random.seed(0)
    np.random.seed(0)
    transform = timm.rand_augment_transform(recipe, dict(translate_const=57, img_mean=(124, 116, 104)))
    image = Image.fromarray(PHOTO)
    for _ in range(DRAWS):
        transform(image)
    ours = drawn(augment)
    agree([name for name, _ in ours], [name for name, *_ in theirs])
    assert abs(len(ours) - len(theirs)) <= 4 * (2 * DRAWS) ** 0.5
    for name, scale in tables.RANDAUGMENT_TIMM.items():
        if scale.argument(0.1, 100) == scale.argument(0.9, 100):
            continue
        size = side(name) if name.startswith("Translate") else 1
        a = np.array([argument for step, argument in ours if step == name])
        b = size * np.array([args[0] for step, *args in theirs if step == name])
        agree(np.sign(a).tolist(), np.sign(b).tolist())
        error = (a.var() / len(a) + b.var() / len(b)) ** 0.5
        assert abs(a.mean() - b.mean()) <= 4 * error, name
        # The spread of the noise, where no sign hides it; that of a sample's deviation from its fourth moment.
        a, b = abs(a), abs(b)
        moments = [((sample - sample.mean()) ** 2).var() / len(sample) for sample in (a, b)]
        assert abs(a.var() - b.var()) <= 4 * sum(moments) ** 0.5 + 1e-12, name


# --- TensorFlow: its model garden can't be installed beside us, but what it calls can -----------------------


@pytest.fixture
def tf():
    return pytest.importorskip("tensorflow")


def projected(tf, matrix):
    result = tf.raw_ops.ImageProjectiveTransformV3(
        images=PHOTO[None],
        transforms=[[*matrix, 0.0, 0.0]],
        output_shape=[HEIGHT, WIDTH],
        fill_value=0.0,
        interpolation="NEAREST",
        fill_mode="REFLECT",
    )
    return result[0].numpy()


@pytest.mark.parametrize("amount", [0.02, 0.11, 0.3, -0.3, 0.45])
def test_tensorflow_warps(tf, amount):
    pixels, angle = 300 * amount, np.float32(np.deg2rad(100 * amount))
    expected = {
        "ShearX": (amount, (1, amount, 0, 0, 1, 0)),
        "ShearY": (amount, (1, 0, 0, amount, 1, 0)),
        "TranslateX": (pixels, (1, 0, pixels, 0, 1, 0)),
        "TranslateY": (pixels, (1, 0, 0, 0, 1, pixels)),
    }
    for name, (argument, matrix) in expected.items():
        np.testing.assert_array_equal(applied(TENSORFLOW, name, argument), projected(tf, matrix), err_msg=name)
    cos, sin, x, y = np.cos(angle), np.sin(angle), (WIDTH - 1) / 2, (HEIGHT - 1) / 2
    turned = projected(tf, (cos, -sin, x - cos * x + sin * y, sin, cos, y - sin * x - cos * y))
    differs = (applied(TENSORFLOW, "Rotate", 100 * amount) != turned).any(axis=-1).mean()
    assert differs < 1e-3  # a place half-way between two pixels can round either way


def test_tensorflow_values(tf):
    image = tf.constant(PHOTO)
    for bits in range(8):
        expected = tf.bitwise.left_shift(tf.bitwise.right_shift(image, 8 - bits), 8 - bits)
        np.testing.assert_array_equal(applied(TENSORFLOW, "Posterize", bits), expected)
    for threshold in (0, 77, 255, 256, 384):
        expected = tf.where(image < threshold, image, 255 - image)
        np.testing.assert_array_equal(applied(TENSORFLOW, "Solarize", threshold), expected)
    grey = tf.image.grayscale_to_rgb(tf.image.rgb_to_grayscale(image))
    difference = applied(TENSORFLOW, "Color", 0.0).astype(int) - grey.numpy()
    assert abs(difference).max() <= 1
    assert (difference != 0).mean() < 1e-3
    kernel = np.tile(np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]], np.float32)[..., None, None] / 13, (1, 1, 3, 1))
    smooth = tf.nn.depthwise_conv2d(PHOTO[None].astype(np.float32), kernel, [1, 1, 1, 1], "VALID")[0].numpy()
    difference = applied(TENSORFLOW, "Sharpness", 0.0)[1:-1, 1:-1] - smooth
    assert difference.min() > -1 - 1e-3  # truncated; a sum that 13 divides can fall short of it by a rounding
    assert difference.max() < 1e-3
