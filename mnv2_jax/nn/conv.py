"""Convolutions over [b, h, w, c]: the functions, and the layers that hold a kernel."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import DTypeLike, Float

from mnv2_jax.errors import UserError
from mnv2_jax.nn.forms import AUTO, LAX, Forms, depthwise_form, image_form, pointwise_form
from mnv2_jax.nn.initializers import Initializer
from mnv2_jax.nn.window import Padding, Window
from mnv2_jax.types import Array

IMAGE_CHANNELS = 4
"""Inputs of at most this many channels count as images: the patch under a kernel then fits into one row of a matrix."""


def conv(
    x: Float[Array, "b h w i"],
    kernel: Float[Array, "r s i o"],
    *,
    stride: int = 1,
    dilation: int = 1,
    padding: Padding = "same",
    forms: Forms = AUTO,
) -> Float[Array, "b p q o"]:
    """Convolves over all channels.

    Args:
      x: input, of the same type as the kernel and the result; sums are in float32 at least.
      kernel: kernel with odd r and s.
      stride: stride of rows and columns; heights and widths are divided by it and rounded up.
      dilation: distance in rows and columns between taps of the kernel.
      padding: see `Window.pad`.
      forms: how the convolution is computed, which changes the result by rounding only.
    """
    window = Window(stride, dilation, padding)
    if dilation > 1 and stride == 1:
        kernel = within_reach(kernel, (x.shape[1], x.shape[2]), dilation)
    if kernel.shape[:2] == (1, 1):
        return pointwise_form(forms.pointwise)(x, kernel, window)
    if x.shape[-1] <= IMAGE_CHANNELS:
        return image_form(forms.image)(x, kernel, window)
    return LAX.value(x, kernel, window)


def within_reach(kernel: Float[Array, "r s i o"], size: tuple[int, int], dilation: int) -> Float[Array, "t u i o"]:
    """Leaves out the taps of a dilated kernel that are so far from its centre that they meet only zeros of the padding.

    With the rates of DeepLab and a small map these are most of them, and XLA's CPU backend computes them slowly.

    Args:
      kernel: kernel with odd r and s, applied with stride 1.
      size: height and width of the map.
      dilation: distance between taps.
    """
    for axis, (taps, extent) in enumerate(zip(kernel.shape[:2], size, strict=True)):
        centre = taps // 2
        reach = min(centre, (extent - 1) // dilation)
        kernel = jax.lax.slice_in_dim(kernel, centre - reach, centre + reach + 1, axis=axis)
    return kernel


def depthwise_conv(
    x: Float[Array, "b h w c"],
    kernel: Float[Array, "r s 1 c"],
    *,
    stride: int = 1,
    dilation: int = 1,
    padding: Padding = "same",
    forms: Forms = AUTO,
) -> Float[Array, "b p q c"]:
    """Convolves each channel with its own kernel; the arguments are those of `conv`.

    Raises:
      UserError: if the map is so small that ``trailing`` padding gives an empty output.
    """
    window = Window(stride, dilation, padding)
    if 0 in (window.outputs(x.shape[1], kernel.shape[0]), window.outputs(x.shape[2], kernel.shape[1])):
        raise UserError(
            f"a map of {x.shape[1]}×{x.shape[2]} is too small to be halved with model.padding=keras_v1 (Keras' padding"
            " of MobileNetV1); give larger images, or model.padding=same"
        )
    return depthwise_form(forms.depthwise)(x, kernel, window)


# --- layers -------------------------------------------------------------------------------------------------


class Conv(nn.Module):
    """`conv` with a kernel [r, s, i, o] of float32 at least, without bias.

    Attributes:
      features: output channels.
      kernel_size: rows and columns of the kernel, odd.
      stride: stride of rows and columns.
      dilation: distance in rows and columns between taps of the kernel.
      padding: see `Window.pad`.
      dtype: type of the computation and of the result.
      kernel_init: initialiser of the kernel.
      forms: how the convolution is computed.
    """

    features: int
    kernel_size: int = 1
    stride: int = 1
    dilation: int = 1
    padding: Padding = "same"
    dtype: DTypeLike = jnp.float32
    kernel_init: Initializer = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
    forms: Forms = AUTO

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps [b, h, w, i] to [b, ceil(h / stride), ceil(w / stride), features]."""
        shape = (self.kernel_size, self.kernel_size, x.shape[-1], self.features)
        kernel = self.param("kernel", self.kernel_init, shape, jnp.promote_types(self.dtype, jnp.float32))
        return conv(
            x.astype(self.dtype),
            kernel.astype(self.dtype),
            stride=self.stride,
            dilation=self.dilation,
            padding=self.padding,
            forms=self.forms,
        )


class DepthwiseConv(nn.Module):
    """`depthwise_conv` with a kernel [r, s, 1, c] of float32 at least, without bias; its attributes are `Conv`'s."""

    kernel_size: int = 3
    stride: int = 1
    dilation: int = 1
    padding: Padding = "same"
    dtype: DTypeLike = jnp.float32
    kernel_init: Initializer = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
    forms: Forms = AUTO

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps [b, h, w, c] to [b, ceil(h / stride), ceil(w / stride), c]."""
        shape = (self.kernel_size, self.kernel_size, 1, x.shape[-1])
        kernel = self.param("kernel", self.kernel_init, shape, jnp.promote_types(self.dtype, jnp.float32))
        return depthwise_conv(
            x.astype(self.dtype),
            kernel.astype(self.dtype),
            stride=self.stride,
            dilation=self.dilation,
            padding=self.padding,
            forms=self.forms,
        )
