"""Makes several processes work as one: they join, agree, exchange facts, and fail together.

    joined ──► start: which processes take part (`cluster.find`) ──► jax.distributed
      │
      ├── agree, exchange, from_first    through the coordinator; they compile nothing
      ├── broadcast                      sends a state through the devices
      └── fail: the first error of any process ends all of them, with its message and its exit code

A single process runs the same code, without communication.
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
from jax._src.distributed import global_state  # its key-value store has no public interface; Orbax uses this one, too
from jax.experimental import multihost_utils

import mnv2_jax
from mnv2_jax import outputs
from mnv2_jax.config import FaultsConfig
from mnv2_jax.errors import FaultError, UserError, line_and_code
from mnv2_jax.processes.cluster import PORT, Cluster, find
from mnv2_jax.processes.settings import settings
from mnv2_jax.types import PyTree

_FAILED_KEY, _READ_KEYS = "mnv2_jax/failed", "mnv2_jax/seen/"
_FOR_EVER_S = 30 * 24 * 3600.0
"""Default timeout of `exchange`, which is no limit: the supervisor ends a process that waits too long."""
_WATCH_EVERY_S, _FAREWELL_S, _PORT_S = 1.0, 3.0, 10.0
_OWN_FAULTS = ("RESOURCE_EXHAUSTED", "INVALID_ARGUMENT", "UNIMPLEMENTED", "NOT_FOUND")
"""First words of XLA's messages for errors that another process can't have caused."""
_NO_BACKEND, _PEER_FAULTS = "Unable to initialize backend", ("DEADLINE_EXCEEDED", "UNAVAILABLE", "ABORTED", "CANCELLED")
"""Text of XLA's message for missing devices, and words that it contains if another process is the cause."""
_AGREED_PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy")


def is_first() -> bool:
    """Tells whether this is process 0, which writes the run folder and prints for all."""
    return jax.process_index() == 0


def are_several() -> bool:
    """Tells whether there are several processes."""
    return jax.process_count() > 1


# --- start and end -----------------------------------------------------------------------------------------


@contextlib.contextmanager
def joined(flags: Cluster, faults: FaultsConfig, verb: str) -> Iterator[None]:
    """Joins the other processes, if there are any. An error that ends one of them in this context ends them all.

    If there are several processes, an exception ends this one at once. Leaving in the usual way would wait for the
    other processes, which wait for this one.

    Args:
      flags: the processes according to the flags; see `cluster.find`.
      faults: the timeouts.
      verb: mode of the command, which must be the same in all processes.

    Raises:
      UserError: if a flag is missing.
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
        jax.distributed.shutdown()  # waits for the other processes, which would count an early leaver as lost
        over.set()
    except BaseException as error:
        _leave(error)


def _start(flags: Cluster, faults: FaultsConfig) -> None:
    """Calls `jax.distributed.initialize` if there is a cluster."""
    os.environ.setdefault("JAX_COORDINATOR_PORT", PORT)
    cluster = find(flags, os.environ)
    if cluster == "alone":
        check_devices()
        return
    options = {} if cluster == "ask JAX" else cluster._asdict()
    if options and options["process_id"] == 0:
        _check_port(options["coordinator_address"])
    processes, identity = "the processes have not all", ""
    if options:
        processes = f"not all {options['num_processes']} processes have"
        identity = f"; this is process {options['process_id']}, process 0 is {options['coordinator_address']}"

    def give_up() -> None:
        _exit(
            FaultError.exit_code,
            f"error: {processes} started within faults.start_timeout_s={faults.start_timeout_s:g} s{identity};"
            " start them all, with the same address and number of processes",
        )

    # JAX's own timeout aborts with a stack trace.
    timer = threading.Timer(faults.start_timeout_s, give_up)
    timer.daemon = True
    timer.start()
    try:
        jax.distributed.initialize(
            **options,
            cluster_detection_method="deactivate" if options else None,
            initialization_timeout=int(faults.start_timeout_s) + 60,
            heartbeat_timeout_seconds=faults.heartbeat_timeout_s,
        )
        jax.devices()  # the backend waits for the devices of all processes
    except ValueError as error:
        if options or "coordinator_address" not in str(error):  # JAX says so if there is no cluster
            raise
    except AssertionError as error:
        raise _no_devices(error) from error
    except (RuntimeError, OSError) as error:
        if str(error).startswith(_NO_BACKEND) and not any(word in str(error) for word in _PEER_FAULTS):
            raise _no_devices(error) from error
        _exit(FaultError.exit_code, f"error: can't join the other processes ({_first_line(error)}); start all again")
    finally:
        timer.cancel()
    check_devices()
    if are_several():
        _keep_stdout_clean()


def check_devices() -> None:
    """Checks that JAX has devices, before anything else uses JAX.

    Raises:
      UserError: if JAX_PLATFORMS names devices that this machine doesn't have.
    """
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # JAX asserts if no GPU is visible
        raise _no_devices(error) from error


def check_compiles() -> None:
    """Checks that JAX compiles functions.

    Raises:
      UserError: if JAX_DISABLE_JIT is set.
    """
    if jax.config.jax_disable_jit:  # type: ignore[attr-defined]
        raise UserError("JAX_DISABLE_JIT is set, but training needs compiled steps; unset it")


def _no_devices(error: Exception) -> UserError:
    """Makes the error for devices that the environment names and JAX can't use."""
    reason = f" ({_first_line(error).partition(' (set JAX_PLATFORMS')[0]})" if str(error) else ""
    for name in ("jax_platforms", "jax_platform_name"):
        if platforms := jax.config.values[name]:
            jax.config.update(name, None)
            return UserError(
                f"{name.upper()}={platforms!r}: JAX has no such device here{reason}; unset it, or set it to a device of"
                f" this machine: {', '.join(_platforms())}"
            )
    return UserError(f"JAX can't use the devices of this machine{reason}; mend that, or set JAX_PLATFORMS=cpu")


def _platforms() -> list[str]:
    """Returns the platforms that JAX finds on this machine, as JAX_PLATFORMS names them."""
    if importlib.util.find_spec("libtpu") is not None:  # it would search for minutes where there is no TPU
        return ["cpu"]
    try:
        return sorted(xla_bridge.backends())  # a public call would say gpu for NVIDIA, which JAX_PLATFORMS doesn't take
    except RuntimeError:
        return ["cpu"]


def _check_port(address: str) -> None:
    """Checks that no other run on this machine uses the coordinator's port.

    gRPC would share the port with that run, and each of the two would take processes of the other.

    Raises:
      UserError: if the port stays taken. A run that is about to end gets some seconds to free it.
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
                    return  # JAX reports the error
                if time.monotonic() > deadline:
                    raise UserError(
                        f"port {port} is taken, probably by another run on this machine; set JAX_COORDINATOR_PORT for"
                        " all processes, or give --coordinator_address another port"
                    ) from error
        time.sleep(0.5)


def _keep_stdout_clean() -> None:
    """Redirects descriptor 1 to standard error, except for our own prints: Gloo prints its connections there."""
    sys.stdout.flush()
    descriptor = os.dup(1)
    os.dup2(2, 1)
    sys.stdout = outputs.open_descriptor(descriptor, sys.stdout)


# --- facts -------------------------------------------------------------------------------------------------

_exchanges = itertools.count()


def exchange(facts: Any, timeout_s: float = _FOR_EVER_S) -> list[Any]:
    """Gathers a JSON value from each process, in the order of the processes.

    All processes must call this, and make such calls in the same order.

    Raises:
      FaultError: if a process doesn't call it in time.
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
    gathered = [json.loads(value) for _, value in sorted(client.key_value_dir_get(folder))]
    if is_first() and number:  # all processes have read the previous exchange before they began this one
        client.key_value_delete(f"mnv2_jax/exchange/{number - 1}/")
    return gathered


def from_first(facts: Any) -> Any:
    """Returns the JSON value of process 0 in all processes, whose own values are ignored."""
    return exchange(facts if is_first() else None)[0]


def agree(
    facts: Mapping[str, Any],
    timeout_s: float = _FOR_EVER_S,
    mend: str = "start all with the same code, config and data",
    kind: type[UserError] = UserError,
) -> None:
    """Checks that all processes have the same facts.

    Args:
      facts: JSON values by name.
      timeout_s: how long to wait for the other processes, in seconds.
      mend: what the user can do, which ends the error.
      kind: class of the error.

    Raises:
      UserError: if a process differs from process 0, naming that process and the first fact that differs.
      FaultError: if a process doesn't call this in time.
    """
    gathered = exchange(facts, timeout_s)
    first = gathered[0]
    for number, process in enumerate(gathered):
        for key in sorted({*process, *first}):
            first_value, value = (json.dumps(each.get(key)) for each in (first, process))
            if first_value != value:
                raise kind(
                    f"the processes don't agree: {key} is {_short(first_value)} in process 0 and {_short(value)} in"
                    f" process {number}; {mend}"
                )


def _short(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:40]}… (SHA-256 {hashlib.sha256(text.encode()).hexdigest()[:8]})"


def _software() -> dict[str, Any]:
    """Returns the facts on code, libraries and devices that all processes must share before anything is compiled."""
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
    """Returns process 0's arrays in all processes, bit for bit. The others pass arrays of the same shapes and types."""
    if not are_several():
        return tree
    leaves, structure = jax.tree.flatten(tree)
    arrays = [np.asarray(leaf) for leaf in leaves]
    # They are sent as bytes, because JAX sends a sum with zeros, which would turn -0.0 into 0.0.
    sent = np.concatenate([np.frombuffer(array.tobytes(), np.uint8) for array in arrays])
    received = np.asarray(multihost_utils.broadcast_one_to_all(sent))
    ends = list(itertools.accumulate(array.nbytes for array in arrays))
    pieces = np.split(received, ends[:-1])
    copies = [piece.view(array.dtype).reshape(array.shape) for piece, array in zip(pieces, arrays, strict=True)]
    return jax.tree.unflatten(structure, copies)


_questions = itertools.count(1)


def reached_stop() -> bool:
    """Tells whether all processes stop here, because one got a SIGTERM. All must call this equally often."""
    return multihost_utils.reached_preemption_sync_point(next(_questions))


# --- failing together --------------------------------------------------------------------------------------


def fail(line: str, code: int) -> NoReturn:
    """Ends this process, from any thread, and tells the other processes why."""
    _send_before_exit(_FAILED_KEY, json.dumps([jax.process_index(), line, code]))
    _exit(code, line)


def _follow(number: int, line: str, code: int) -> NoReturn:
    """Ends this process because another one has failed."""
    if code == FaultError.exit_code:  # print the stacks, as any of the processes may be the one that is stuck
        faulthandler.dump_traceback(sys.__stderr__ or 2, all_threads=True)
    _send_before_exit(f"{_READ_KEYS}{jax.process_index()}", "")
    _exit(code, f"process {number} has failed, and so ends process {jax.process_index()}: {line}")


def _send_before_exit(key: str, value: str) -> None:
    """Stores a message for the other processes.

    The coordinator ends with process 0, which therefore waits a little until all have read the message of a failure.
    """

    def send() -> None:
        client, deadline = global_state.client, time.monotonic() + _FAREWELL_S
        if client is None or not are_several():
            return
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # another process was first
            client.key_value_set(key, value)
        while is_first() and time.monotonic() < deadline and not all_have_read(client):
            time.sleep(0.05)

    def all_have_read(client: Any) -> bool:  # all but the process that failed
        return len(client.key_value_dir_get(_READ_KEYS)) >= jax.process_count() - 1

    thread = threading.Thread(target=send, daemon=True)
    thread.start()
    thread.join(2 * _FAREWELL_S)  # the coordinator itself may be stuck


def _peer_failure() -> tuple[int, str, int] | None:
    """Returns the number, line and exit code of another process that failed; None if there is none."""
    client = global_state.client
    if client is None:  # JAX has shut down
        return None
    try:
        number, line, code = json.loads(client.key_value_try_get(_FAILED_KEY))
    except jax.errors.JaxRuntimeError:  # no failure is stored; or the coordinator is gone, and JAX ends this process
        return None
    return None if number == jax.process_index() else (number, line, code)


def _watch_peers(over: threading.Event) -> None:
    """Ends this process when another one has failed. Otherwise it would wait for that one in its next step."""
    while not over.wait(_WATCH_EVERY_S):
        if (failure := _peer_failure()) is not None:
            _follow(*failure)


def _leave(error: BaseException) -> NoReturn:
    """Ends this process of several at once, because of an error."""
    if (report := line_and_code(error)) is not None:
        fail(*report)
    traceback.print_exception(error)
    line, code = f"error: {type(error).__name__}: {_first_line(error)}", 1
    if isinstance(error, jax.errors.JaxRuntimeError) and not str(error).startswith(_OWN_FAULTS):
        deadline = time.monotonic() + _FAREWELL_S  # probably another process has failed, and has stored the reason
        while time.monotonic() < deadline:
            if (failure := _peer_failure()) is not None:
                _follow(*failure)
            time.sleep(0.1)
        line, code = f"error: another process was lost ({_first_line(error)}); start all again", FaultError.exit_code
    fail(line, code)


def _first_line(error: BaseException) -> str:
    return str(error).split("\n")[0][:200]


def _exit(code: int, line: str) -> NoReturn:
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
        print(line, file=sys.stderr, flush=True)
    os._exit(code)
