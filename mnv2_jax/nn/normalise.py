"""Normalisation by the statistics of groups, with the activation behind it; the gradient is written out by hand.

If JAX derives the gradient, XLA's GPU backend takes 4 passes over the map forward and 8 backward for a norm with relu6
(block_2/expand_norm of MobileNetV2 on an H200, jaxlib 0.11.2). Written out it takes 3 and 5. Forward, the statistics
read the map, and the result reads and writes it. Backward, two sums read the map and the cotangent, and the gradient
reads both again and writes its result.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Float

from mnv2_jax.nn.activations import Activation, activate
from mnv2_jax.types import Array


class Normalised(NamedTuple):
    """Result of `normalise_groups`."""

    y: Float[Array, "b *space c"]
    """Normalised and activated map, of the type of x."""
    mean: Float[Array, "g c"]
    """Mean of each group, float32 at least."""
    var: Float[Array, "g c"]
    """Variance of each group, divided by the number of values; float32 at least."""


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5, 6))
def normalise_groups(
    x: Float[Array, "b *space c"],
    scale: Float[Array, " c"],
    bias: Float[Array, " c"],
    group_size: int,
    epsilon: float,
    act: Activation | None,
    sums: Sums,
) -> Normalised:
    """Applies batch norm over groups of ``group_size`` consecutive images, then the activation.

    Args:
      x: input of any float type; the computation is in float32 at least.
      scale: scale, float32 at least.
      bias: bias, float32 at least.
      group_size: images in a group; divides b.
      epsilon: added to the variance.
      act: the activation; None for none.
      sums: how the sums over space are computed.
    """
    return _forward(x, scale, bias, group_size, epsilon, act, sums)[0]


_Residuals = tuple[Array, Array, Array, Array, Array, Array]


def _forward(
    x: Array, scale: Array, bias: Array, group_size: int, epsilon: float, act: Activation | None, sums: Sums
) -> tuple[Normalised, _Residuals]:
    values = _wide(x)
    count = group_size * math.prod(x.shape[1:-1])
    # Mean and variance take one pass, as in `nn.norm`.
    total, squares = (_over_images(part, group_size) for part in sums.moments(x))
    mean = total / count
    var = jnp.maximum(squares / count - jnp.square(mean), 0)
    inverse = jax.lax.rsqrt(var + epsilon)
    factor = scale[None] * inverse
    offset = bias[None] - mean * factor
    y = activate(values * _over(factor, x) + _over(offset, x), act).astype(x.dtype)
    return Normalised(y, mean, var), (x, mean, inverse, factor, offset, scale)


def _backward(
    group_size: int,
    epsilon: float,
    act: Activation | None,
    sums: Sums,
    residuals: _Residuals,
    cotangents: Normalised,
) -> tuple[Array, Array, Array]:
    """Computes the gradients of x, scale and bias.

    With z = x * factor + offset, x̂ = (x - mean) * inverse and dz the cotangent of z they are

    dscale = Σ dz x̂,  dbias = Σ dz,  dx = factor (dz - mean(dz) - x̂ mean(dz x̂)),

    where dx also has the terms from the cotangents of mean and variance. dz is computed twice, for the sums and for dx.
    The barriers keep XLA from writing dz, or the mask of the activation, to memory in between, which would be one more
    pass.
    """
    x, mean, inverse, factor, offset, scale = residuals
    count = group_size * math.prod(x.shape[1:-1])

    x, dy = jax.lax.optimization_barrier((x, cotangents.y))
    total, with_x = (_over_images(part, group_size) for part in sums.of_gradient(x, dy, factor, offset, act))
    with_normalised = inverse * (with_x - mean * total)
    of_var = 2 * cotangents.var / count
    slope = of_var - factor * inverse * with_normalised / count
    constant = (cotangents.mean - factor * total) / count - slope * mean
    x, dy = jax.lax.optimization_barrier((x, dy))
    values, dz = of_activation(x, dy, factor, offset, act)
    dx = (dz * _over(factor, x) + values * _over(slope, x) + _over(constant, x)).astype(x.dtype)
    return dx, with_normalised.sum(0).astype(scale.dtype), total.sum(0).astype(scale.dtype)


normalise_groups.defvjp(_forward, _backward)


def _wide(x: Array) -> Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def of_activation(x: Array, dy: Array, factor: Array, offset: Array, act: Activation | None) -> tuple[Array, Array]:
    """Returns x and the cotangent of z, given dy, the cotangent of act(z), with z = x * factor + offset.

    Both are float32 at least.
    """
    values = _wide(x)
    z = values * _over(factor, x) + _over(offset, x)
    (dz,) = jax.vjp(lambda z: activate(z, act), z)[1](_wide(dy))
    return values, dz


# --- sums over space ----------------------------------------------------------------------------------------


TwoSums: TypeAlias = Sequence[Array] | Float[Array, "2 b c"]
"""Two arrays [b, c], float32 at least."""


class Sums(NamedTuple):
    """Ways to sum over space."""

    moments: Callable[[Array], TwoSums]
    """Computes Σx and Σx² of x."""
    of_gradient: Callable[[Array, Array, Array, Array, Activation | None], TwoSums]
    """Computes Σdz and Σdz x, from the arguments of `of_activation`."""


def _together(*terms: Array) -> Sequence[Array]:
    """Sums each [b, *space, c] over space, all with one operator: for several, XLA may make several passes."""
    space = tuple(range(1, terms[0].ndim - 1))
    if not space:
        return terms
    zeros = tuple(jnp.zeros((), term.dtype) for term in terms)
    sums: Sequence[Array] = jax.lax.reduce(terms, zeros, lambda one, other: tuple(map(jnp.add, one, other)), space)
    return sums


def _moments(x: Array) -> Sequence[Array]:
    values = _wide(x)
    return _together(values, jnp.square(values))


def _of_gradient(x: Array, dy: Array, factor: Array, offset: Array, act: Activation | None) -> Sequence[Array]:
    values, dz = of_activation(x, dy, factor, offset, act)
    return _together(dz, dz * values)


def _triton_moments(x: Array) -> TwoSums:
    from mnv2_jax.nn import norm_triton

    return norm_triton.moments(x) if x.ndim == 4 else _moments(x)


def _triton_of_gradient(x: Array, dy: Array, factor: Array, offset: Array, act: Activation | None) -> TwoSums:
    from mnv2_jax.nn import norm_triton

    compute = norm_triton.gradient_sums if x.ndim == 4 and act in norm_triton.ACTIVATIONS else _of_gradient
    return compute(x, dy, factor, offset, act)


SUMS: Mapping[str, Sums] = {
    "written": Sums(_moments, _of_gradient),
    "triton": Sums(_triton_moments, _triton_of_gradient),
}
"""Ways to sum by the names of `forms.NormForm`."""


def _over_images(of_images: Array, group_size: int) -> Array:
    """Sums [b, c] over the images of each group, to [g, c]."""
    return of_images.reshape(-1, group_size, of_images.shape[-1]).sum(1)


def _over(of_group: Array, x: Array) -> Array:
    """Repeats [g, c] for the images of each group, and reshapes it to [b, 1…, c] for x [b, *space, c]."""
    groups, channels = of_group.shape
    repeated = jnp.broadcast_to(of_group[:, None], (groups, x.shape[0] // groups, channels))
    return repeated.reshape(x.shape[0], *(1 for _ in x.shape[1:-1]), channels)
