"""The ways to compute a convolution over [b, h, w, c], and which is taken where.

XLA's CPU backend runs a depthwise convolution 10 to 50 times, its input gradient 35 to 120 times and its kernel
gradient 5 to 30 times slower than the same sums written as shifted multiply-adds, and the gradients of a 1×1
convolution 2 to 9 times slower than matrix products (MobileNetV2's layers, jaxlib 0.10.2). On the CPU those are used;
on GPU and TPU, whose libraries have kernels for convolutions, `jax.lax.conv_general_dilated` is, but for training on
newer NVIDIA GPUs, which takes kernels of our own (`fastest`). The forms agree up to rounding.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from mnv2_jax.nn.window import Window
from mnv2_jax.types import Array

if TYPE_CHECKING:
    from mnv2_jax.nn import depthwise_triton

Value: TypeAlias = Callable[[Array, Array, Window], Array]
"""A convolution: (x, kernel, window) -> y."""

Gradient: TypeAlias = Callable[[Array, Array, Array, Window], Array]
"""One of its two gradients: (x, kernel, dy, window) -> dx or dkernel, where dy is the cotangent of y."""


class Form(NamedTuple):
    """One way to compute a convolution and its gradients."""

    value: Value
    input_gradient: Gradient
    """Reads nothing of x but its shape."""
    kernel_gradient: Gradient
    """Reads nothing of the kernel but its shape."""

    def __call__(self, x: Array, kernel: Array, window: Window) -> Array:
        """Convolves; differentiated once by this form's own gradients."""
        return _with_gradients(self, x, kernel, window)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 3))
def _with_gradients(form: Form, x: Array, kernel: Array, window: Window) -> Array:
    return form.value(x, kernel, window)


def _forward(form: Form, x: Array, kernel: Array, window: Window) -> tuple[Array, tuple[Array, Array]]:
    return form.value(x, kernel, window), (x, kernel)


def _backward(form: Form, window: Window, residuals: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
    return form.input_gradient(*residuals, dy, window), form.kernel_gradient(*residuals, dy, window)


_with_gradients.defvjp(_forward, _backward)


def _differentiated(value: Value) -> Form:
    """The form whose gradients are JAX's own of its value."""

    def input_gradient(x: Array, kernel: Array, dy: Array, window: Window) -> Array:
        (dx,) = jax.vjp(lambda x: value(x, kernel, window), x)[1](dy)
        return dx

    def kernel_gradient(x: Array, kernel: Array, dy: Array, window: Window) -> Array:
        (dkernel,) = jax.vjp(lambda kernel: value(x, kernel, window), kernel)[1](dy)
        return dkernel

    return Form(value, input_gradient, kernel_gradient)


# --- XLA's convolution --------------------------------------------------------------------------------------


def _lax(x: Array, kernel: Array, window: Window) -> Array:
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        (window.stride, window.stride),
        window.pads(x, kernel),
        rhs_dilation=(window.dilation, window.dilation),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=x.shape[-1] // kernel.shape[2],
    )


# --- matrix products ----------------------------------------------------------------------------------------


def _matmul(x: Array, kernel: Array, window: Window) -> Array:
    """A 1×1 kernel as one product of two matrices, which Eigen is better at than at one with three free axes."""
    x = x[:, :: window.stride, :: window.stride]
    return (x.reshape(-1, x.shape[-1]) @ kernel[0, 0]).reshape(*x.shape[:-1], -1)


def _patches(x: Array, kernel: Array, window: Window) -> Array:
    """A row of a matrix for what the kernel sees at each place, times the kernel as a matrix."""
    patches = jnp.concatenate([tap for _, _, tap in _taps(x, kernel, window)], -1)
    return _matmul(patches, kernel.reshape(1, 1, -1, kernel.shape[-1]), Window())


# --- depthwise as shifted multiply-adds ---------------------------------------------------------------------


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


def _shifted(x: Array, kernel: Array, window: Window) -> Array:
    """Multiply-adds of shifted inputs, which XLA fuses into one pass; summed in float32 at least."""
    wide = jnp.promote_types(x.dtype, jnp.float32)
    terms = (tap.astype(wide) * kernel[r : r + 1, s : s + 1].astype(wide) for r, s, tap in _taps(x, kernel, window))
    return functools.reduce(jnp.add, terms).astype(x.dtype)


_shifted_input_gradient = _differentiated(_shifted).input_gradient


def _reductions(x: Array, kernel: Array, dy: Array, window: Window) -> Array:
    """The kernel gradient as r * s sums over places, of which XLA makes one pass; then over images."""
    wide = jnp.promote_types(x.dtype, jnp.float32)
    sums = [(tap.astype(wide) * dy.astype(wide)).sum((1, 2)) for _, _, tap in _taps(x, kernel, window)]
    return jnp.stack(sums).sum(1).reshape(kernel.shape).astype(kernel.dtype)


def _row_loop(x: Array, kernel: Array, dy: Array, window: Window) -> Array:
    """sum over b, i, j of dy[b, i, j, c] * x[b, i * stride + r * dilation, j * stride + s * dilation, c].

    As a reduction for each (r, s), XLA on the CPU reads both arrays r * s times and doesn't vectorise. A loop over rows
    that adds into r * s arrays [b, 1, w, c] reads them once and vectorises over channels. Not a loop over images: the
    batch is the axis that devices share.
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


# --- depthwise as kernels of our own for GPUs ---------------------------------------------------------------


def triton_form(plan: depthwise_triton.Plan | None = None) -> Form:
    """Our kernels; the gradient of the kernel by a plan, unset: by that which is taken.

    They are imported where they are used: Pallas takes time, and a later JAX may be without its Triton.
    """

    def value(x: Array, kernel: Array, window: Window) -> Array:
        from mnv2_jax.nn import depthwise_triton

        return depthwise_triton.value(x, kernel, window)

    def input_gradient(x: Array, kernel: Array, dy: Array, window: Window) -> Array:
        from mnv2_jax.nn import depthwise_triton

        return depthwise_triton.input_gradient(dy, kernel, window, x.shape[1:3])

    def kernel_gradient(x: Array, kernel: Array, dy: Array, window: Window) -> Array:
        from mnv2_jax.nn import depthwise_triton

        size = kernel.shape[:2]
        return depthwise_triton.kernel_gradient(x, dy, window, size, plan=plan or depthwise_triton.WIDE)

    return Form(value, input_gradient, kernel_gradient)


# --- which is taken where -----------------------------------------------------------------------------------

LAX = _differentiated(_lax)
"""Any convolution as XLA's own operator, which the platform's library computes."""

DEPTHWISE: Mapping[str, Form] = {
    "lax": LAX,
    "shifted": Form(_shifted, _shifted_input_gradient, _reductions),
    "rows": Form(_shifted, _shifted_input_gradient, _row_loop),
    "triton": triton_form(),
}
"""A kernel [r, s, 1, c], a channel each."""

POINTWISE: Mapping[str, Form] = {"lax": LAX, "matmul": _differentiated(_matmul)}
"""A kernel [1, 1, i, o]."""

IMAGE: Mapping[str, Form] = {"lax": LAX, "patches": _differentiated(_patches)}
"""A kernel [r, s, i, o] over few channels."""

DepthwiseForm: TypeAlias = Literal["auto", "lax", "shifted", "rows", "triton"]
PointwiseForm: TypeAlias = Literal["auto", "lax", "matmul"]
ImageForm: TypeAlias = Literal["auto", "lax", "patches"]
NormForm: TypeAlias = Literal["derived", "written", "triton"]
"""The gradient of a norm with its activation: derived by JAX, or written out (`nn.normalise`), its sums by XLA or by
kernels of our own for GPUs."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Forms:
    """How each kind of layer is computed; ``auto``: what is fastest on the platform compiled for, of XLA's own."""

    depthwise: DepthwiseForm = "auto"
    pointwise: PointwiseForm = "auto"
    image: ImageForm = "auto"
    norm: NormForm = "derived"


AUTO = Forms()
LIBRARY = Forms(depthwise="lax", pointwise="lax", image="lax")
"""XLA's own convolutions on every platform: what is exported, and what ours are measured against."""


NVIDIA = Forms(depthwise="triton", pointwise="matmul", image="patches", norm="triton")
"""Together 1.35 times as fast as `AUTO` in MobileNetV2's step at 224 px in bfloat16 on an H200 (`bench gpu`); other
GPUs, networks and types weren't timed."""

_TRITON_FROM = 8.0
"""Compute capability of the oldest GPUs that Pallas' Triton compiles for (Ampere)."""


def fastest(compute_capability: float | None, dtype: str) -> Forms:
    """The forms that training takes.

    Args:
      compute_capability: an NVIDIA GPU's, as 9.0; None: another device.
      dtype: of the computation. float64 is XLA's everywhere.
    """
    if compute_capability is None or compute_capability < _TRITON_FROM or dtype == "float64":
        return AUTO
    try:
        from mnv2_jax.nn import depthwise_triton, norm_triton  # noqa: F401
    except ImportError:  # JAX says that Pallas' Triton will be removed in a later version
        return AUTO
    return NVIDIA


def _over(function: Callable[..., Array], window: Window) -> Callable[..., Array]:
    return lambda *arrays: function(*arrays, window)


def _by_platform(**forms: Form) -> Form:
    """The form of the platform that the program is lowered for, and likewise those of its gradients.

    Lowered for, not running on: a program compiled on a CPU machine for a TPU gets the TPU's form. The choice is made
    anew in the backward pass, so that nothing differentiates through a switch.
    """

    def chosen(part: int) -> Callable[..., Array]:
        def compute(*arrays_and_window: Any) -> Array:
            *arrays, window = arrays_and_window
            branches: dict[str, Any] = {name: _over(form[part], window) for name, form in forms.items()}
            found: Array = jax.lax.platform_dependent(*arrays, **branches)
            return found

        return compute

    return Form(*map(chosen, range(len(Form._fields))))


_AUTO_DEPTHWISE = _by_platform(cpu=DEPTHWISE["rows"], default=LAX)
_AUTO_POINTWISE = _by_platform(cpu=POINTWISE["matmul"], default=LAX)
_AUTO_IMAGE = _by_platform(cpu=IMAGE["patches"], default=LAX)


def depthwise_form(name: DepthwiseForm) -> Form:
    """The form of that name for kernels [r, s, 1, c]."""
    return _AUTO_DEPTHWISE if name == "auto" else DEPTHWISE[name]


def pointwise_form(name: PointwiseForm) -> Form:
    """The form of that name for kernels [1, 1, i, o]."""
    return _AUTO_POINTWISE if name == "auto" else POINTWISE[name]


def image_form(name: ImageForm) -> Form:
    """The form of that name for kernels [r, s, i, o] over an image's channels."""
    return _AUTO_IMAGE if name == "auto" else IMAGE[name]
