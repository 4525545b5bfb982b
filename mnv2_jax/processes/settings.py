"""Settings of JAX and XLA, outside the config, that change numbers."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import jax

_OF_DRAWS = ("JAX_ENABLE_X64", "JAX_DEFAULT_PRNG_IMPL", "JAX_THREEFRY_PARTITIONABLE", "JAX_RANDOM_SEED_OFFSET")
"""Settings of JAX by which a seed's random numbers are others."""
_OF_ROUNDING = ("JAX_DEFAULT_MATMUL_PRECISION", "JAX_DISABLE_MOST_OPTIMIZATIONS")
_FLAGS = ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "NVIDIA_TF32_OVERRIDE")
"""Variables that JAX doesn't read itself; they change how numbers are rounded."""


def settings() -> dict[str, Any]:
    """Settings outside the config that change numbers, by the variable that sets them; JAX's as they hold now."""
    known = jax.config.values  # what a later JAX has no more can't differ
    of_jax = {name: name.lower() for name in (*_OF_DRAWS, *_OF_ROUNDING) if name.lower() in known}
    # Those that a context manager can set for a while are attributes, the others not.
    held = {name: getattr(jax.config, key, known[key]) for name, key in of_jax.items()}
    return held | {name: os.environ.get(name) for name in _FLAGS}


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Differences between the `settings` of two sessions, as ``NAME: before -> now``, of names that both have.

    Returns:
      What changes the random numbers, and what changes how numbers are rounded. Numbers of devices do neither.
    """
    differing = [name for name in now if name in before and _plain(name, before[name]) != _plain(name, now[name])]
    told = {name: f"{name}: {before[name]!r} -> {now[name]!r}" for name in differing}
    draws = [line for name, line in told.items() if name in _OF_DRAWS]
    return draws, [line for name, line in told.items() if name not in _OF_DRAWS]


def _plain(name: str, value: Any) -> Any:
    """Flags by their names, without those that say how many devices there are; none are as good as unset."""
    if name not in _FLAGS:
        return value
    return dict(flag.partition("=")[::2] for flag in str(value or "").split() if "device_count" not in flag)
