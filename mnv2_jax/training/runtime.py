"""Settings of the process that every verb makes before it uses JAX."""

from __future__ import annotations

import os
import pathlib

import jax
from absl import flags, logging


def configure() -> None:
    """Turns on the persistent compilation cache and quietens libraries.

    The cache lies in ``JAX_COMPILATION_CACHE_DIR``, or else in ``~/.cache/mnv2_jax``; set the variable to the empty
    string to do without.
    """
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        home = pathlib.Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser()
        jax.config.update("jax_compilation_cache_dir", str(home / "mnv2_jax"))
    logging.set_verbosity(logging.ERROR)  # Orbax reports every file it writes
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # grain's worker processes read absl's flags
