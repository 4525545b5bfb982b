"""Sets up a strict session: eight CPU devices, warnings are errors, implicit rank promotion raises."""

import atexit
import fcntl
import json
import os
import pathlib
import shutil
import signal
import tempfile

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["KERAS_BACKEND"] = "jax"  # before anything imports Keras, which would compute with TensorFlow

import jax
import jaxtyping
import pytest
from absl import flags

from mnv2_jax.registry import TASKS
from tests import cli

os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count=8 {cli.OLDER_EMITTERS}"  # read by the first backend

SHAPED = (
    "mnv2_jax.ops",
    *(f"mnv2_jax.nn.{name}" for name in ("conv", "depthwise_triton", "normalise", "norm_triton", "resize")),
)
"""Modules with shapes in their signatures, whose calls are checked. The other modules of `nn` are left out, since their
nested functions would be decorated again in every trace."""
jaxtyping.install_import_hook(SHAPED, "beartype.beartype")  # before the modules are imported
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_disable_most_optimizations", True)  # takes two thirds of the compilation time; see `optimized`
# A cache, since several tests and the commands that they run compile the same step. Commands take the folder from the
# environment. Each worker of pytest-xdist has its own folder, since JAX doesn't write its cache atomically.
os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="mnv2_jax_tests_")
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"  # the default is 1 s, and some compilations take less
atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
# Tests send these; under nohup and in the background of a shell they would stay ignored.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)
flags.FLAGS.mark_as_parsed()  # grain's worker processes read absl flags


LONGEST = (
    "test_multihost.py",
    "test_predict.py",  # of those that wait for `trained`, so that it is there when the other worker needs it
    "test_step.py",
    "test_resume.py",
    "test_teacher.py",
    "test_export.py",
    "test_faults.py",
    "test_family.py",
    "test_workers.py",
    "test_convert.py",
    "test_main.py",
    "test_docs.py",
    "test_scales.py",
    "test_load.py",
    "test_prepare.py",
    "test_golden_outputs.py",
)
"""Files that start first, so that no worker of pytest-xdist is still running one of them at the end."""


def pytest_collection_modifyitems(items):
    order = {name: i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))


@pytest.fixture(scope="session", autouse=True)
def own_tasks():
    """Registers the package's own tasks, before a test replaces the registries for a while: they register but once."""
    for name in TASKS.names():
        TASKS.find(name)


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """Trains `cli.SHRUNK` once for all workers; returns the run folder, the JSON answer, and stdout and stderr.

    Tests must not write to the run or resume it; a test that does so must copy it first.
    """
    top = tmp_path_factory.getbasetemp()
    top = top.parent if "PYTEST_XDIST_WORKER" in os.environ else top
    output_path = top / "trained.json"
    with (top / "trained.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not output_path.exists():
            result = cli.run("main", *cli.SHRUNK, f"--workdir={top / 'trained'}", "--json")
            cli.answer(result)
            output_path.write_text(json.dumps({"stdout": result.stdout, "stderr": result.stderr}))
    output = json.loads(output_path.read_text())
    return top / "trained", json.loads(output["stdout"]), output


@pytest.fixture(scope="session")
def real_data() -> pathlib.Path:
    """Returns the folder that MNV2_JAX_DATA names; each test documents which data it needs there."""
    root = os.environ.get("MNV2_JAX_DATA")
    if not root:
        pytest.skip("MNV2_JAX_DATA is not set")
    return pathlib.Path(root)


@pytest.fixture(scope="session")
def operators():
    """Defines torchvision's operators if its compiled ones are missing, as beside a CPU build of torch."""
    torch = pytest.importorskip("torch", reason="pip install .[parity]")
    try:
        import torchvision  # noqa: F401
    except (ImportError, RuntimeError):
        library = torch.library.Library("torchvision", "FRAGMENT")
    else:
        return None  # the operators exist, and defining them twice fails
    for name in ("nms", "qnms"):  # torchvision's import needs them but never calls them
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return library


@pytest.fixture
def optimized():
    """Compiles with all optimizations, as users do, for tests that depend on how XLA rounds."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture
def x64():
    """Enables 64-bit floats, for invariances that hold up to rounding."""
    with jax.enable_x64(True):
        yield
