"""Lets tests lower programs for a GPU on a machine without one."""

import contextlib

import jax


def h100():
    """Returns a context in which programs are traced for an H100."""
    if jax.__version_info__ < (0, 11):  # without a GPU it assumes one of compute capability 9.0
        return contextlib.nullcontext()
    device = jax.sharding.AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=None, platform="gpu")
    return jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device))
