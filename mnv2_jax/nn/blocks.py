"""Building blocks of the networks, from layers that the network has bound to its options."""

from __future__ import annotations

from collections.abc import Callable

import flax.linen as nn
import jax

from mnv2_jax.types import Array


class InvertedResidual(nn.Module):
    """MobileNetV2's block (Sandler et al. 2018, arXiv 1801.04381, table 1): expand, filter each channel, project.

    Attributes:
      features: channels out.
      expand_ratio: hidden channels over channels in; there is no expansion convolution where it is 1.
      stride: of the depthwise convolution.
      dilation: of the depthwise convolution.
      conv: `nn.conv.Conv` with the network's options bound.
      depthwise: `nn.conv.DepthwiseConv`, likewise.
      norm: `nn.norm.GroupedBatchNorm`, likewise.
    """

    features: int
    expand_ratio: int
    stride: int
    dilation: int
    conv: Callable[..., nn.Module]
    depthwise: Callable[..., nn.Module]
    norm: Callable[..., nn.Module]

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        """Maps [b, h, w, i] to [b, ceil(h / stride), ceil(w / stride), features]."""
        y = x
        if self.expand_ratio != 1:
            y = self.conv(x.shape[-1] * self.expand_ratio, name="expand")(y)
            y = jax.nn.relu6(self.norm(name="expand_norm")(y, train))
        y = self.depthwise(stride=self.stride, dilation=self.dilation, name="depthwise")(y)
        y = jax.nn.relu6(self.norm(name="depthwise_norm")(y, train))
        # No activation after the projection: the paper's linear bottleneck.
        y = self.conv(self.features, name="project")(y)
        y = self.norm(name="project_norm")(y, train)
        return x + y if self.stride == 1 and x.shape == y.shape else y
