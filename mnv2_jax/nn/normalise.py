"""Normalisation by the statistics of groups with the activation behind it, its gradient written out.

What JAX derives from the forward pass, XLA's GPU backend computes in 4 passes over the map forward and 8 backward for
a norm with relu6 (block_2/expand_norm of MobileNetV2 on an H200, jaxlib 0.11.2). Written out it is 3 and 5: the
statistics read the map, the result reads and writes it; backward, two sums read the map and the cotangent, and the
gradient reads both again and is written.
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
    """Batch norm over groups of ``group_size`` images that follow each other, then the activation.

    Args:
      x: of any float type; everything between is float32 at least.
      scale: of float32 at least.
      bias: likewise.
      group_size: divides b.
      epsilon: added to the variance.
      act: None for none.
      sums: how those over space are computed.
    """
    return _forward(x, scale, bias, group_size, epsilon, act, sums)[0]


_Residuals = tuple[Array, Array, Array, Array, Array, Array]


def _forward(
    x: Array, scale: Array, bias: Array, group_size: int, epsilon: float, act: Activation | None, sums: Sums
) -> tuple[Normalised, _Residuals]:
    values = _wide(x)
    count = group_size * math.prod(x.shape[1:-1])
    # Mean and variance in one pass, as in `nn.norm`.
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
    """With n values in a group, z = x * factor + offset, x̂ = (x - mean) * inverse and dz the cotangent of z,

    dscale = Σ dz x̂,  dbias = Σ dz,  dx = factor (dz - mean(dz) - x̂ mean(dz x̂)),

    and what the cotangents of mean and variance themselves add. dz is computed anew for the sums and for dx: the
    barriers keep XLA from writing it, or the mask of the activation, down in between, which is a pass more.
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
    """x, and the cotangent of z where dy is that of act(z) and z = x * factor + offset; float32 at least."""
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
    """Gives Σx and Σx² of x."""
    of_gradient: Callable[[Array, Array, Array, Array, Activation | None], TwoSums]
    """Gives Σdz and Σdz x, from the arguments of `of_activation`."""


def _together(*terms: Array) -> Sequence[Array]:
    """Sums of [b, *space, c] over space, by one operator for all: of several XLA may make several passes."""
    space = tuple(range(1, terms[0].ndim - 1))
    if not space:
        return terms
    zeros = tuple(jnp.zeros((), term.dtype) for term in terms)
    found: Sequence[Array] = jax.lax.reduce(terms, zeros, lambda one, other: tuple(map(jnp.add, one, other)), space)
    return found


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
    """[b, c] summed over the images of each group, [g, c]."""
    return of_images.reshape(-1, group_size, of_images.shape[-1]).sum(1)


def _over(of_group: Array, x: Array) -> Array:
    """[g, c] as [b, 1…, c] for x [b, *space, c]."""
    groups, channels = of_group.shape
    repeated = jnp.broadcast_to(of_group[:, None], (groups, x.shape[0] // groups, channels))
    return repeated.reshape(x.shape[0], *(1 for _ in x.shape[1:-1]), channels)
