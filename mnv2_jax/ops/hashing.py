"""Hashes of batches and arrays: they tell two of them apart, and don't depend on how these lie on devices."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from mnv2_jax.types import Array, Batch


def batch_hash(batch: Batch) -> Array:
    """Computes a hash, uint32 [], of all bytes of a batch and their positions: array, row and place in the row.

    It is the sum modulo 2^32 of every byte times a weight that depends on its position. Sums of integers are the same
    in any order, so devices and processes don't change it. It detects differences, but doesn't protect against forgery.
    """
    total = jnp.zeros((), jnp.uint32)
    for salt, name in enumerate(sorted(batch)):
        array = batch[name]
        array = array.astype(jnp.uint8) if array.dtype == jnp.bool_ else array
        data = jax.lax.bitcast_convert_type(array, jnp.uint8).reshape(array.shape[0], -1).astype(jnp.uint32)
        rows, columns = (jax.lax.broadcasted_iota(jnp.uint32, data.shape, axis) for axis in range(2))
        place = _mixed(_mixed(rows + jnp.uint32(salt << 24)) ^ columns)
        total += jnp.sum((data + jnp.uint32(1)) * (place | jnp.uint32(1)), dtype=jnp.uint32)
    return total


def array_hash(array: Array) -> Array:
    """Computes a hash, uint32 [], of all bits of an array and their positions; it doesn't depend on the shape.

    It is the sum modulo 2^32 of every word, of 32 bits at most, mixed with its position. Any change of a single word
    changes it. (A sum of products, as above, would not notice that an even number of signs, the highest bits, change.)
    """
    array = array.astype(jnp.uint8) if array.dtype == jnp.bool_ else array
    word = {1: jnp.uint8, 2: jnp.uint16}.get(array.dtype.itemsize, jnp.uint32)  # of 64 bits it makes an axis of two
    data = jax.lax.bitcast_convert_type(array, word).astype(jnp.uint32)
    # The array keeps its shape: flattened, it might have to move between the devices.
    place = _mixed(jax.lax.iota(jnp.uint32, data.size).reshape(data.shape))
    return jnp.sum(_mixed(data ^ place), dtype=jnp.uint32)


def _mixed(x: Array) -> Array:
    """Permutes the 32-bit numbers so that neighbours scatter (the finaliser of MurmurHash3, Appleby 2008)."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
