"""Geometry of a kernel that moves over the rows and columns of a map."""

from __future__ import annotations

from typing import Literal, NamedTuple, TypeAlias

from mnv2_jax.types import Array

Padding: TypeAlias = Literal["same", "symmetric", "trailing"]


class Window(NamedTuple):
    """How a kernel of odd size moves over the rows and columns of its input."""

    stride: int = 1
    dilation: int = 1
    padding: Padding = "same"

    def pad(self, size: int, kernel: int) -> tuple[int, int]:
        """Returns the number of zeros before and after an axis; the output then has ceil(size / stride) positions.

        ``same``: as few zeros as that takes, with an odd one after (TensorFlow). ``symmetric``: dilation * (kernel - 1)
        / 2 on each side, whatever the size (PyTorch). The two differ if a stride meets an even size. ``trailing``: with
        a stride, one zero less before than ``symmetric``, as Keras pads in MobileNetV1; the output then has
        floor(size / stride) positions.
        """
        reach = self.dilation * (kernel - 1)
        if self.padding != "same":
            is_short = self.padding == "trailing" and self.stride > 1
            return reach // 2 - is_short, reach // 2
        total = max((-(-size // self.stride) - 1) * self.stride + reach + 1 - size, 0)
        return total // 2, total - total // 2

    def outputs(self, size: int, kernel: int) -> int:
        """Returns the size of the output of an axis."""
        return (size + sum(self.pad(size, kernel)) - self.dilation * (kernel - 1) - 1) // self.stride + 1

    def pads(self, x: Array, kernel: Array) -> tuple[tuple[int, int], tuple[int, int]]:
        """Returns `pad` of the rows and of the columns."""
        return self.pad(x.shape[1], kernel.shape[0]), self.pad(x.shape[2], kernel.shape[1])
