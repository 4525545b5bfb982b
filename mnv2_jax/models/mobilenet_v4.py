"""MobileNetV4: Universal Models for the Mobile Ecosystem (Qin et al. 2024, arXiv 2404.10518), tables 11 to 15."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import flax.linen as nn

from mnv2_jax.config import ModelConfig
from mnv2_jax.models.network import Block, Plan
from mnv2_jax.nn.activations import Activation
from mnv2_jax.nn.blocks import (
    ConvBlock,
    FusedInvertedResidual,
    MobileAttention,
    UniversalInvertedBottleneck,
)
from mnv2_jax.nn.channels import make_divisible


class Conv(NamedTuple):
    """Convolution, norm, activation."""

    kernel_size: int
    stride: int
    channels: int


class Fused(NamedTuple):
    """The fused inverted bottleneck."""

    kernel_size: int
    stride: int
    channels: int
    expand_ratio: int


class UIB(NamedTuple):
    """The universal inverted bottleneck; a kernel of 0 is none."""

    start_kernel_size: int
    kernel_size: int
    stride: int
    channels: int
    expand_ratio: int


class MQA(NamedTuple):
    """Mobile multi-query attention."""

    heads: int
    key_dim: int
    kv_stride: int
    channels: int


Row: TypeAlias = Conv | Fused | UIB | MQA


class Table(NamedTuple):
    """A whole network, by stages."""

    stem: int
    stages: tuple[tuple[Row, ...], ...]
    act: Activation = "relu"
    layer_scale: bool = False


HIDDEN_CHANNELS = 1280

CONV_SMALL = Table(
    # At 224 px.
    stem=32,
    stages=(
        (  # 112×112×32
            Conv(3, 2, 32),
            Conv(1, 1, 32),
        ),
        (  # 56×56×32
            Conv(3, 2, 96),
            Conv(1, 1, 64),
        ),
        (  # 28×28×64
            UIB(5, 5, 2, 96, 3),
            UIB(0, 3, 1, 96, 2),
            UIB(0, 3, 1, 96, 2),
            UIB(0, 3, 1, 96, 2),
            UIB(0, 3, 1, 96, 2),
            UIB(3, 0, 1, 96, 4),
        ),
        (  # 14×14×96
            UIB(3, 3, 2, 128, 6),
            UIB(5, 5, 1, 128, 4),
            UIB(0, 5, 1, 128, 4),
            UIB(0, 5, 1, 128, 3),
            UIB(0, 3, 1, 128, 4),
            UIB(0, 3, 1, 128, 4),
        ),
        (  # 7×7×128
            Conv(1, 1, 960),
        ),
    ),
)
CONV_MEDIUM = Table(
    # At 256 px.
    stem=32,
    stages=(
        (  # 128×128×32
            Fused(3, 2, 48, 4),
        ),
        (  # 64×64×48
            UIB(3, 5, 2, 80, 4),
            UIB(3, 3, 1, 80, 2),
        ),
        (  # 32×32×80
            UIB(3, 5, 2, 160, 6),
            UIB(3, 3, 1, 160, 4),
            UIB(3, 3, 1, 160, 4),
            UIB(3, 5, 1, 160, 4),
            UIB(3, 3, 1, 160, 4),
            UIB(3, 0, 1, 160, 4),
            UIB(0, 0, 1, 160, 2),
            UIB(3, 0, 1, 160, 4),
        ),
        (  # 16×16×160
            UIB(5, 5, 2, 256, 6),
            UIB(5, 5, 1, 256, 4),
            UIB(3, 5, 1, 256, 4),
            UIB(3, 5, 1, 256, 4),
            UIB(0, 0, 1, 256, 4),
            UIB(3, 0, 1, 256, 4),
            UIB(3, 5, 1, 256, 2),
            UIB(5, 5, 1, 256, 4),
            UIB(0, 0, 1, 256, 4),
            UIB(0, 0, 1, 256, 4),
            UIB(5, 0, 1, 256, 2),
        ),
        (  # 8×8×256
            Conv(1, 1, 960),
        ),
    ),
)
CONV_LARGE = Table(
    # At 384 px.
    stem=24,
    stages=(
        (  # 192×192×24
            Fused(3, 2, 48, 4),
        ),
        (  # 96×96×48
            UIB(3, 5, 2, 96, 4),
            UIB(3, 3, 1, 96, 4),
        ),
        (  # 48×48×96
            UIB(3, 5, 2, 192, 4),
            UIB(3, 3, 1, 192, 4),
            UIB(3, 3, 1, 192, 4),
            UIB(3, 3, 1, 192, 4),
            UIB(3, 5, 1, 192, 4),
            UIB(5, 3, 1, 192, 4),
            UIB(5, 3, 1, 192, 4),
            UIB(5, 3, 1, 192, 4),
            UIB(5, 3, 1, 192, 4),
            UIB(5, 3, 1, 192, 4),
            UIB(3, 0, 1, 192, 4),
        ),
        (  # 24×24×192
            UIB(5, 5, 2, 512, 4),
            UIB(5, 5, 1, 512, 4),
            UIB(5, 5, 1, 512, 4),
            UIB(5, 5, 1, 512, 4),
            UIB(5, 0, 1, 512, 4),
            UIB(5, 3, 1, 512, 4),
            UIB(5, 0, 1, 512, 4),
            UIB(5, 0, 1, 512, 4),
            UIB(5, 3, 1, 512, 4),
            UIB(5, 5, 1, 512, 4),
            UIB(5, 0, 1, 512, 4),
            UIB(5, 0, 1, 512, 4),
            UIB(5, 0, 1, 512, 4),
        ),
        (  # 12×12×512
            Conv(1, 1, 960),
        ),
    ),
)
HYBRID_MEDIUM = Table(
    # At 256 px.
    stem=32,
    stages=(
        (  # 128×128×32
            Fused(3, 2, 48, 4),
        ),
        (  # 64×64×48
            UIB(3, 5, 2, 80, 4),
            UIB(3, 3, 1, 80, 2),
        ),
        (  # 32×32×80
            UIB(3, 5, 2, 160, 6),
            UIB(0, 0, 1, 160, 2),
            UIB(3, 3, 1, 160, 4),
            UIB(3, 5, 1, 160, 4),
            MQA(4, 64, 2, 160),
            UIB(3, 3, 1, 160, 4),
            MQA(4, 64, 2, 160),
            UIB(3, 0, 1, 160, 4),
            MQA(4, 64, 2, 160),
            UIB(3, 3, 1, 160, 4),
            MQA(4, 64, 2, 160),
            UIB(3, 0, 1, 160, 4),
        ),
        (  # 16×16×160
            UIB(5, 5, 2, 256, 6),
            UIB(5, 5, 1, 256, 4),
            UIB(3, 5, 1, 256, 4),
            UIB(3, 5, 1, 256, 4),
            UIB(0, 0, 1, 256, 2),
            UIB(3, 5, 1, 256, 2),
            UIB(0, 0, 1, 256, 2),
            UIB(0, 0, 1, 256, 4),
            MQA(4, 64, 1, 256),
            UIB(3, 0, 1, 256, 4),
            MQA(4, 64, 1, 256),
            UIB(5, 5, 1, 256, 4),
            MQA(4, 64, 1, 256),
            UIB(5, 0, 1, 256, 4),
            MQA(4, 64, 1, 256),
            UIB(5, 0, 1, 256, 4),
        ),
        (  # 8×8×256
            Conv(1, 1, 960),
        ),
    ),
    layer_scale=True,
)
HYBRID_LARGE = Table(
    # At 384 px.
    stem=24,
    stages=(
        (  # 192×192×24
            Fused(3, 2, 48, 4),
        ),
        (  # 96×96×48
            UIB(3, 5, 2, 96, 4),
            UIB(3, 3, 1, 96, 4),
        ),
        (  # 48×48×96
            UIB(3, 5, 2, 192, 4),
            UIB(3, 3, 1, 192, 4),
            UIB(3, 3, 1, 192, 4),
            UIB(3, 3, 1, 192, 4),
            UIB(3, 5, 1, 192, 4),
            UIB(5, 3, 1, 192, 4),
            UIB(5, 3, 1, 192, 4),
            MQA(8, 48, 2, 192),
            UIB(5, 3, 1, 192, 4),
            MQA(8, 48, 2, 192),
            UIB(5, 3, 1, 192, 4),
            MQA(8, 48, 2, 192),
            UIB(5, 3, 1, 192, 4),
            MQA(8, 48, 2, 192),
            UIB(3, 0, 1, 192, 4),
        ),
        (  # 24×24×192
            UIB(5, 5, 2, 512, 4),
            UIB(5, 5, 1, 512, 4),
            UIB(5, 5, 1, 512, 4),
            UIB(5, 5, 1, 512, 4),
            UIB(5, 0, 1, 512, 4),
            UIB(5, 3, 1, 512, 4),
            UIB(5, 0, 1, 512, 4),
            UIB(5, 0, 1, 512, 4),
            UIB(5, 3, 1, 512, 4),
            UIB(5, 5, 1, 512, 4),
            MQA(8, 64, 1, 512),
            UIB(5, 0, 1, 512, 4),
            MQA(8, 64, 1, 512),
            UIB(5, 0, 1, 512, 4),
            MQA(8, 64, 1, 512),
            UIB(5, 0, 1, 512, 4),
            MQA(8, 64, 1, 512),
            UIB(5, 0, 1, 512, 4),
        ),
        (  # 12×12×512
            Conv(1, 1, 960),
        ),
    ),
    act="gelu",
    layer_scale=True,
)


def plan(model: ModelConfig, table: Table) -> Plan:
    """The network of a config.

    Its sizes were searched one by one; a width below or above 1 (timm has 0.35 and 0.5 of Conv-S) rounds the channels
    of every block to multiples of 8 and leaves the stem and the hidden layer as they are.
    """

    def block(row: Row) -> Callable[..., nn.Module]:
        features = make_divisible(row.channels * model.width)
        match row:
            case Conv():
                return functools.partial(ConvBlock, features=features, kernel_size=row.kernel_size, act=table.act)
            case Fused():
                make = functools.partial(FusedInvertedResidual, kernel_size=row.kernel_size)
                return functools.partial(make, features=features, expand_ratio=row.expand_ratio, act=table.act)
            case UIB():
                return functools.partial(
                    UniversalInvertedBottleneck,
                    features=features,
                    expand_ratio=row.expand_ratio,
                    start_kernel_size=row.start_kernel_size,
                    kernel_size=row.kernel_size,
                    act=table.act,
                    layer_scale=table.layer_scale,
                )
            case MQA():
                attention = functools.partial(MobileAttention, heads=row.heads, key_dim=row.key_dim)
                return functools.partial(attention, features=features, kv_stride=row.kv_stride)

    return Plan(
        stem=table.stem,
        blocks=tuple(
            Block(make=block(row), stride=1, stage=index, attends=True)
            if isinstance(row, MQA)
            else Block(make=block(row), stride=row.stride, stage=index)
            for index, stage in enumerate(table.stages)
            for row in stage
        ),
        hidden=HIDDEN_CHANNELS,
        hidden_norm=True,
        act=table.act,
    )
