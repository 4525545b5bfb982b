"""Augmentation on the device, inside jit: each image by a key of its own.

The key of an image comes from (seed, epoch, index) and from nothing else, so what is done to it does not depend
on the batch, the devices or a restart.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array as AnyArray
from jaxtyping import Float, Shaped, UInt8

from mnv2_jax.types import Array, Key


def random_flip(keys: Key, images: Shaped[AnyArray, "b h w c"]) -> Shaped[AnyArray, "b h w c"]:
    """Mirrors each image left to right with probability 1/2."""
    flip = jax.vmap(jax.random.bernoulli)(keys)
    return jnp.where(flip[:, None, None, None], images[:, :, ::-1], images)


def random_shift(keys: Key, images: Shaped[AnyArray, "b h w c"], pad_pixels: int) -> Shaped[AnyArray, "b h w c"]:
    """Pads with zeros and crops back at random: a shift by -pad..pad pixels each way (He et al., 1512.03385, 4.2)."""
    _, h, w, c = images.shape
    padded = jnp.pad(images, ((0, 0), (pad_pixels, pad_pixels), (pad_pixels, pad_pixels), (0, 0)))
    corners = jax.vmap(lambda key: jax.random.randint(key, (2,), 0, 2 * pad_pixels + 1, jnp.int32))(keys)

    def crop(image: Array, corner: Array) -> Array:
        return jax.lax.dynamic_slice(image, (corner[0], corner[1], jnp.int32(0)), (h, w, c))

    return jax.vmap(crop)(padded, corners)


def adjust_saturation(
    images: Float[AnyArray, "b h w 3"], factor: Float[Array, " b 1 1 1"]
) -> Float[AnyArray, "b h w 3"]:
    """Scales the saturation of HSV and clips it to 1, hue and value kept; images in [0, 1].

    With value V and saturation S of a pixel, a channel x moves to V - (V - x) * min(factor, 1 / S): the closed
    form of the way through HSV and back.
    """
    value = images.max(axis=-1, keepdims=True)
    spread = value - images.min(axis=-1, keepdims=True)
    limit = value / jnp.where(spread > 0, spread, 1)  # 1 / S
    scale = jnp.where(spread > 0, jnp.minimum(factor, limit), 1)
    return value - (value - images) * scale


def inception_color(keys: Key, images: Float[AnyArray, "b h w 3"]) -> Float[AnyArray, "b h w 3"]:
    """Random brightness and saturation in random order, clipped to [0, 1] (TF-slim, Inception's fast mode)."""

    def draw(key: Key) -> tuple[Array, Array, Array]:
        brightness, saturation, order = jax.random.split(key, 3)
        return (
            jax.random.uniform(brightness, (), images.dtype, -32 / 255, 32 / 255),
            jax.random.uniform(saturation, (), images.dtype, 0.5, 1.5),
            jax.random.bernoulli(order),
        )

    delta, factor, brightness_first = (x[:, None, None, None] for x in jax.vmap(draw)(keys))
    # Adding the same to every channel before or after differs only in the value that the saturation sees.
    before = jnp.where(brightness_first, delta, 0)
    return jnp.clip(adjust_saturation(images + before, factor) + (delta - before), 0, 1)


def as_float(images: UInt8[AnyArray, "b h w c"] | Float[AnyArray, "b h w c"]) -> Float[AnyArray, "b h w c"]:
    """uint8 in 0..255 as floats in [0, 1], in float32 at least; floats are taken to be there already."""
    dtype = jnp.promote_types(images.dtype, jnp.float32)
    return images.astype(dtype) / 255 if images.dtype == jnp.uint8 else images.astype(dtype)


def normalise(
    images: UInt8[AnyArray, "b h w c"] | Float[AnyArray, "b h w c"],
    mean: tuple[float, ...],
    std: tuple[float, ...],
) -> Float[AnyArray, "b h w c"]:
    """uint8 in 0..255, or floats in [0, 1], as (x - mean) / std by channel, in float32 at least."""
    images = as_float(images)
    dtype, shape = images.dtype, (1, 1, 1, -1)
    return (images - jnp.asarray(mean, dtype).reshape(shape)) / jnp.asarray(std, dtype).reshape(shape)
