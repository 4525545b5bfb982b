"""Several processes as one: how they find each other, agree, exchange facts, and fail together.

    joined ──► start: who takes part (`cluster.find`) ──► jax.distributed
      │
      ├── agree, exchange, from_first    over the coordinator; compile nothing
      ├── broadcast                      a state, over the devices
      └── fail: the first error of any process ends all of them, with its message and its exit code

A process alone goes the same way, and meets nobody.
"""

from __future__ import annotations

import contextlib
import errno
import faulthandler
import hashlib
import importlib.metadata
import importlib.util
import itertools
import json
import os
import pathlib
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

import jax
import numpy as np
from jax._src import xla_bridge
from jax._src.distributed import global_state  # its store of facts has no public door; Orbax goes in by it, too
from jax.experimental import multihost_utils

import mnv2_jax
from mnv2_jax import outputs
from mnv2_jax.config import FaultsConfig
from mnv2_jax.errors import FaultError, UserError, line_and_code
from mnv2_jax.processes.cluster import PORT, Cluster, find
from mnv2_jax.processes.settings import settings
from mnv2_jax.types import PyTree

_FAILED, _SEEN = "mnv2_jax/failed", "mnv2_jax/seen/"
_FOR_EVER_S = 30 * 24 * 3600.0
"""`exchange` waits without a limit of its own: the supervisor ends a process that waits too long."""
_WATCH_EVERY_S, _FAREWELL_S, _PORT_S = 1.0, 3.0, 10.0
_OWN_FAULTS = ("RESOURCE_EXHAUSTED", "INVALID_ARGUMENT", "UNIMPLEMENTED", "NOT_FOUND")
"""Messages of XLA that have nothing to do with another process."""
_NO_BACKEND, _OF_PEERS = "Unable to initialize backend", ("DEADLINE_EXCEEDED", "UNAVAILABLE", "ABORTED", "CANCELLED")
"""Messages of XLA about devices that aren't there, and, in the same words, about peers."""
_AGREED_PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy")


def is_first() -> bool:
    """Whether this process keeps the run folder and speaks for all."""
    return jax.process_index() == 0


def are_several() -> bool:
    """Whether there is another process."""
    return jax.process_count() > 1


# --- start and end -----------------------------------------------------------------------------------------


@contextlib.contextmanager
def joined(flags: Cluster, faults: FaultsConfig, verb: str) -> Iterator[None]:
    """Joins the other processes, if there are any. What ends one of them within ends all.

    An exception ends a process of several at once: the usual way out would wait for peers who wait for it.

    Args:
      flags: see `cluster.find`.
      faults: how long to wait for whom.
      verb: what is to be done; the same in all.

    Raises:
      UserError: if the flags aren't whole.
    """
    _start(flags, faults)
    if not are_several():
        yield
        return
    over = threading.Event()
    threading.Thread(target=_watch_peers, args=(over,), daemon=True, name="peers").start()
    try:
        agree({"the mode": verb, **_software()}, faults.start_timeout_s)
        yield
        jax.distributed.shutdown()  # waits for the others: one that left early would be taken for lost
        over.set()
    except BaseException as error:
        _leave(error)


def _start(flags: Cluster, faults: FaultsConfig) -> None:
    """`jax.distributed.initialize` where there is a cluster; nothing elsewhere."""
    os.environ.setdefault("JAX_COORDINATOR_PORT", PORT)
    chosen = find(flags, os.environ)
    if chosen == "alone":
        check_devices()
        return
    given = {} if chosen == "ask JAX" else chosen._asdict()
    if given and given["process_id"] == 0:
        _check_port(given["coordinator_address"])
    many = f"all {given['num_processes']}" if given else "the"
    who = f"; this is process {given['process_id']}, process 0 is {given['coordinator_address']}" if given else ""

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
            **given,
            cluster_detection_method="deactivate" if given else None,
            initialization_timeout=int(faults.start_timeout_s) + 60,
            heartbeat_timeout_seconds=faults.heartbeat_timeout_s,
        )
        jax.devices()  # the backend waits for everybody's devices
    except ValueError as error:
        if given or "coordinator_address" not in str(error):  # that is how JAX says that there is no cluster
            raise
    except AssertionError as error:
        raise _no_devices(error) from error
    except (RuntimeError, OSError) as error:
        if str(error).startswith(_NO_BACKEND) and not any(sign in str(error) for sign in _OF_PEERS):
            raise _no_devices(error) from error
        _exit(FaultError.exit_code, f"error: the other processes can't be joined ({_first_line(error)}); start again")
    finally:
        timer.cancel()
    check_devices()
    if are_several():
        _keep_stdout_clean()


def check_devices() -> None:
    """Makes sure that JAX has devices, before anything else is asked of it.

    Raises:
      UserError: if JAX_PLATFORMS names some that aren't there.
    """
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # asserted by JAX where no GPU is visible
        raise _no_devices(error) from error


def check_compiles() -> None:
    """Makes sure that JAX compiles what it is told to.

    Raises:
      UserError: if JAX_DISABLE_JIT is set.
    """
    if jax.config.jax_disable_jit:  # type: ignore[attr-defined]
        raise UserError("JAX_DISABLE_JIT is set, and training needs its steps compiled; unset it")


def _no_devices(error: Exception) -> UserError:
    """Error line for devices that JAX was told to use and can't."""
    reason = f" ({_first_line(error).partition(' (set JAX_PLATFORMS')[0]})" if str(error) else ""
    for name in ("jax_platforms", "jax_platform_name"):
        if asked := jax.config.values[name]:
            jax.config.update(name, None)
            return UserError(
                f"{name.upper()}={asked!r}: JAX has no such device here{reason}; unset it, or take one of those that"
                f" are here: {', '.join(_platforms())}"
            )
    return UserError(f"JAX can't use the devices of this machine{reason}; mend that, or set JAX_PLATFORMS=cpu")


def _platforms() -> list[str]:
    """Platforms that JAX finds by itself, in the form of JAX_PLATFORMS."""
    if importlib.util.find_spec("libtpu") is not None:  # which looks for a TPU for minutes where there is none
        return ["cpu"]
    try:
        return sorted(xla_bridge.backends())  # the public name of NVIDIA's is gpu, which JAX_PLATFORMS doesn't take
    except RuntimeError:
        return ["cpu"]


def _check_port(address: str) -> None:
    """gRPC would share a port with another run on this machine, and the two would take each other's processes.

    Raises:
      UserError: if somebody listens there, and goes on doing so; a run that is just ending lets go.
    """
    port = int(address.rpartition(":")[2])
    deadline = time.monotonic() + _PORT_S
    while True:
        with socket.socket(socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                listener.bind(("", port))
                return
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    return  # JAX will say what it thinks of it
                if time.monotonic() > deadline:
                    raise UserError(
                        f"port {port} is taken, mostly by another run on this machine; set JAX_COORDINATOR_PORT for"
                        " all processes, or give --coordinator_address another"
                    ) from error
        time.sleep(0.5)


def _keep_stdout_clean() -> None:
    """Gloo tells standard output of its connections; that is for what we answer."""
    sys.stdout.flush()
    ours = os.dup(1)
    os.dup2(2, 1)
    sys.stdout = outputs.opened(ours, sys.stdout)


# --- facts -------------------------------------------------------------------------------------------------

_exchanges = itertools.count()


def exchange(facts: Any, timeout_s: float = _FOR_EVER_S) -> list[Any]:
    """Gathers a JSON value from each process, in their order. All must call it, in the same order of calls.

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
    """Gives the JSON value of process 0 to all; the others' values are not looked at."""
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
    """Code, libraries and devices, which must be the same in all processes before anything is compiled."""
    root, code = pathlib.Path(mnv2_jax.__file__).parent, hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        code.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes())
    device = jax.local_devices()[0]
    return {
        "the code of mnv2_jax": code.hexdigest()[:12],
        **{f"the version of {name}": importlib.metadata.version(name) for name in _AGREED_PACKAGES},
        "the number of devices": jax.local_device_count(),
        "the kind of device": device.device_kind,
        **settings(),
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


_questions = itertools.count(1)


def reached_stop() -> bool:
    """Whether all are to stop here: some process has got a SIGTERM, and this is where all meet. All ask it as often."""
    return multihost_utils.reached_preemption_sync_point(next(_questions))


# --- failing together --------------------------------------------------------------------------------------


def fail(line: str, code: int) -> NoReturn:
    """Ends this process, whatever thread calls, and tells the others why."""
    _before_leaving(_FAILED, json.dumps([jax.process_index(), line, code]))
    _exit(code, line)


def _follow(number: int, line: str, code: int) -> NoReturn:
    if code == FaultError.exit_code:  # which of us is the one that is stuck?
        faulthandler.dump_traceback(sys.__stderr__ or 2, all_threads=True)
    _before_leaving(f"{_SEEN}{jax.process_index()}", "")
    _exit(code, f"process {number} has failed, and so ends process {jax.process_index()}: {line}")


def _before_leaving(key: str, value: str) -> None:
    """Leaves word for the others. The coordinator goes with process 0, which waits a little for all to have read it."""

    def leave_word() -> None:
        client, deadline = global_state.client, time.monotonic() + _FAREWELL_S
        if client is None or not are_several():
            return
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # another was first
            client.key_value_set(key, value)
        while is_first() and time.monotonic() < deadline and not all_have_read(client):
            time.sleep(0.05)

    def all_have_read(client: Any) -> bool:  # but the one that failed
        return len(client.key_value_dir_get(_SEEN)) >= jax.process_count() - 1

    thread = threading.Thread(target=leave_word, daemon=True)
    thread.start()
    thread.join(2 * _FAREWELL_S)  # the coordinator may be stuck itself


def _peer_failure() -> tuple[int, str, int] | None:
    """Process, line and exit code of another that failed; None if nobody has."""
    client = global_state.client
    if client is None:  # all is over
        return None
    try:
        number, line, code = json.loads(client.key_value_try_get(_FAILED))
    except jax.errors.JaxRuntimeError:  # not there; or the coordinator is gone, and JAX ends us
        return None
    return None if number == jax.process_index() else (number, line, code)


def _watch_peers(over: threading.Event) -> None:
    """Ends this process when another has failed: it would wait for it in the next step."""
    while not over.wait(_WATCH_EVERY_S):
        if (failure := _peer_failure()) is not None:
            _follow(*failure)


def _leave(error: BaseException) -> NoReturn:
    """Out of a run of several processes, at once."""
    if (told := line_and_code(error)) is not None:
        fail(*told)
    traceback.print_exception(error)
    line, code = f"error: {type(error).__name__}: {_first_line(error)}", 1
    if isinstance(error, jax.errors.JaxRuntimeError) and not str(error).startswith(_OWN_FAULTS):
        deadline = time.monotonic() + _FAREWELL_S  # most likely a peer has gone, and has said why
        while time.monotonic() < deadline:
            if (failure := _peer_failure()) is not None:
                _follow(*failure)
            time.sleep(0.1)
        line, code = f"error: a peer was lost ({_first_line(error)}); start all again", FaultError.exit_code
    fail(line, code)


def _first_line(error: BaseException) -> str:
    return str(error).split("\n")[0][:200]


def _exit(code: int, line: str) -> NoReturn:
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
        print(line, file=sys.stderr, flush=True)
    os._exit(code)
