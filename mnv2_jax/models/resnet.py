"""ResNet-50: Deep Residual Learning (He et al. 2015, arXiv 1512.03385), as a teacher and a yardstick."""

from __future__ import annotations

import functools

from mnv2_jax.config import ModelConfig
from mnv2_jax.models.network import Block, Plan
from mnv2_jax.nn.blocks import Bottleneck

EXPANSION = 4
RESNET_50 = (
    # Table 1: (channels of the 3×3 convolution, blocks, stride of the first).
    (64, 3, 1),  # 56×56×64 at 224 px
    (128, 4, 2),  # 56×56×256
    (256, 6, 2),  # 28×28×512
    (512, 3, 2),  # 14×14×1024
)


def plan(model: ModelConfig) -> Plan:
    """The network; nothing of the config changes its channels."""
    del model
    return Plan(
        stem=64,
        stem_kernel_size=7,
        stem_pool=True,
        blocks=tuple(
            Block(
                make=functools.partial(Bottleneck, features=EXPANSION * channels, hidden=channels),
                stride=stride if repeat == 0 else 1,
                stage=stage,
            )
            for stage, (channels, repeats, stride) in enumerate(RESNET_50)
            for repeat in range(repeats)
        ),
        act="relu",
    )
