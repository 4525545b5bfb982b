"""A strict session: four CPU devices, warnings are errors, implicit rank promotion raises."""

import atexit
import os
import shutil
import tempfile

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"

import jax
import pytest
from absl import flags

jax.config.update("jax_numpy_rank_promotion", "raise")
# Several tests compile the same step; the commands they run, too, which take the folder from the environment. Each
# worker of pytest-xdist has a folder of its own: JAX doesn't write its cache atomically.
os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="mnv2_jax_tests_")
atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
flags.FLAGS.mark_as_parsed()  # grain's worker processes read absl flags


@pytest.fixture
def x64():
    """64-bit floats, for the invariances that are exact up to rounding."""
    with jax.enable_x64(True):
        yield
