"""Several processes as one: how they find each other, agree, exchange facts, and fail together.

    together ──► start: a cluster's variables, or flags ──► jax.distributed
       │
       ├── agree, exchange, from_first    over the coordinator; compile nothing
       ├── broadcast                      a state, over the devices
       └── fail: the first error of any process ends all of them, with its message and its exit code

A process alone goes the same way, and meets nobody.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import itertools
import json
import os
import pathlib
import re
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, NoReturn

import jax
import numpy as np
from jax._src.distributed import global_state
from jax.experimental import multihost_utils

import mnv2_jax
from mnv2_jax.config import FaultsConfig
from mnv2_jax.errors import FaultError, UserError
from mnv2_jax.types import PyTree

PORT = "8482"
"""Of the coordinator, unless JAX_COORDINATOR_PORT says another; JAX's own choice on TPUs."""

_FAILED, _SEEN = "mnv2_jax/failed", "mnv2_jax/seen/"
_FOR_EVER_S = 30 * 24 * 3600.0
"""`exchange` leaves it to the supervisor to lose patience."""
_WATCH_EVERY_S, _FAREWELL_S = 1.0, 3.0
_AGREED_PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy")


class Cluster(NamedTuple):
    """Who takes part, as flags say it; unset: as the scheduler's variables say it, if there is one."""

    coordinator_address: str | None = None
    """Of process 0, as HOST:PORT; processes that it can't be reached from don't take part."""
    num_processes: int | None = None
    process_id: int | None = None
    local_device_ids: list[int] | None = None
    """Which of the machine's GPUs are this process's; unset: all."""


def is_first() -> bool:
    """Whether this process keeps the run folder and speaks for all."""
    return jax.process_index() == 0


def are_several() -> bool:
    """Whether there is another process."""
    return jax.process_count() > 1


# --- start and end -----------------------------------------------------------------------------------------


@contextlib.contextmanager
def together(cluster: Cluster, faults: FaultsConfig) -> Iterator[None]:
    """Joins the other processes, if there are any. What ends one of them within ends all.

    An exception ends a process of several at once: the usual way out would wait for peers who wait for it.

    Raises:
      UserError: if the flags aren't whole.
    """
    _start(cluster, faults)
    if not are_several():
        yield
        return
    over = threading.Event()
    threading.Thread(target=_watch_peers, args=(over,), daemon=True, name="peers").start()
    try:
        agree(_software(), faults.start_timeout_s)
        yield
        jax.distributed.shutdown()  # waits for the others: one that left early would be taken for lost
        over.set()
    except BaseException as error:
        _leave(error)


def _start(cluster: Cluster, faults: FaultsConfig) -> None:
    """`jax.distributed.initialize` where there is a cluster; nothing elsewhere."""
    os.environ.setdefault("JAX_COORDINATOR_PORT", PORT)
    chosen = _checked(cluster) or _of_slurm(os.environ)
    if chosen is None and not _may_be_detected(os.environ):
        return
    who = "" if chosen is None else f"; this is process {chosen.process_id}, and process 0 is {chosen[0]}"
    many = "the" if chosen is None else f"all {chosen.num_processes}"

    def give_up() -> None:
        _exit(
            FaultError.exit_code,
            f"error: not {many} processes came within faults.start_timeout_s={faults.start_timeout_s:g} s{who};"
            " start them all, with the same address and number",
        )

    # JAX's own end of patience is an abort with a stack trace.
    timer = threading.Timer(faults.start_timeout_s, give_up)
    timer.daemon = True
    timer.start()
    try:
        jax.distributed.initialize(
            **({} if chosen is None else chosen._asdict()),
            cluster_detection_method="deactivate" if chosen else None,
            initialization_timeout=int(faults.start_timeout_s) + 60,
            heartbeat_timeout_seconds=faults.heartbeat_timeout_s,
        )
        jax.devices()  # the backend waits for everybody's devices
    except ValueError as error:
        if chosen is not None or "coordinator_address" not in str(error):
            raise
    finally:
        timer.cancel()
    if are_several():
        _keep_stdout_clean()


def _checked(cluster: Cluster) -> Cluster | None:
    """What the flags say, whole; None if they say nothing."""
    address, count, number, devices = cluster
    if address is None and count is None and number is None:
        return None
    if count == 1 and number in (None, 0):
        return Cluster(address or f"localhost:{os.environ['JAX_COORDINATOR_PORT']}", 1, 0, devices)
    if address is None or count is None or number is None:
        raise UserError("--coordinator_address, --num_processes and --process_id go together; give all three")
    if count < 1 or not 0 <= number < count:
        raise UserError(f"--process_id={number} is not one of --num_processes={count}; they count from 0")
    host, colon, port = address.rpartition(":")
    if not colon:
        return Cluster(f"{address}:{os.environ['JAX_COORDINATOR_PORT']}", count, number, devices)
    if not host or not port.isdigit():
        raise UserError(f"--coordinator_address={address!r} is not of the form HOST:PORT, as node1:{PORT}")
    return Cluster(address, count, number, devices)


def _of_slurm(environment: Mapping[str, str]) -> Cluster | None:
    """The tasks of a step of srun; None outside of one, and for a single task.

    JAX's own detection gives each task one GPU; here a task that has its node to itself has all of the node's.
    """
    wanted = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")
    if not all(name in environment for name in wanted) or environment["SLURM_NTASKS"] == "1":
        return None
    # As node01, node01,node07, or node[01-04,07].cluster.
    parsed = re.match(r"([^,\[]+)(?:\[(\d+)[^\]]*\]([^,]*))?", environment["SLURM_STEP_NODELIST"])
    if parsed is None:
        raise UserError(f"SLURM_STEP_NODELIST={environment['SLURM_STEP_NODELIST']!r} can't be read; give the flags")
    # As 8(x2),4: eight tasks on each of two nodes, four on another.
    per_node = [int(part.split("(")[0]) for part in environment.get("SLURM_STEP_TASKS_PER_NODE", "1").split(",")]
    visible = environment.get("CUDA_VISIBLE_DEVICES", environment.get("ROCR_VISIBLE_DEVICES", ""))
    shares = max(per_node) > 1 and (not visible or "," in visible)  # else SLURM has given it its own
    return Cluster(
        "".join(filter(None, parsed.groups())) + f":{environment['JAX_COORDINATOR_PORT']}",
        int(environment["SLURM_NTASKS"]),
        int(environment["SLURM_PROCID"]),
        [int(environment["SLURM_LOCALID"])] if shares else None,
    )


def _may_be_detected(environment: Mapping[str, str]) -> bool:
    """Whether JAX shall look for a cluster: not in a Kubernetes pod that is no part of an indexed job.

    Raises:
      UserError: in one that is, without what JAX asks Kubernetes with: it would train alone, as would the others.
    """
    if "KUBERNETES_SERVICE_HOST" not in environment or "TPU_WORKER_HOSTNAMES" in environment:
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


def _keep_stdout_clean() -> None:
    """Gloo tells standard output of its connections; that is for what we answer."""
    sys.stdout.flush()
    ours = os.dup(1)
    os.dup2(2, 1)
    sys.stdout = os.fdopen(ours, "w", buffering=1, errors="backslashreplace", closefd=False)


# --- facts -------------------------------------------------------------------------------------------------

_exchanges = itertools.count()


def exchange(facts: Any, timeout_s: float = _FOR_EVER_S) -> list[Any]:
    """What each process has to say (JSON), in their order. All must call it, in the same order of calls.

    Raises:
      FaultError: if not all came in time.
    """
    if not are_several():
        return [facts]
    client, number = global_state.client, next(_exchanges)
    assert client is not None
    folder = f"mnv2_jax/exchange/{number}/"
    client.key_value_set(f"{folder}{jax.process_index():06}", json.dumps(facts))
    try:
        client.wait_at_barrier(f"mnv2_jax/exchange/{number}", int(timeout_s * 1000))
    except jax.errors.JaxRuntimeError as error:
        if "DEADLINE_EXCEEDED" not in str(error):
            raise
        raise FaultError(
            f"the other processes didn't get as far as this one within {timeout_s:g} s; start them all again"
        ) from error
    told = [json.loads(value) for _, value in sorted(client.key_value_dir_get(folder))]
    if is_first() and number:  # everybody has read the one before, or they wouldn't have come here
        client.key_value_delete(f"mnv2_jax/exchange/{number - 1}/")
    return told


def from_first(facts: Any) -> Any:
    """What process 0 says (JSON); the others' is not looked at."""
    return exchange(facts if is_first() else None)[0]


def agree(
    facts: Mapping[str, Any],
    timeout_s: float = _FOR_EVER_S,
    mend: str = "start all with the same code, config and data",
    kind: type[UserError] = UserError,
) -> None:
    """Makes sure that all processes are about to do the same.

    Raises:
      UserError: of this ``kind``, naming a process and the first fact that is another one there than in process 0, and
        the ``mend``.
      FaultError: if one of them doesn't come in time.
    """
    told = exchange(facts, timeout_s)
    for number, theirs in enumerate(told):
        for key in sorted({*theirs, *told[0]}):
            first, other = (json.dumps(process.get(key)) for process in (told[0], theirs))
            if first != other:
                raise kind(
                    f"the processes don't agree: {key} is {_short(first)} in process 0 and {_short(other)} in process"
                    f" {number}; {mend}"
                )


def _short(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:40]}… (SHA-256 {hashlib.sha256(text.encode()).hexdigest()[:8]})"


def _software() -> dict[str, Any]:
    """What must be the same before anything is compiled: our code, the libraries, the devices."""
    root, code = pathlib.Path(mnv2_jax.__file__).parent, hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        code.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes())
    device = jax.local_devices()[0]
    return {
        "the code of mnv2_jax": code.hexdigest()[:12],
        **{f"the version of {name}": importlib.metadata.version(name) for name in _AGREED_PACKAGES},
        "the number of devices": jax.local_device_count(),
        "the kind of device": device.device_kind,
        "JAX_ENABLE_X64": jax.config.read("jax_enable_x64"),
    }


def broadcast(tree: PyTree) -> PyTree:
    """Process 0's arrays, to the bit, in all; the others give NumPy arrays of the same shapes and types."""
    if not are_several():
        return tree
    leaves, structure = jax.tree.flatten(tree)
    arrays = [np.asarray(leaf) for leaf in leaves]
    # As bytes: what is sent is a sum with zeros, which makes of -0.0 another number.
    sent = np.concatenate([np.frombuffer(array.tobytes(), np.uint8) for array in arrays])
    received = np.asarray(multihost_utils.broadcast_one_to_all(sent))
    ends = list(itertools.accumulate(array.nbytes for array in arrays))
    pieces = np.split(received, ends[:-1])
    copies = [piece.view(array.dtype).reshape(array.shape) for piece, array in zip(pieces, arrays, strict=True)]
    return jax.tree.unflatten(structure, copies)


def reached_stop(number: int) -> bool:
    """Whether all are to stop here: some process has got a SIGTERM, and this is where all will meet.

    Args:
      number: of the question; every process asks in the same places.
    """
    return multihost_utils.reached_preemption_sync_point(number)


# --- failing together --------------------------------------------------------------------------------------


def fail(line: str, code: int) -> NoReturn:
    """Ends this process, whatever thread calls, and tells the others why."""
    sender = threading.Thread(target=_tell, args=(line, code), daemon=True)
    sender.start()
    sender.join(2 * _FAREWELL_S)  # the coordinator may be stuck itself
    _exit(code, line)


def _tell(line: str, code: int) -> None:
    client = global_state.client
    if client is None or not are_several():
        return
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # another was first
        client.key_value_set(_FAILED, json.dumps([jax.process_index(), line, code]))
    if is_first():  # the coordinator goes with us, and nobody could read it any more
        deadline = time.monotonic() + _FAREWELL_S
        while time.monotonic() < deadline and len(client.key_value_dir_get(_SEEN)) < jax.process_count() - 1:
            time.sleep(0.05)


def _peer_failure() -> tuple[int, str, int] | None:
    """Process, line and exit code of the first that failed; None if nobody has."""
    assert global_state.client is not None
    try:
        number, line, code = json.loads(global_state.client.key_value_try_get(_FAILED))
    except jax.errors.JaxRuntimeError:  # not there; or the coordinator is gone, and JAX ends us
        return None
    return number, line, code


def _watch_peers(over: threading.Event) -> None:
    """Ends this process when another has failed: it would wait for it in the next step."""
    while not over.wait(_WATCH_EVERY_S):
        failure = _peer_failure()
        if failure is not None and failure[0] != jax.process_index():
            _follow(*failure)


def _follow(number: int, line: str, code: int) -> NoReturn:
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        assert global_state.client is not None
        global_state.client.key_value_set(f"{_SEEN}{jax.process_index()}", "")
    _exit(code, f"process {number} has failed, and so ends process {jax.process_index()}: {line}")


def _leave(error: BaseException) -> NoReturn:
    """Out of a run of several processes, at once."""
    if isinstance(error, UserError):
        fail("error: " + " ".join(str(error).split()), error.exit_code)
    if isinstance(error, KeyboardInterrupt):
        fail("interrupted", 130)
    if isinstance(error, jax.errors.JaxRuntimeError):
        deadline = time.monotonic() + _FAREWELL_S  # most likely a peer has gone, and has said why
        while time.monotonic() < deadline:
            failure = _peer_failure()
            if failure is not None and failure[0] != jax.process_index():
                _follow(*failure)
            time.sleep(0.1)
        fail(f"error: a peer was lost ({_first_line(error)}); start all again", FaultError.exit_code)
    traceback.print_exception(error)
    fail(f"error: {type(error).__name__}: {_first_line(error)}", 1)


def _first_line(error: BaseException) -> str:
    return str(error).split("\n")[0][:200]


def _exit(code: int, line: str) -> NoReturn:
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
        print(line, file=sys.stderr, flush=True)
    os._exit(code)
