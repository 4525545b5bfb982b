"""LR-ASPP, the light head of MobileNetV3 (Howard et al. 2019, arXiv 1905.02244, section 6.4 and figure 10).

    features ─┬─► 1×1 ─────────────► × ─► resized ─► classes ─┐
              └─► mean ─► 1×1 ─► σ ──┘                        + ─► classes of each position at stride 8
    first block at stride 8 ─────────────────────► classes ───┘

The gate is the mean over the whole map, as in torchvision, not over windows of 49×49.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from mnv2_jax.config import ModelConfig
from mnv2_jax.models.heads.base import Body, Head, Points, is_feature
from mnv2_jax.models.heads.classifier import Classifier, classify
from mnv2_jax.models.plan import Plan
from mnv2_jax.nn.blocks import Layers
from mnv2_jax.nn.resize import resize_bilinear
from mnv2_jax.types import Array


class LrAspp(nn.Module):
    """The convolution and the gate of LR-ASPP."""

    channels: int
    layers: Layers

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        """Maps [b, h, w, i] to [b, h, w, channels]."""
        layers = self.layers
        y = layers.conv_norm(x, train, self.channels, "conv", "relu")
        mean = x.mean((1, 2), keepdims=True, dtype=jnp.promote_types(x.dtype, jnp.float32)).astype(x.dtype)
        return y * jax.nn.sigmoid(layers.conv(self.channels, name="gate")(mean))


def low_point(plan: Plan) -> str:
    """Returns the endpoint of the fine features: the first block at a published stride of 8."""
    halvings = 1 + plan.stem_pool
    for number, block in enumerate(plan.blocks, 1):
        halvings += block.stride == 2
        if halvings == 3:
            return f"block_{number}"
    raise AssertionError("every plan halves its map five times")


def _parts(plan: Plan, model: ModelConfig) -> tuple[str, ...]:
    del plan, model
    return ("lraspp", "low_classifier", "classifier")


def _compute(body: Body) -> Points:
    model, points = body.model, Points()
    low = body.points[low_point(body.plan)]
    y = points["lraspp"] = LrAspp(model.head_channels, body.layers, name="lraspp")(body.last, body.by_batch["lraspp"])
    wide = jnp.promote_types(y.dtype, jnp.float32)
    y = resize_bilinear(y.astype(wide), (low.shape[1], low.shape[2]), align_corners=model.align_corners)
    assert model.num_classes is not None
    inits = body.layers.inits
    of_low = Classifier(
        model.num_classes, 0.0, inits.classifier, inits.classifier_bias(low.shape[-1]), name="low_classifier"
    )
    points["logits"] = classify(body, y) + of_low(low.astype(wide), body.train, None)
    return points


LRASPP = Head(
    parts=_parts,
    has_last_conv=is_feature,
    compute=_compute,
    outputs=lambda points: {"logits": points["logits"]},
)
"""The head of LR-ASPP: logits [b, h, w, k] at stride 8."""
