"""The only file that deals with devices: the mesh, the placement of arrays on it, and the functions compiled for it.

Everything is replicated except the batch, which is cut along its first axis ("data"). The functions compiled here are
pure and don't know about the mesh; XLA's partitioner adds the all-reduces.
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
    """Makes a mesh of all devices (or of ``devices``) along one axis, "data".

    Devices are in the order of the processes, so that each process holds one contiguous piece of a batch.
    `jax.make_mesh` orders a TPU's devices by their place in the pod, which an all-reduce over all of them doesn't need.
    """
    devices = jax.devices() if devices is None else devices
    ordered = sorted(devices, key=lambda device: (device.process_index, device.id))
    return Mesh(np.array(ordered), ("data",), axis_types=(AxisType.Auto,))


def describe(mesh: Mesh) -> dict[str, Any]:
    """Returns platform, kind and number of the devices, and the number of processes, for the provenance."""
    device = mesh.devices.flat[0]
    processes = len({device.process_index for device in mesh.devices.flat})
    return {"platform": device.platform, "kind": device.device_kind, "count": mesh.size, "processes": processes}


def peak_memory(mesh: Mesh) -> dict[str, int]:
    """Returns the peak number of bytes in use since this process began.

    ``host_bytes``, and, where JAX reports it, ``device_bytes``: that of the local device with the highest peak.
    """
    statistics = [device.memory_stats() or {} for device in mesh.local_devices]
    peaks = [stats["peak_bytes_in_use"] for stats in statistics if "peak_bytes_in_use" in stats]
    return {**({"device_bytes": max(peaks)} if peaks else {}), "host_bytes": peak_host_bytes()}


def fastest_forms(mesh: Mesh, dtype: str) -> Forms:
    """Returns the forms of the layers with which these devices train fastest."""
    device = mesh.devices.flat[0]
    is_nvidia = device.platform == "gpu" and "NVIDIA" in device.device_kind
    return fastest(float(device.compute_capability) if is_nvidia else None, dtype)


def replicated(mesh: Mesh) -> NamedSharding:
    """Places the whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def sharded(mesh: Mesh) -> NamedSharding:
    """Places a contiguous piece of the first axis on each device."""
    return NamedSharding(mesh, PartitionSpec("data"))


def spread_microbatches(mesh: Mesh) -> Callable[[PyTree], PyTree]:
    """Makes a function that gives each device its share of every microbatch; arrays are [microbatches, images, ...].

    Where a device's images aren't whole norm groups of every microbatch, some images move to another device. Without
    this constraint XLA would compute a microbatch where its images lie, the same images on several devices.
    """
    place = NamedSharding(mesh, PartitionSpec(None, "data"))
    return lambda tree: jax.lax.with_sharding_constraint(tree, place)


def compile_init(mesh: Mesh, init: Callable[[], TrainState]) -> Callable[[], TrainState]:
    """Compiles ``init`` so that it makes the state on all devices."""
    return jax.jit(init, out_shardings=replicated(mesh))


def compile_train_step(mesh: Mesh, step: TrainStep) -> TrainStep:
    """Compiles the step for the mesh. It donates the state that it is given: those buffers are gone afterwards."""
    whole = replicated(mesh)
    return jax.jit(step, in_shardings=(whole, whole, sharded(mesh)), out_shardings=(whole, whole), donate_argnums=0)


def compile_eval_step(mesh: Mesh, step: EvalStep) -> Callable[[PyTree, PyTree, Batch], tuple[PyTree, dict[str, Array]]]:
    """Compiles ``(sums so far, variables, batch) -> (sums, rows)``; donates the old sums, replicates the results."""
    whole = replicated(mesh)

    def add(sums: PyTree, variables: PyTree, batch: Batch) -> tuple[PyTree, dict[str, Array]]:
        new, rows = step(variables, batch)
        return merge(sums, new), {**rows, "index": batch["index"], "mask": batch["mask"]}

    return jax.jit(add, in_shardings=(whole, whole, sharded(mesh)), out_shardings=whole, donate_argnums=0)


def compile_rows(mesh: Mesh, f: Callable[[PyTree, Batch], Array]) -> Callable[[PyTree, Batch], Array]:
    """Compiles ``(variables, batch) -> rows``, once for each shape of a batch; rows are placed as the batch is."""
    place = sharded(mesh)
    return jax.jit(f, in_shardings=(replicated(mesh), place), out_shardings=place)


def put(mesh: Mesh, tree: PyTree) -> PyTree:
    """Replicates host arrays, which must be the same in every process, on all devices."""
    place = replicated(mesh)
    if place.is_fully_addressable:
        return jax.device_put(tree, place)
    # `device_put` would compare the processes' values, array by array.
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(place, np.asarray(x), np.shape(x)), tree)


def make_throttle(in_flight: int = 2) -> Callable[[PyTree], None]:
    """Makes a function that takes the results of each step, and waits for those of ``in_flight`` steps ago.

    Without it batches that arrive faster than the steps run would fill the device's memory.
    """
    pending: collections.deque[PyTree] = collections.deque()

    def wait(results: PyTree) -> None:
        pending.append(results)
        if len(pending) > in_flight:
            jax.block_until_ready(pending.popleft())

    return wait


def make_feed(mesh: Mesh, resident: HostBatch | None) -> Callable[[HostBatch], Batch]:
    """Makes a function that takes a host batch to the devices.

    Args:
      mesh: the devices.
      resident: arrays [n, ...] of a whole split, which are then put on every device; the rows that a host batch's
        "index" names are gathered there. None: a host batch brings all its arrays itself.
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
