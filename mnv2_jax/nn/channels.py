"""Rounding of channel counts after a width multiplier."""

from __future__ import annotations


def make_divisible(value: float, divisor: int = 8, min_value: int | None = None) -> int:
    """Rounds a channel count to a multiple of ``divisor``, never more than 10 % down.

    Args:
      value: channels before rounding, such as ``32 * width``; > 0.
      divisor: the result is a multiple of it, unless the result is ``min_value``.
      min_value: smallest result; ``divisor`` if unset.

    This is the rule of TF-slim's ``mobilenet.py``, which torchvision, timm and Keras share.
    """
    rounded = max(min_value or divisor, int(value + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * value else rounded
