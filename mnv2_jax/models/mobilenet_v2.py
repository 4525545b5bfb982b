"""MobileNetV2: Inverted Residuals and Linear Bottlenecks (Sandler et al. 2018, arXiv 1801.04381).

Strides for small images: `stem_stride`, `stage_strides` and the last feature map they give.

    resolution   stem   stages                   last map
    224            2    (1, 2, 2, 2, 1, 2, 1)    7×7       the paper
     96            2    (1, 2, 2, 2, 1, 2, 1)    3×3       the paper
     64            1    (1, 2, 2, 2, 1, 2, 1)    4×4
     32            1    (1, 1, 2, 2, 1, 2, 1)    4×4       chenyaofo/pytorch-cifar-models
     32            2    (1, 2, 2, 1, 1, 2, 1)    2×2       the recipe for digits
     32            2    (1, 2, 2, 2, 1, 2, 1)    1×1       the paper's; fast, hard to train
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mnv2_jax.config import ModelConfig, NormConfig
from mnv2_jax.errors import UserError
from mnv2_jax.models.classifier import Classifier
from mnv2_jax.nn.blocks import InvertedResidual
from mnv2_jax.nn.channels import make_divisible
from mnv2_jax.nn.conv import Conv, DepthwiseConv, conv_init, dense_init
from mnv2_jax.nn.norm import GroupedBatchNorm
from mnv2_jax.types import Array, Key


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
    """A row of the paper's table 2: ``repeats`` blocks, the first of which has the stride."""

    expand_ratio: int
    channels: int
    repeats: int
    stride: int


STEM_CHANNELS = 32
STAGES = (
    # Table 2: t, c, n, s. In the margin: the input of the stage at 224 px.
    Stage(expand_ratio=1, channels=16, repeats=1, stride=1),  # 112×112×32
    Stage(expand_ratio=6, channels=24, repeats=2, stride=2),  # 112×112×16
    Stage(expand_ratio=6, channels=32, repeats=3, stride=2),  # 56×56×24
    Stage(expand_ratio=6, channels=64, repeats=4, stride=2),  # 28×28×32
    Stage(expand_ratio=6, channels=96, repeats=3, stride=1),  # 14×14×64
    Stage(expand_ratio=6, channels=160, repeats=3, stride=2),  # 14×14×96
    Stage(expand_ratio=6, channels=320, repeats=1, stride=1),  # 7×7×160
)
HEAD_CHANNELS = 1280


@dataclasses.dataclass(frozen=True, kw_only=True)
class Block:
    """One inverted residual, with everything decided but its channels in."""

    channels: int
    expand_ratio: int
    stride: int
    dilation: int
    ratio: int
    """Height of the image over height of this block's output."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """The network that a config asks for."""

    stem: int
    blocks: tuple[Block, ...]
    head: int


def layout(model: ModelConfig) -> Layout:
    """Applies the width and the strides of a config to the table.

    Raises:
      UserError: for a width that isn't finite and above 0 or strides that don't fit the table.
    """
    if not 0 < model.width < math.inf:
        raise UserError(f"model.width={model.width!r} must be a finite number greater than 0")
    own = tuple(stage.stride for stage in STAGES)
    strides = own if model.stage_strides is None else model.stage_strides
    if len(strides) != len(STAGES):
        raise UserError(f"model.stage_strides={list(strides)} has {len(strides)} entries; expected {len(STAGES)}")
    divisor = 4 if model.width_rule == "divisor4" else 8
    stem_width = 1.0 if model.width_rule == "corenet" else model.width
    blocks = []
    ratio, dilation = model.stem_stride, 1
    for stage, stage_stride in zip(STAGES, strides, strict=True):
        for repeat in range(stage.repeats):
            stride = stage_stride if repeat == 0 else 1
            block_dilation = dilation
            # DeepLab's rule, as in slim: a stride that would go beyond the output stride becomes dilation, from the
            # next block on; the block that lost its stride still has the taps it would have had.
            if ratio * stride > model.output_stride:
                dilation, stride = dilation * stride, 1
            ratio *= stride
            channels = make_divisible(stage.channels * model.width, divisor)
            blocks.append(
                Block(
                    channels=channels,
                    expand_ratio=stage.expand_ratio,
                    stride=stride,
                    dilation=block_dilation,
                    ratio=ratio,
                )
            )
    return Layout(
        stem=make_divisible(STEM_CHANNELS * stem_width, divisor),
        blocks=tuple(blocks),
        head=make_divisible(HEAD_CHANNELS * max(1.0, model.width), divisor),
    )


class MobileNetV2(nn.Module):
    """The network of a `ModelConfig` (its ``num_classes`` set) and a `NormConfig`."""

    model: ModelConfig
    norm: NormConfig

    def __post_init__(self) -> None:
        layout(self.model)  # options that can't be are refused here, not at the first call
        super().__post_init__()

    def __call__(self, x: Array, train: bool = False, dropout_keys: Key | None = None) -> Array:
        """Maps float images [b, h, w, 3] to logits [b, k], float32 at least; see `endpoints`."""
        return self.endpoints(x, train, dropout_keys)["logits"]

    @property
    def endpoint_strides(self) -> dict[str, int]:
        """Height of the image over height of the map, for each endpoint that is one, in order."""
        blocks = layout(self.model).blocks
        strides = {"stem": self.model.stem_stride}
        strides |= {f"block_{i}": block.ratio for i, block in enumerate(blocks, 1)}
        return strides | {"head": blocks[-1].ratio}

    @nn.compact
    def endpoints(self, x: Array, train: bool = False, dropout_keys: Key | None = None) -> dict[str, Array]:
        """The output of every block.

        Args:
          x: float images [b, h, w, 3] of any height and width.
          train: batch norm by the statistics of the batch, which its groups must divide, and dropout.
          dropout_keys: [b], one typed PRNG key an example; only read in training.

        Returns:
          In order (which `jax.jit` doesn't keep): stem, block_1 to block_17, head, each [b, h / stride, w / stride, c]
          in the compute type, strides as in `endpoint_strides`, sizes rounded up; then pooled [b, c] and logits
          [b, k], float32 at least.
        """
        plan, dtype = layout(self.model), jnp.dtype(self.model.dtype)
        options: dict[str, Any] = dict(padding=self.model.padding, dtype=dtype, kernel_init=conv_init(self.model.init))
        conv: Callable[..., nn.Module] = functools.partial(Conv, **options)
        depthwise: Callable[..., nn.Module] = functools.partial(DepthwiseConv, **options)
        norm = functools.partial(
            GroupedBatchNorm,
            group_size=self.norm.group_size,
            decay=self.norm.decay,
            epsilon=self.norm.epsilon,
        )
        points = {}
        x = conv(plan.stem, kernel_size=3, stride=self.model.stem_stride, name="stem")(x)
        x = points["stem"] = jax.nn.relu6(norm(name="stem_norm")(x, train))
        for index, block in enumerate(plan.blocks, 1):
            name = f"block_{index}"
            x = points[name] = InvertedResidual(
                features=block.channels,
                expand_ratio=block.expand_ratio,
                stride=block.stride,
                dilation=block.dilation,
                conv=conv,
                depthwise=depthwise,
                norm=norm,
                name=name,
            )(x, train)
        x = conv(plan.head, name="head")(x)
        x = points["head"] = jax.nn.relu6(norm(name="head_norm")(x, train))
        assert self.model.num_classes is not None
        classifier = Classifier(
            num_classes=self.model.num_classes,
            dropout=self.model.dropout,
            kernel_init=dense_init(self.model.init),
            name="classifier",
        )
        points["pooled"], points["logits"] = classifier(x, train, dropout_keys)
        return points
