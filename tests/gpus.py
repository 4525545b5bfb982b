"""What can be seen of a GPU without one: whether programs can be lowered for it."""

import contextlib

import jax


def h100():
    """A context in which programs are traced for an H100."""
    if jax.__version_info__ < (0, 11):  # it takes a GPU of compute capability 9.0 where there is none
        return contextlib.nullcontext()
    device = jax.sharding.AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=None, platform="gpu")
    return jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device))
