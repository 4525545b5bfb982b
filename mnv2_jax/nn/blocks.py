"""Building blocks of the networks, made of layers to which the network has bound its options.

Every block is called as ``block(x, train)`` and maps [b, h, w, i] to [b, ceil(h / stride), ceil(w / stride), features].
Its attributes include ``features``, ``stride``, ``dilation`` (both of the convolution with a window) and ``layers``. A
norm has the name of the layer that it follows: ``expand_norm`` follows ``expand``.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mnv2_jax.nn.activations import Activation
from mnv2_jax.nn.channels import make_divisible
from mnv2_jax.nn.initializers import Initializers
from mnv2_jax.nn.window import Window
from mnv2_jax.types import Array, Key


def drop_path(y: Array, keys: Key, rate: float) -> Array:
    """Stochastic depth: zeroes the branch of a share ``rate`` of the examples, and scales the others by 1 / (1 - rate).

    Huang et al. 2016, arXiv:1603.09382; the scaling in training is that of timm and of TF model garden.

    Args:
      y: [b, h, w, c].
      keys: [b], one typed PRNG key per example.
      rate: in [0, 1).
    """
    keep = jax.vmap(lambda key: jax.random.bernoulli(key, 1 - rate))(keys)
    return y * (keep / (1 - rate)).astype(y.dtype)[:, None, None, None]


def _whole(y: Array) -> Array:
    return y


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layers:
    """Factories of the layers that all blocks of a network share, with the network's options bound."""

    conv: Callable[..., nn.Module]
    """`nn.conv.Conv`."""
    depthwise: Callable[..., nn.Module]
    """`nn.conv.DepthwiseConv`."""
    norm: Callable[..., nn.Module]
    """`nn.norm.GroupedBatchNorm`."""
    dense: Callable[..., nn.Module]
    """`flax.linen.Dense`, without bound initialisers."""
    inits: Initializers
    """Initialisers; `conv` and `depthwise` use theirs unless a block passes another."""
    branch: Callable[[Array], Array] = _whole
    """Function applied to the branch of a residual block before it is added; see `drop_path`."""
    tap: Callable[[Array], Array] = _whole
    """Function applied to the expansion of an inverted residual, before its depthwise convolution."""

    def residual(self, x: Array, y: Array, stride: int) -> Array:
        """Adds the block's input to ``y`` if it has the same shape and the stride is 1; otherwise returns ``y``."""
        return x + self.branch(y) if stride == 1 and x.shape == y.shape else y

    def conv_norm(
        self, x: Array, train: bool, features: int, name: str, act: Activation | None = None, **window: Any
    ) -> Array:
        """Applies the convolution ``name``, its norm, and the activation if there is one."""
        return self._finish(self.conv(features, name=name, **window)(x), train, name, act)

    def depthwise_norm(
        self, x: Array, train: bool, name: str = "depthwise", act: Activation | None = None, **window: Any
    ) -> Array:
        """Applies the depthwise convolution ``name``, its norm, and the activation if there is one."""
        return self._finish(self.depthwise(name=name, **window)(x), train, name, act)

    def squeeze_excite(self, y: Array, features: int, name: str) -> Array:
        """Applies the dense layer ``name`` of a squeeze-excite, from [b, c] to [b, features]."""
        bias_init = self.inits.squeeze_excite_bias(y.shape[-1])
        mapped: Array = self.dense(features, kernel_init=self.inits.squeeze_excite, bias_init=bias_init, name=name)(y)
        return mapped

    def _finish(self, x: Array, train: bool, name: str, act: Activation | None) -> Array:
        normalised: Array = self.norm(name=f"{name}_norm")(x, train, act)
        return normalised


class ConvBlock(nn.Module):
    """A convolution with its norm and activation."""

    features: int
    act: Activation
    layers: Layers
    kernel_size: int = 3
    stride: int = 1
    dilation: int = 1

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        """See the module."""
        window: dict[str, Any] = dict(kernel_size=self.kernel_size, stride=self.stride, dilation=self.dilation)
        return self.layers.conv_norm(x, train, self.features, "conv", self.act, **window)


class DepthwiseSeparable(nn.Module):
    """MobileNetV1's block (Howard et al. 2017, arXiv 1704.04861, figure 3): filter each channel, then mix them.

    Attributes:
      act: activation after both convolutions.
      linear_depthwise: apply the activation after the second convolution only (CoreNet).
    """

    features: int
    act: Activation
    layers: Layers
    linear_depthwise: bool = False
    stride: int = 1
    dilation: int = 1

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        """See the module."""
        act = None if self.linear_depthwise else self.act
        x = self.layers.depthwise_norm(x, train, act=act, stride=self.stride, dilation=self.dilation)
        return self.layers.conv_norm(x, train, self.features, "pointwise", self.act)


class SqueezeExcite(nn.Module):
    """Weights each channel by a function of the means of all (Hu et al., arXiv 1709.01507), with V3's hard sigmoid.

    Attributes:
      squeezed: channels between the two dense layers, which compute in float32 at least.
    """

    squeezed: int
    layers: Layers

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Scales [b, h, w, c]."""
        y = x.mean((1, 2), dtype=jnp.promote_types(x.dtype, jnp.float32))
        y = jax.nn.relu(self.layers.squeeze_excite(y, self.squeezed, "reduce"))
        gate = jax.nn.hard_sigmoid(self.layers.squeeze_excite(y, x.shape[-1], "expand"))
        return x * gate[:, None, None].astype(x.dtype)


class InvertedResidual(nn.Module):
    """MobileNetV2's block (Sandler et al. 2018, arXiv 1801.04381, table 1): expand, filter each channel, project.

    It has V3's additions as well (Howard et al. 2019, arXiv 1905.02244, figure 4).

    Attributes:
      hidden: channels of the depthwise convolution; None: the number of input channels, without an expansion.
      act: activation after the expansion and after the depthwise convolution.
      kernel_size: kernel size of the depthwise convolution.
      squeezed: `SqueezeExcite.squeezed` of the squeeze-excite before the projection; None: there is none.
    """

    features: int
    hidden: int | None
    act: Activation
    layers: Layers
    kernel_size: int = 3
    squeezed: int | None = None
    stride: int = 1
    dilation: int = 1

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        """See the module."""
        y, layers = x, self.layers
        if self.hidden is not None:
            y = layers.tap(layers.conv_norm(y, train, self.hidden, "expand", self.act))
        window: dict[str, Any] = dict(kernel_size=self.kernel_size, stride=self.stride, dilation=self.dilation)
        y = layers.depthwise_norm(y, train, act=self.act, **window)
        if self.squeezed is not None:
            y = SqueezeExcite(self.squeezed, layers, name="squeeze_excite")(y)
        # No activation after the projection: this is the paper's linear bottleneck.
        y = layers.conv_norm(y, train, self.features, "project")
        return self.layers.residual(x, y, self.stride)


class FusedInvertedResidual(nn.Module):
    """Inverted residual whose expansion has the spatial kernel (EfficientNet-EdgeTPU's fused block; V4's FusedIB)."""

    features: int
    expand_ratio: float
    act: Activation
    layers: Layers
    kernel_size: int = 3
    stride: int = 1
    dilation: int = 1

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        """See the module."""
        window: dict[str, Any] = dict(kernel_size=self.kernel_size, stride=self.stride, dilation=self.dilation)
        hidden = make_divisible(x.shape[-1] * self.expand_ratio)
        y = self.layers.conv_norm(x, train, hidden, "expand", self.act, **window)
        y = self.layers.conv_norm(y, train, self.features, "project")
        return self.layers.residual(x, y, self.stride)


class LayerScale(nn.Module):
    """A learnt factor for each channel, initially 1e-5 (Touvron et al., arXiv 2103.17239, section 2)."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Scales [b, h, w, c]."""
        wide = jnp.promote_types(x.dtype, jnp.float32)
        scale = self.param("scale", nn.initializers.constant(1e-5), (x.shape[-1],), wide)
        return x * scale[None, None, None].astype(x.dtype)


class UniversalInvertedBottleneck(nn.Module):
    """MobileNetV4's block (Qin et al. 2024, arXiv 2404.10518, figure 4).

    Its expansion lies between two optional depthwise convolutions. Their kernel sizes decide which block it is:

        start   middle   block
        0       k        inverted bottleneck (V2's)
        k       0        ConvNext-like
        k       k        extra depthwise
        0       0        feed-forward network

    Attributes:
      start_kernel_size: kernel size of the depthwise convolution before the expansion; 0: there is none.
      kernel_size: kernel size of the depthwise convolution after the expansion; 0: there is none. This convolution has
        the stride; if it is left out, the first one has.
      layer_scale: whether to apply `LayerScale` to the branch, as the hybrid networks do.
    """

    features: int
    expand_ratio: float
    start_kernel_size: int
    kernel_size: int
    act: Activation
    layers: Layers
    layer_scale: bool = False
    stride: int = 1
    dilation: int = 1

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        """See the module."""
        y, layers = x, self.layers
        window: dict[str, Any] = dict(stride=self.stride, dilation=self.dilation)
        if self.start_kernel_size:
            first = window if not self.kernel_size else dict(window, stride=1)
            y = layers.depthwise_norm(y, train, "start_depthwise", kernel_size=self.start_kernel_size, **first)
        y = layers.tap(layers.conv_norm(y, train, make_divisible(x.shape[-1] * self.expand_ratio), "expand", self.act))
        if self.kernel_size:
            y = layers.depthwise_norm(y, train, act=self.act, kernel_size=self.kernel_size, **window)
        y = layers.conv_norm(y, train, self.features, "project")
        y = LayerScale(name="layer_scale")(y) if self.layer_scale else y
        return self.layers.residual(x, y, self.stride)


class MobileAttention(nn.Module):
    """MobileNetV4's Mobile MQA (arXiv 2404.10518, section 5): each head has its own queries; all share keys and values.

    Attributes:
      heads: number of heads of the queries.
      key_dim: channels of a key, a value, and a head's query.
      kv_stride: stride of the depthwise 3×3 convolution that shrinks the map for keys and values; 1: there is none.
    """

    features: int
    heads: int
    key_dim: int
    kv_stride: int
    layers: Layers
    stride: int = 1
    dilation: int = 1

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        """See the module."""
        layers = self.layers
        inits = layers.inits.of_attention(self.heads, self.kv_stride)
        y = layers.norm(name="input_norm")(x, train)
        batch, rows, columns, _ = y.shape
        query = layers.conv(self.heads * self.key_dim, kernel_init=inits.query, name="query")(y)
        query = query.reshape(batch, rows * columns, self.heads, self.key_dim)

        def shared(name: str) -> Array:
            z = y
            if self.kv_stride > 1:
                z = layers.depthwise_norm(
                    y, train, f"{name}_depthwise", stride=self.kv_stride, kernel_init=inits.depthwise
                )
            z = layers.conv(self.key_dim, kernel_init=inits.shared, name=name)(z)
            return z.reshape(batch, -1, self.key_dim)

        key, value = shared("key"), shared("value")
        wide = jnp.promote_types(x.dtype, jnp.float32)
        with jax.named_scope("attention"):
            match = jnp.einsum("bqhd,bkd->bhqk", query, key, preferred_element_type=wide)
            weights = jax.nn.softmax(match * self.key_dim**-0.5, axis=-1).astype(x.dtype)
            mixed = jnp.einsum("bhqk,bkd->bqhd", weights, value)
        y = layers.conv(self.features, kernel_init=inits.output, name="output")(mixed.reshape(batch, rows, columns, -1))
        return self.layers.residual(x, LayerScale(name="layer_scale")(y), self.stride)


class Bottleneck(nn.Module):
    """ResNet's block (He et al. 2015, arXiv 1512.03385, figure 5), with the stride on the 3×3 convolution (v1.5).

    Attributes:
      hidden: channels of the 3×3 convolution.
    """

    features: int
    hidden: int
    layers: Layers
    stride: int = 1
    dilation: int = 1

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        """See the module."""
        layers = self.layers
        window: dict[str, Any] = dict(kernel_size=3, stride=self.stride, dilation=self.dilation)
        y = layers.conv_norm(x, train, self.hidden, "reduce", "relu")
        y = layers.conv_norm(y, train, self.hidden, "conv", "relu", **window)
        y = layers.conv_norm(y, train, self.features, "project")
        if x.shape != y.shape:
            x = layers.conv_norm(x, train, self.features, "shortcut", stride=self.stride)
        return jax.nn.relu(x + layers.branch(y))


def max_pool(x: Array, window: Window, size: int = 3) -> Array:
    """Takes the largest value of each ``size`` × ``size`` window, per channel."""
    pads = tuple(window.pad(x.shape[axis], size) for axis in (1, 2))
    return nn.max_pool(x, (size, size), (window.stride, window.stride), pads)


def bind_layers(
    conv: Callable[..., nn.Module],
    depthwise: Callable[..., nn.Module],
    norm: Callable[..., nn.Module],
    dtype: Any,
    inits: Initializers,
) -> Layers:
    """Makes `Layers` with these initialisers; the dense layers compute in float32 at least."""
    wide = jnp.promote_types(dtype, jnp.float32)
    return Layers(
        conv=functools.partial(conv, kernel_init=inits.conv),
        depthwise=functools.partial(depthwise, kernel_init=inits.depthwise),
        norm=norm,
        dense=functools.partial(nn.Dense, dtype=wide, param_dtype=wide),
        inits=inits,
    )
