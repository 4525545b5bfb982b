"""Configures the process before JAX is used; every verb calls `configure`."""

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
    """Turns on the persistent compilation cache, and silences libraries.

    The cache is in ``JAX_COMPILATION_CACHE_DIR``, or else in ``~/.cache/mnv2_jax``; an empty variable turns it off.
    Several processes have a cache only if the variable names a folder, which all of them should see. Only the first one
    writes to it, and if some found a program there and others compiled it, they would start it minutes apart.
    """
    together.check_devices()
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ and not together.are_several():
        home = os.path.expanduser(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
        if os.path.isabs(home):  # a container's user may have no home
            jax.config.update("jax_compilation_cache_dir", os.path.join(home, "mnv2_jax"))
    _disable_unwritable_cache()
    # Orbax logs every file that it writes, and Orbax and asyncio log errors that they raise as well.
    absl_logging.set_verbosity(absl_logging.FATAL)
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    sys.unraisablehook = _report_unraisable
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # grain's worker processes read absl's flags


_ACCELERATORS = {
    "an NVIDIA GPU": ("/dev/nvidia[0-9]*", "gpu", "cuda"),
    "a TPU": ("/dev/accel[0-9]*", "tpu", "tpu"),
}
"""Accelerators, each with its device files, its platform in JAX, and the extra that installs its JAX plugin."""


def idle_devices(platform: str) -> str:
    """Writes a note on an accelerator that this machine has but JAX doesn't use; "" if there is none.

    Args:
      platform: platform of the devices that JAX uses.
    """
    if os.environ.get("JAX_PLATFORMS"):  # the user has chosen
        return ""
    for name, (files, accelerator_platform, extra) in _ACCELERATORS.items():
        if platform != accelerator_platform and glob.glob(files):
            return f"note: this machine has {name}, which isn't used; to use it, pip install 'mnv2_jax[{extra}]'"
    return ""


def _disable_unwritable_cache() -> None:
    """Turns off a cache whose folder can't be written, with one note. JAX would warn at every compiled program."""
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
            f"note: compiled programs aren't cached, as {folder} can't be written ({error.strerror}); set"
            " JAX_COMPILATION_CACHE_DIR to a folder that can"
        )


@functools.cache
def _note_once(text: str) -> None:
    print(text, file=sys.stderr)


def _report_unraisable(event: sys.UnraisableHookArgs) -> None:
    """Calls Python's own hook, except for tensorstore's reports on the arrays of a checkpoint that failed.

    `Checkpoints` raises that error, and the reports, one for each array, would be printed in between.
    """
    if not (event.object is None and str(event.exc_value) == "Event loop is closed"):
        sys.__unraisablehook__(event)
