"""Activations by name."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Literal, TypeAlias

import jax

from mnv2_jax.types import Array

Activation: TypeAlias = Literal["relu", "relu6", "hard_swish", "gelu"]
ACTIVATIONS: Mapping[Activation, Callable[[Array], Array]] = {
    "relu": jax.nn.relu,
    "relu6": jax.nn.relu6,
    "hard_swish": jax.nn.hard_swish,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
}


def activate(x: Array, act: Activation | None) -> Array:
    """Applies an activation; returns x unchanged if ``act`` is None."""
    return x if act is None else ACTIVATIONS[act](x)
