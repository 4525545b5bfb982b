"""MobileNetV3: Searching for MobileNetV3 (Howard et al. 2019, arXiv 1905.02244)."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Literal, NamedTuple

from flax.core import FrozenDict

from mnv2_jax.config import ModelConfig
from mnv2_jax.models.plan import Block, Plan
from mnv2_jax.nn.activations import Activation
from mnv2_jax.nn.blocks import InvertedResidual
from mnv2_jax.nn.channels import make_divisible


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One block of the table."""

    kernel_size: int
    expanded_channels: int
    """Channels of the depthwise convolution."""
    channels: int
    squeeze_excite: bool
    activation: Activation
    stride: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Table:
    """The table of a whole network."""

    stem: int
    stages: tuple[tuple[Row, ...], ...]
    hidden: int
    """Channels of the dense layer behind the mean."""


RE: Activation = "relu"
HS: Activation = "hard_swish"

LARGE = Table(
    # Table 1: kernel, exp size, #out, SE, NL and s. The comment on each stage is its input at 224 px.
    stem=16,
    stages=(
        (  # 112×112×16
            Row(kernel_size=3, expanded_channels=16, channels=16, squeeze_excite=False, activation=RE, stride=1),
        ),
        (  # 112×112×16
            Row(kernel_size=3, expanded_channels=64, channels=24, squeeze_excite=False, activation=RE, stride=2),
            Row(kernel_size=3, expanded_channels=72, channels=24, squeeze_excite=False, activation=RE, stride=1),
        ),
        (  # 56×56×24
            Row(kernel_size=5, expanded_channels=72, channels=40, squeeze_excite=True, activation=RE, stride=2),
            Row(kernel_size=5, expanded_channels=120, channels=40, squeeze_excite=True, activation=RE, stride=1),
            Row(kernel_size=5, expanded_channels=120, channels=40, squeeze_excite=True, activation=RE, stride=1),
        ),
        (  # 28×28×40
            Row(kernel_size=3, expanded_channels=240, channels=80, squeeze_excite=False, activation=HS, stride=2),
            Row(kernel_size=3, expanded_channels=200, channels=80, squeeze_excite=False, activation=HS, stride=1),
            Row(kernel_size=3, expanded_channels=184, channels=80, squeeze_excite=False, activation=HS, stride=1),
            Row(kernel_size=3, expanded_channels=184, channels=80, squeeze_excite=False, activation=HS, stride=1),
        ),
        (  # 14×14×80
            Row(kernel_size=3, expanded_channels=480, channels=112, squeeze_excite=True, activation=HS, stride=1),
            Row(kernel_size=3, expanded_channels=672, channels=112, squeeze_excite=True, activation=HS, stride=1),
        ),
        (  # 14×14×112
            Row(kernel_size=5, expanded_channels=672, channels=160, squeeze_excite=True, activation=HS, stride=2),
            Row(kernel_size=5, expanded_channels=960, channels=160, squeeze_excite=True, activation=HS, stride=1),
            Row(kernel_size=5, expanded_channels=960, channels=160, squeeze_excite=True, activation=HS, stride=1),
        ),
    ),
    hidden=1280,
)
SMALL = Table(
    # Table 2. The paper also has an SE behind the last 1×1 convolution, but no implementation does.
    stem=16,
    stages=(
        (  # 112×112×16
            Row(kernel_size=3, expanded_channels=16, channels=16, squeeze_excite=True, activation=RE, stride=2),
        ),
        (  # 56×56×16
            Row(kernel_size=3, expanded_channels=72, channels=24, squeeze_excite=False, activation=RE, stride=2),
            Row(kernel_size=3, expanded_channels=88, channels=24, squeeze_excite=False, activation=RE, stride=1),
        ),
        (  # 28×28×24
            Row(kernel_size=5, expanded_channels=96, channels=40, squeeze_excite=True, activation=HS, stride=2),
            Row(kernel_size=5, expanded_channels=240, channels=40, squeeze_excite=True, activation=HS, stride=1),
            Row(kernel_size=5, expanded_channels=240, channels=40, squeeze_excite=True, activation=HS, stride=1),
        ),
        (  # 14×14×40
            Row(kernel_size=5, expanded_channels=120, channels=48, squeeze_excite=True, activation=HS, stride=1),
            Row(kernel_size=5, expanded_channels=144, channels=48, squeeze_excite=True, activation=HS, stride=1),
        ),
        (  # 14×14×48
            Row(kernel_size=5, expanded_channels=288, channels=96, squeeze_excite=True, activation=HS, stride=2),
            Row(kernel_size=5, expanded_channels=576, channels=96, squeeze_excite=True, activation=HS, stride=1),
            Row(kernel_size=5, expanded_channels=576, channels=96, squeeze_excite=True, activation=HS, stride=1),
        ),
    ),
    hidden=1024,
)


def minimalistic(table: Table) -> Table:
    """Makes TF-slim's variant without 5×5 kernels, squeeze-excite and hard-swish, which are slow on some devices."""
    plain = functools.partial(dataclasses.replace, kernel_size=3, squeeze_excite=False, activation=RE)
    return dataclasses.replace(table, stages=tuple(tuple(map(plain, stage)) for stage in table.stages))


def reduced(table: Table, rule: Literal["paper", "torchvision"]) -> Table:
    """Makes the variant with half the channels in its last stage; torchvision's first expansion there stays whole."""
    tail = tuple(
        dataclasses.replace(
            row,
            channels=row.channels // 2,
            expanded_channels=row.expanded_channels // (1 if rule == "torchvision" and not place else 2),
        )
        for place, row in enumerate(table.stages[-1])
    )
    return dataclasses.replace(table, stages=(*table.stages[:-1], tail), hidden=table.hidden // 2)


class WidthRule(NamedTuple):
    """Effect of a width on stem, expanded channels and head. The output channels of blocks are always multiplied."""

    stem: Callable[[float], float]
    """Maps the width to the width of the stem."""
    expanded: Literal["ratio", "number"]
    """Hidden channels of a block. ``ratio``: the block's input channels times the published ratio; ``number``: the
    published number times the width."""
    head: Literal["number", "ratio"]
    """Channels of the last convolution. ``number``: 6 times the published output channels of the last block times the
    width; ``ratio``: 6 times its rounded output channels."""
    dense: Callable[[float], float]
    """Maps the width to the width of the dense layer behind the mean."""


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
"""Rules by `config.ModelConfig.width_rule`. At width 1 all give the same network; at 0.75 standard and keras do."""


def plan(model: ModelConfig, table: Table) -> Plan:
    """Makes the network of a config.

    Channels are rounded to multiples of 8. The rule of `WIDTH_RULES` that ``model.width_rule`` names decides the rest:
    ``"standard"`` (TF-slim's), ``"torchvision"``, ``"keras"``, or ``"fixed_stem_head"`` (timm's for widths below 0.75).
    """
    table = reduced(table, model.reduced_tail) if model.reduced_tail else table
    rule = WIDTH_RULES[model.width_rule]
    last = table.stages[-1][-1]
    before, full = make_divisible(table.stem * rule.stem(model.width)), table.stem
    stem, blocks = before, []
    for stage, rows in enumerate(table.stages):
        for row in rows:
            channels = make_divisible(row.channels * model.width)
            expanded = row.expanded_channels
            by_ratio = rule.expanded == "ratio"
            hidden = make_divisible(before * (expanded / full) if by_ratio else expanded * model.width)
            blocks.append(
                Block(
                    module=InvertedResidual,
                    options=FrozenDict(
                        features=channels,
                        hidden=None if hidden == before else hidden,
                        act=row.activation,
                        kernel_size=row.kernel_size,
                        squeezed=make_divisible(hidden / 4) if row.squeeze_excite else None,
                    ),
                    stride=row.stride,
                    stage=stage,
                )
            )
            before, full = channels, row.channels
    return Plan(
        stem=stem,
        blocks=tuple(blocks),
        head=6 * before if rule.head == "ratio" else make_divisible(6 * last.channels * model.width),
        hidden=make_divisible(table.hidden * rule.dense(model.width)),
        act=last.activation,
    )
