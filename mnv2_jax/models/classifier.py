"""The classification head that every network shares."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from mnv2_jax.nn.initializers import Initializer
from mnv2_jax.types import Array, Key


def dropout(x: Array, keys: Key, rate: float) -> Array:
    """Zeroes a share ``rate`` of each row and scales the rest by 1 / (1 - rate).

    Args:
      x: [b, c].
      keys: [b], one typed PRNG key per example. A row's mask depends on its own key only, so it doesn't change with the
        number of devices, the order of the batch or gradient accumulation.
      rate: in [0, 1).
    """
    keep = jax.vmap(lambda key: jax.random.bernoulli(key, 1 - rate, x.shape[1:]))(keys)
    return jnp.where(keep, x / (1 - rate), jnp.zeros_like(x))


class Classifier(nn.Module):
    """Dropout, then a dense layer with bias, both in float32 at least.

    Attributes:
      num_classes: columns of the logits.
      dropout: share of the features that is dropped in training.
      kernel_init: of the dense kernel [c, k].
      bias_init: of the bias [k].
    """

    num_classes: int
    dropout: float
    kernel_init: Initializer
    bias_init: Initializer = nn.initializers.zeros_init()

    @nn.compact
    def __call__(self, features: Array, train: bool, dropout_keys: Key | None) -> Array:
        """Maps [b, c] to logits [b, k].

        Raises:
          ValueError: if training needs dropout and ``dropout_keys`` is None.
        """
        wide = features.dtype
        kernel = self.param("kernel", self.kernel_init, (features.shape[-1], self.num_classes), wide)
        bias = self.param("bias", self.bias_init, (self.num_classes,), wide)
        if train and self.dropout:
            if dropout_keys is None:
                raise ValueError(f"training with dropout={self.dropout:g} needs dropout_keys, one key per example")
            features = dropout(features, dropout_keys, self.dropout)
        return features @ kernel + bias[None]
