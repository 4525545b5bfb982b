"""Initialisers of weights: a table of sources, each with an initialiser for every kind of layer."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import TypeAlias

import flax.linen as nn
import jax
from jaxtyping import DTypeLike

from mnv2_jax.types import Array, Key

Initializer: TypeAlias = Callable[..., Array]
"""Function that draws weights from a key, a shape and a type."""


def _zeros(channels_in: int) -> Initializer:
    del channels_in
    return nn.initializers.zeros_init()


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionInitializers:
    """Initializers of `nn.blocks.MobileAttention`: kernels [1, 1, i, o], and [r, s, 1, c] of depthwise convolutions."""

    query: Initializer
    shared: Initializer
    """Initializer of the keys and of the values, which all heads share."""
    output: Initializer
    depthwise: Initializer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Initializers:
    """Initialisers of one source, by kind of layer.

    The scales of norms are always 1 at first, layer scale 1e-5, and all other weights without a field here 0.
    """

    conv: Initializer
    """Kernels [r, s, i, o] of convolutions over all channels."""
    depthwise: Initializer
    """Kernels [r, s, 1, c]."""
    squeeze_excite: Initializer
    """Kernels [i, o] of both dense layers of a squeeze-excite."""
    squeeze_excite_bias: Callable[[int], Initializer] = _zeros
    """Makes the initialiser of the biases [o] of those layers from their number of input channels."""
    hidden: Initializer
    """Kernel [i, o] of the dense layer before the classifier."""
    classifier: Initializer
    """Kernel [c, k] of the classifier."""
    classifier_bias: Callable[[int], Initializer] = _zeros
    """Makes the initialiser of the biases [k] of the classifier from its number of input channels."""
    attention: Callable[[int, int], AttentionInitializers] | None = None
    """Makes the initialisers of attention from the number of heads and the stride of keys and values.

    None: attention uses `conv` and `depthwise`.
    """

    def of_attention(self, heads: int, kv_stride: int) -> AttentionInitializers:
        """Makes the initialisers of attention; see `attention`."""
        if self.attention:
            return self.attention(heads, kv_stride)
        return AttentionInitializers(query=self.conv, shared=self.conv, output=self.conv, depthwise=self.depthwise)


def _symmetric_uniform(limit: float) -> Initializer:
    def draw(key: Key, shape: tuple[int, ...], dtype: DTypeLike) -> Array:
        return jax.random.uniform(key, shape, dtype, -limit, limit)

    return draw


def _torch_bias(channels_in: int) -> Initializer:
    return _symmetric_uniform(channels_in**-0.5)


def _fan_out_of_one_group(key: Key, shape: tuple[int, ...], dtype: DTypeLike) -> Array:
    drawn: Array = nn.initializers.normal((2 / math.prod(shape[:2])) ** 0.5)(key, shape, dtype)
    return drawn


_NORMAL = nn.initializers.normal(0.01)
_TRUNCATED = nn.initializers.truncated_normal(0.09)
_FAN_OUT = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
_UNIFORM_FAN_OUT = nn.initializers.variance_scaling(1 / 3, "fan_out", "uniform")  # ± 1 / sqrt(outputs)
_UNIFORM_FAN_IN = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")  # ± 1 / sqrt(inputs)
_GLOROT = nn.initializers.glorot_uniform()
_KERAS = nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal")
# Keras' depthwise kernels are [r, s, c, 1]: their channels count as inputs.
_KERAS_DEPTHWISE = nn.initializers.variance_scaling(1.0, "fan_out", "truncated_normal")


def _glorot_attention(heads: int, kv_stride: int) -> AttentionInitializers:
    del heads, kv_stride
    return AttentionInitializers(query=_GLOROT, shared=_GLOROT, output=_GLOROT, depthwise=_GLOROT)


def _garden_attention(heads: int, kv_stride: int) -> AttentionInitializers:
    """Makes Keras' default initialisers. If keys and values see the whole map, the kernels of queries and outputs have
    an axis of heads, and Keras then counts the first axis as a window."""
    as_convolutions = _glorot_attention(heads, kv_stride)
    if kv_stride > 1:
        return as_convolutions

    def query(key: Key, shape: tuple[int, ...], dtype: DTypeLike) -> Array:
        *_, channels, all_heads = shape
        return _GLOROT(key, (heads, all_heads // heads, channels), dtype).reshape(shape)

    def output(key: Key, shape: tuple[int, ...], dtype: DTypeLike) -> Array:
        *_, all_heads, channels = shape
        return _GLOROT(key, (channels, heads, all_heads // heads), dtype).reshape(shape)

    return dataclasses.replace(as_convolutions, query=query, output=output)


_DENSE_SMALL = Initializers(
    conv=_FAN_OUT, depthwise=_FAN_OUT, squeeze_excite=_NORMAL, hidden=_NORMAL, classifier=_NORMAL
)
_TIMM = Initializers(
    conv=_FAN_OUT,
    depthwise=_fan_out_of_one_group,
    squeeze_excite=_FAN_OUT,
    hidden=_FAN_OUT,
    classifier=_UNIFORM_FAN_OUT,
    attention=_glorot_attention,
)

INITS: Mapping[str, Initializers] = {
    # TF-slim: all layers, even the logits, are convolutions, with mobilenet.training_scope's stddev, cut at ±0.18.
    "truncated_normal": Initializers(
        conv=_TRUNCATED, depthwise=_TRUNCATED, squeeze_excite=_TRUNCATED, hidden=_TRUNCATED, classifier=_TRUNCATED
    ),
    # torchvision's V2, CoreNet's V1 and V2, mmpretrain's V2 and d-li14's, whose squeeze-excite is made of dense layers.
    # The standard deviation of convolutions is sqrt(2 / (r * s * o)). Dense layers, also those of squeeze-excite, are
    # N(0, 0.01). For a depthwise kernel o is the number of channels too, because torch.nn.init counts the first axis of
    # the weight as the outputs of one input.
    "kaiming_fan_out": _DENSE_SMALL,
    # The standard deviation of a depthwise kernel is sqrt(2 / (r * s)). Batch norm cancels the scale of a kernel, but a
    # step of the same learning rate turns a smaller kernel further, so this one tolerates larger learning rates.
    "kaiming_fan_out_grouped": dataclasses.replace(_DENSE_SMALL, depthwise=_fan_out_of_one_group),
    # Like kaiming_fan_out, but squeeze-excite is made of convolutions.
    "torchvision_v3": dataclasses.replace(_DENSE_SMALL, squeeze_excite=_FAN_OUT),
    # Like kaiming_fan_out, but the last layer keeps PyTorch's default.
    "torchvision_resnet": dataclasses.replace(_DENSE_SMALL, classifier=_UNIFORM_FAN_IN, classifier_bias=_torch_bias),
    # timm's MobileNets: efficientnet_init_weights, after which attention initialises itself again. The hidden layer is
    # a convolution.
    "timm": _TIMM,
    # jeffnet: like timm, but flax counts all channels of a depthwise kernel.
    "efficientnet_jax": dataclasses.replace(_TIMM, depthwise=_FAN_OUT, attention=None),
    # MobileNetV3 is the only network of CoreNet that doesn't call reset_parameters: convolutions keep PyTorch's default
    # and dense layers that of LinearLayer, whatever the config file sets.
    "corenet_v3": Initializers(
        conv=_UNIFORM_FAN_IN,
        depthwise=_UNIFORM_FAN_IN,
        squeeze_excite=_UNIFORM_FAN_IN,
        squeeze_excite_bias=_torch_bias,
        hidden=_GLOROT,
        classifier=_GLOROT,
    ),
    # Keras' VarianceScaling(), and random_uniform in the classifier.
    "tf_model_garden": Initializers(
        conv=_KERAS,
        depthwise=_KERAS_DEPTHWISE,
        squeeze_excite=_KERAS,
        hidden=_KERAS,
        classifier=_symmetric_uniform(0.05),
        attention=_garden_attention,
    ),
}
"""Initialisers by `config.ModelConfig.init`."""
