"""MobileNetV1: Efficient Convolutional Neural Networks for Mobile Vision (Howard et al. 2017, arXiv 1704.04861)."""

from __future__ import annotations

import dataclasses
import math

from flax.core import FrozenDict

from mnv2_jax.config import ModelConfig
from mnv2_jax.models.plan import Block, Plan
from mnv2_jax.nn.blocks import DepthwiseSeparable
from mnv2_jax.nn.channels import make_divisible


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """A stage: ``repeats`` blocks. The first block has the stride."""

    channels: int
    repeats: int
    stride: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Table:
    """The table of a whole network."""

    stem: int
    stages: tuple[Row, ...]


TABLE_1 = Table(
    # The comment on each line is the input of the stage at 224 px.
    stem=32,
    stages=(
        Row(channels=64, repeats=1, stride=1),  # 112×112×32
        Row(channels=128, repeats=2, stride=2),  # 112×112×64
        Row(channels=256, repeats=2, stride=2),  # 56×56×128
        Row(channels=512, repeats=6, stride=2),  # 28×28×256
        Row(channels=1024, repeats=2, stride=2),  # 14×14×512
    ),
)


def plan(model: ModelConfig, table: Table) -> Plan:
    """Makes the network of a config.

    Channels are rounded down to whole numbers, at least 8 (as in slim and Keras; this gives the paper's counts). The
    activation is ReLU6 (slim, Keras, timm), unless ``model.activation`` names another. With ``width_rule="corenet"``
    channels are rounded to multiples of 16, and no activation follows a depthwise convolution.
    """
    is_corenet = model.width_rule == "corenet"

    def scaled(channels: int) -> int:
        if is_corenet:
            return make_divisible(math.ceil(channels * model.width), 16)
        return max(8, int(channels * model.width))

    act = model.activation or "relu6"
    return Plan(
        stem=scaled(table.stem),
        blocks=tuple(
            Block(
                module=DepthwiseSeparable,
                options=FrozenDict(features=scaled(row.channels), act=act, linear_depthwise=is_corenet),
                stride=row.stride if repeat == 0 else 1,
                stage=stage,
            )
            for stage, row in enumerate(table.stages)
            for repeat in range(row.repeats)
        ),
        act=act,
    )
