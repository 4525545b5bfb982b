"""Augmentation policies: the operations that are applied to a training image on the host, and their strengths.

A policy draws a list of (operation, argument) and applies the operations in turn. Both follow the library that a recipe
comes from, since the RandAugment of torchvision and that of timm are different augmentations: `tables` holds the
strengths, `operations` the pixel operations. They have the names that the libraries use, without timm's suffixes:

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
    """Applies the policy to an image.

    Args:
      image: uint8 [h, w, 3], cropped.
      augment: `policy` and its options are read.
      rng: the generator for all draws.
      mean: `data.mean`, with which timm fills the pixels that come from outside the image.

    Returns:
      uint8 [h, w, 3].
    """
    policy = _POLICIES[augment.policy]
    canvas = Canvas(fill=policy.fill or _as_color(mean), filters=policy.filters, rng=rng)
    for name, argument in draw_policy(augment, image.shape[0], image.shape[1], rng):
        image = policy.operations[name](image, argument, canvas)
    return image


def draw_policy(augment: AugmentConfig, height: int, width: int, rng: np.random.Generator) -> list[tuple[str, float]]:
    """Draws the pairs (operation, argument) for an image of this size, in the order of application."""
    scales = _scales(augment)
    return [
        (name, _scale_argument(scales[name], share, width if name.endswith("X") else height, rng))
        for name, share in _POLICIES[augment.policy].draw(augment, rng)
    ]


def check_policy(augment: AugmentConfig) -> None:
    """Refuses options that the policy can't apply.

    Raises:
      UserError: naming the option and the values that it may have.
    """
    if not augment.policy.startswith("randaugment"):
        return
    names, magnitude = _scales(augment), augment.policy_magnitude
    for name in augment.policy_excluded:
        if name not in names:
            raise UserError(f"augment.policy_excluded: {augment.policy} has no {name!r}{nearest(name, names)}")
    if not set(names) - set(augment.policy_excluded):
        raise UserError("augment.policy_excluded leaves no operation; exclude fewer, or set augment.policy=none")
    if augment.policy == "randaugment" and magnitude not in range(_BINS):
        raise UserError(
            f"augment.policy_magnitude is {magnitude}; for randaugment, set a whole number from 0 to {_BINS - 1}, as in"
            " torchvision"
        )
    if augment.policy == "randaugment_timm" and magnitude > 10:
        raise UserError(f"augment.policy_magnitude is {magnitude}; timm clips it at 10, so set 10 or less")


def _scales(augment: AugmentConfig) -> tables.Scales:
    if augment.policy == "randaugment_timm" and augment.policy_increasing:
        return tables.RANDAUGMENT_TIMM_INCREASING
    return _POLICIES[augment.policy].scales


def _scale_argument(scale: tables.Scale, share: float, side: int, rng: np.random.Generator) -> float:
    if scale.signed and rng.integers(2):
        share = -share
    return scale.argument(share, side)


def _as_color(mean: tuple[float, float, float]) -> tuple[int, int, int]:
    red, green, blue = (min(255, round(255 * value)) for value in mean)
    return red, green, blue


# --- draws of operations ------------------------------------------------------------------------------------

_Draws = list[tuple[str, float]]
"""Pairs of an operation and its magnitude as a share of the library's maximum."""


def _sub_policy(sub_policies: tables.SubPolicies, maximum: int, rng: np.random.Generator) -> _Draws:
    chosen = sub_policies[rng.integers(len(sub_policies))]
    return [(name, magnitude / maximum) for name, probability, magnitude in chosen if rng.random() < probability]


def _draw_names(augment: AugmentConfig, rng: np.random.Generator) -> list[str]:
    names = [name for name in _scales(augment) if name not in augment.policy_excluded]
    return [names[number] for number in rng.integers(len(names), size=augment.policy_layers)]


def _randaugment(augment: AugmentConfig, rng: np.random.Generator) -> _Draws:
    return [(name, augment.policy_magnitude / (_BINS - 1)) for name in _draw_names(augment, rng)]


def _trivialaugment(augment: AugmentConfig, rng: np.random.Generator) -> _Draws:
    names = list(tables.TRIVIALAUGMENT)
    return [(names[rng.integers(len(names))], int(rng.integers(_BINS)) / (_BINS - 1))]


def _randaugment_timm(augment: AugmentConfig, rng: np.random.Generator) -> _Draws:
    names = _draw_names(augment, rng)
    return [(name, _timm_magnitude(augment, rng) / 10) for name in names if rng.random() < augment.policy_probability]


def _timm_magnitude(augment: AugmentConfig, rng: np.random.Generator) -> float:
    magnitude, std = augment.policy_magnitude, augment.policy_magnitude_std
    drawn = rng.uniform(0, magnitude) if std > 100 else rng.normal(magnitude, std)
    return min(max(drawn, 0.0), 10.0)


def _randaugment_tf(augment: AugmentConfig, rng: np.random.Generator) -> _Draws:
    # The magnitude isn't clipped at 10, since MobileNetV4's recipes use 15.
    names = _draw_names(augment, rng)
    return [(name, augment.policy_magnitude / 10) for name in names if rng.random() < augment.policy_probability]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Policy:
    draw: Callable[[AugmentConfig, np.random.Generator], _Draws]
    scales: tables.Scales
    operations: Mapping[str, Operation]
    fill: tuple[int, int, int] | None = (0, 0, 0)
    """RGB of the pixels that come from outside the image; None: the mean colour of the data."""
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
    # torchvision's training script, which made the recipes with TrivialAugment, gives it the filter of the crop.
    "trivialaugment": _Policy(draw=_trivialaugment, scales=tables.TRIVIALAUGMENT, operations=PILLOW, filters=_BILINEAR),
}
