"""Settings of JAX and XLA that change numerical results and are not in the config."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import jax

_RANDOM_SETTINGS = ("JAX_ENABLE_X64", "JAX_DEFAULT_PRNG_IMPL", "JAX_THREEFRY_PARTITIONABLE", "JAX_RANDOM_SEED_OFFSET")
"""Settings of JAX that change the random numbers of a seed."""
_ROUNDING_SETTINGS = ("JAX_DEFAULT_MATMUL_PRECISION", "JAX_DISABLE_MOST_OPTIMIZATIONS")
"""Settings of JAX that change how numbers are rounded."""
_FLAGS = ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "NVIDIA_TF32_OVERRIDE")
"""Environment variables of other libraries that change how numbers are rounded."""


def settings() -> dict[str, Any]:
    """Returns the settings that change numerical results, by the variable that sets them; JAX's as they are now."""
    values = jax.config.values
    # A setting that a later JAX has dropped can't differ, and is left out.
    keys = {name: name.lower() for name in (*_RANDOM_SETTINGS, *_ROUNDING_SETTINGS) if name.lower() in values}
    # Settings that a context manager can change are attributes of `jax.config`; others are only in its values.
    jax_settings = {name: getattr(jax.config, key, values[key]) for name, key in keys.items()}
    return jax_settings | {name: os.environ.get(name) for name in _FLAGS}


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Compares the `settings` of two sessions, where both have them. Flags for the number of devices don't count.

    Returns:
      Lines ``NAME: before -> now`` for changes of the random numbers, and lines for changes of the rounding.
    """
    changed = [
        name for name in now if name in before and _comparable(name, before[name]) != _comparable(name, now[name])
    ]
    lines = {name: f"{name}: {before[name]!r} -> {now[name]!r}" for name in changed}
    random = [line for name, line in lines.items() if name in _RANDOM_SETTINGS]
    return random, [line for name, line in lines.items() if name not in _RANDOM_SETTINGS]


def _comparable(name: str, value: Any) -> Any:
    """Returns flags by name, without those for the number of devices, so that an empty variable equals an unset one."""
    if name not in _FLAGS:
        return value
    return dict(flag.partition("=")[::2] for flag in str(value or "").split() if "device_count" not in flag)
