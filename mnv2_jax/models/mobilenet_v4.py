"""MobileNetV4: Universal Models for the Mobile Ecosystem (Qin et al. 2024, arXiv 2404.10518), tables 11 to 15."""

from __future__ import annotations

import dataclasses
from typing import Any, TypeAlias

import flax.linen as nn
from flax.core import FrozenDict

from mnv2_jax.config import ModelConfig
from mnv2_jax.models.plan import Block, Plan
from mnv2_jax.nn.activations import Activation
from mnv2_jax.nn.blocks import (
    ConvBlock,
    FusedInvertedResidual,
    MobileAttention,
    UniversalInvertedBottleneck,
)
from mnv2_jax.nn.channels import make_divisible


@dataclasses.dataclass(frozen=True, kw_only=True)
class Conv:
    """A convolution with its norm and activation."""

    kernel_size: int
    channels: int
    stride: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fused:
    """The fused inverted bottleneck."""

    kernel_size: int
    expand_ratio: int
    channels: int
    stride: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class UIB:
    """The universal inverted bottleneck; a kernel size of 0 leaves that depthwise convolution out."""

    start_kernel_size: int
    kernel_size: int
    expand_ratio: int
    channels: int
    stride: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class MQA:
    """Mobile multi-query attention."""

    heads: int
    key_dim: int
    kv_stride: int
    channels: int
    stride: int = 1


Row: TypeAlias = Conv | Fused | UIB | MQA


@dataclasses.dataclass(frozen=True, kw_only=True)
class Table:
    """The table of a whole network."""

    stem: int
    stages: tuple[tuple[Row, ...], ...]
    hidden: int
    """Channels of the dense layer behind the mean."""
    activation: Activation = "relu"
    layer_scale: bool = False


CONV_SMALL = Table(
    # The comment on each stage is its input, in all tables; here at 224 px.
    stem=32,
    stages=(
        (  # 112×112×32
            Conv(kernel_size=3, channels=32, stride=2),
            Conv(kernel_size=1, channels=32, stride=1),
        ),
        (  # 56×56×32
            Conv(kernel_size=3, channels=96, stride=2),
            Conv(kernel_size=1, channels=64, stride=1),
        ),
        (  # 28×28×64
            UIB(start_kernel_size=5, kernel_size=5, expand_ratio=3, channels=96, stride=2),
            UIB(start_kernel_size=0, kernel_size=3, expand_ratio=2, channels=96, stride=1),
            UIB(start_kernel_size=0, kernel_size=3, expand_ratio=2, channels=96, stride=1),
            UIB(start_kernel_size=0, kernel_size=3, expand_ratio=2, channels=96, stride=1),
            UIB(start_kernel_size=0, kernel_size=3, expand_ratio=2, channels=96, stride=1),
            UIB(start_kernel_size=3, kernel_size=0, expand_ratio=4, channels=96, stride=1),
        ),
        (  # 14×14×96
            UIB(start_kernel_size=3, kernel_size=3, expand_ratio=6, channels=128, stride=2),
            UIB(start_kernel_size=5, kernel_size=5, expand_ratio=4, channels=128, stride=1),
            UIB(start_kernel_size=0, kernel_size=5, expand_ratio=4, channels=128, stride=1),
            UIB(start_kernel_size=0, kernel_size=5, expand_ratio=3, channels=128, stride=1),
            UIB(start_kernel_size=0, kernel_size=3, expand_ratio=4, channels=128, stride=1),
            UIB(start_kernel_size=0, kernel_size=3, expand_ratio=4, channels=128, stride=1),
        ),
        (  # 7×7×128
            Conv(kernel_size=1, channels=960, stride=1),
        ),
    ),
    hidden=1280,
)
CONV_MEDIUM = Table(
    # At 256 px.
    stem=32,
    stages=(
        (  # 128×128×32
            Fused(kernel_size=3, expand_ratio=4, channels=48, stride=2),
        ),
        (  # 64×64×48
            UIB(start_kernel_size=3, kernel_size=5, expand_ratio=4, channels=80, stride=2),
            UIB(start_kernel_size=3, kernel_size=3, expand_ratio=2, channels=80, stride=1),
        ),
        (  # 32×32×80
            UIB(start_kernel_size=3, kernel_size=5, expand_ratio=6, channels=160, stride=2),
            UIB(start_kernel_size=3, kernel_size=3, expand_ratio=4, channels=160, stride=1),
            UIB(start_kernel_size=3, kernel_size=3, expand_ratio=4, channels=160, stride=1),
            UIB(start_kernel_size=3, kernel_size=5, expand_ratio=4, channels=160, stride=1),
            UIB(start_kernel_size=3, kernel_size=3, expand_ratio=4, channels=160, stride=1),
            UIB(start_kernel_size=3, kernel_size=0, expand_ratio=4, channels=160, stride=1),
            UIB(start_kernel_size=0, kernel_size=0, expand_ratio=2, channels=160, stride=1),
            UIB(start_kernel_size=3, kernel_size=0, expand_ratio=4, channels=160, stride=1),
        ),
        (  # 16×16×160
            UIB(start_kernel_size=5, kernel_size=5, expand_ratio=6, channels=256, stride=2),
            UIB(start_kernel_size=5, kernel_size=5, expand_ratio=4, channels=256, stride=1),
            UIB(start_kernel_size=3, kernel_size=5, expand_ratio=4, channels=256, stride=1),
            UIB(start_kernel_size=3, kernel_size=5, expand_ratio=4, channels=256, stride=1),
            UIB(start_kernel_size=0, kernel_size=0, expand_ratio=4, channels=256, stride=1),
            UIB(start_kernel_size=3, kernel_size=0, expand_ratio=4, channels=256, stride=1),
            UIB(start_kernel_size=3, kernel_size=5, expand_ratio=2, channels=256, stride=1),
            UIB(start_kernel_size=5, kernel_size=5, expand_ratio=4, channels=256, stride=1),
            UIB(start_kernel_size=0, kernel_size=0, expand_ratio=4, channels=256, stride=1),
            UIB(start_kernel_size=0, kernel_size=0, expand_ratio=4, channels=256, stride=1),
            UIB(start_kernel_size=5, kernel_size=0, expand_ratio=2, channels=256, stride=1),
        ),
        (  # 8×8×256
            Conv(kernel_size=1, channels=960, stride=1),
        ),
    ),
    hidden=1280,
)
CONV_LARGE = Table(
    # At 384 px.
    stem=24,
    stages=(
        (  # 192×192×24
            Fused(kernel_size=3, expand_ratio=4, channels=48, stride=2),
        ),
        (  # 96×96×48
            UIB(start_kernel_size=3, kernel_size=5, expand_ratio=4, channels=96, stride=2),
            UIB(start_kernel_size=3, kernel_size=3, expand_ratio=4, channels=96, stride=1),
        ),
        (  # 48×48×96
            UIB(start_kernel_size=3, kernel_size=5, expand_ratio=4, channels=192, stride=2),
            UIB(start_kernel_size=3, kernel_size=3, expand_ratio=4, channels=192, stride=1),
            UIB(start_kernel_size=3, kernel_size=3, expand_ratio=4, channels=192, stride=1),
            UIB(start_kernel_size=3, kernel_size=3, expand_ratio=4, channels=192, stride=1),
            UIB(start_kernel_size=3, kernel_size=5, expand_ratio=4, channels=192, stride=1),
            UIB(start_kernel_size=5, kernel_size=3, expand_ratio=4, channels=192, stride=1),
            UIB(start_kernel_size=5, kernel_size=3, expand_ratio=4, channels=192, stride=1),
            UIB(start_kernel_size=5, kernel_size=3, expand_ratio=4, channels=192, stride=1),
            UIB(start_kernel_size=5, kernel_size=3, expand_ratio=4, channels=192, stride=1),
            UIB(start_kernel_size=5, kernel_size=3, expand_ratio=4, channels=192, stride=1),
            UIB(start_kernel_size=3, kernel_size=0, expand_ratio=4, channels=192, stride=1),
        ),
        (  # 24×24×192
            UIB(start_kernel_size=5, kernel_size=5, expand_ratio=4, channels=512, stride=2),
            UIB(start_kernel_size=5, kernel_size=5, expand_ratio=4, channels=512, stride=1),
            UIB(start_kernel_size=5, kernel_size=5, expand_ratio=4, channels=512, stride=1),
            UIB(start_kernel_size=5, kernel_size=5, expand_ratio=4, channels=512, stride=1),
            UIB(start_kernel_size=5, kernel_size=0, expand_ratio=4, channels=512, stride=1),
            UIB(start_kernel_size=5, kernel_size=3, expand_ratio=4, channels=512, stride=1),
            UIB(start_kernel_size=5, kernel_size=0, expand_ratio=4, channels=512, stride=1),
            UIB(start_kernel_size=5, kernel_size=0, expand_ratio=4, channels=512, stride=1),
            UIB(start_kernel_size=5, kernel_size=3, expand_ratio=4, channels=512, stride=1),
            UIB(start_kernel_size=5, kernel_size=5, expand_ratio=4, channels=512, stride=1),
            UIB(start_kernel_size=5, kernel_size=0, expand_ratio=4, channels=512, stride=1),
            UIB(start_kernel_size=5, kernel_size=0, expand_ratio=4, channels=512, stride=1),
            UIB(start_kernel_size=5, kernel_size=0, expand_ratio=4, channels=512, stride=1),
        ),
        (  # 12×12×512
            Conv(kernel_size=1, channels=960, stride=1),
        ),
    ),
    hidden=1280,
)
HYBRID_MEDIUM = Table(
    # At 256 px.
    stem=32,
    stages=(
        (  # 128×128×32
            Fused(kernel_size=3, expand_ratio=4, channels=48, stride=2),
        ),
        (  # 64×64×48
            UIB(start_kernel_size=3, kernel_size=5, expand_ratio=4, channels=80, stride=2),
            UIB(start_kernel_size=3, kernel_size=3, expand_ratio=2, channels=80, stride=1),
        ),
        (  # 32×32×80
            UIB(start_kernel_size=3, kernel_size=5, expand_ratio=6, channels=160, stride=2),
            UIB(start_kernel_size=0, kernel_size=0, expand_ratio=2, channels=160, stride=1),
            UIB(start_kernel_size=3, kernel_size=3, expand_ratio=4, channels=160, stride=1),
            UIB(start_kernel_size=3, kernel_size=5, expand_ratio=4, channels=160, stride=1),
            MQA(heads=4, key_dim=64, kv_stride=2, channels=160),
            UIB(start_kernel_size=3, kernel_size=3, expand_ratio=4, channels=160, stride=1),
            MQA(heads=4, key_dim=64, kv_stride=2, channels=160),
            UIB(start_kernel_size=3, kernel_size=0, expand_ratio=4, channels=160, stride=1),
            MQA(heads=4, key_dim=64, kv_stride=2, channels=160),
            UIB(start_kernel_size=3, kernel_size=3, expand_ratio=4, channels=160, stride=1),
            MQA(heads=4, key_dim=64, kv_stride=2, channels=160),
            UIB(start_kernel_size=3, kernel_size=0, expand_ratio=4, channels=160, stride=1),
        ),
        (  # 16×16×160
            UIB(start_kernel_size=5, kernel_size=5, expand_ratio=6, channels=256, stride=2),
            UIB(start_kernel_size=5, kernel_size=5, expand_ratio=4, channels=256, stride=1),
            UIB(start_kernel_size=3, kernel_size=5, expand_ratio=4, channels=256, stride=1),
            UIB(start_kernel_size=3, kernel_size=5, expand_ratio=4, channels=256, stride=1),
            UIB(start_kernel_size=0, kernel_size=0, expand_ratio=2, channels=256, stride=1),
            UIB(start_kernel_size=3, kernel_size=5, expand_ratio=2, channels=256, stride=1),
            UIB(start_kernel_size=0, kernel_size=0, expand_ratio=2, channels=256, stride=1),
            UIB(start_kernel_size=0, kernel_size=0, expand_ratio=4, channels=256, stride=1),
            MQA(heads=4, key_dim=64, kv_stride=1, channels=256),
            UIB(start_kernel_size=3, kernel_size=0, expand_ratio=4, channels=256, stride=1),
            MQA(heads=4, key_dim=64, kv_stride=1, channels=256),
            UIB(start_kernel_size=5, kernel_size=5, expand_ratio=4, channels=256, stride=1),
            MQA(heads=4, key_dim=64, kv_stride=1, channels=256),
            UIB(start_kernel_size=5, kernel_size=0, expand_ratio=4, channels=256, stride=1),
            MQA(heads=4, key_dim=64, kv_stride=1, channels=256),
            UIB(start_kernel_size=5, kernel_size=0, expand_ratio=4, channels=256, stride=1),
        ),
        (  # 8×8×256
            Conv(kernel_size=1, channels=960, stride=1),
        ),
    ),
    hidden=1280,
    layer_scale=True,
)
HYBRID_LARGE = Table(
    # At 384 px.
    stem=24,
    stages=(
        (  # 192×192×24
            Fused(kernel_size=3, expand_ratio=4, channels=48, stride=2),
        ),
        (  # 96×96×48
            UIB(start_kernel_size=3, kernel_size=5, expand_ratio=4, channels=96, stride=2),
            UIB(start_kernel_size=3, kernel_size=3, expand_ratio=4, channels=96, stride=1),
        ),
        (  # 48×48×96
            UIB(start_kernel_size=3, kernel_size=5, expand_ratio=4, channels=192, stride=2),
            UIB(start_kernel_size=3, kernel_size=3, expand_ratio=4, channels=192, stride=1),
            UIB(start_kernel_size=3, kernel_size=3, expand_ratio=4, channels=192, stride=1),
            UIB(start_kernel_size=3, kernel_size=3, expand_ratio=4, channels=192, stride=1),
            UIB(start_kernel_size=3, kernel_size=5, expand_ratio=4, channels=192, stride=1),
            UIB(start_kernel_size=5, kernel_size=3, expand_ratio=4, channels=192, stride=1),
            UIB(start_kernel_size=5, kernel_size=3, expand_ratio=4, channels=192, stride=1),
            MQA(heads=8, key_dim=48, kv_stride=2, channels=192),
            UIB(start_kernel_size=5, kernel_size=3, expand_ratio=4, channels=192, stride=1),
            MQA(heads=8, key_dim=48, kv_stride=2, channels=192),
            UIB(start_kernel_size=5, kernel_size=3, expand_ratio=4, channels=192, stride=1),
            MQA(heads=8, key_dim=48, kv_stride=2, channels=192),
            UIB(start_kernel_size=5, kernel_size=3, expand_ratio=4, channels=192, stride=1),
            MQA(heads=8, key_dim=48, kv_stride=2, channels=192),
            UIB(start_kernel_size=3, kernel_size=0, expand_ratio=4, channels=192, stride=1),
        ),
        (  # 24×24×192
            UIB(start_kernel_size=5, kernel_size=5, expand_ratio=4, channels=512, stride=2),
            UIB(start_kernel_size=5, kernel_size=5, expand_ratio=4, channels=512, stride=1),
            UIB(start_kernel_size=5, kernel_size=5, expand_ratio=4, channels=512, stride=1),
            UIB(start_kernel_size=5, kernel_size=5, expand_ratio=4, channels=512, stride=1),
            UIB(start_kernel_size=5, kernel_size=0, expand_ratio=4, channels=512, stride=1),
            UIB(start_kernel_size=5, kernel_size=3, expand_ratio=4, channels=512, stride=1),
            UIB(start_kernel_size=5, kernel_size=0, expand_ratio=4, channels=512, stride=1),
            UIB(start_kernel_size=5, kernel_size=0, expand_ratio=4, channels=512, stride=1),
            UIB(start_kernel_size=5, kernel_size=3, expand_ratio=4, channels=512, stride=1),
            UIB(start_kernel_size=5, kernel_size=5, expand_ratio=4, channels=512, stride=1),
            MQA(heads=8, key_dim=64, kv_stride=1, channels=512),
            UIB(start_kernel_size=5, kernel_size=0, expand_ratio=4, channels=512, stride=1),
            MQA(heads=8, key_dim=64, kv_stride=1, channels=512),
            UIB(start_kernel_size=5, kernel_size=0, expand_ratio=4, channels=512, stride=1),
            MQA(heads=8, key_dim=64, kv_stride=1, channels=512),
            UIB(start_kernel_size=5, kernel_size=0, expand_ratio=4, channels=512, stride=1),
            MQA(heads=8, key_dim=64, kv_stride=1, channels=512),
            UIB(start_kernel_size=5, kernel_size=0, expand_ratio=4, channels=512, stride=1),
        ),
        (  # 12×12×512
            Conv(kernel_size=1, channels=960, stride=1),
        ),
    ),
    hidden=1280,
    activation="gelu",
    layer_scale=True,
)


def plan(model: ModelConfig, table: Table) -> Plan:
    """Makes the network of a config.

    The authors searched the networks of each size separately, so the paper has no width. A width other than 1 (timm has
    Conv-S at 0.35 and 0.5) multiplies the channels of every block and rounds them to multiples of 8. It doesn't change
    the stem and the hidden layer.
    """

    def block(row: Row, stage: int) -> Block:
        module, options = _module_of(row, table)
        features = make_divisible(row.channels * model.width)
        return Block(module=module, options=FrozenDict(features=features, **options), stride=row.stride, stage=stage)

    return Plan(
        stem=table.stem,
        blocks=tuple(block(row, stage) for stage, rows in enumerate(table.stages) for row in rows),
        hidden=table.hidden,
        hidden_norm=True,
        act=table.activation,
    )


def _module_of(row: Row, table: Table) -> tuple[type[nn.Module], dict[str, Any]]:
    """Returns the module of a row and its options, except the channels."""
    match row:
        case Conv():
            return ConvBlock, dict(kernel_size=row.kernel_size, act=table.activation)
        case Fused():
            options = dict(kernel_size=row.kernel_size, expand_ratio=row.expand_ratio)
            return FusedInvertedResidual, dict(options, act=table.activation)
        case UIB():
            options = dict(start_kernel_size=row.start_kernel_size, kernel_size=row.kernel_size)
            shared = dict(act=table.activation, layer_scale=table.layer_scale)
            return UniversalInvertedBottleneck, dict(options, expand_ratio=row.expand_ratio, **shared)
        case MQA():
            return MobileAttention, dict(heads=row.heads, key_dim=row.key_dim, kv_stride=row.kv_stride)
