"""MobileNetV2: Inverted Residuals and Linear Bottlenecks (Sandler et al. 2018, arXiv 1801.04381)."""

from __future__ import annotations

import dataclasses
import math

from flax.core import FrozenDict

from mnv2_jax.config import ModelConfig
from mnv2_jax.models.plan import Block, Plan
from mnv2_jax.nn.blocks import InvertedResidual
from mnv2_jax.nn.channels import make_divisible


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """A stage: ``repeats`` blocks. The first block has the stride."""

    expand_ratio: int
    channels: int
    repeats: int
    stride: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Table:
    """The table of a whole network."""

    stem: int
    stages: tuple[Row, ...]
    head: int


TABLE_2 = Table(
    # The paper's columns are t, c, n and s. The comment on each line is the input of the stage at 224 px.
    stem=32,
    stages=(
        Row(expand_ratio=1, channels=16, repeats=1, stride=1),  # 112×112×32
        Row(expand_ratio=6, channels=24, repeats=2, stride=2),  # 112×112×16
        Row(expand_ratio=6, channels=32, repeats=3, stride=2),  # 56×56×24
        Row(expand_ratio=6, channels=64, repeats=4, stride=2),  # 28×28×32
        Row(expand_ratio=6, channels=96, repeats=3, stride=1),  # 14×14×64
        Row(expand_ratio=6, channels=160, repeats=3, stride=2),  # 14×14×96
        Row(expand_ratio=6, channels=320, repeats=1, stride=1),  # 7×7×160
    ),
    head=1280,
)


def reduced(table: Table) -> Table:
    """Makes the variant with half the channels from the last halving of the map on."""
    first = max(number for number, row in enumerate(table.stages) if row.stride == 2)
    tail = (dataclasses.replace(row, channels=row.channels // 2) for row in table.stages[first:])
    return dataclasses.replace(table, stages=(*table.stages[:first], *tail), head=table.head // 2)


def plan(model: ModelConfig, table: Table) -> Plan:
    """Makes the network of a config.

    Channels are rounded to multiples of 8. The channels of the head grow with widths above 1 only. Of the other width
    rules, divisor4 rounds to multiples of 4 (d-li14's width 0.1), corenet doesn't scale the stem, and fixed_stem_head
    scales neither the stem nor the head (timm's mobilenetv2_110d and 120d). ``model.depth`` multiplies the number of
    blocks, rounded up, in all stages except the first and the last (timm's 110d: 1.2, 120d: 1.4).
    """
    table = reduced(table) if model.reduced_tail else table
    rule = model.width_rule
    divisor = 4 if rule == "divisor4" else 8
    act = model.activation or "relu6"
    before = stem = make_divisible(table.stem * (1 if rule in ("corenet", "fixed_stem_head") else model.width), divisor)
    blocks = []
    for stage, row in enumerate(table.stages):
        channels = make_divisible(row.channels * model.width, divisor)
        is_inner = 0 < stage < len(table.stages) - 1
        for repeat in range(math.ceil(row.repeats * model.depth) if is_inner else row.repeats):
            hidden = None if row.expand_ratio == 1 else before * row.expand_ratio
            blocks.append(
                Block(
                    module=InvertedResidual,
                    options=FrozenDict(features=channels, hidden=hidden, act=act),
                    stride=row.stride if repeat == 0 else 1,
                    stage=stage,
                )
            )
            before = channels
    head = table.head * (1 if rule == "fixed_stem_head" else max(1.0, model.width))
    return Plan(stem=stem, blocks=tuple(blocks), head=make_divisible(head, divisor), act=act)
