"""MobileNetV3: Searching for MobileNetV3 (Howard et al. 2019, arXiv 1905.02244)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Literal, NamedTuple

from mnv2_jax.config import ModelConfig
from mnv2_jax.models.network import Block, Plan
from mnv2_jax.nn.activations import Activation
from mnv2_jax.nn.blocks import InvertedResidual
from mnv2_jax.nn.channels import make_divisible


class Row(NamedTuple):
    """A row of the paper's tables 1 and 2, in their order."""

    kernel_size: int
    hidden: int
    """Channels of the depthwise convolution, "exp size"."""
    channels: int
    squeeze_excite: bool
    act: Activation
    stride: int


class Table(NamedTuple):
    """A whole network: its stages, and the channels of the dense layer behind the mean."""

    stages: tuple[tuple[Row, ...], ...]
    hidden: int


RE: Activation = "relu"
HS: Activation = "hard_swish"
STEM_CHANNELS = 16
LARGE = Table(
    # Table 1: kernel, exp size, #out, SE, NL, s. In the margin: the input of the stage at 224 px.
    stages=(
        (Row(3, 16, 16, False, RE, 1),),  # 112×112×16
        (Row(3, 64, 24, False, RE, 2), Row(3, 72, 24, False, RE, 1)),  # 112×112×16
        (Row(5, 72, 40, True, RE, 2), Row(5, 120, 40, True, RE, 1), Row(5, 120, 40, True, RE, 1)),  # 56×56×24
        (
            Row(3, 240, 80, False, HS, 2),  # 28×28×40
            Row(3, 200, 80, False, HS, 1),
            Row(3, 184, 80, False, HS, 1),
            Row(3, 184, 80, False, HS, 1),
        ),
        (Row(3, 480, 112, True, HS, 1), Row(3, 672, 112, True, HS, 1)),  # 14×14×80
        (Row(5, 672, 160, True, HS, 2), Row(5, 960, 160, True, HS, 1), Row(5, 960, 160, True, HS, 1)),  # 14×14×112
    ),
    hidden=1280,
)
SMALL = Table(
    # Table 2. It also has an SE behind the last 1×1 convolution, which no implementation has.
    stages=(
        (Row(3, 16, 16, True, RE, 2),),  # 112×112×16
        (Row(3, 72, 24, False, RE, 2), Row(3, 88, 24, False, RE, 1)),  # 56×56×16
        (Row(5, 96, 40, True, HS, 2), Row(5, 240, 40, True, HS, 1), Row(5, 240, 40, True, HS, 1)),  # 28×28×24
        (Row(5, 120, 48, True, HS, 1), Row(5, 144, 48, True, HS, 1)),  # 14×14×40
        (Row(5, 288, 96, True, HS, 2), Row(5, 576, 96, True, HS, 1), Row(5, 576, 96, True, HS, 1)),  # 14×14×48
    ),
    hidden=1024,
)


def minimalistic(table: Table) -> Table:
    """Without what some accelerators are slow at: 5×5 kernels, squeeze-excite, hard-swish (TF-slim's)."""
    return table._replace(
        stages=tuple(
            tuple(row._replace(kernel_size=3, squeeze_excite=False, act=RE) for row in stage) for stage in table.stages
        )
    )


class WidthRule(NamedTuple):
    """What becomes of a width, apart from the outputs of the blocks, which it always multiplies."""

    stem: Callable[[float], float]
    """The width of the stem."""
    expanded: Literal["ratio", "number"]
    """Hidden channels of a block: the block's input times the published ratio, or the published number times the width.
    """
    head: Literal["number", "ratio"]
    """The last convolution: 6 times the published outputs of the last block times the width, or 6 times the rounded
    outputs."""
    dense: Callable[[float], float]
    """The width of the dense layer behind the mean."""


def _scaled(width: float) -> float:
    return width


def _fixed(width: float) -> float:
    return 1.0


def _grown(width: float) -> float:
    return max(1.0, width)


WIDTH_RULES = {
    "standard": WidthRule(stem=_scaled, expanded="ratio", head="number", dense=_grown),  # slim; timm from 0.75
    "torchvision": WidthRule(stem=_scaled, expanded="number", head="ratio", dense=_scaled),
    "fixed_stem_head": WidthRule(stem=_fixed, expanded="ratio", head="number", dense=_fixed),  # timm below 0.75
    "keras": WidthRule(stem=_fixed, expanded="ratio", head="ratio", dense=_grown),
}
"""By `config.ModelConfig.width_rule`. At a width of 1 all are the same network, and standard and keras at 0.75, too."""


def plan(model: ModelConfig, table: Table) -> Plan:
    """The network of a config.

    Channels are rounded to multiples of 8; where else the width counts, and how, says the row of `WIDTH_RULES`:
    TF-slim's ``width_rule="standard"``, ``"torchvision"``, ``"keras"``, or ``"fixed_stem_head"``, timm's for its
    networks below 0.75.
    """
    rule = WIDTH_RULES[model.width_rule]
    last = table.stages[-1][-1]
    before, full = make_divisible(STEM_CHANNELS * rule.stem(model.width)), STEM_CHANNELS
    stem, blocks = before, []
    for index, stage in enumerate(table.stages):
        for row in stage:
            channels = make_divisible(row.channels * model.width)
            by_ratio = rule.expanded == "ratio"
            hidden = make_divisible(before * (row.hidden / full) if by_ratio else row.hidden * model.width)
            make = functools.partial(
                InvertedResidual,
                features=channels,
                hidden=None if hidden == before else hidden,
                act=row.act,
                kernel_size=row.kernel_size,
                squeezed=make_divisible(hidden / 4) if row.squeeze_excite else None,
            )
            blocks.append(Block(make=make, stride=row.stride, stage=index))
            before, full = channels, row.channels
    return Plan(
        stem=stem,
        blocks=tuple(blocks),
        head=6 * before if rule.head == "ratio" else make_divisible(6 * last.channels * model.width),
        hidden=make_divisible(table.hidden * rule.dense(model.width)),
        act=last.act,
    )
