"""A network that the package doesn't have: MobileNetV2 with squeeze-excite and hard-swish in the later stages.

import tests.models.squeezed_v2

create_model("squeezed_v2", 10, width=0.5)
"""

import dataclasses

from mnv2_jax.config import ModelConfig
from mnv2_jax.models import mobilenet_v2
from mnv2_jax.models.network import Block, Plan
from mnv2_jax.models.registry import register_model
from mnv2_jax.nn.channels import make_divisible

FIRST_SQUEEZED = 2
"""Stage, from 0."""


def plan(model: ModelConfig) -> Plan:
    """V2's plan with other blocks from a stage on."""
    plain = mobilenet_v2.plan(model, mobilenet_v2.TABLE_2)
    return dataclasses.replace(plain, blocks=tuple(map(_squeezed, plain.blocks)), act="hard_swish")


def _squeezed(block: Block) -> Block:
    if block.stage < FIRST_SQUEEZED:
        return block
    squeezed = make_divisible(block.options["hidden"] / 4, 8)
    return dataclasses.replace(block, options=block.options.copy({"squeezed": squeezed, "act": "hard_swish"}))


register_model("squeezed_v2", plan, options=("width", "depth"))
