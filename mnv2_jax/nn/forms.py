"""The ways ("forms") to compute a convolution over [b, h, w, c], and which form is used where.

XLA's CPU backend runs a depthwise convolution 10 to 50 times, its input gradient 35 to 120 times and its kernel
gradient 5 to 30 times slower than the same sums written as shifted multiply-adds, and the gradients of a 1×1
convolution 2 to 9 times slower than matrix products (MobileNetV2's layers, jaxlib 0.10.2). So the CPU uses the shifted
multiply-adds and the matrix products. GPU and TPU, whose libraries have kernels for convolutions, use
`jax.lax.conv_general_dilated`, except that training on newer NVIDIA GPUs uses our own kernels (`fastest`). The forms
agree up to rounding.
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
"""A gradient of a convolution: (x, kernel, dy, window) -> dx or dkernel, where dy is the cotangent of y."""


class Form(NamedTuple):
    """One way to compute a convolution and its gradients."""

    value: Value
    input_gradient: Gradient
    """Gradient dx; of x it reads only the shape."""
    kernel_gradient: Gradient
    """Gradient dkernel; of the kernel it reads only the shape."""

    def __call__(self, x: Array, kernel: Array, window: Window) -> Array:
        """Convolves. Its derivative uses this form's own gradients, and can be taken once."""
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
    """Makes a form whose gradients JAX derives from ``value``."""

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
    """Applies a 1×1 kernel as a product of two matrices, which Eigen computes faster than one with three free axes."""
    x = x[:, :: window.stride, :: window.stride]
    return (x.reshape(-1, x.shape[-1]) @ kernel[0, 0]).reshape(*x.shape[:-1], -1)


def _patches(x: Array, kernel: Array, window: Window) -> Array:
    """Convolves as a product of matrices: a row for the patch under the kernel at each position, times the kernel."""
    patches = jnp.concatenate([tap for _, _, tap in _taps(x, kernel, window)], -1)
    return _matmul(patches, kernel.reshape(1, 1, -1, kernel.shape[-1]), Window())


# --- depthwise as shifted multiply-adds ---------------------------------------------------------------------


def _padded(x: Array, kernel: Array, window: Window) -> Array:
    return jnp.pad(x, ((0, 0), *window.pads(x, kernel), (0, 0)))


def _taps(x: Array, kernel: Array, window: Window) -> Iterator[tuple[int, int, Array]]:
    """Yields each tap (r, s) of the kernel with its input, [b, ceil(h / stride), ceil(w / stride), c]."""
    rows, columns = window.outputs(x.shape[1], kernel.shape[0]), window.outputs(x.shape[2], kernel.shape[1])
    x = _padded(x, kernel, window)
    for r in range(kernel.shape[0]):
        for s in range(kernel.shape[1]):
            row0, column0 = r * window.dilation, s * window.dilation
            row1, column1 = row0 + (rows - 1) * window.stride + 1, column0 + (columns - 1) * window.stride + 1
            yield r, s, x[:, row0 : row1 : window.stride, column0 : column1 : window.stride]


def _shifted(x: Array, kernel: Array, window: Window) -> Array:
    """Convolves as multiply-adds of shifted inputs, which XLA fuses into one pass; sums in float32 at least."""
    wide = jnp.promote_types(x.dtype, jnp.float32)
    terms = (tap.astype(wide) * kernel[r : r + 1, s : s + 1].astype(wide) for r, s, tap in _taps(x, kernel, window))
    return functools.reduce(jnp.add, terms).astype(x.dtype)


_shifted_input_gradient = _differentiated(_shifted).input_gradient


def _reductions(x: Array, kernel: Array, dy: Array, window: Window) -> Array:
    """Computes the kernel gradient as r * s sums over positions, which XLA fuses into one pass, then over images."""
    wide = jnp.promote_types(x.dtype, jnp.float32)
    sums = [(tap.astype(wide) * dy.astype(wide)).sum((1, 2)) for _, _, tap in _taps(x, kernel, window)]
    return jnp.stack(sums).sum(1).reshape(kernel.shape).astype(kernel.dtype)


def _row_loop(x: Array, kernel: Array, dy: Array, window: Window) -> Array:
    """Sums dy[b, i, j, c] * x[b, i * stride + r * dilation, j * stride + s * dilation, c] over b, i and j.

    If it is written as a reduction for each (r, s), XLA on the CPU reads both arrays r * s times and doesn't vectorise.
    A loop over rows that adds into r * s arrays [b, 1, w, c] reads them once and vectorises over channels. The loop is
    not over images, because devices share the batch axis.
    """
    wide = jnp.promote_types(x.dtype, jnp.float32)
    batch, rows, columns, channels = dy.shape
    stride, dilation = window.stride, window.dilation
    taps = [(r * dilation, s * dilation) for r in range(kernel.shape[0]) for s in range(kernel.shape[1])]
    x = _padded(x, kernel, window)
    unroll = 2 if rows % 2 == 0 else 1  # two rows per turn: the sums are read and written half as often

    def add_rows(turn: Array, sums: tuple[Array, ...]) -> tuple[Array, ...]:
        for row in (turn * unroll + step for step in range(unroll)):
            x_rows = jax.lax.dynamic_slice_in_dim(x, row * stride, taps[-1][0] + 1, axis=1).astype(wide)
            dy_row = jax.lax.dynamic_slice_in_dim(dy, row, 1, axis=1).astype(wide)
            ends = [column0 + (columns - 1) * stride + 1 for _, column0 in taps]
            sums = tuple(
                total + x_rows[:, row0 : row0 + 1, column0:end:stride] * dy_row
                for total, (row0, column0), end in zip(sums, taps, ends, strict=True)
            )
        return sums

    zeros = tuple(jnp.zeros((batch, 1, columns, channels), wide) for _ in taps)
    sums = jax.lax.fori_loop(0, rows // unroll, add_rows, zeros)
    return jnp.stack([total.sum((0, 1, 2)) for total in sums]).reshape(kernel.shape).astype(kernel.dtype)


# --- depthwise as our own kernels for GPUs ------------------------------------------------------------------


def triton_form(plan: depthwise_triton.Plan | None = None) -> Form:
    """Makes the form of our GPU kernels. ``plan`` is that of the kernel gradient; `depthwise_triton.WIDE` if unset.

    The kernels are imported where they are used: importing Pallas takes time, and a later JAX may lack its Triton.
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


# --- which form is used where -------------------------------------------------------------------------------

LAX = _differentiated(_lax)
"""Form for any convolution: XLA's own operator, which the library of the platform computes."""

DEPTHWISE: Mapping[str, Form] = {
    "lax": LAX,
    "shifted": Form(_shifted, _shifted_input_gradient, _reductions),
    "rows": Form(_shifted, _shifted_input_gradient, _row_loop),
    "triton": triton_form(),
}
"""Forms for a depthwise kernel [r, s, 1, c], by name."""

POINTWISE: Mapping[str, Form] = {"lax": LAX, "matmul": _differentiated(_matmul)}
"""Forms for a kernel [1, 1, i, o], by name."""

IMAGE: Mapping[str, Form] = {"lax": LAX, "patches": _differentiated(_patches)}
"""Forms for a kernel [r, s, i, o] over the few channels of an image, by name."""

DepthwiseForm: TypeAlias = Literal["auto", "lax", "shifted", "rows", "triton"]
PointwiseForm: TypeAlias = Literal["auto", "lax", "matmul"]
ImageForm: TypeAlias = Literal["auto", "lax", "patches"]
NormForm: TypeAlias = Literal["derived", "written", "triton"]
"""How the gradient of a norm with its activation is computed. ``derived``: JAX derives it. ``written``: it is written
out (`nn.normalise`), and XLA computes its sums. ``triton``: written out, with sums by our own GPU kernels."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Forms:
    """How each kind of layer is computed. ``auto``: the fastest form on the target platform without our own kernels."""

    depthwise: DepthwiseForm = "auto"
    pointwise: PointwiseForm = "auto"
    image: ImageForm = "auto"
    norm: NormForm = "derived"


AUTO = Forms()
LIBRARY = Forms(depthwise="lax", pointwise="lax", image="lax")
"""XLA's own convolutions on every platform: used for exports, and as the baseline for our own forms."""


NVIDIA = Forms(depthwise="triton", pointwise="matmul", image="patches", norm="triton")
"""The forms for newer NVIDIA GPUs. Together they make MobileNetV2's step at 224 px in bfloat16 on an H200 1.35 times as
fast as `AUTO` (`bench gpu`). Other GPUs, networks and types weren't timed."""

_TRITON_FROM = 8.0
"""Compute capability of the oldest GPUs that Pallas' Triton compiles for (Ampere)."""


def fastest(compute_capability: float | None, dtype: str) -> Forms:
    """Returns the forms that training uses.

    Args:
      compute_capability: compute capability of an NVIDIA GPU, such as 9.0; None for another device.
      dtype: type of the computation. For float64 the result is `AUTO`.
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
    """Makes a form that, with its gradients, is that of the platform for which the program is lowered.

    That need not be the platform that lowers it: a program compiled on a CPU machine for a TPU gets the TPU's form. The
    backward pass makes the choice again, so that nothing differentiates through a switch.
    """

    def chosen(part: int) -> Callable[..., Array]:
        def compute(*arrays_and_window: Any) -> Array:
            *arrays, window = arrays_and_window
            branches: dict[str, Any] = {name: _over(form[part], window) for name, form in forms.items()}
            result: Array = jax.lax.platform_dependent(*arrays, **branches)
            return result

        return compute

    return Form(*map(chosen, range(len(Form._fields))))


_AUTO_DEPTHWISE = _by_platform(cpu=DEPTHWISE["rows"], default=LAX)
_AUTO_POINTWISE = _by_platform(cpu=POINTWISE["matmul"], default=LAX)
_AUTO_IMAGE = _by_platform(cpu=IMAGE["patches"], default=LAX)


def depthwise_form(name: DepthwiseForm) -> Form:
    """Returns the form of that name for kernels [r, s, 1, c]."""
    return _AUTO_DEPTHWISE if name == "auto" else DEPTHWISE[name]


def pointwise_form(name: PointwiseForm) -> Form:
    """Returns the form of that name for kernels [1, 1, i, o]."""
    return _AUTO_POINTWISE if name == "auto" else POINTWISE[name]


def image_form(name: ImageForm) -> Form:
    """Returns the form of that name for kernels [r, s, i, o] over the channels of an image."""
    return _AUTO_IMAGE if name == "auto" else IMAGE[name]
