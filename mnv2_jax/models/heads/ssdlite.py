"""SSDLite, the light head of detection (Sandler et al. 2018, arXiv 1801.04381, section 6.2).

    expansion of the block that goes to stride 32 ─► map_1
    last convolution ─► map_2 ─► extra_1 ─► map_3 ─► … ─► extra_4 ─► map_6
    map_i ─┬─► 3×3 depthwise ─► 1×1 ─► boxes of each anchor
           └─► 3×3 depthwise ─► 1×1 ─► classes of each anchor

These are the maps of TensorFlow's networks and of torchvision's. Where the block has no expansion (V1), the first map
is what the block gets; where there is no last convolution, the second map is the output of the last block.
"""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp

from mnv2_jax.config import ModelConfig
from mnv2_jax.models.anchors import NUM_MAPS, shapes_of
from mnv2_jax.models.heads.base import EXPANDED, Body, Head, Points
from mnv2_jax.models.plan import Plan
from mnv2_jax.nn.blocks import Layers
from mnv2_jax.types import Array

_EXTRAS = (512, 256, 256, 128)
"""Channels of the maps behind the features, at width 1."""
_LEAST = 16
_INIT = nn.initializers.truncated_normal(0.03)


class Extra(nn.Module):
    """A block that halves the map: 1×1 to half its channels, 3×3 depthwise, 1×1."""

    features: int
    layers: Layers

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        """Maps [b, h, w, i] to [b, h / 2, w / 2, features], rounded up."""
        layers = self.layers
        x = layers.conv_norm(x, train, self.features // 2, "reduce", "relu6", kernel_init=_INIT)
        x = layers.depthwise_norm(x, train, act="relu6", stride=2, kernel_init=_INIT)
        return layers.conv_norm(x, train, self.features, "project", "relu6", kernel_init=_INIT)


class Predictor(nn.Module):
    """Predicts values for each anchor of a map.

    Attributes:
      anchors: number of anchors at each position.
      values: number of values for each.
    """

    anchors: int
    values: int
    layers: Layers

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        """Maps [b, h, w, i] to [b, h · w · anchors, values], float32 at least."""
        x = self.layers.depthwise_norm(x, train, act="relu6", kernel_init=_INIT)
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        shape = (x.shape[-1], self.anchors * self.values)
        kernel = self.param("kernel", _INIT, shape, wide.dtype)
        bias = self.param("bias", nn.initializers.zeros_init(), shape[1:], wide.dtype)
        batch, height, width, _ = x.shape  # the batch of a file is a symbol, which `len` doesn't take
        values = wide @ kernel + bias[None, None, None]
        return values.reshape(batch, height * width * self.anchors, self.values)


def _tap(plan: Plan) -> str:
    return f"block_{max(number for number, block in enumerate(plan.blocks, 1) if block.stride == 2)}"


def _parts(plan: Plan, model: ModelConfig) -> tuple[str, ...]:
    del plan, model
    extras = [f"extra_{number}" for number in range(1, len(_EXTRAS) + 1)]
    predictors = [f"map_{number}_{kind}" for number in range(1, NUM_MAPS + 1) for kind in ("boxes", "classifier")]
    return (*extras, *predictors)


def _compute(body: Body) -> Points:
    model, layers, points = body.model, body.layers, Points()
    assert model.num_classes is not None
    maps = [body.points[EXPANDED], body.last]
    for number, channels in enumerate(_EXTRAS, 1):
        name = f"extra_{number}"
        extra = Extra(max(int(channels * model.width), _LEAST), layers, name=name)
        points[name] = extra(maps[-1], body.by_batch[name])
        maps.append(points[name])
    values = {"boxes": 4, "classifier": model.num_classes + 1}
    outputs: dict[str, list[Array]] = {kind: [] for kind in values}
    for number, (x, shapes) in enumerate(zip(maps, shapes_of(model.anchors), strict=True), 1):
        for kind, count in values.items():
            name = f"map_{number}_{kind}"
            outputs[kind].append(Predictor(len(shapes), count, layers, name=name)(x, body.by_batch[name]))
    points["boxes"] = jnp.concatenate(outputs["boxes"], 1)
    points["logits"] = jnp.concatenate(outputs["classifier"], 1)
    return points


SSDLITE = Head(
    parts=_parts,
    has_last_conv=lambda plan: plan.head is not None,
    compute=_compute,
    outputs=lambda points: {"boxes": points["boxes"], "logits": points["logits"]},
    tap=_tap,
)
"""The head of SSDLite: codes of boxes [b, a, 4], and logits [b, a, k + 1] whose first column is the background."""
