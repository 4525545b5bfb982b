"""MobileNets in JAX: what a library user needs, imported when it is first asked for."""

from __future__ import annotations

import importlib
from typing import Any

_EXPORTS = dict.fromkeys(("Model", "create_model", "list_models"), "mnv2_jax.models.registry")

__all__ = list(_EXPORTS)


def __getattr__(name: str) -> Any:
    """Loads an export lazily: ``python -m mnv2_jax.main --help`` needs no JAX."""
    if name not in _EXPORTS:
        raise AttributeError(f"module 'mnv2_jax' has no attribute {name!r}")
    return getattr(importlib.import_module(_EXPORTS[name]), name)
