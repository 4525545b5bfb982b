"""Batch normalisation whose statistics group is a hyperparameter, not a property of the hardware."""

from __future__ import annotations

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from mnv2_jax.nn.activations import Activation, activate
from mnv2_jax.nn.forms import NormForm
from mnv2_jax.nn.normalise import SUMS, normalise_groups
from mnv2_jax.types import Array

INPUTS = "norm_inputs"
"""Collection that gets mean and mean square of the input of each norm, if a caller makes it mutable."""


class SingleValueError(ValueError):
    """Raised if a norm can't be trained because its groups have one value per channel. PyTorch refuses that as well."""


def _last(_: object, new: Array) -> Array:
    return new


class GroupedBatchNorm(nn.Module):
    """Batch norm (Ioffe & Szegedy 2015, arXiv 1502.03167) over groups of ``group_size`` consecutive images.

    The result is the same, up to rounding, on any number of devices. If each device holds whole groups, normalising
    needs no communication; otherwise devices exchange the sums of groups, but not the map. Running statistics are
    averaged over the groups.

    Attributes:
      group_size: images in a group; must divide the batch in training.
      decay: decay of the running statistics per step.
      epsilon: added to the variance.
      form: how the norm is computed in training.
    """

    group_size: int = 32
    decay: float = 0.9
    epsilon: float = 1e-3
    form: NormForm = "derived"

    @nn.compact
    def __call__(self, x: Array, train: bool = False, act: Activation | None = None) -> Array:
        """Normalises [b, h, w, c] or [b, c] over all axes but the last, then applies the activation.

        Args:
          x: input of any float type, which is also the type of the result; the computation is in float32 at least.
          train: use the statistics of each group, and update the running statistics in the collection ``batch_stats``.
            Otherwise use the running statistics.
          act: the activation; None for none.

        Raises:
          ValueError: if ``train`` and the groups don't divide the batch.
          SingleValueError: if ``train`` and a group has one value per channel: the output would be the bias alone.
        """
        batch, channels, space = x.shape[0], x.shape[-1], tuple(range(1, x.ndim - 1))
        wide = jnp.promote_types(x.dtype, jnp.float32)
        scale = self.param("scale", nn.initializers.ones_init(), (channels,), wide)
        bias = self.param("bias", nn.initializers.zeros_init(), (channels,), wide)
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, (channels,), wide)
        running_var = self.variable("batch_stats", "var", jnp.ones, (channels,), wide)
        if self.is_mutable_collection(INPUTS) and not self.is_initializing():
            values = x.astype(wide)
            self.sow(INPUTS, "mean", values.mean((0, *space)), reduce_fn=_last)
            self.sow(INPUTS, "square", jnp.square(values).mean((0, *space)), reduce_fn=_last)
        if train and batch % self.group_size:
            raise ValueError(f"group_size={self.group_size} does not divide the batch of {batch} images")
        count = self.group_size * math.prod(x.shape[1:-1])
        if train and count == 1:
            raise SingleValueError(f"{'/'.join(self.path)}: a group of one image of one pixel has no variance")

        def update_running(mean: Array, var: Array) -> None:
            # A group is normalised by its own variance. The running variance estimates that of the population, as in
            # PyTorch and in TensorFlow's fused op, which slim uses.
            bessel = count / (count - 1)
            for running, new in ((running_mean, mean), (running_var, var * bessel)):
                running.value = self.decay * running.value + (1 - self.decay) * new.mean(0)

        if train and self.form in SUMS:
            normalised = normalise_groups(x, scale, bias, self.group_size, self.epsilon, act, SUMS[self.form])
            update_running(normalised.mean, normalised.var)
            return normalised.y
        if not train:
            mean, var = running_mean.value[None], running_var.value[None]  # one group for all
        else:
            # Average over each image and then over the group. x itself is never reshaped: that keeps XLA's CPU backend
            # from fusing well, and made the whole training step 1.8 to 2.9 times slower.
            # Mean and variance take one pass: E[x²] - E[x]² loses (mean / deviation)² roundings, which is little for
            # the outputs of convolutions. Separate passes make the layer 2 to 4 times slower.
            values = x.astype(wide)
            mean = values.mean(space).reshape(-1, self.group_size, channels).mean(1)
            square = jnp.square(values).mean(space).reshape(-1, self.group_size, channels).mean(1)
            var = jnp.maximum(square - jnp.square(mean), 0)
            update_running(mean, var)
        factor = scale[None] * jax.lax.rsqrt(var + self.epsilon)
        offset = bias[None] - mean * factor

        def of_each_image(of_group: Array) -> Array:
            groups = of_group.shape[0]
            if not train:  # [1, 1, 1, c] for any batch, so that `graph.fold` finds a factor per channel
                return of_group.reshape(1, *(1 for _ in space), channels)
            repeated = jnp.broadcast_to(of_group[:, None], (groups, batch // groups, channels))
            return repeated.reshape(batch, *(1 for _ in space), channels)

        return activate((x.astype(wide) * of_each_image(factor) + of_each_image(offset)).astype(x.dtype), act)
