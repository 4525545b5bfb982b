"""Settings of the process that every verb makes before it uses JAX."""

from __future__ import annotations

import errno
import functools
import glob
import logging
import os
import sys

import jax
from absl import flags
from absl import logging as absl_logging

from mnv2_jax.processes import together


def configure() -> None:
    """Turns on the persistent compilation cache and quietens libraries.

    The cache lies in ``JAX_COMPILATION_CACHE_DIR``, or else in ``~/.cache/mnv2_jax``; set the variable to the empty
    string to do without. Several processes have one only where the variable names a folder, which all should see: the
    first alone writes to it, and programs that some find and others compile would be started minutes apart.
    """
    together.check_devices()
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ and not together.are_several():
        home = os.path.expanduser(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
        if os.path.isabs(home):  # a container's user may have no home
            jax.config.update("jax_compilation_cache_dir", os.path.join(home, "mnv2_jax"))
    _do_without_a_cache_that_cannot_be()
    # Orbax reports every file that it writes, and asyncio and it each error that is raised as well.
    absl_logging.set_verbosity(absl_logging.FATAL)
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    sys.unraisablehook = _report_unraisable
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # grain's worker processes read absl's flags


_IDLE = {
    "an NVIDIA GPU": ("/dev/nvidia[0-9]*", "gpu", "cuda"),
    "a TPU": ("/dev/accel[0-9]*", "tpu", "tpu"),
}
"""Devices by what the system calls their files, JAX's platform, and the extra that brings its plugin."""


def idle_devices(platform: str) -> str:
    """Names a device that this machine has and JAX doesn't use, and what to do; "" where there is none.

    Args:
      platform: of the devices that are used.
    """
    if os.environ.get("JAX_PLATFORMS"):  # somebody has chosen
        return ""
    for name, (files, own, extra) in _IDLE.items():
        if platform != own and glob.glob(files):
            return f"note: this machine has {name}, which isn't used: pip install 'mnv2_jax[{extra}]'"
    return ""


def _do_without_a_cache_that_cannot_be() -> None:
    """JAX would say so in two lines for each program that it compiles."""
    folder = jax.config.values["jax_compilation_cache_dir"]
    if not folder or "://" in folder:
        return
    try:
        os.makedirs(folder, exist_ok=True)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        jax.config.update("jax_compilation_cache_dir", None)
        _note_once(
            f"note: compiled programs aren't kept, as {folder} can't be written ({error.strerror}); set"
            " JAX_COMPILATION_CACHE_DIR to a folder that can"
        )


@functools.cache
def _note_once(text: str) -> None:
    print(text, file=sys.stderr)


def _report_unraisable(event: sys.UnraisableHookArgs) -> None:
    """Does what Python's own hook does, but drops tensorstore's reports, one an array, of a checkpoint that failed.

    That error is raised by `Checkpoints`; these would be printed across it.
    """
    if not (event.object is None and str(event.exc_value) == "Event loop is closed"):
        sys.__unraisablehook__(event)
