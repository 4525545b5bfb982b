"""MobileNetV1: Efficient Convolutional Neural Networks for Mobile Vision (Howard et al. 2017, arXiv 1704.04861)."""

from __future__ import annotations

import functools
import math

from mnv2_jax.config import ModelConfig
from mnv2_jax.models.network import Block, Plan
from mnv2_jax.nn.blocks import DepthwiseSeparable
from mnv2_jax.nn.channels import make_divisible

STEM_CHANNELS = 32
STAGES = (
    # Table 1: (channels, stride) of each depthwise-separable block. In the margin: the input at 224 px.
    ((64, 1),),  # 112×112×32
    ((128, 2), (128, 1)),  # 112×112×64
    ((256, 2), (256, 1)),  # 56×56×128
    ((512, 2), (512, 1), (512, 1), (512, 1), (512, 1), (512, 1)),  # 28×28×256
    ((1024, 2), (1024, 1)),  # 14×14×512
)


def plan(model: ModelConfig) -> Plan:
    """The network of a config.

    Channels are cut to whole numbers, at least 8 (slim, Keras; the paper's counts). The activation is ReLU6 (slim,
    Keras, timm), or what ``model.activation`` says. With ``width_rule="corenet"`` channels are rounded to multiples of
    16, and no activation follows a depthwise convolution.
    """
    is_corenet = model.width_rule == "corenet"

    def scaled(channels: int) -> int:
        if is_corenet:
            return make_divisible(math.ceil(channels * model.width), 16)
        return max(8, int(channels * model.width))

    act = model.activation or "relu6"
    return Plan(
        stem=scaled(STEM_CHANNELS),
        blocks=tuple(
            Block(
                make=functools.partial(
                    DepthwiseSeparable, features=scaled(channels), act=act, linear_depthwise=is_corenet
                ),
                stride=stride,
                stage=stage,
            )
            for stage, rows in enumerate(STAGES)
            for channels, stride in rows
        ),
        act=act,
    )
