"""Convolutions over [b, h, w, c], in the form that is fastest on the platform they are compiled for.

XLA's CPU backend runs a depthwise convolution 10 to 50 times, its input gradient 35 to 120 times and its kernel
gradient 5 to 30 times slower than the same sums written as shifted multiply-adds, and the gradients of a 1×1
convolution 2 to 9 times slower than matrix products (MobileNetV2's layers, jaxlib 0.10.2). On the CPU those are used;
on GPU and TPU, whose libraries have kernels for convolutions, `jax.lax.conv_general_dilated` is. The two forms agree
up to rounding.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple, Protocol, TypeAlias

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import DTypeLike, Float

from mnv2_jax.errors import UserError
from mnv2_jax.types import Array, Key

Padding: TypeAlias = Literal["same", "symmetric", "trailing"]
Init: TypeAlias = Literal["truncated_normal", "kaiming_fan_out", "kaiming_fan_out_grouped"]
Initializer: TypeAlias = Callable[..., Array]

IMAGE_CHANNELS = 4
"""Inputs of at most this many channels are images: what a kernel sees of them fits into one row of a matrix."""


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
        """What remains of an axis."""
        return (size + sum(self.pad(size, kernel)) - self.dilation * (kernel - 1) - 1) // self.stride + 1

    def pads(self, x: Array, kernel: Array) -> tuple[tuple[int, int], tuple[int, int]]:
        """`pad` of the rows and of the columns."""
        return self.pad(x.shape[1], kernel.shape[0]), self.pad(x.shape[2], kernel.shape[1])


class _Form(Protocol):
    """One way to compute a convolution."""

    def __call__(self, x: Array, kernel: Array, window: Window) -> Array: ...


def _by_platform(cpu: _Form, default: _Form) -> _Form:
    """The form of the platform that the program is lowered for, and likewise that of its gradients.

    Lowered for, not running on: a program compiled on a CPU machine for a TPU gets the TPU's form. The choice is made
    anew in the backward pass, so that nothing differentiates through a switch.
    """

    def value(x: Array, kernel: Array, window: Window) -> Array:
        forms = {name: functools.partial(form, window=window) for name, form in (("cpu", cpu), ("default", default))}
        return jax.lax.platform_dependent(x, kernel, **forms)

    def forward(x: Array, kernel: Array, window: Window) -> tuple[Array, tuple[Array, Array]]:
        return value(x, kernel, window), (x, kernel)

    def backward(window: Window, residuals: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
        def gradients_of(form: _Form) -> Callable[..., tuple[Array, Array]]:
            return lambda x, kernel, dy: jax.vjp(functools.partial(form, window=window), x, kernel)[1](dy)

        return jax.lax.platform_dependent(*residuals, dy, cpu=gradients_of(cpu), default=gradients_of(default))

    chosen = jax.custom_vjp(value, nondiff_argnums=(2,))
    chosen.defvjp(forward, backward)
    return chosen


def _lax_form(x: Array, kernel: Array, window: Window, groups: int = 1) -> Array:
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        (window.stride, window.stride),
        window.pads(x, kernel),
        rhs_dilation=(window.dilation, window.dilation),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )


def _matmul_form(x: Array, kernel: Array, window: Window) -> Array:
    """A 1×1 kernel as one product of two matrices, which Eigen is better at than at one with three free axes."""
    x = x[:, :: window.stride, :: window.stride]
    return (x.reshape(-1, x.shape[-1]) @ kernel[0, 0]).reshape(*x.shape[:-1], -1)


def _patches_form(x: Array, kernel: Array, window: Window) -> Array:
    """A row of a matrix for what the kernel sees at each place, times the kernel as a matrix."""
    patches = jnp.concatenate([tap for _, _, tap in _taps(x, kernel, window)], -1)
    return _matmul_form(patches, kernel.reshape(1, 1, -1, kernel.shape[-1]), Window())


# --- depthwise: the form for the CPU ------------------------------------------------------------------------


def _padded(x: Array, kernel: Array, window: Window) -> Array:
    return jnp.pad(x, ((0, 0), *window.pads(x, kernel), (0, 0)))


def _taps(x: Array, kernel: Array, window: Window) -> Iterator[tuple[int, int, Array]]:
    """Each (r, s) of the kernel with what it is multiplied by, [b, ceil(h / stride), ceil(w / stride), c]."""
    rows, columns = window.outputs(x.shape[1], kernel.shape[0]), window.outputs(x.shape[2], kernel.shape[1])
    x = _padded(x, kernel, window)
    for r in range(kernel.shape[0]):
        for s in range(kernel.shape[1]):
            top, left = r * window.dilation, s * window.dilation
            bottom, right = top + (rows - 1) * window.stride + 1, left + (columns - 1) * window.stride + 1
            yield r, s, x[:, top : bottom : window.stride, left : right : window.stride]


def _shifted_sum(x: Array, kernel: Array, window: Window) -> Array:
    """Multiply-adds of shifted inputs, which XLA fuses into one pass; summed in float32 at least."""
    wide = jnp.promote_types(x.dtype, jnp.float32)
    terms = (tap.astype(wide) * kernel[r : r + 1, s : s + 1].astype(wide) for r, s, tap in _taps(x, kernel, window))
    return functools.reduce(jnp.add, terms).astype(x.dtype)


def _kernel_gradient(x: Array, kernel: Array, dy: Array, window: Window) -> Array:
    """sum over b, i, j of dy[b, i, j, c] * x[b, i * stride + r * dilation, j * stride + s * dilation, c].

    As a reduction for each (r, s), XLA reads both arrays r * s times and doesn't vectorise. A loop over rows that adds
    into r * s arrays [b, 1, w, c] reads them once and vectorises over channels. Not a loop over images: the batch
    is the axis that devices share.
    """
    wide = jnp.promote_types(x.dtype, jnp.float32)
    batch, rows, columns, channels = dy.shape
    stride, dilation = window.stride, window.dilation
    taps = [(r * dilation, s * dilation) for r in range(kernel.shape[0]) for s in range(kernel.shape[1])]
    x = _padded(x, kernel, window)
    unroll = 2 if rows % 2 == 0 else 1  # halves how often the sums are read and written

    def add_rows(turn: Array, sums: tuple[Array, ...]) -> tuple[Array, ...]:
        for row in (turn * unroll + step for step in range(unroll)):
            seen = jax.lax.dynamic_slice_in_dim(x, row * stride, taps[-1][0] + 1, axis=1).astype(wide)
            here = jax.lax.dynamic_slice_in_dim(dy, row, 1, axis=1).astype(wide)
            ends = [left + (columns - 1) * stride + 1 for _, left in taps]
            sums = tuple(
                total + seen[:, top : top + 1, left:end:stride] * here
                for total, (top, left), end in zip(sums, taps, ends, strict=True)
            )
        return sums

    zeros = tuple(jnp.zeros((batch, 1, columns, channels), wide) for _ in taps)
    sums = jax.lax.fori_loop(0, rows // unroll, add_rows, zeros)
    return jnp.stack([total.sum((0, 1, 2)) for total in sums]).reshape(kernel.shape).astype(kernel.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _shifted_form(x: Array, kernel: Array, window: Window) -> Array:
    return _shifted_sum(x, kernel, window)


def _shifted_forward(x: Array, kernel: Array, window: Window) -> tuple[Array, tuple[Array, Array]]:
    return _shifted_sum(x, kernel, window), (x, kernel)


def _shifted_backward(window: Window, residuals: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
    x, kernel = residuals
    (dx,) = jax.vjp(lambda x: _shifted_sum(x, kernel, window), x)[1](dy)
    return dx, _kernel_gradient(x, kernel, dy, window)


_shifted_form.defvjp(_shifted_forward, _shifted_backward)


# --- the functions ------------------------------------------------------------------------------------------


def _depthwise_lax_form(x: Array, kernel: Array, window: Window) -> Array:
    return _lax_form(x, kernel, window, groups=x.shape[-1])


_depthwise = _by_platform(cpu=_shifted_form, default=_depthwise_lax_form)
_pointwise = _by_platform(cpu=_matmul_form, default=_lax_form)
_of_image = _by_platform(cpu=_patches_form, default=_lax_form)


def conv(
    x: Float[Array, "b h w i"],
    kernel: Float[Array, "r s i o"],
    *,
    stride: int = 1,
    dilation: int = 1,
    padding: Padding = "same",
) -> Float[Array, "b h/stride w/stride o"]:
    """Convolves over all channels.

    Args:
      x: of the same type as the kernel, which the result has too; sums are in float32 at least.
      kernel: of odd r and s.
      stride: of rows and columns; heights and widths are divided by it and rounded up.
      dilation: rows and columns between taps of the kernel.
      padding: as `Window.pad` says.
    """
    window = Window(stride, dilation, padding)
    if kernel.shape[:2] == (1, 1):
        return _pointwise(x, kernel, window)
    form = _of_image if x.shape[-1] <= IMAGE_CHANNELS else _lax_form
    return form(x, kernel, window)


def depthwise_conv(
    x: Float[Array, "b h w c"],
    kernel: Float[Array, "r s 1 c"],
    *,
    stride: int = 1,
    dilation: int = 1,
    padding: Padding = "same",
) -> Float[Array, "b h/stride w/stride c"]:
    """Convolves each channel with a kernel of its own; arguments as for `conv`.

    Raises:
      UserError: if ``trailing`` padding leaves nothing of a map that is too small.
    """
    window = Window(stride, dilation, padding)
    if 0 in (window.outputs(x.shape[1], kernel.shape[0]), window.outputs(x.shape[2], kernel.shape[1])):
        raise UserError(
            f"a map of {x.shape[1]}×{x.shape[2]} is too small to be halved with Keras' padding of MobileNetV1; give"
            " larger images, or model.padding=same"
        )
    return _depthwise(x, kernel, window)


# --- layers -------------------------------------------------------------------------------------------------


def conv_init(name: Init) -> Initializer:
    """Of kernels [r, s, i, o], depthwise ones [r, s, 1, c] included.

    truncated_normal: 0.09, cut at ±0.18 (TF-slim's ``mobilenet.training_scope``).
    kaiming_fan_out: normal of standard deviation sqrt(2 / (r * s * o)), also where o are the channels of a depthwise
      kernel: torchvision's MobileNetV2, since ``torch.nn.init`` takes the first axis of the weight for the outputs of
      one input.
    kaiming_fan_out_grouped: as EfficientNet and timm, which divide by the groups: sqrt(2 / (r * s)) for a depthwise
      kernel. Batch norm takes the scale of a kernel out again, but the smaller a kernel, the further a step of the same
      learning rate turns it: this one bears the larger learning rates.
    """
    if name == "truncated_normal":
        return nn.initializers.truncated_normal(0.09)
    fan_out = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
    if name == "kaiming_fan_out":
        return fan_out

    def grouped(key: Key, shape: tuple[int, ...], dtype: DTypeLike) -> Array:
        is_depthwise = shape[2] == 1
        return (
            nn.initializers.normal((2 / math.prod(shape[:2])) ** 0.5)(key, shape, dtype)
            if is_depthwise
            else fan_out(key, shape, dtype)
        )

    return grouped


def dense_init(name: Init) -> Initializer:
    """Of a classifier's kernel [c, k]: as slim's convolutions (its logits are one), or torchvision's N(0, 0.01)."""
    return conv_init(name) if name == "truncated_normal" else nn.initializers.normal(0.01)


class Conv(nn.Module):
    """`conv` with a kernel [r, s, i, o] of float32 at least, without bias.

    Attributes:
      features: channels out.
      kernel_size: rows and columns of the kernel, odd.
      stride: of rows and columns.
      dilation: rows and columns between taps of the kernel.
      padding: as `Window.pad` says.
      dtype: of the computation and the result.
      kernel_init: initialiser of the kernel.
    """

    features: int
    kernel_size: int = 1
    stride: int = 1
    dilation: int = 1
    padding: Padding = "same"
    dtype: DTypeLike = jnp.float32
    kernel_init: Initializer = conv_init("kaiming_fan_out")

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
        )


class DepthwiseConv(nn.Module):
    """`depthwise_conv` with a kernel [r, s, 1, c] of float32 at least, without bias; attributes as of `Conv`."""

    kernel_size: int = 3
    stride: int = 1
    dilation: int = 1
    padding: Padding = "same"
    dtype: DTypeLike = jnp.float32
    kernel_init: Initializer = conv_init("kaiming_fan_out")

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
        )
