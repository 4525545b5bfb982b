"""The number of CPU cores that this process may use; not part of `workers`, whose libraries take seconds to import."""

from __future__ import annotations

import os


def num_cores() -> int:
    """Returns the number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
