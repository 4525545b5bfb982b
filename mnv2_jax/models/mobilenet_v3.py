"""MobileNetV3: Searching for MobileNetV3 (Howard et al. 2019, arXiv 1905.02244)."""

from __future__ import annotations

import functools
from typing import NamedTuple

from mnv2_jax.config import ModelConfig
from mnv2_jax.models.network import Block, Plan
from mnv2_jax.nn.blocks import Activation, InvertedResidual
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


def plan(model: ModelConfig, table: Table) -> Plan:
    """The network of a config.

    Channels are rounded to multiples of 8. The hidden ones of a block are what the width leaves of its input times the
    published ratio (slim, Keras, timm), or by ``width_rule="torchvision"`` the published number times the width. The
    dense layer behind the mean grows with widths above 1 only, with torchvision's rule always; and
    ``width_rule="fixed_stem_head"`` (timm below 0.75) leaves it and the stem as they are.
    """
    theirs, fixed = model.width_rule == "torchvision", model.width_rule == "fixed_stem_head"
    last = table.stages[-1][-1]
    before, full = make_divisible(STEM_CHANNELS * (1 if fixed else model.width)), STEM_CHANNELS
    stem, blocks = before, []
    for index, stage in enumerate(table.stages):
        for row in stage:
            channels = make_divisible(row.channels * model.width)
            hidden = make_divisible(row.hidden * model.width if theirs else before * (row.hidden / full))
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
    width = model.width if theirs else 1 if fixed else max(1.0, model.width)
    return Plan(
        stem=stem,
        blocks=tuple(blocks),
        head=6 * before if theirs else make_divisible(6 * last.channels * model.width),
        hidden=make_divisible(table.hidden * width),
        act=last.act,
    )
