"""Mixup and cutmix on the device, inside jit: images of a batch are mixed with each other, with one draw per batch.

The draw depends on the step's key, and an image's partner comes from its own norm group. So no device needs images of
another, and the result is the same on any number of devices and with any number of microbatches, which keep groups
whole.
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
    """Labels of the images that were mixed in; None if the config never mixes."""
    share: Float[Array, ""] | None = None
    """Share of ``labels``, from 0 to 1; ``partners`` have the rest."""

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
    """Draws the weight of an image's own pixels against its partner's, the same for all images of a batch.

    Mixup (Zhang et al., arXiv:1710.09412) has the same weight everywhere. Cutmix (Yun et al., arXiv:1905.04899) has
    weight 0 inside a rectangle and 1 outside. The rectangle has the aspect of the image, is centred on a pixel drawn
    from the whole image, and is cut off at the borders (torchvision's CutMix). One of the two is drawn for each batch,
    as in torchvision's RandomChoice and timm's batch mode.

    Args:
      key: key of the step.
      height: height of the images.
      width: width of the images.
      mixup_alpha: the weight of mixup is drawn from Beta(alpha, alpha); 0: no mixup.
      cutmix_alpha: one minus the rectangle's share of the image, before it is cut off, is drawn from Beta(alpha,
        alpha); 0: no cutmix. At least one of the two alphas is above 0.
      probability: probability that the batch is mixed at all.
      cutmix_share: share of cutmix among the mixed batches, if both alphas are above 0.

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
    """Returns the partner of each row: the row before it in its group of ``group_size`` rows, the last for the first.

    If all rows are one group, these are torchvision's partners.
    """
    groups = x.reshape(-1, group_size, *x.shape[1:])
    return jnp.roll(groups, 1, axis=1).reshape(x.shape)


def mix(
    images: Float[Array, "b h w c"], partner_images: Float[Array, "b h w c"], weights: Float[Array, "h w"]
) -> Array:
    """Mixes images [b, h, w, c] with their partners, which get 1 - ``weights``; weights of 0 and 1 are exact."""
    weights = weights[None, :, :, None].astype(images.dtype)
    return weights * images + (1 - weights) * partner_images
