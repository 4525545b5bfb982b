"""Augmentation on the device, inside jit: each image has its own key.

The key of an image depends on (seed, epoch, index) only, so its augmentation does not depend on the batch, the devices
or a restart.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array as AnyArray
from jaxtyping import Bool, Float, Int, Shaped, UInt8

from mnv2_jax.config import DataConfig
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
    """Scales the saturation of HSV and clips it to 1; keeps hue and value. Images are in [0, 1].

    With value V and saturation S of a pixel, a channel x moves to V - (V - x) * min(factor, 1 / S). This is the closed
    form of the conversion to HSV and back.
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
    # The delta is the same for every channel, so its order matters only for the value that `adjust_saturation` sees.
    before = jnp.where(brightness_first, delta, 0)
    return jnp.clip(adjust_saturation(images + before, factor) + (delta - before), 0, 1)


# --- colour jitter ------------------------------------------------------------------------------------------


def _grey(image: Float[AnyArray, "h w 3"]) -> Float[AnyArray, "h w 1"]:
    """Computes the luma of ITU-R BT.601, with torchvision's coefficients."""
    return 0.2989 * image[..., 0:1] + 0.587 * image[..., 1:2] + 0.114 * image[..., 2:3]


def _blend(image: Array, other: Array | float, factor: Array) -> Array:
    return jnp.clip(factor * image + (1 - factor) * other, 0, 1)


def _shift_hue(image: Float[AnyArray, "h w 3"], turns: Float[Array, ""]) -> Float[AnyArray, "h w 3"]:
    """Adds ``turns`` to the hue of HSV; keeps saturation and value.

    A channel is the value minus the spread times a trapezium of the hue: the closed form of the conversion from HSV.
    """
    red, green, blue = image[..., 0], image[..., 1], image[..., 2]
    value = image.max(axis=-1)
    spread = value - image.min(axis=-1)
    unit = jnp.where(spread > 0, spread, 1)
    in_red, in_green, in_blue = (green - blue) / unit, 2 + (blue - red) / unit, 4 + (red - green) / unit
    # Not `red == value`: a compiler that computes a channel twice may round it in two ways.
    is_red, is_green = (red >= green) & (red >= blue), green >= blue
    sixths = jnp.where(is_red, in_red, jnp.where(is_green, in_green, in_blue)) + 6 * turns
    away = [(offset + sixths) % 6 for offset in (5, 3, 1)]
    return jnp.stack([value - spread * jnp.clip(jnp.minimum(k, 4 - k), 0, 1) for k in away], axis=-1)


_JITTERS: tuple[Callable[[Array, Array], Array], ...] = (
    lambda image, factor: _blend(image, 0.0, factor),  # brightness
    lambda image, factor: _blend(image, _grey(image).mean(), factor),  # contrast
    lambda image, factor: _blend(image, _grey(image), factor),  # saturation
    _shift_hue,
)


def draw_jitter(
    key: Key, strengths: tuple[float, float, float, float]
) -> tuple[Int[AnyArray, " n"], Float[AnyArray, " 4"]]:
    """Draws the order and the factors of `color_jitter` for one image.

    Returns:
      The indices of the strengths above 0, in the order of their use, and all four factors. With strength x they are
      uniform in max(0, 1 - x) to 1 + x for brightness, contrast and saturation, and in ± x turns for hue.
    """
    for_order, for_factors = jax.random.split(key)
    used = [place for place, strength in enumerate(strengths) if strength > 0]
    order = jax.random.permutation(for_order, jnp.asarray(used, jnp.int32))
    low = [*(max(0.0, 1 - x) for x in strengths[:3]), -strengths[3]]
    high = [*(1 + x for x in strengths[:3]), strengths[3]]
    bounds = jnp.asarray([low, high], jnp.float32)
    return order, jax.random.uniform(for_factors, (4,), jnp.float32, bounds[0], bounds[1])


def color_jitter(
    keys: Key, images: Float[AnyArray, "b h w 3"], strengths: tuple[float, float, float, float]
) -> Float[AnyArray, "b h w 3"]:
    """Changes brightness, contrast, saturation and hue in an order drawn for each image (torchvision's ColorJitter).

    Brightness blends the image with black, contrast with the mean of its grey image, saturation with its grey image;
    each result is clipped to [0, 1].

    Args:
      keys: [b].
      images: in [0, 1].
      strengths: one for each of the four, at least 0, for hue at most 0.5 turns; a strength of 0 leaves it out.
    """
    stages = [adjust if strength > 0 else _unchanged for adjust, strength in zip(_JITTERS, strengths, strict=True)]

    def jitter(key: Key, image: Array) -> Array:
        order, factors = draw_jitter(key, strengths)
        for place in order:
            image = jax.lax.switch(place, stages, image, factors[place].astype(image.dtype))
        return image

    return jax.vmap(jitter)(keys, images)


def _unchanged(image: Array, factor: Array) -> Array:
    del factor
    return image


# --- rotation and shift -------------------------------------------------------------------------------------


def affine(
    image: Float[AnyArray, "h w c"], radians: Float[Array, ""], shift: Float[AnyArray, " 2"]
) -> Float[AnyArray, "h w c"]:
    """Rotates one image about its centre, then shifts it, with one bilinear resampling; outside, the edge is repeated.

    Args:
      image: an image with any values.
      radians: angle, counter-clockwise.
      shift: pixels down and to the right. A shift by whole pixels without rotation keeps the values exactly.
    """
    height, width, _ = image.shape
    y = jnp.arange(height, dtype=image.dtype)[:, None] - (height - 1) / 2 - shift[0]
    x = jnp.arange(width, dtype=image.dtype)[None, :] - (width - 1) / 2 - shift[1]
    cos, sin = jnp.cos(radians), jnp.sin(radians)
    rows = jnp.clip(cos * y + sin * x + (height - 1) / 2, 0, height - 1)
    columns = jnp.clip(cos * x - sin * y + (width - 1) / 2, 0, width - 1)
    row0, column0 = jnp.floor(rows).astype(jnp.int32), jnp.floor(columns).astype(jnp.int32)
    row1, column1 = jnp.minimum(row0 + 1, height - 1), jnp.minimum(column0 + 1, width - 1)
    down, across = (rows - row0)[..., None], (columns - column0)[..., None]

    def along(row: Array) -> Array:
        at = image.at
        value0, value1 = (at[row, column].get(mode="promise_in_bounds") for column in (column0, column1))
        return value0 + across * (value1 - value0)

    upper, lower = along(row0), along(row1)
    return upper + down * (lower - upper)


def draw_shift(key: Key, height: int, width: int, fraction: float) -> Float[AnyArray, " 2"]:
    """Draws the pixels that one image moves down and to the right, each uniform in ± ``fraction`` of that side."""
    return jax.random.uniform(key, (2,), jnp.float32, -fraction, fraction) * jnp.asarray([height, width], jnp.float32)


def random_affine(
    rotation_keys: Key,
    shift_keys: Key,
    images: Float[AnyArray, "b h w c"],
    degrees: float,
    fraction: float,
) -> Float[AnyArray, "b h w c"]:
    """Rotates and shifts each image at random; see `affine`.

    This is Keras' RandomRotation, then RandomTranslation, with fill_mode="nearest", but with a single resampling.

    Args:
      rotation_keys: [b].
      shift_keys: [b].
      images: images with any values.
      degrees: the angle is uniform in ± ``degrees``; 0: no rotation.
      fraction: see `draw_shift`; 0: no shift.
    """
    b, height, width, _ = images.shape
    limit = math.radians(degrees)
    angles, shifts = jnp.zeros(b, images.dtype), jnp.zeros((b, 2), images.dtype)
    if degrees > 0:
        angles = jax.vmap(lambda key: jax.random.uniform(key, (), images.dtype, -limit, limit))(rotation_keys)
    if fraction > 0:
        shifts = jax.vmap(lambda key: draw_shift(key, height, width, fraction).astype(images.dtype))(shift_keys)
    return jax.vmap(affine)(images, angles, shifts)


# --- erasing ------------------------------------------------------------------------------------------------

_ERASE_RATIOS = {"zero": (0.3, 3.3), "noise": (0.3, 1 / 0.3)}
"""Range of height over width of the erased rectangle, by fill: torchvision's for zero, timm's for noise."""


def inside_box(
    height: int, width: int, start: Int[AnyArray, " 2"], stop: Int[AnyArray, " 2"]
) -> Bool[AnyArray, "{height} {width}"]:
    """Makes a mask that is True in the rows start[0] to stop[0] - 1 and the columns start[1] to stop[1] - 1."""
    rows, columns = jnp.arange(height)[:, None], jnp.arange(width)[None, :]
    return (rows >= start[0]) & (rows < stop[0]) & (columns >= start[1]) & (columns < stop[1])


def draw_erased(
    key: Key,
    height: int,
    width: int,
    probability: float | Array,
    area: tuple[float | Array, float | Array],
    ratio: tuple[float, float],
) -> tuple[Int[AnyArray, " 2"], Int[AnyArray, " 2"]]:
    """Draws the rectangle of `random_erasing` for one image: its first row and column, and those after its last.

    Its share of the image is uniform in ``area``, and its height over width log-uniform in ``ratio``. The first of ten
    draws that leaves a row and a column of the image is used. The rectangle is empty if no draw does, and otherwise
    with probability 1 - ``probability``.
    """
    uniform = jax.random.uniform(key, (23,), jnp.float32)
    use, corner, areas, ratios = jnp.split(uniform, (1, 3, 13))
    areas = height * width * (area[0] + (area[1] - area[0]) * areas)
    ratios = jnp.exp(math.log(ratio[0]) + math.log(ratio[1] / ratio[0]) * ratios)
    sizes = jnp.round(jnp.sqrt(jnp.stack([areas * ratios, areas / ratios], axis=-1))).astype(jnp.int32)
    whole = jnp.asarray([height, width])
    fits = (sizes < whole[None]).all(axis=-1)
    size = jnp.where(fits.any() & (use < probability), sizes[fits.argmax()], 0)
    start = jnp.floor(corner * (whole - size + 1)).astype(jnp.int32)
    return start, start + size


def random_erasing(
    keys: Key,
    images: Float[AnyArray, "b h w c"],
    probability: float,
    area: tuple[float, float],
    fill: Literal["zero", "noise"],
) -> Float[AnyArray, "b h w c"]:
    """Erases a rectangle of each image with a probability (Zhong et al., arXiv:1708.04896).

    Args:
      keys: [b].
      images: normalised images.
      probability: in [0, 1].
      area: smallest and largest share of the image that the rectangle covers.
      fill: ``zero``, as in torchvision's RandomErasing; ``noise``: a standard normal for each value, as in timm's mode
        ``pixel``.
    """
    _, height, width, _ = images.shape

    def erase(key: Key, image: Array) -> Array:
        for_box, for_fill = jax.random.split(key)
        inside = inside_box(height, width, *draw_erased(for_box, height, width, probability, area, _ERASE_RATIOS[fill]))
        filling = jax.random.normal(for_fill, image.shape, image.dtype) if fill == "noise" else jnp.zeros_like(image)
        return jnp.where(inside[..., None], filling, image)

    return jax.vmap(erase)(keys, images)


# --- to the network's input ---------------------------------------------------------------------------------


def as_float(images: UInt8[AnyArray, "b h w c"] | Float[AnyArray, "b h w c"]) -> Float[AnyArray, "b h w c"]:
    """Converts uint8 in 0..255 to floats in [0, 1]; floats must be in [0, 1] already.

    The type is float32, or float64 where JAX_ENABLE_X64 is set: float32 pixels would be rounded differently by
    differently compiled steps, which networks in float64 are compared to exclude.
    """
    dtype = jnp.promote_types(images.dtype, jnp.result_type(float))
    return images.astype(dtype) / 255 if images.dtype == jnp.uint8 else images.astype(dtype)


def normalise(
    images: UInt8[AnyArray, "b h w c"] | Float[AnyArray, "b h w c"],
    mean: tuple[float, ...] = DataConfig.mean,
    std: tuple[float, ...] = DataConfig.std,
) -> Float[AnyArray, "b h w c"]:
    """Normalises images for a network: (x - mean) / std by channel, in float32 at least.

    Args:
      images: [b, h, w, c], uint8 in 0..255 or floats in [0, 1].
      mean: mean of each channel, on the scale from 0 to 1; default: those of ImageNet's red, green and blue.
      std: standard deviation of each channel; default: likewise ImageNet's.
    """
    images = as_float(images)
    dtype, shape = images.dtype, (1, 1, 1, -1)
    return (images - jnp.asarray(mean, dtype).reshape(shape)) / jnp.asarray(std, dtype).reshape(shape)
