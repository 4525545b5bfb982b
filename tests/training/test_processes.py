"""Who takes part, and how a process that has got stuck is noticed; several real processes are in test_multihost.py."""

import os
import re
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest

from mnv2_jax import config as config_lib
from mnv2_jax.errors import FaultError, UserError
from mnv2_jax.training import mesh as meshes
from mnv2_jax.training import processes
from mnv2_jax.training.processes import Cluster
from mnv2_jax.training.supervisor import Supervisor, supervise
from tests import cli

SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_NODELIST": "gpu[003-004,9]",
    "SLURM_NTASKS": "3",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
    "SLURM_STEP_TASKS_PER_NODE": "1(x3)",
    "JAX_COORDINATOR_PORT": "8482",
}


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node01", "node01"),
        ("node01,node07", "node01"),
        ("node[01-04,07]", "node01"),
        ("node[7],gpu3", "node7"),
        ("gpu-a[003-004,9].cluster.org,b", "gpu-a003.cluster.org"),
        ("10.0.0.7", "10.0.0.7"),
    ],
)
def test_slurm_names_the_first_node(nodes, first):
    assert processes._of_slurm(SLURM | {"SLURM_STEP_NODELIST": nodes}) == Cluster(f"{first}:8482", 3, 1, None)


@pytest.mark.parametrize(
    ("changes", "devices"),
    [
        ({}, None),  # a task that has its node to itself has all of its GPUs
        ({"SLURM_STEP_TASKS_PER_NODE": "1,2", "SLURM_LOCALID": "1"}, [1]),
        ({"SLURM_STEP_TASKS_PER_NODE": "8(x2)", "SLURM_LOCALID": "5", "CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7"}, [5]),
        ({"SLURM_STEP_TASKS_PER_NODE": "8(x2)", "SLURM_LOCALID": "5", "CUDA_VISIBLE_DEVICES": "5"}, None),
        ({"SLURM_STEP_TASKS_PER_NODE": "8", "SLURM_LOCALID": "5", "ROCR_VISIBLE_DEVICES": "5"}, None),
    ],
)
def test_slurm_shares_out_a_nodes_gpus(changes, devices):
    found = processes._of_slurm(SLURM | changes)
    assert found is not None
    assert found.local_device_ids == devices


@pytest.mark.parametrize("missing", ["SLURM_STEP_NODELIST", "SLURM_PROCID"])
def test_slurm_outside_of_a_step_is_none(missing):
    assert processes._of_slurm({name: value for name, value in SLURM.items() if name != missing}) is None
    assert processes._of_slurm(SLURM | {"SLURM_NTASKS": "1"}) is None


def test_kubernetes_asks_for_what_it_needs():
    assert processes._may_be_detected({})
    assert processes._may_be_detected({"KUBERNETES_SERVICE_HOST": "x", "TPU_WORKER_HOSTNAMES": "a,b"})
    assert not processes._may_be_detected({"KUBERNETES_SERVICE_HOST": "x"})  # a notebook
    with pytest.raises(UserError, match="pip install kubernetes"):
        processes._may_be_detected({"KUBERNETES_SERVICE_HOST": "x", "JOB_COMPLETION_INDEX": "0"})


def test_flags_are_whole(monkeypatch):
    monkeypatch.setenv("JAX_COORDINATOR_PORT", "9000")
    assert processes._checked(Cluster()) is None
    assert processes._checked(Cluster(None, 1)) == Cluster("localhost:9000", 1, 0)
    assert processes._checked(Cluster("node1", 4, 3)) == Cluster("node1:9000", 4, 3)
    assert processes._checked(Cluster("node1:77", 4, 0)) == Cluster("node1:77", 4, 0)
    assert processes._checked(Cluster("[::1]:77", 4, 0)) == Cluster("[::1]:77", 4, 0)
    for cluster in (Cluster("a:1"), Cluster("a:1", 4), Cluster(None, 4, 1), Cluster("a:1", None, 1)):
        with pytest.raises(UserError, match="go together"):
            processes._checked(cluster)
    for count, number in ((0, 0), (2, 2), (2, -1), (1, 1)):
        with pytest.raises(UserError, match=f"--process_id={number} is not one of --num_processes={count}"):
            processes._checked(Cluster("a:1", count, number))


def test_one_process_agrees_with_itself():
    assert processes.exchange({"a": 1}) == [{"a": 1}]
    assert processes.from_first([1]) == [1]
    processes.agree({"a": 1})
    tree = {"a": np.float32(-0.0)}
    assert processes.broadcast(tree) is tree


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ([{"a": 1}, {"a": 1}, {"a": 2}], "a is 1 in process 0 and 2 in process 2; start all"),
        ([{"a": 1}, {}], "a is 1 in process 0 and null in process 1"),
        ([{"b": "x" * 99}, {"b": "x" * 98}], r"b is \"x+… \(SHA-256 \w{8}\) in process 0"),
    ],
)
def test_what_differs_is_named(monkeypatch, told, message):
    monkeypatch.setattr(processes, "exchange", lambda facts, timeout_s: told)
    with pytest.raises(UserError, match=message):
        processes.agree(told[0])
    with pytest.raises(FaultError, match="mend this"):
        processes.agree(told[0], mend="mend this", kind=FaultError)


def test_a_mesh_is_in_the_order_of_the_processes():
    """A TPU numbers its devices by where they stand."""
    backwards = meshes.make_mesh(jax.devices()[::-1])
    assert [device.id for device in backwards.devices.flat] == sorted(device.id for device in jax.devices())


# --- the watch over the loop --------------------------------------------------------------------------------


def test_signals_become_a_question():
    with supervise(config_lib.FaultsConfig()) as supervisor:
        assert not supervisor.should_stop()
        os.kill(os.getpid(), signal.SIGTERM)
        assert supervisor.should_stop()
        assert supervisor.should_stop()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_what_is_compiled_may_take_longer():
    supervisor = Supervisor(2.0, 50.0)
    supervisor._waited_s = 1.5
    with supervisor.compiling():
        assert supervisor._limit_s == 50
        supervisor._waited_s = 40
    assert (supervisor._limit_s, supervisor._waited_s) == (2, 0)
    supervisor._waited_s = 1.5
    supervisor.should_stop()
    assert supervisor._waited_s == 0


STUCK = """
import sys, threading, time
from mnv2_jax.config import FaultsConfig
from mnv2_jax.training.supervisor import supervise
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
