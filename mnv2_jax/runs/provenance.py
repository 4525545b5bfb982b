"""Provenance of the numbers of a session: the code, the versions and the devices that produced them."""

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
    """Returns start (UTC), command, git, versions, devices and settings of this session; no host name, no user name."""
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
    """Returns the peak memory of this process in bytes, without the processes that it started."""
    try:
        match = re.search(r"^VmHWM:\s+(\d+) kB$", pathlib.Path("/proc/self/status").read_text(), re.MULTILINE)
    except OSError:
        match = None
    if match is not None:  # preferred: on Linux, `getrusage` may return the parent's peak
        return int(match[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git() -> dict[str, Any] | None:
    """Returns commit and dirtiness of the git checkout that this file belongs to; None if it belongs to none."""
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
