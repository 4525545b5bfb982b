"""Sums of a map [b, h, w, c] that a norm needs, as Pallas kernels for NVIDIA GPUs, limited only by memory bandwidth.

XLA's own reductions over space reach two thirds of an H200's bandwidth on MobileNetV2's maps. If the activation is part
of the sum, XLA writes its mask to memory and reads it again. These kernels read each array once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Float

from mnv2_jax.nn.activations import Activation, activate
from mnv2_jax.nn.partition import each_its_images
from mnv2_jax.types import Array

WARPS = 4
"""Warps of 32 threads in a program."""

VALUES = WARPS * 32 * 8
"""Number of values of an array that a program loads at once: 16 bytes of bfloat16 per thread."""

TURNS = 8
"""Number of such loads that a program starts one right after the other, so that many are under way."""

ACTIVATIONS = frozenset({None, "relu", "relu6", "hard_swish"})
"""Activations that `gradient_sums` computes. Pallas' Triton (JAX 0.10 and 0.11) has no erf, which gelu is made of."""


def _channel_block(channels: int) -> int:
    """Returns the channels per program: a power of two with which rows of the map are read in whole 32-byte sectors.

    It is the largest power of two up to 64 that divides the channels. If that is below 16, it is the next power of two
    from the number of channels on, up to 64, and the excess is masked.
    """
    divides = min(channels & -channels, 64)
    return divides if divides >= 16 else min(pl.next_power_of_2(channels), 64)


def _sums(
    arrays: tuple[Array, ...],
    of_group: tuple[Array, ...],
    terms: Callable[..., tuple[Array, ...]],
    count: int,
    interpret: bool,
) -> Array:
    """Sums ``count`` terms of the arrays over space, to float32 [count, b, c].

    Args:
      arrays: [b, h, w, c].
      of_group: [g, c], float32; g divides b.
      terms: computes the terms from a block of each array, in float32, and the row of its group in each ``of_group``.
      count: number of terms.
      interpret: run the kernel without a GPU, slowly.
    """
    batch, height, width, channels = arrays[0].shape
    places = height * width
    block = _channel_block(channels)
    rows = VALUES // block
    turns = min(TURNS, pl.cdiv(places, rows))
    chunks = pl.cdiv(places, rows * turns)
    blocks = pl.cdiv(channels, block)
    shape = rows, block
    group_size = batch // of_group[0].shape[0] if of_group else batch

    def norm_sums(*refs: jax.Ref) -> None:
        inputs, group_refs, result_ref = refs[: len(arrays)], refs[len(arrays) : -1], refs[-1]
        image, chunk = pl.program_id(2), pl.program_id(1)
        channel = pl.program_id(0) * block + jax.lax.broadcasted_iota(jnp.int32, (block,), 0)
        exists = None if channels % block == 0 else channel < channels
        group = jnp.broadcast_to(image // group_size, (block,))
        other = None if exists is None else 0.0
        rows_of_group = [plgpu.load(ref.at[group, channel], mask=exists, other=other)[None] for ref in group_refs]
        row = jax.lax.broadcasted_iota(jnp.int32, shape, 0)
        across = jnp.broadcast_to(channel[None], shape)
        images = jnp.broadcast_to(image, shape)
        totals = [jnp.zeros(shape, jnp.float32) for _ in range(count)]
        for turn in range(turns):
            place = (chunk * turns + turn) * rows + row
            inside = [] if places % (rows * turns) == 0 else [place < places]
            inside += [] if channels % block == 0 else [across < channels]
            mask = functools.reduce(jnp.logical_and, inside) if inside else None
            at = place * channels + across
            loaded = [
                plgpu.load(ref.at[images, at], mask=mask, other=None if mask is None else 0.0).astype(jnp.float32)
                for ref in inputs
            ]
            new = terms(*loaded, *rows_of_group)
            # Outside the map every array is 0, and so is every term, because each has a factor x or dy.
            totals = [total + term for total, term in zip(totals, new, strict=True)]
        for number, total in enumerate(totals):
            at_result = tuple(jnp.full((block,), part) for part in (number, image, chunk))
            plgpu.store(result_ref.at[(*at_result, channel)], total.sum(0), mask=exists)

    partials = pl.pallas_call(
        norm_sums,
        jax.ShapeDtypeStruct((count, batch, chunks, channels), jnp.float32),
        grid=(blocks, chunks, batch),  # neighbours run together: they share lines of the memory
        compiler_params=plgpu.CompilerParams(num_warps=WARPS, num_stages=1),
        interpret=interpret,
        name="norm_sums",
    )(*(x.reshape(batch, -1) for x in arrays), *of_group)
    return partials.sum(2)


@functools.partial(jax.jit, static_argnames="interpret")
def moments(x: Float[Array, "b h w c"], interpret: bool = False) -> Float[Array, "2 b c"]:
    """Sums x and x² over space."""

    def of_images(x: Array) -> Array:
        return _sums((x,), (), lambda x: (x, x * x), 2, interpret)

    return each_its_images(of_images, "b h w c -> t b c")(x)


@functools.partial(jax.jit, static_argnames=("act", "interpret"))
def gradient_sums(
    x: Float[Array, "b h w c"],
    dy: Float[Array, "b h w c"],
    factor: Float[Array, "g c"],
    offset: Float[Array, "g c"],
    act: Activation | None,
    interpret: bool = False,
) -> Float[Array, "2 b c"]:
    """Sums dz and dz x over space, where dy is the cotangent of act(z) and z = x * factor + offset.

    On a GPU, ``act`` must be one of `ACTIVATIONS`.
    """

    def terms(x: Array, dy: Array, factor: Array, offset: Array) -> tuple[Array, Array]:
        dz = dy if act is None else jax.vjp(lambda z: activate(z, act), x * factor + offset)[1](dy)[0]
        return dz, dz * x

    def of_images(x: Array, dy: Array, factor: Array, offset: Array) -> Array:
        return _sums((x, dy), (factor, offset), terms, 2, interpret)

    return each_its_images(of_images, "b h w c, b h w c, g c, g c -> t b c")(x, dy, factor, offset)
