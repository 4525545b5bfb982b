"""ResNet-50: Deep Residual Learning (He et al. 2015, arXiv 1512.03385), for use as a teacher and for comparison."""

from __future__ import annotations

import dataclasses

from flax.core import FrozenDict

from mnv2_jax.config import ModelConfig
from mnv2_jax.models.plan import Block, Plan
from mnv2_jax.nn.blocks import Bottleneck


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """A stage: ``repeats`` blocks. The first block has the stride."""

    hidden: int
    """Channels of the 3×3 convolution."""
    channels: int
    repeats: int
    stride: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Table:
    """The table of a whole network."""

    stem: int
    stages: tuple[Row, ...]


RESNET_50 = Table(
    # Table 1. The comment on each line is the input of the stage at 224 px.
    stem=64,
    stages=(
        Row(hidden=64, channels=256, repeats=3, stride=1),  # 56×56×64
        Row(hidden=128, channels=512, repeats=4, stride=2),  # 56×56×256
        Row(hidden=256, channels=1024, repeats=6, stride=2),  # 28×28×512
        Row(hidden=512, channels=2048, repeats=3, stride=2),  # 14×14×1024
    ),
)


def plan(model: ModelConfig, table: Table) -> Plan:
    """Makes the network; no option of the config changes its channels."""
    del model
    return Plan(
        stem=table.stem,
        stem_kernel_size=7,
        stem_pool=True,
        blocks=tuple(
            Block(
                module=Bottleneck,
                options=FrozenDict(features=row.channels, hidden=row.hidden),
                stride=row.stride if repeat == 0 else 1,
                stage=stage,
            )
            for stage, row in enumerate(table.stages)
            for repeat in range(row.repeats)
        ),
        act="relu",
    )
