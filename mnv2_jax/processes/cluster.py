"""Which processes train together: as flags say it, or as the variables of a scheduler do. Asks nobody."""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Mapping
from typing import Literal, NamedTuple

from mnv2_jax.errors import UserError

PORT = "8482"
"""Port of the coordinator, unless JAX_COORDINATOR_PORT names another; JAX's own choice on TPUs."""

_OF_A_SLURM_STEP = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")


class Cluster(NamedTuple):
    """The processes that take part; the names are those of `jax.distributed.initialize`."""

    coordinator_address: str | None = None
    """Address of process 0, as HOST:PORT."""
    num_processes: int | None = None
    process_id: int | None = None
    local_device_ids: list[int] | None = None
    """Which of the GPUs that it can see are this process's; unset: all."""


def find(flags: Cluster, environment: Mapping[str, str]) -> Cluster | Literal["alone", "ask JAX"]:
    """Finds the processes by flags or SLURM's variables, or else says whether JAX is to look (TPUs, Kubernetes, MPI).

    Raises:
      UserError: if flags aren't whole, or variables can't be used.
    """
    port = environment.get("JAX_COORDINATOR_PORT", PORT)
    if flags != Cluster():
        return _whole(flags, port)
    if all(name in environment for name in _OF_A_SLURM_STEP):
        return _of_slurm(environment, port) if environment["SLURM_NTASKS"] != "1" else "alone"
    return "ask JAX" if _is_worth_asking(environment) else "alone"


def _whole(flags: Cluster, port: str) -> Cluster:
    address, count, number, _ = flags
    if count == 1 and number in (None, 0):
        return Cluster(address or f"localhost:{port}", 1, 0)
    if address is None or count is None or number is None:
        raise UserError("--coordinator_address, --num_processes and --process_id go together; give all three")
    if count < 1 or not 0 <= number < count:
        raise UserError(f"--process_id={number} is not one of --num_processes={count}; they count from 0")
    host, colon, given = address.rpartition(":")
    if not colon:
        return Cluster(f"{address}:{port}", count, number)
    if not host or not given.isdigit():
        raise UserError(f"--coordinator_address={address!r} is not of the form HOST:PORT, as node1:{PORT}")
    return Cluster(address, count, number)


def _of_slurm(environment: Mapping[str, str], port: str) -> Cluster:
    """The tasks of a step of srun. JAX's own detection would give each task one GPU, however many there are."""
    nodes = environment["SLURM_STEP_NODELIST"]
    # As node01, node01,node07, or node[01-04,07].cluster.
    parsed = re.match(r"([^,\[]+)(?:\[(\d+)[^\]]*\]([^,\[]*))?(?:,|$)", nodes)
    if parsed is None:
        raise UserError(
            f"SLURM_STEP_NODELIST={nodes!r} can't be read; give --coordinator_address, --num_processes and --process_id"
        )
    return Cluster(
        "".join(filter(None, parsed.groups())) + f":{port}",
        int(environment["SLURM_NTASKS"]),
        int(environment["SLURM_PROCID"]),
        _gpus_of_a_task(environment),
    )


def _gpus_of_a_task(environment: Mapping[str, str]) -> list[int] | None:
    """An even share of its node's GPUs; None for all that it can see: SLURM may have shared them out.

    Raises:
      UserError: if there is no even share.
    """
    # As 8(x2),4: eight tasks on each of two nodes, four on another.
    tasks: list[int] = []
    for part in environment.get("SLURM_STEP_TASKS_PER_NODE", "1").split(","):
        number, _, times = part.rstrip(")").partition("(x")
        tasks += [int(number)] * int(times or 1)
    here = tasks[min(int(environment.get("SLURM_NODEID", 0)), len(tasks) - 1)]
    visible = environment.get("CUDA_VISIBLE_DEVICES", environment.get("ROCR_VISIBLE_DEVICES", ""))
    seen = len(visible.split(",")) if visible else 0
    on_node = int(environment.get("SLURM_GPUS_ON_NODE", seen))
    if here == 1 or on_node == 0 or "SLURM_GPUS_PER_TASK" in environment or seen == 1 or 0 < seen < on_node:
        return None
    if on_node % here:
        raise UserError(f"{on_node} GPUs of a node do not divide over its {here} tasks; set --ntasks-per-node to 1")
    share, place = on_node // here, int(environment["SLURM_LOCALID"])
    return list(range(place * share, (place + 1) * share))


def _is_worth_asking(environment: Mapping[str, str]) -> bool:
    """Whether JAX shall look for a cluster: not in a Kubernetes pod that is no part of an indexed job.

    Raises:
      UserError: in one that is, without what JAX asks Kubernetes with: it would train alone, as would the others.
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
