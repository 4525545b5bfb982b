import pytest

from mnv2_jax.errors import UserError
from mnv2_jax.processes.cluster import Cluster, find

SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_NODELIST": "gpu[003-004,9]",
    "SLURM_NTASKS": "3",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
    "SLURM_STEP_TASKS_PER_NODE": "1(x3)",
    "JAX_COORDINATOR_PORT": "9000",
}
POD = {"KUBERNETES_SERVICE_HOST": "10.0.0.1"}


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
    assert find(Cluster(), SLURM | {"SLURM_STEP_NODELIST": nodes}) == Cluster(f"{first}:9000", 3, 1, None)
    assert find(Cluster("a:1", 2, 0), SLURM) == Cluster("a:1", 2, 0)  # flags come first


def test_slurm_nodes_that_cannot_be_read_are_refused():
    with pytest.raises(UserError, match=r"SLURM_STEP_NODELIST='rack\[1-2\]node\[01-04\]'"):
        find(Cluster(), SLURM | {"SLURM_STEP_NODELIST": "rack[1-2]node[01-04]"})


@pytest.mark.parametrize(
    ("changes", "devices"),
    [
        ({}, None),  # a task that has its node to itself has all of its GPUs
        ({"CUDA_VISIBLE_DEVICES": "0,1,2,3"}, None),
        ({"SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_LOCALID": "1"}, None),  # no GPUs
        ({"SLURM_STEP_TASKS_PER_NODE": "8(x2)", "SLURM_LOCALID": "5", "CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7"}, [5]),
        (
            {"SLURM_STEP_TASKS_PER_NODE": "2(x2)", "SLURM_LOCALID": "1", "CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7"},
            [4, 5, 6, 7],
        ),
        ({"SLURM_STEP_TASKS_PER_NODE": "2(x2)", "SLURM_LOCALID": "0", "SLURM_GPUS_ON_NODE": "4"}, [0, 1]),
        # On the second kind of nodes there is one task.
        ({"SLURM_STEP_TASKS_PER_NODE": "2(x2),1", "SLURM_NODEID": "2", "SLURM_GPUS_ON_NODE": "4"}, None),
        # SLURM has shared them out.
        ({"SLURM_STEP_TASKS_PER_NODE": "8(x2)", "SLURM_LOCALID": "5", "CUDA_VISIBLE_DEVICES": "5"}, None),
        ({"SLURM_STEP_TASKS_PER_NODE": "8", "SLURM_LOCALID": "5", "ROCR_VISIBLE_DEVICES": "5"}, None),
        (
            {
                "SLURM_STEP_TASKS_PER_NODE": "4",
                "SLURM_LOCALID": "3",
                "CUDA_VISIBLE_DEVICES": "6,7",
                "SLURM_GPUS_ON_NODE": "8",
            },
            None,
        ),
        ({"SLURM_STEP_TASKS_PER_NODE": "4", "SLURM_GPUS_PER_TASK": "2", "CUDA_VISIBLE_DEVICES": "0,1"}, None),
    ],
)
def test_a_nodes_gpus_are_shared_out(changes, devices):
    cluster = find(Cluster(), SLURM | changes)
    assert isinstance(cluster, Cluster)
    assert cluster.local_device_ids == devices


def test_gpus_that_do_not_divide_are_refused():
    with pytest.raises(UserError, match=r"8 GPUs .* 3 tasks.*--ntasks-per-node"):
        find(Cluster(), SLURM | {"SLURM_STEP_TASKS_PER_NODE": "3", "SLURM_GPUS_ON_NODE": "8"})


def test_a_single_task_is_alone_and_has_all_gpus():
    """JAX's own detection would use only one GPU."""
    assert find(Cluster(), SLURM | {"SLURM_NTASKS": "1"}) == "alone"


@pytest.mark.parametrize("missing", ["SLURM_STEP_NODELIST", "SLURM_PROCID"])
def test_outside_of_a_step_slurm_says_nothing(missing):
    assert find(Cluster(), {name: value for name, value in SLURM.items() if name != missing}) == "ask JAX"


def test_kubernetes_asks_for_what_it_needs():
    assert find(Cluster(), {}) == "ask JAX"
    for name in ("TPU_WORKER_HOSTNAMES", "TPU_PROCESS_ADDRESSES"):
        assert find(Cluster(), POD | {name: "a,b"}) == "ask JAX"
    assert find(Cluster(), POD) == "alone"  # a notebook
    with pytest.raises(UserError, match="pip install kubernetes"):
        find(Cluster(), POD | {"JOB_COMPLETION_INDEX": "0"})
    assert find(Cluster("a:1", 2, 0), POD | {"JOB_COMPLETION_INDEX": "0"}) == Cluster("a:1", 2, 0)


def test_flags_are_whole():
    assert find(Cluster(None, 1), {}) == Cluster("localhost:8482", 1, 0)
    assert find(Cluster(None, 1), {"JAX_COORDINATOR_PORT": "9000"}) == Cluster("localhost:9000", 1, 0)
    assert find(Cluster("node1", 4, 3), {}) == Cluster("node1:8482", 4, 3)
    assert find(Cluster("node1:77", 4, 0), {}) == Cluster("node1:77", 4, 0)
    assert find(Cluster("[::1]:77", 4, 0), {}) == Cluster("[::1]:77", 4, 0)
    for flags in (Cluster("a:1"), Cluster("a:1", 4), Cluster(None, 4, 1), Cluster("a:1", None, 1)):
        with pytest.raises(UserError, match="go together"):
            find(flags, {})
    for count, number in ((0, 0), (2, 2), (2, -1), (1, 1)):
        with pytest.raises(UserError, match=f"--process_id={number} .*--num_processes={count}"):
            find(Cluster("a:1", count, number), {})
