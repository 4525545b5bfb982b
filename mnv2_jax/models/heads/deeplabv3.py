"""DeepLabv3 (Chen et al. 2017, arXiv 1706.05587): atrous spatial pyramid pooling (ASPP) over the features.

    features ─┬─► 1×1 ──────────────────────────┐
              ├─► 3×3, one for each rate ───────┼─► joined ─► 1×1 ─► dropout ─► classes of each position
              └─► mean over the map ─► 1×1 ─────┘

Without rates it is the small DeepLabv3 of MobileNetV2's paper (table 7), which TensorFlow's model zoo has. In
torchvision a 3×3 convolution follows the joint 1×1.
"""

from __future__ import annotations

from collections.abc import Mapping

import flax.linen as nn
import jax.numpy as jnp

from mnv2_jax.config import ModelConfig
from mnv2_jax.models.heads.base import Body, Head, Points, is_feature
from mnv2_jax.models.heads.classifier import classify
from mnv2_jax.models.plan import Plan
from mnv2_jax.nn.blocks import Layers
from mnv2_jax.types import Array

_AUX_SHRINK, _AUX_LEAST = 4, 128
"""The auxiliary head has a fourth of its input's channels, at least 128 (CoreNet)."""
_AUX_DROPOUT = 1
"""Number of the auxiliary head's dropout."""


class Aspp(nn.Module):
    """Atrous spatial pyramid pooling; all convolutions have a norm and ReLU.

    Attributes:
      channels: output channels of each branch and of the whole.
      rates: dilations of the 3×3 branches.
      has_conv: whether a 3×3 convolution follows (torchvision).
    """

    channels: int
    rates: tuple[int, ...]
    has_conv: bool
    layers: Layers

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        """Maps [b, h, w, i] to [b, h, w, channels]."""
        layers, channels = self.layers, self.channels
        branches = [layers.conv_norm(x, train, channels, "pointwise", "relu")]
        branches += [
            layers.conv_norm(x, train, channels, f"dilated_{number}", "relu", kernel_size=3, dilation=rate)
            for number, rate in enumerate(self.rates, 1)
        ]
        wide = jnp.promote_types(x.dtype, jnp.float32)
        mean = x.mean((1, 2), keepdims=True, dtype=wide).astype(x.dtype)
        pooled = layers.conv_norm(mean, train, channels, "pool", "relu")
        branches.append(jnp.broadcast_to(pooled, branches[0].shape))
        y = layers.conv_norm(jnp.concatenate(branches, -1), train, channels, "project", "relu")
        return layers.conv_norm(y, train, channels, "conv", "relu", kernel_size=3) if self.has_conv else y


class Aux(nn.Module):
    """The convolution of the auxiliary head (PSPNet, Zhao et al., arXiv 1612.01105; CoreNet's form)."""

    layers: Layers

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        """Maps [b, h, w, i] to [b, h, w, max(i / 4, 128)]."""
        channels = max(x.shape[-1] // _AUX_SHRINK, _AUX_LEAST)
        return self.layers.conv_norm(x, train, channels, "conv", "relu", kernel_size=3)


def _parts(plan: Plan, model: ModelConfig) -> tuple[str, ...]:
    del plan
    return ("aspp", *(["aux", "aux_classifier"] if model.aux_head else []), "classifier")


def aux_point(plan: Plan) -> str:
    """Returns the endpoint of the auxiliary head: the last block before the last halving of the published network."""
    last = max(number for number, block in enumerate(plan.blocks, 1) if block.stride == 2)
    return f"block_{last - 1}"


def _compute(body: Body) -> Points:
    model, points = body.model, Points()
    aspp = Aspp(model.head_channels, model.aspp_rates, model.aspp_conv, body.layers, name="aspp")
    points["aspp"] = aspp(body.last, body.by_batch["aspp"])
    # Inference doesn't need the auxiliary head; its parameters are made whenever the variables are.
    if model.aux_head and (body.train or body.is_initializing):
        points["aux"] = Aux(body.layers, name="aux")(body.points[aux_point(body.plan)], body.by_batch["aux"])
        points["aux_logits"] = classify(body, points["aux"], "aux_classifier", _AUX_DROPOUT)
    points["logits"] = classify(body, points["aspp"])
    return points


def _outputs(points: Mapping[str, Array]) -> dict[str, Array]:
    aux = {"aux": points["aux_logits"]} if "aux_logits" in points else {}
    return {"logits": points["logits"], **aux}


DEEPLABV3 = Head(parts=_parts, has_last_conv=is_feature, compute=_compute, outputs=_outputs)
"""The head of DeepLabv3: logits [b, h, w, k] at the output stride, and in training those of the auxiliary head."""
