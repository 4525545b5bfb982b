"""The contract of a head."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

import jax

from mnv2_jax.config import ModelConfig
from mnv2_jax.models.plan import Plan
from mnv2_jax.nn.blocks import Layers
from mnv2_jax.types import Array, Key

Points: TypeAlias = dict[str, Array]
"""Outputs of the parts of a network, by their names, in the order in which they are computed."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Body:
    """Everything that a head gets of the network in front of it."""

    plan: Plan
    model: ModelConfig
    layers: Layers
    points: Points
    """Outputs of the stem, the blocks and, where the head uses it, the last convolution."""
    by_batch: Mapping[str, bool]
    """Whether the norms of each part use the statistics of the batch."""
    train: bool
    """Whether there is dropout."""
    dropout_keys: Key | None
    """[b], one key per example."""
    is_initializing: bool
    """Whether the variables are drawn, for which all parts are computed."""

    @property
    def last(self) -> Array:
        """Features [b, h, w, c] in front of the head."""
        return next(reversed(self.points.values()))

    def keys(self, purpose: int) -> Key | None:
        """Returns dropout keys [b] of one of several dropouts, so that no two drop the same places."""
        if self.dropout_keys is None:
            return None
        return jax.vmap(jax.random.fold_in, (0, None))(self.dropout_keys, purpose)


class Head(NamedTuple):
    """A kind of head, as functions."""

    parts: Callable[[Plan, ModelConfig], tuple[str, ...]]
    """Names of its parts, in the order of `Network.parts`."""
    has_last_conv: Callable[[Plan], bool]
    """Whether the plan's last 1×1 convolution belongs to the features."""
    compute: Callable[[Body], Points]
    """Computes the outputs of its parts. It is called inside the network, whose submodules it makes."""
    outputs: Callable[[Mapping[str, Array]], Any]
    """Selects the outputs of the network among all points."""
    tap: Callable[[Plan], str | None] = lambda plan: None
    """Name of the block whose expansion the head uses, as the point `EXPANDED`; None: it uses none."""


EXPANDED = "expanded"
"""Name of the expansion of the block that `Head.tap` names; of a block without one, what the block gets."""


def is_feature(plan: Plan) -> bool:
    """Whether the last 1×1 convolution is a feature for dense heads: in V3 and V4, which have a hidden layer behind it.

    V2's 1280 channels are a part of its classifier; DeepLab takes the 320 channels before them (V2's paper, 6.3).
    """
    return plan.head is not None and plan.hidden is not None
