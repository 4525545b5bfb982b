"""The plan of a network: its stem, blocks and channels, and where strides become dilation."""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import numpy as np
from flax.core import FrozenDict

from mnv2_jax.config import ModelConfig
from mnv2_jax.errors import UserError, nearest
from mnv2_jax.nn.activations import ACTIVATIONS, Activation
from mnv2_jax.nn.blocks import MobileAttention

STRIDES = 5
"""Number of times that every network here halves its map, and the length of `ModelConfig.strides`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Block:
    """One block of a table, with everything decided except its number of input channels."""

    module: type[nn.Module]
    """A class of `nn.blocks`."""
    options: FrozenDict[str, Any]
    """Attributes of the module, except ``layers``, ``stride`` and ``dilation``, which the network sets."""
    stride: int
    """Published stride: 1 or 2."""
    stage: int
    """Index of the block's stage in the table of the family, from 0."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """The network that a config describes; numbers are channels."""

    stem: int
    blocks: tuple[Block, ...]
    act: Activation
    """Activation after the stem, the head and the hidden layer."""
    stem_kernel_size: int = 3
    stem_pool: bool = False
    """Whether a 3×3 max-pool of stride 2 follows the stem (ResNet)."""
    head: int | None = None
    """Channels of the 1×1 convolution before the mean; None: there is none."""
    hidden: int | None = None
    """Channels of the dense layer behind the mean; None: there is none."""
    hidden_norm: bool = False
    """Whether the hidden layer has a batch norm, and so no bias."""


@dataclasses.dataclass(frozen=True)
class Place:
    """Stride and dilation of a part of the network, and the scale of the map behind it."""

    stride: int
    dilation: int
    ratio: int
    """Height of the image over height of the map."""


def places(plan: Plan, model: ModelConfig) -> tuple[Place, ...]:
    """Returns stride, dilation and ratio of the stem, of the pool if there is one, and of each block."""
    published = [2, *([2] if plan.stem_pool else []), *(block.stride for block in plan.blocks)]
    assert published.count(2) == STRIDES
    configured_strides = iter(model.strides)
    result = []
    ratio, dilation = 1, 1
    for index, halves in enumerate(published):
        stride = next(configured_strides) if halves == 2 else 1
        block_dilation = dilation
        # DeepLab's rule, as in slim: a stride that would go beyond the output stride becomes dilation, from the next
        # block on. The block that lost its stride keeps the dilation that it would have had; in torchvision's V3 it has
        # the new one.
        if ratio * stride > model.output_stride and index > plan.stem_pool:
            dilation, stride = dilation * stride, 1
            block_dilation = dilation if model.dilation_from == "same" else block_dilation
        ratio *= stride
        result.append(Place(stride, block_dilation, ratio))
    return tuple(result)


def check_plan(name: str, plan: Plan) -> None:
    """Checks the plan of a registered network.

    Raises:
      UserError: in one line, for what no network can be built from.
    """
    if not isinstance(plan, Plan):
        raise UserError(f"model.name={name!r}: its function returned {plan!r:.60}; let it return a Plan")
    halvings = 1 + plan.stem_pool + sum(block.stride == 2 for block in plan.blocks)
    if halvings != STRIDES:
        raise UserError(
            f"model.name={name!r}: its plan halves the map {halvings} times, with the stem; it must be {STRIDES} times,"
            " and model.strides turns some of them off, as in --config.model.strides=(1,1,2,2,2)"
        )
    channels = {"stem": plan.stem, "head": plan.head, "hidden": plan.hidden}
    acts = {"act": plan.act}
    for number, block in enumerate(plan.blocks, 1):
        fields = set(block.module.__dataclass_fields__) - {"parent", "name"}
        for key, value in block.options.items():
            if key not in fields:
                raise UserError(
                    f"model.name={name!r}: block {number}: {block.module.__name__} has no field {key!r}"
                    f"{nearest(key, fields)}"
                )
            if block.module.__module__ != MobileAttention.__module__:
                continue  # a block of the user's own, whose fields may mean something else
            if key in ("features", "hidden", "squeezed"):
                channels[f"block {number}: {key}"] = value
            elif key == "act":
                acts[f"block {number}: act"] = value
    for place, count in channels.items():
        if count is not None and (isinstance(count, bool) or not isinstance(count, int | np.integer) or count < 1):
            raise UserError(f"model.name={name!r}: {place}={count!r} must be a whole number of channels, at least 1")
    for place, act in acts.items():
        if act is not None and act not in ACTIVATIONS:
            raise UserError(f"model.name={name!r}: {place}={act!r} is no activation{nearest(str(act), ACTIVATIONS)}")


def has_classes(part: str) -> bool:
    """Whether a part of a head has channels that are classes, so that it doesn't suit other classes."""
    return part.endswith("classifier")


def part_of(name: str) -> str:
    """Returns the name of the part (`Network.parts`) to which a branch of the parameters belongs."""
    return name.removesuffix("_norm")
