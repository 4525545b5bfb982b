"""The strength of each operation by library, and the sub-policies that AutoAugment found."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import TypeAlias


@dataclasses.dataclass(frozen=True)
class Scale:
    """The conversion of a magnitude to the argument of an operation."""

    argument: Callable[[float, int], float] = lambda share, side: 0.0
    """(magnitude as a share of the library's maximum, the image's side in px along which it shifts) -> argument."""
    signed: bool = False
    """Whether the share is made negative half of the time."""


Scales: TypeAlias = Mapping[str, Scale]


def _to(high: float) -> Scale:
    """Returns a scale from 0 to ± `high`."""
    return Scale(lambda share, side: high * share, signed=True)


def _factor(high: float) -> Scale:
    """Returns a scale of factors from 1 to 1 ± `high`."""
    return Scale(lambda share, side: 1 + high * share, signed=True)


_NONE = Scale()

# --- torchvision (transforms/autoaugment.py) ----------------------------------------------------------------

_TORCHVISION_COMMON: Scales = {
    "Solarize": Scale(lambda share, side: 255 - 255 * share),
    "AutoContrast": _NONE,
    "Equalize": _NONE,
}
_TORCHVISION_SHIFT = Scale(lambda share, side: int(150 / 331 * side * share), signed=True)
_COLORS = ("Brightness", "Color", "Contrast", "Sharpness")

RANDAUGMENT: Scales = {
    "Identity": _NONE,
    "ShearX": _to(0.3),
    "ShearY": _to(0.3),
    "TranslateX": _TORCHVISION_SHIFT,
    "TranslateY": _TORCHVISION_SHIFT,
    "Rotate": _to(30.0),
    **dict.fromkeys(_COLORS, _factor(0.9)),
    "Posterize": Scale(lambda share, side: 8 - round(4 * share)),
    **_TORCHVISION_COMMON,
}
AUTOAUGMENT: Scales = {**RANDAUGMENT, "Invert": _NONE}
TRIVIALAUGMENT: Scales = {
    "Identity": _NONE,
    "ShearX": _to(0.99),
    "ShearY": _to(0.99),
    "TranslateX": Scale(lambda share, side: int(32 * share), signed=True),
    "TranslateY": Scale(lambda share, side: int(32 * share), signed=True),
    "Rotate": _to(135.0),
    **dict.fromkeys(_COLORS, _factor(0.99)),
    "Posterize": Scale(lambda share, side: 8 - round(6 * share)),
    **_TORCHVISION_COMMON,
}

# --- TensorFlow: its model garden, and timm, which grew from its EfficientNet -------------------------------

_TENSORFLOW_COMMON: Scales = {
    "AutoContrast": _NONE,
    "Equalize": _NONE,
    "Invert": _NONE,
    "Rotate": _to(30.0),
    "Posterize": Scale(lambda share, side: int(4 * share)),
    "Solarize": Scale(lambda share, side: int(256 * share)),
    "SolarizeAdd": Scale(lambda share, side: int(110 * share)),
    **dict.fromkeys(_COLORS, Scale(lambda share, side: 1.8 * share + 0.1)),
    "ShearX": _to(0.3),
    "ShearY": _to(0.3),
}

RANDAUGMENT_TIMM: Scales = {
    **_TENSORFLOW_COMMON,
    "TranslateX": Scale(lambda share, side: 0.45 * share * side, signed=True),
    "TranslateY": Scale(lambda share, side: 0.45 * share * side, signed=True),
}
RANDAUGMENT_TIMM_INCREASING: Scales = {
    **RANDAUGMENT_TIMM,
    "Posterize": Scale(lambda share, side: 4 - int(4 * share)),
    "Solarize": Scale(lambda share, side: 256 - int(256 * share)),
    **dict.fromkeys(_COLORS, Scale(lambda share, side: max(0.1, 1 + 0.9 * share), signed=True)),
}
"""timm calls these `PosterizeIncreasing` and so on, and the shifts `TranslateXRel` and `TranslateYRel`."""

RANDAUGMENT_TF: Scales = {
    **_TENSORFLOW_COMMON,
    "TranslateX": _to(10.0),
    "TranslateY": _to(10.0),
    "Cutout": Scale(lambda share, side: int(40 * share)),
    "Identity": _NONE,
}
"""cutout_const and translate_const come from `official/vision/configs/common.py`, which the recipes use."""

AUTOAUGMENT_TF: Scales = {**_TENSORFLOW_COMMON, "TranslateX": _to(250.0), "TranslateY": _to(250.0)}

# --- AutoAugment --------------------------------------------------------------------------------------------

SubPolicies: TypeAlias = tuple[tuple[tuple[str, float, int], tuple[str, float, int]], ...]
"""Pairs of (operation, probability, magnitude)."""

IMAGENET: SubPolicies = (
    (("Posterize", 0.4, 8), ("Rotate", 0.6, 9)),
    (("Solarize", 0.6, 5), ("AutoContrast", 0.6, 5)),
    (("Equalize", 0.8, 8), ("Equalize", 0.6, 3)),
    (("Posterize", 0.6, 7), ("Posterize", 0.6, 6)),
    (("Equalize", 0.4, 7), ("Solarize", 0.2, 4)),
    (("Equalize", 0.4, 4), ("Rotate", 0.8, 8)),
    (("Solarize", 0.6, 3), ("Equalize", 0.6, 7)),
    (("Posterize", 0.8, 5), ("Equalize", 1.0, 2)),
    (("Rotate", 0.2, 3), ("Solarize", 0.6, 8)),
    (("Equalize", 0.6, 8), ("Posterize", 0.4, 6)),
    (("Rotate", 0.8, 8), ("Color", 0.4, 0)),
    (("Rotate", 0.4, 9), ("Equalize", 0.6, 2)),
    (("Equalize", 0.0, 7), ("Equalize", 0.8, 8)),
    (("Invert", 0.6, 4), ("Equalize", 1.0, 8)),
    (("Color", 0.6, 4), ("Contrast", 1.0, 8)),
    (("Rotate", 0.8, 8), ("Color", 1.0, 2)),
    (("Color", 0.8, 8), ("Solarize", 0.8, 7)),
    (("Sharpness", 0.4, 7), ("Invert", 0.6, 8)),
    (("ShearX", 0.6, 5), ("Equalize", 1.0, 9)),
    (("Color", 0.4, 0), ("Equalize", 0.6, 3)),
    (("Equalize", 0.4, 7), ("Solarize", 0.2, 4)),
    (("Solarize", 0.6, 5), ("AutoContrast", 0.6, 5)),
    (("Invert", 0.6, 4), ("Equalize", 1.0, 8)),
    (("Color", 0.6, 4), ("Contrast", 1.0, 8)),
    (("Equalize", 0.8, 8), ("Equalize", 0.6, 3)),
)
"""Cubuk et al., arXiv:1805.09501, table 9."""

V0: SubPolicies = (
    (("Equalize", 0.8, 1), ("ShearY", 0.8, 4)),
    (("Color", 0.4, 9), ("Equalize", 0.6, 3)),
    (("Color", 0.4, 1), ("Rotate", 0.6, 8)),
    (("Solarize", 0.8, 3), ("Equalize", 0.4, 7)),
    (("Solarize", 0.4, 2), ("Solarize", 0.6, 2)),
    (("Color", 0.2, 0), ("Equalize", 0.8, 8)),
    (("Equalize", 0.4, 8), ("SolarizeAdd", 0.8, 3)),
    (("ShearX", 0.2, 9), ("Rotate", 0.6, 8)),
    (("Color", 0.6, 1), ("Equalize", 1.0, 2)),
    (("Invert", 0.4, 9), ("Rotate", 0.6, 0)),
    (("Equalize", 1.0, 9), ("ShearY", 0.6, 3)),
    (("Color", 0.4, 7), ("Equalize", 0.6, 0)),
    (("Posterize", 0.4, 6), ("AutoContrast", 0.4, 7)),
    (("Solarize", 0.6, 8), ("Color", 0.6, 9)),
    (("Solarize", 0.2, 4), ("Rotate", 0.8, 9)),
    (("Rotate", 1.0, 7), ("TranslateY", 0.8, 9)),
    (("ShearX", 0.0, 0), ("Solarize", 0.8, 4)),
    (("ShearY", 0.8, 0), ("Color", 0.6, 4)),
    (("Color", 1.0, 0), ("Rotate", 0.6, 2)),
    (("Equalize", 0.8, 4), ("Equalize", 0.0, 8)),
    (("Equalize", 1.0, 4), ("AutoContrast", 0.6, 2)),
    (("ShearY", 0.4, 7), ("SolarizeAdd", 0.6, 7)),
    (("Posterize", 0.8, 2), ("Solarize", 0.6, 10)),
    (("Solarize", 0.6, 8), ("Equalize", 0.6, 1)),
    (("Color", 0.8, 6), ("Rotate", 0.4, 5)),
)
"""The sub-policies of EfficientNet, from the TensorFlow model garden."""
