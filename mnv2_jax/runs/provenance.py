"""Provenance of a session's numbers."""

from __future__ import annotations

import datetime
import importlib.metadata
import pathlib
import platform
import re
import resource
import shlex
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

import psutil

from mnv2_jax.processes.settings import settings

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


def provenance(devices: Mapping[str, Any]) -> dict[str, Any]:
    """Provenance of a session's numbers: start (UTC), command, git, versions, devices, settings. No host, no user."""
    started = datetime.datetime.fromtimestamp(psutil.Process().create_time(), datetime.UTC)
    return {
        "started": started.isoformat(timespec="seconds"),
        "command": shlex.join(["python", *sys.orig_argv[1:]]),
        "git": _git(),
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in _PACKAGES}},
        "devices": dict(devices),
        "settings": settings(),
    }


def peak_host_bytes() -> int:
    """The most memory that this process has held, without processes that it started."""
    try:
        told = re.search(r"^VmHWM:\s+(\d+) kB$", pathlib.Path("/proc/self/status").read_text(), re.MULTILINE)
    except OSError:
        told = None
    if told is not None:  # what `getrusage` says on Linux may be the parent's
        return int(told[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


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
