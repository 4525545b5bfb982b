"""Finds the processes that train together, from flags or a scheduler's variables, without any communication."""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Mapping
from typing import Literal, NamedTuple

from mnv2_jax.errors import UserError

PORT = "8482"
"""Port of the coordinator, unless JAX_COORDINATOR_PORT names another; JAX's own choice on TPUs."""

_SLURM_STEP_VARIABLES = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")


class Cluster(NamedTuple):
    """The processes that train together. The names are those of `jax.distributed.initialize`."""

    coordinator_address: str | None = None
    """Address of process 0, as HOST:PORT."""
    num_processes: int | None = None
    process_id: int | None = None
    local_device_ids: list[int] | None = None
    """Numbers of the GPUs that this process uses, out of those it can see. Unset: all of them."""


def find(flags: Cluster, environment: Mapping[str, str]) -> Cluster | Literal["alone", "ask JAX"]:
    """Finds the processes by the flags or SLURM's variables.

    Returns:
      The processes; "alone" if there is only this one; "ask JAX" if JAX should look for others (TPUs, Kubernetes, MPI).

    Raises:
      UserError: if a flag is missing, or variables can't be used.
    """
    port = environment.get("JAX_COORDINATOR_PORT", PORT)
    if flags != Cluster():
        return _from_flags(flags, port)
    if all(name in environment for name in _SLURM_STEP_VARIABLES):
        return _from_slurm(environment, port) if environment["SLURM_NTASKS"] != "1" else "alone"
    return "ask JAX" if _should_ask_jax(environment) else "alone"


def _from_flags(flags: Cluster, port: str) -> Cluster:
    address, count, number, _ = flags
    if count == 1 and number in (None, 0):
        return Cluster(address or f"localhost:{port}", 1, 0)
    if address is None or count is None or number is None:
        raise UserError("--coordinator_address, --num_processes and --process_id go together; give all three")
    if count < 1 or not 0 <= number < count:
        raise UserError(f"--process_id={number} is not one of --num_processes={count}; processes count from 0")
    host, colon, flag_port = address.rpartition(":")
    if not colon:
        return Cluster(f"{address}:{port}", count, number)
    if not host or not flag_port.isdigit():
        raise UserError(f"--coordinator_address={address!r} is not of the form HOST:PORT, as in node1:{PORT}")
    return Cluster(address, count, number)


def _from_slurm(environment: Mapping[str, str], port: str) -> Cluster:
    """Returns the tasks of a step of srun. JAX's own detection would give each task one GPU, however many there are."""
    nodes = environment["SLURM_STEP_NODELIST"]
    # Forms: node01, or node01,node07, or node[01-04,07].cluster. Only the first node's name is needed.
    parsed = re.match(r"([^,\[]+)(?:\[(\d+)[^\]]*\]([^,\[]*))?(?:,|$)", nodes)
    if parsed is None:
        raise UserError(
            f"SLURM_STEP_NODELIST={nodes!r} can't be read; give --coordinator_address, --num_processes and --process_id"
        )
    return Cluster(
        "".join(filter(None, parsed.groups())) + f":{port}",
        int(environment["SLURM_NTASKS"]),
        int(environment["SLURM_PROCID"]),
        _gpus_of_slurm_task(environment),
    )


def _gpus_of_slurm_task(environment: Mapping[str, str]) -> list[int] | None:
    """Returns this task's even share of the node's GPUs; None for all visible ones, where SLURM has shared them out.

    Raises:
      UserError: if the GPUs can't be shared evenly.
    """
    # 8(x2),4 means eight tasks on each of two nodes, and four on another.
    tasks: list[int] = []
    for part in environment.get("SLURM_STEP_TASKS_PER_NODE", "1").split(","):
        number, _, times = part.rstrip(")").partition("(x")
        tasks += [int(number)] * int(times or 1)
    node_tasks = tasks[min(int(environment.get("SLURM_NODEID", 0)), len(tasks) - 1)]
    visible = environment.get("CUDA_VISIBLE_DEVICES", environment.get("ROCR_VISIBLE_DEVICES", ""))
    num_visible = len(visible.split(",")) if visible else 0
    node_gpus = int(environment.get("SLURM_GPUS_ON_NODE", num_visible))
    is_shared_out = "SLURM_GPUS_PER_TASK" in environment or num_visible == 1 or 0 < num_visible < node_gpus
    if node_tasks == 1 or node_gpus == 0 or is_shared_out:
        return None
    if node_gpus % node_tasks:
        raise UserError(
            f"{node_gpus} GPUs of a node do not divide over its {node_tasks} tasks; set --ntasks-per-node to 1"
        )
    share, task = node_gpus // node_tasks, int(environment["SLURM_LOCALID"])
    return list(range(task * share, (task + 1) * share))


def _should_ask_jax(environment: Mapping[str, str]) -> bool:
    """Tells whether JAX should look for a cluster. In a Kubernetes pod it should only if the pod is in an indexed job.

    Raises:
      UserError: in a pod of an indexed job without the package with which JAX asks Kubernetes. Every process would
        train alone then.
    """
    on_tpus = "TPU_WORKER_HOSTNAMES" in environment or "TPU_PROCESS_ADDRESSES" in environment
    if "KUBERNETES_SERVICE_HOST" not in environment or on_tpus:
        return True
    if "JOB_COMPLETION_INDEX" not in environment:
        return False
    try:
        importlib.metadata.version("kubernetes")
    except importlib.metadata.PackageNotFoundError as error:
        raise UserError(
            "this is a pod of an indexed Kubernetes job; give --coordinator_address, --num_processes and --process_id,"
            " or pip install kubernetes"
        ) from error
    return True
