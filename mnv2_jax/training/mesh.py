"""The only file that knows of devices: the mesh, where arrays lie on it, and what is compiled for it.

Everything is replicated but the batch, which is cut along its first axis ("data"). The functions compiled here
are pure and know nothing of it; XLA's partitioner adds the all-reduces.
"""

from __future__ import annotations

import collections
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from mnv2_jax.nn.forms import Forms, fastest
from mnv2_jax.ops.metrics import merge
from mnv2_jax.runs.provenance import peak_host_bytes
from mnv2_jax.training.state import TrainState
from mnv2_jax.training.step import EvalStep, TrainStep
from mnv2_jax.types import Array, Batch, PyTree

HostBatch = Mapping[str, np.ndarray]
"""This process's rows of a batch, as NumPy arrays."""


def make_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
    """All devices (or these) along one axis, "data".

    In the order of the processes, so that each holds one contiguous piece of a batch; `jax.make_mesh` orders a TPU's
    devices by where they stand, which an all-reduce over all of them doesn't need.
    """
    found = sorted(jax.devices() if devices is None else devices, key=lambda device: (device.process_index, device.id))
    return Mesh(np.array(found), ("data",), axis_types=(AxisType.Auto,))


def describe(mesh: Mesh) -> dict[str, Any]:
    """Platform, kind and number of the devices, and of the processes, for the provenance."""
    device = mesh.devices.flat[0]
    processes = len({device.process_index for device in mesh.devices.flat})
    return {"platform": device.platform, "kind": device.device_kind, "count": mesh.size, "processes": processes}


def peak_memory(mesh: Mesh) -> dict[str, int]:
    """The most bytes that were in use since this process began: host_bytes; device_bytes, of that of its devices which
    had the most, where JAX tells."""
    told = [device.memory_stats() or {} for device in mesh.local_devices]
    peaks = [stats["peak_bytes_in_use"] for stats in told if "peak_bytes_in_use" in stats]
    return {**({"device_bytes": max(peaks)} if peaks else {}), "host_bytes": peak_host_bytes()}


def fastest_forms(mesh: Mesh, dtype: str) -> Forms:
    """In which forms of the layers these devices train fastest."""
    device = mesh.devices.flat[0]
    is_nvidia = device.platform == "gpu" and "NVIDIA" in device.device_kind
    return fastest(float(device.compute_capability) if is_nvidia else None, dtype)


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds the whole."""
    return NamedSharding(mesh, PartitionSpec())


def sharded(mesh: Mesh) -> NamedSharding:
    """Each device holds a contiguous piece of the first axis."""
    return NamedSharding(mesh, PartitionSpec("data"))


def spread_microbatches(mesh: Mesh) -> Callable[[PyTree], PyTree]:
    """A function that gives each device its share of every microbatch; arrays are [microbatches, images, ...].

    Where a device's images aren't whole norm groups of every microbatch, some images move. Left to itself, XLA then
    computes a microbatch where its images lie, on several devices the same.
    """
    place = NamedSharding(mesh, PartitionSpec(None, "data"))
    return lambda tree: jax.lax.with_sharding_constraint(tree, place)


def compile_init(mesh: Mesh, init: Callable[[], TrainState]) -> Callable[[], TrainState]:
    """Makes the state where it will live."""
    return jax.jit(init, out_shardings=replicated(mesh))


def compile_train_step(mesh: Mesh, step: TrainStep) -> TrainStep:
    """The step over the mesh. The state given is donated: its buffers are gone afterwards."""
    whole = replicated(mesh)
    return jax.jit(step, in_shardings=(whole, whole, sharded(mesh)), out_shardings=(whole, whole), donate_argnums=0)


def compile_eval_step(mesh: Mesh, step: EvalStep) -> Callable[[PyTree, PyTree, Batch], tuple[PyTree, dict[str, Array]]]:
    """``(sums so far, variables, batch) -> (sums, rows)``, all on every device; the sums given are donated."""
    whole = replicated(mesh)

    def add(sums: PyTree, variables: PyTree, batch: Batch) -> tuple[PyTree, dict[str, Array]]:
        new, rows = step(variables, batch)
        return merge(sums, new), {**rows, "index": batch["index"], "mask": batch["mask"]}

    return jax.jit(add, in_shardings=(whole, whole, sharded(mesh)), out_shardings=whole, donate_argnums=0)


def compile_rows(mesh: Mesh, f: Callable[[PyTree, Batch], Array]) -> Callable[[PyTree, Batch], Array]:
    """``(variables, batch) -> rows``, which lie as the batch does; compiled for each shape of a batch."""
    place = sharded(mesh)
    return jax.jit(f, in_shardings=(replicated(mesh), place), out_shardings=place)


def put(mesh: Mesh, tree: PyTree) -> PyTree:
    """Host arrays, of which every process has the same, replicated on all devices."""
    place = replicated(mesh)
    if place.is_fully_addressable:
        return jax.device_put(tree, place)
    # `device_put` would compare the processes' values, array by array.
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(place, np.asarray(x), np.shape(x)), tree)


def make_throttle(in_flight: int = 2) -> Callable[[PyTree], None]:
    """A function that takes what each step gives, and waits for that of so many steps ago.

    Batches that come faster than steps would fill the device's memory.
    """
    given: collections.deque[PyTree] = collections.deque()

    def wait(results: PyTree) -> None:
        given.append(results)
        if len(given) > in_flight:
            jax.block_until_ready(given.popleft())

    return wait


def make_feed(mesh: Mesh, resident: HostBatch | None) -> Callable[[HostBatch], Batch]:
    """A function that takes a host batch to the devices.

    Args:
      mesh: where to.
      resident: arrays [n, ...] of a whole split, which then lie on every device; of a host batch's "index" their rows
        are gathered there. None: it brings everything.
    """
    place = sharded(mesh)
    place_batch = functools.partial(jax.tree.map, functools.partial(jax.make_array_from_process_local_data, place))
    if resident is None:
        return place_batch
    arrays = put(mesh, dict(resident))

    @functools.partial(jax.jit, out_shardings=place)
    def gather(arrays: Mapping[str, Array], batch: Batch) -> Batch:
        return {**batch, **{name: array[batch["index"]] for name, array in arrays.items()}}

    return lambda batch: gather(arrays, place_batch(dict(batch)))
