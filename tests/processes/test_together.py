"""Tests the part of the work of several processes that one process can do, and the watch for a stuck process."""

import contextlib
import errno
import os
import queue
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import jax
import numpy as np
import pytest

from mnv2_jax.config import FaultsConfig
from mnv2_jax.errors import FaultError, UserError, line_and_code
from mnv2_jax.processes import supervisor as supervisor_lib
from mnv2_jax.processes import together
from mnv2_jax.processes.cluster import Cluster
from mnv2_jax.processes.supervisor import Stopped, supervise
from mnv2_jax.training import mesh as meshes
from tests import cli


def test_one_process_agrees_with_itself():
    assert together.exchange({"a": 1}) == [{"a": 1}]
    assert together.from_first([1]) == [1]
    together.agree({"a": 1})
    tree = {"a": np.float32(-0.0)}
    assert together.broadcast(tree) is tree


@pytest.mark.parametrize(
    ("gathered", "message"),
    [
        ([{"a": 1}, {"a": 1}, {"a": 2}], "a is 1 in process 0 and 2 in process 2; start all"),
        ([{"a": 1}, {}], "a is 1 in process 0 and null in process 1"),
        ([{}, {"a": 1}], "a is null in process 0 and 1 in process 1"),
        ([{"b": "x" * 99}, {"b": "x" * 98}], r"b is \"x+… \(SHA-256 \w{8}\) in process 0"),
    ],
)
def test_what_differs_is_named(monkeypatch, gathered, message):
    monkeypatch.setattr(together, "exchange", lambda facts, timeout_s: gathered)
    with pytest.raises(UserError, match=message):
        together.agree(gathered[0])
    with pytest.raises(FaultError, match="mend this"):
        together.agree(gathered[0], mend="mend this", kind=FaultError)


def test_a_mesh_is_in_the_order_of_the_processes():
    """A TPU numbers its devices by their position in the machine, not by process."""
    backwards = meshes.make_mesh(jax.devices()[::-1])
    assert [device.id for device in backwards.devices.flat] == sorted(device.id for device in jax.devices())


# --- the watch over the loop --------------------------------------------------------------------------------


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGINT])
def test_signals_become_a_question(sent):
    before = signal.getsignal(sent)
    with supervise(FaultsConfig()) as supervisor:
        assert not supervisor.should_stop()
        os.kill(os.getpid(), sent)
        assert supervisor.should_stop()
        assert supervisor.should_stop()
    assert signal.getsignal(sent) == before


def test_what_was_ignored_under_nohup_stays_so():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with supervise(FaultsConfig()) as supervisor:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not supervisor.should_stop()
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_signal_ends_the_wait_for_a_batch_and_nothing_else():
    def batches():
        yield 1
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(3600)

    with supervise(FaultsConfig()) as supervisor:
        each = supervisor.each(batches())
        assert next(each) == 1
        with pytest.raises(Stopped):
            next(each)
        assert supervisor.should_stop()
        with pytest.raises(Stopped):
            next(supervisor.each(iter([2])))
        os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("compiles", [True, False])
def test_a_signal_during_compilation_is_answered_before_that_is_over(capfd, compiles):
    with supervise(FaultsConfig()) as supervisor:
        with supervisor.compiling() if compiles else contextlib.nullcontext():
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.2)  # the thread's
        assert supervisor.should_stop()
    assert ("SIGTERM" in capfd.readouterr().err) is compiles


INTERRUPTED = """
import os, signal, sys, time
from mnv2_jax import interrupts
interrupts.GRACE_S, *pauses_s = map(float, sys.argv[1:])
signal.signal(signal.SIGINT, signal.default_int_handler)
with interrupts.ending_at_second_interrupt("interrupted", 130):
    for pause_s in pauses_s:
        try:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(60)
        except KeyboardInterrupt:
            print("heard", flush=True)
            time.sleep(pause_s)
print("closed")
"""


@pytest.mark.parametrize(
    ("times_s", "expected"),
    [
        (("0.1", "0.3", "60"), (130, "heard\nheard\n", "interrupted\n")),  # the first alone ends nobody
        (("10", "0", "0.1"), (0, "heard\nheard\nclosed\n", "")),
    ],
)
def test_a_second_interrupt_ends_who_does_not_leave_in_time(times_s, expected):
    command = [sys.executable, "-c", INTERRUPTED, *times_s]
    result = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    assert (result.returncode, result.stdout, result.stderr) == expected


# --- devices ------------------------------------------------------------------------------------------------


def test_training_uncompiled_is_refused():
    with jax.disable_jit(), pytest.raises(UserError, match="JAX_DISABLE_JIT"):
        together.check_compiles()
    together.check_compiles()


@pytest.fixture
def ends(monkeypatch):
    """Queue of the line and code with which the watch ends the process; the watch checks often."""
    reports, never = queue.SimpleQueue(), threading.Event()

    def fail(*report):
        reports.put(report)
        never.wait()  # the real function doesn't return either

    monkeypatch.setattr(supervisor_lib, "_TICK_S", 0.02)
    monkeypatch.setattr("faulthandler.dump_traceback", lambda *_, **__: None)
    monkeypatch.setattr(together, "fail", fail)
    return reports


def test_what_is_compiled_may_take_longer(ends):
    with supervise(FaultsConfig(step_timeout_s=0.6, compile_timeout_s=60.0)) as supervisor:
        with supervisor.compiling():
            time.sleep(0.8)
        for _ in range(5):  # a loop that asks isn't stuck
            time.sleep(0.15)
            assert not supervisor.should_stop()
        assert ends.empty()
        line, code = ends.get(timeout=10)
    assert "stuck for 0.6 s" in line
    assert code == 75


def test_what_is_compiled_may_not_take_for_ever(ends):
    with (
        supervise(FaultsConfig(step_timeout_s=0.1, compile_timeout_s=0.3)) as supervisor,
        supervisor.compiling(),
    ):
        assert "stuck for 0.3 s" in ends.get(timeout=10)[0]


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (UserError("a is b;\n mend it"), ("error: a is b; mend it", 2)),
        (FaultError("gone"), ("error: gone", 75)),
        (KeyboardInterrupt(), ("interrupted", 130)),
        (
            OSError(errno.ENOSPC, "no room", "x.json"),
            ("error: x.json: can't be written (no room); make room and start again", 2),
        ),
        (OSError(errno.ENAMETOOLONG, "too long", "x.py"), ("error: x.py: too long; mend that or correct the path", 2)),
        (OSError(errno.EMFILE, "too many", "x.py"), ("error: x.py: too many; mend that or correct the path", 2)),
        (OSError(errno.ENOENT, "not there", "x.py"), None),
        (BrokenPipeError(errno.EPIPE, "a worker's"), None),
        (KeyError("a bug"), None),
    ],
)
def test_what_is_said_of_an_error(error, expected):
    assert line_and_code(error) == expected


def test_a_port_that_is_taken_is_refused(monkeypatch):
    monkeypatch.setattr(together, "_PORT_S", 0.6)
    monkeypatch.setenv("JAX_COORDINATOR_PORT", "8482")  # `joined` sets it where it isn't
    initialized = []
    monkeypatch.setattr("jax.distributed.initialize", lambda **given: initialized.append(given["coordinator_address"]))
    with socket.socket(socket.AF_INET6) as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)  # as gRPC does
        other.bind(("::", 0))
        other.listen()
        port = other.getsockname()[1]
        first = Cluster(f"localhost:{port}", 1, 0)
        with (
            pytest.raises(UserError, match=f"port {port} is taken"),
            together.joined(first, FaultsConfig(), "train"),
        ):
            pytest.fail("joined")
        assert initialized == []
    with together.joined(first, FaultsConfig(), "train"):
        assert initialized == [first.coordinator_address]


STUCK = """
import sys, threading, time
from mnv2_jax.config import FaultsConfig
from mnv2_jax.processes.supervisor import supervise
with supervise(FaultsConfig(step_timeout_s=2.0, compile_timeout_s=60.0)) as supervisor:
    for _ in range(4):
        time.sleep(1)
        supervisor.should_stop()
    print("moving", flush=True)
    with supervisor.compiling():
        time.sleep(3)
    print("compiled", flush=True)
    def waits_for_ever(): time.sleep(3600)
    waits_for_ever()
"""


def test_who_does_not_ask_in_time_is_ended_with_every_threads_traceback():
    result = subprocess.run(
        [sys.executable, "-c", STUCK], env=cli.environment(), capture_output=True, text=True, timeout=60, check=False
    )
    assert result.returncode == 75
    assert result.stdout == "moving\ncompiled\n"
    assert re.search(r"most recent call first.*in watch.*in waits_for_ever", result.stderr, re.DOTALL)
    assert "error: stuck for 2 s" in result.stderr.splitlines()[-1]
