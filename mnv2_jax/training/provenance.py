"""What produced a session's numbers."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import pathlib
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

import jax
import psutil

_PACKAGES = (
    "mnv2_jax",
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "grain",
    "numpy",
    "pillow",
    "simplejpeg",
    "cykooz-resizer",
)


_OF_DRAWS = ("JAX_ENABLE_X64", "JAX_DEFAULT_PRNG_IMPL", "JAX_THREEFRY_PARTITIONABLE", "JAX_RANDOM_SEED_OFFSET")
"""Settings of JAX by which a seed's random numbers are others."""
_OF_ROUNDING = ("JAX_DEFAULT_MATMUL_PRECISION", "JAX_DISABLE_MOST_OPTIMIZATIONS")
_FLAGS = ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "NVIDIA_TF32_OVERRIDE")
"""Variables that JAX doesn't read itself; they change how numbers are rounded."""


def settings() -> dict[str, Any]:
    """What outside the config changes numbers, by the variable that sets it; JAX's as they hold now."""
    known = jax.config.values  # what a later JAX has no more can't differ
    of_jax = {name: name.lower() for name in (*_OF_DRAWS, *_OF_ROUNDING) if name.lower() in known}
    # Those that a context manager can set for a while are attributes, the others not.
    held = {name: getattr(jax.config, key, known[key]) for name, key in of_jax.items()}
    return held | {name: os.environ.get(name) for name in _FLAGS}


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """What differs between the `settings` of two sessions, as ``NAME: before -> now``, of what both say.

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


def provenance(devices: Mapping[str, Any]) -> dict[str, Any]:
    """What produced a session's numbers: start (UTC), command, git, versions, devices, settings. No host, no user."""
    started = datetime.datetime.fromtimestamp(psutil.Process().create_time(), datetime.UTC)
    return {
        "started": started.isoformat(timespec="seconds"),
        "command": shlex.join(["python", *sys.orig_argv[1:]]),
        "git": _git(),
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in _PACKAGES}},
        "devices": dict(devices),
        "settings": settings(),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git() -> dict[str, Any] | None:
    """Commit and dirtiness of the tree that this file belongs to; None if that isn't a checkout."""
    source = pathlib.Path(__file__)

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(source.parent), "--no-optional-locks", *arguments]
        return subprocess.run(command, capture_output=True, check=True, timeout=5, text=True).stdout.strip()

    try:
        # An installed copy may lie inside somebody else's checkout.
        git("ls-files", "--error-unmatch", source.name)
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return None
