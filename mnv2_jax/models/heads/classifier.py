"""The classification head: the mean over the map, the hidden layer where the plan has one, and the classes."""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from mnv2_jax.config import ModelConfig
from mnv2_jax.models.heads.base import Body, Head, Points
from mnv2_jax.models.plan import Plan
from mnv2_jax.nn.activations import activate
from mnv2_jax.nn.initializers import Initializer
from mnv2_jax.types import Array, Key


def dropout(x: Array, keys: Key, rate: float) -> Array:
    """Zeroes a share ``rate`` of each row and scales the rest by 1 / (1 - rate).

    Args:
      x: [b, ..., c].
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
        """Maps [b, ..., c] to logits [b, ..., k].

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
        return features @ kernel + bias.reshape((1,) * (features.ndim - 1) + bias.shape)


def classify(body: Body, features: Array, name: str = "classifier", purpose: int | None = None) -> Array:
    """Applies the `Classifier` ``name`` to features [b, ..., c], in float32 at least.

    Args:
      body: the network in front of it.
      features: features of any float type.
      name: name of the part.
      purpose: number of its dropout where a network has several; None: the only one.
    """
    assert body.model.num_classes is not None
    inits = body.layers.inits
    classifier = Classifier(
        num_classes=body.model.num_classes,
        dropout=body.model.dropout,
        kernel_init=inits.classifier,
        bias_init=inits.classifier_bias(features.shape[-1]),
        name=name,
    )
    keys = body.dropout_keys if purpose is None else body.keys(purpose)
    logits: Array = classifier(features.astype(jnp.promote_types(features.dtype, jnp.float32)), body.train, keys)
    return logits


def _parts(plan: Plan, model: ModelConfig) -> tuple[str, ...]:
    del model
    return (*(["hidden"] if plan.hidden else []), "classifier")


def _compute(body: Body) -> Points:
    plan, layers, points = body.plan, body.layers, Points()
    x = points["pooled"] = body.last.mean((1, 2), dtype=jnp.promote_types(body.last.dtype, jnp.float32))
    if plan.hidden:
        dense = functools.partial(layers.dense, use_bias=not plan.hidden_norm, kernel_init=layers.inits.hidden)
        x = dense(plan.hidden, name="hidden")(x)
        x = (
            layers.norm(name="hidden_norm")(x, body.by_batch["hidden"], plan.act)
            if plan.hidden_norm
            else activate(x, plan.act)
        )
        points["hidden"] = x
    points["logits"] = classify(body, x)
    return points


CLASSIFIER = Head(
    parts=_parts,
    has_last_conv=lambda plan: plan.head is not None,
    compute=_compute,
    outputs=lambda points: points["logits"],
)
"""The head of classification, whose output is logits [b, k]."""
