"""Settings of the process that every verb makes before it uses JAX."""

from __future__ import annotations

import logging
import os
import pathlib
import sys

import jax
from absl import flags
from absl import logging as absl_logging

from mnv2_jax.training import processes


def configure() -> None:
    """Turns on the persistent compilation cache and quietens libraries.

    The cache lies in ``JAX_COMPILATION_CACHE_DIR``, or else in ``~/.cache/mnv2_jax``; set the variable to the empty
    string to do without. Several processes have one only where the variable names a folder, which all should see: the
    first alone writes to it, and programs that some find and others compile would be started minutes apart.
    """
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ and not processes.are_several():
        home = pathlib.Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser()
        jax.config.update("jax_compilation_cache_dir", str(home / "mnv2_jax"))
    # Orbax reports every file that it writes, and asyncio and it each error that is raised as well.
    absl_logging.set_verbosity(absl_logging.FATAL)
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    sys.unraisablehook = _report_unraisable
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # grain's worker processes read absl's flags


def _report_unraisable(event: sys.UnraisableHookArgs) -> None:
    """As Python's own hook, but for what tensorstore reports once an array when another's error has ended a checkpoint.

    That error is raised by `Checkpoints`; these would be printed across it.
    """
    if not (event.object is None and str(event.exc_value) == "Event loop is closed"):
        sys.__unraisablehook__(event)
