"""Augmentation policies: which operations a training image goes through on the host, and how strong they are.

A policy draws a list of (operation, argument) and applies them one after the other. Both are those of the library that
a recipe comes from, for RandAugment of torchvision and of timm are different augmentations: see `tables` for the
strengths, `operations` for the pixels. Operations have the names of the libraries, without timm's suffixes:

    AutoContrast  Equalize  Invert  Posterize  Solarize  SolarizeAdd  Color  Contrast  Brightness  Sharpness  Rotate
    ShearX  ShearY  TranslateX  TranslateY  Cutout  Identity
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np
from PIL import Image

from mnv2_jax.config import AugmentConfig
from mnv2_jax.data.policies import tables
from mnv2_jax.data.policies.operations import PILLOW, TENSORFLOW, Canvas, Operation
from mnv2_jax.errors import UserError, nearest

_NEAREST = (Image.Resampling.NEAREST,)
_BILINEAR = (Image.Resampling.BILINEAR,)
_EITHER = (Image.Resampling.BILINEAR, Image.Resampling.BICUBIC)
_BINS = 31
"""Magnitudes of torchvision's RandAugment and TrivialAugment: 0 to 30."""


def apply_policy(
    image: np.ndarray,
    augment: AugmentConfig,
    rng: np.random.Generator,
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406),
) -> np.ndarray:
    """Puts an image through the policy.

    Args:
      image: uint8 [h, w, 3], cropped.
      augment: `policy` and its options.
      rng: what all draws come from.
      mean: `data.mean`, with which timm fills what comes in from outside.

    Returns:
      uint8 [h, w, 3].
    """
    policy = _POLICIES[augment.policy]
    canvas = Canvas(fill=policy.fill or _as_color(mean), filters=policy.filters, rng=rng)
    for name, argument in draw_policy(augment, image.shape[0], image.shape[1], rng):
        image = policy.operations[name](image, argument, canvas)
    return image


def draw_policy(augment: AugmentConfig, height: int, width: int, rng: np.random.Generator) -> list[tuple[str, float]]:
    """Draws what an image of this size goes through: (operation, argument), in the order of application."""
    scales = _scales(augment)
    return [
        (name, _argument(scales[name], share, width if name.endswith("X") else height, rng))
        for name, share in _POLICIES[augment.policy].draw(augment, rng)
    ]


def check_policy(augment: AugmentConfig) -> None:
    """Refuses options that the policy can't follow.

    Raises:
      UserError: naming the option, and what it can be.
    """
    if not augment.policy.startswith("randaugment"):
        return
    names, magnitude = _scales(augment), augment.policy_magnitude
    for name in augment.policy_excluded:
        if name not in names:
            raise UserError(f"augment.policy_excluded: {augment.policy} has no {name!r}{nearest(name, names)}")
    if not set(names) - set(augment.policy_excluded):
        raise UserError("augment.policy_excluded leaves no operation; set augment.policy=none, or leave some in")
    if augment.policy == "randaugment" and magnitude not in range(_BINS):
        raise UserError(
            f"augment.policy_magnitude is {magnitude}; torchvision's are the whole numbers 0 to {_BINS - 1}"
        )
    if augment.policy == "randaugment_timm" and magnitude > 10:
        raise UserError(f"augment.policy_magnitude is {magnitude}; timm's are cut off at 10: set at most that")


def _scales(augment: AugmentConfig) -> tables.Scales:
    if augment.policy == "randaugment_timm" and augment.policy_increasing:
        return tables.RANDAUGMENT_TIMM_INCREASING
    return _POLICIES[augment.policy].scales


def _argument(scale: tables.Scale, share: float, side: int, rng: np.random.Generator) -> float:
    if scale.signed and rng.integers(2):
        share = -share
    return scale.argument(share, side)


def _as_color(mean: tuple[float, float, float]) -> tuple[int, int, int]:
    red, green, blue = (min(255, round(255 * value)) for value in mean)
    return red, green, blue


# --- what is drawn: (operation, magnitude as a share of the library's maximum) ------------------------------

_Draws = list[tuple[str, float]]


def _sub_policy(sub_policies: tables.SubPolicies, maximum: int, rng: np.random.Generator) -> _Draws:
    chosen = sub_policies[rng.integers(len(sub_policies))]
    return [(name, magnitude / maximum) for name, probability, magnitude in chosen if rng.random() < probability]


def _layers(augment: AugmentConfig, rng: np.random.Generator) -> list[str]:
    names = [name for name in _scales(augment) if name not in augment.policy_excluded]
    return [names[number] for number in rng.integers(len(names), size=augment.policy_layers)]


def _randaugment(augment: AugmentConfig, rng: np.random.Generator) -> _Draws:
    return [(name, augment.policy_magnitude / (_BINS - 1)) for name in _layers(augment, rng)]


def _trivialaugment(augment: AugmentConfig, rng: np.random.Generator) -> _Draws:
    names = list(tables.TRIVIALAUGMENT)
    return [(names[rng.integers(len(names))], int(rng.integers(_BINS)) / (_BINS - 1))]


def _randaugment_timm(augment: AugmentConfig, rng: np.random.Generator) -> _Draws:
    names = _layers(augment, rng)
    return [(name, _timm_magnitude(augment, rng) / 10) for name in names if rng.random() < augment.policy_probability]


def _timm_magnitude(augment: AugmentConfig, rng: np.random.Generator) -> float:
    magnitude, std = augment.policy_magnitude, augment.policy_magnitude_std
    drawn = rng.uniform(0, magnitude) if std > 100 else rng.normal(magnitude, std)
    return min(max(drawn, 0.0), 10.0)


def _randaugment_tf(augment: AugmentConfig, rng: np.random.Generator) -> _Draws:
    # Not cut off at 10: MobileNetV4's recipes have 15.
    names = _layers(augment, rng)
    return [(name, augment.policy_magnitude / 10) for name in names if rng.random() < augment.policy_probability]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Policy:
    draw: Callable[[AugmentConfig, np.random.Generator], _Draws]
    scales: tables.Scales
    operations: Mapping[str, Operation]
    fill: tuple[int, int, int] | None = (0, 0, 0)
    """None: the mean colour of the data."""
    filters: tuple[Image.Resampling, ...] = _NEAREST


_POLICIES: Mapping[str, _Policy] = {
    "none": _Policy(draw=lambda augment, rng: [], scales={}, operations={}),
    "autoaugment": _Policy(
        draw=lambda augment, rng: _sub_policy(tables.IMAGENET, 9, rng),  # ten bins
        scales=tables.AUTOAUGMENT,
        operations=PILLOW,
    ),
    "autoaugment_tf": _Policy(
        draw=lambda augment, rng: _sub_policy(tables.V0, 10, rng), scales=tables.AUTOAUGMENT_TF, operations=TENSORFLOW
    ),
    "randaugment": _Policy(draw=_randaugment, scales=tables.RANDAUGMENT, operations=PILLOW),
    "randaugment_timm": _Policy(
        draw=_randaugment_timm, scales=tables.RANDAUGMENT_TIMM, operations=PILLOW, fill=None, filters=_EITHER
    ),
    "randaugment_tf": _Policy(draw=_randaugment_tf, scales=tables.RANDAUGMENT_TF, operations=TENSORFLOW),
    # torchvision's training script, which the recipes of TrivialAugment ran, hands it the filter of the crop.
    "trivialaugment": _Policy(draw=_trivialaugment, scales=tables.TRIVIALAUGMENT, operations=PILLOW, filters=_BILINEAR),
}
