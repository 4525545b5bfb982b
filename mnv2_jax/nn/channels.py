"""Channel counts that survive a width multiplier."""

from __future__ import annotations


def make_divisible(value: float, divisor: int = 8, min_value: int | None = None) -> int:
    """Rounds a channel count to a multiple of ``divisor``, never more than 10 % down.

    Args:
      value: channels before rounding, as ``32 * width``; > 0.
      divisor: what the result is a multiple of, unless ``min_value`` is larger and isn't.
      min_value: least result; unset: ``divisor``.

    The rule of TF-slim's ``mobilenet.py``, which torchvision, timm and Keras share.
    """
    rounded = max(min_value or divisor, int(value + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * value else rounded
