"""Mixup and cutmix on the device, inside jit: a batch is mixed within itself, by one draw for all of it.

The draw comes from the step's key and an image's partner is of its own norm group. So no device needs another's images,
and the result is the same on any number of devices and with any number of microbatches, which keep groups whole.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int, Shaped

from mnv2_jax.ops.augment import inside_box
from mnv2_jax.types import Array, Key


class Targets(NamedTuple):
    """Class labels of the images of a training batch, mixed or not."""

    labels: Int[Array, " b"]
    partners: Int[Array, " b"] | None = None
    """Labels of the images that were mixed in; None where nothing is ever mixed."""
    share: Float[Array, ""] | None = None
    """Share of ``labels``, from 0 to 1; the rest belongs to ``partners``."""

    @property
    def larger(self) -> Int[Array, " b"]:
        """The labels with the larger share."""
        if self.partners is None or self.share is None:
            return self.labels
        return jnp.where(self.share >= 0.5, self.labels, self.partners)


def draw_weights(
    key: Key,
    height: int,
    width: int,
    *,
    mixup_alpha: float,
    cutmix_alpha: float,
    probability: float = 1.0,
    cutmix_share: float = 0.5,
) -> tuple[Float[Array, "h w"], Float[Array, ""]]:
    """How much of each pixel stays an image's own, the same for all images of a batch.

    Mixup (Zhang et al., arXiv:1710.09412) leaves the same share everywhere. Cutmix (Yun et al., arXiv:1905.04899)
    leaves all but a rectangle: about a pixel drawn from the whole image, of its aspect, cut off at its borders
    (torchvision's CutMix). One of the two is drawn a batch, as by torchvision's RandomChoice and timm's batch mode.

    Args:
      key: of the step.
      height: of the images.
      width: of the images.
      mixup_alpha: the share is drawn from Beta(alpha, alpha); 0: no mixup.
      cutmix_alpha: the same, for one less the rectangle's share before it is cut off; 0: no cutmix. One of both is
        above 0.
      probability: with which the batch is mixed at all.
      cutmix_share: where both are above 0: of cutmix among the mixed batches.

    Returns:
      The weights, and their mean: the share of the image's own label.
    """
    for_use, for_kind, for_share, for_centre = jax.random.split(key, 4)
    cutmix_share = cutmix_share if mixup_alpha > 0 and cutmix_alpha > 0 else float(cutmix_alpha > 0)
    cuts = jax.random.bernoulli(for_kind, cutmix_share)
    alpha = jnp.where(cuts, cutmix_alpha, mixup_alpha).astype(jnp.float32)
    share = jax.random.beta(for_share, alpha, alpha, dtype=jnp.float32)
    size = jnp.asarray([height, width])
    centre = jax.random.randint(for_centre, (2,), 0, size, jnp.int32)
    reach = (0.5 * jnp.sqrt(1 - share) * size).astype(jnp.int32)
    outside = ~inside_box(height, width, jnp.maximum(centre - reach, 0), jnp.minimum(centre + reach, size))
    weights = jnp.where(cuts, outside.astype(jnp.float32), share)
    share = jnp.where(cuts, outside.mean(dtype=jnp.float32), share)
    used = jax.random.bernoulli(for_use, probability)
    return jnp.where(used, weights, 1), jnp.where(used, share, 1)


def partners(x: Shaped[Array, "b ..."], group_size: int) -> Shaped[Array, "b ..."]:
    """For each row the one before it in its group of ``group_size`` rows, which is a ring.

    Where all rows are one group these are torchvision's partners.
    """
    groups = x.reshape(-1, group_size, *x.shape[1:])
    return jnp.roll(groups, 1, axis=1).reshape(x.shape)


def mix(images: Float[Array, "b h w c"], others: Float[Array, "b h w c"], weights: Float[Array, "h w"]) -> Array:
    """``weights`` of the images and the rest of the others, [b, h, w, c]; weights of 0 and 1 are exact."""
    weights = weights[None, :, :, None].astype(images.dtype)
    return weights * images + (1 - weights) * others
