"""How much of the machine is ours; apart from `workers`, whose libraries take seconds to import."""

from __future__ import annotations

import os


def num_cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
