"""How a kernel goes over the rows and columns of a map."""

from __future__ import annotations

from typing import Literal, NamedTuple, TypeAlias

from mnv2_jax.types import Array

Padding: TypeAlias = Literal["same", "symmetric", "trailing"]


class Window(NamedTuple):
    """How a kernel of odd size goes over the rows and columns of its input."""

    stride: int = 1
    dilation: int = 1
    padding: Padding = "same"

    def pad(self, size: int, kernel: int) -> tuple[int, int]:
        """Zeros before and after an axis, of which ceil(size / stride) outputs remain.

        ``same``: as few as that takes, the odd one after (TensorFlow). ``symmetric``: dilation * (kernel - 1) / 2 on
        each side, whatever the size (PyTorch). They differ where a stride meets an even size. ``trailing``: where there
        is a stride, one less before than ``symmetric``, as Keras pads in MobileNetV1; floor(size / stride) remain.
        """
        reach = self.dilation * (kernel - 1)
        if self.padding != "same":
            is_short = self.padding == "trailing" and self.stride > 1
            return reach // 2 - is_short, reach // 2
        total = max((-(-size // self.stride) - 1) * self.stride + reach + 1 - size, 0)
        return total // 2, total - total // 2

    def outputs(self, size: int, kernel: int) -> int:
        """Size of the output of an axis."""
        return (size + sum(self.pad(size, kernel)) - self.dilation * (kernel - 1) - 1) // self.stride + 1

    def pads(self, x: Array, kernel: Array) -> tuple[tuple[int, int], tuple[int, int]]:
        """`pad` of the rows and of the columns."""
        return self.pad(x.shape[1], kernel.shape[0]), self.pad(x.shape[2], kernel.shape[1])
