"""A strict session: four CPU devices, warnings are errors, implicit rank promotion raises."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"

import jax
import pytest
from absl import flags

jax.config.update("jax_numpy_rank_promotion", "raise")
flags.FLAGS.mark_as_parsed()  # grain's worker processes read absl flags


@pytest.fixture
def x64():
    """64-bit floats, for the invariances that are exact up to rounding."""
    with jax.enable_x64(True):
        yield
