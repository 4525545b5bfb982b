"""A strict session: eight CPU devices, warnings are errors, implicit rank promotion raises."""

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
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import jax
import jaxtyping
import pytest
from absl import flags

from tests import cli

SHAPED = ("mnv2_jax.ops", *(f"mnv2_jax.nn.{name}" for name in ("conv", "depthwise_triton", "normalise", "norm_triton")))
"""What has shapes in its signatures: every call is checked. Not all of `nn`, whose norms and forms hold functions in
functions, which would be decorated anew in every trace."""
jaxtyping.install_import_hook(SHAPED, "beartype.beartype")  # before these are imported
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_disable_most_optimizations", True)  # compiles in two thirds of the time; see `optimized`
# Several tests compile the same step; the commands they run, too, which take the folder from the environment. Each
# worker of pytest-xdist has a folder of its own: JAX doesn't write its cache atomically.
os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="mnv2_jax_tests_")
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"  # unset, a second: some take less
atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup it would stay ignored, and some tests send it
flags.FLAGS.mark_as_parsed()  # grain's worker processes read absl flags


LONGEST = (
    "test_multihost.py",
    "test_step.py",
    "test_teacher.py",
    "test_resume.py",
    "test_faults.py",
    "test_convert.py",
    "test_main.py",
    "test_golden_outputs.py",
    "test_family.py",
)
"""Files that begin first, so that no worker of pytest-xdist is left with one of them at the end."""


def pytest_collection_modifyitems(items):
    order = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A finished run of `cli.SHRUNK`, made once for all workers: its folder, what it answered and what it said.

    Nobody may write to it, or go on with it: tests that do take a copy.
    """
    top = tmp_path_factory.getbasetemp()
    top = top.parent if "PYTEST_XDIST_WORKER" in os.environ else top
    said = top / "trained.json"
    with (top / "trained.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not said.exists():
            result = cli.run("main", *cli.SHRUNK, f"--workdir={top / 'trained'}", "--json")
            cli.answer(result)
            said.write_text(json.dumps({"stdout": result.stdout, "stderr": result.stderr}))
    told = json.loads(said.read_text())
    return top / "trained", json.loads(told["stdout"]), told


@pytest.fixture(scope="session")
def real_data() -> pathlib.Path:
    """The folder that MNV2_JAX_DATA names; what lies in it each test says."""
    root = os.environ.get("MNV2_JAX_DATA")
    if not root:
        pytest.skip("MNV2_JAX_DATA is not set")
    return pathlib.Path(root)


@pytest.fixture(scope="session")
def operators():
    """torchvision may lack its compiled operators: there is no build of it for the CPU build of torch."""
    torch = pytest.importorskip("torch", reason="pip install .[parity]")
    try:
        import torchvision  # noqa: F401
    except (ImportError, RuntimeError):
        library = torch.library.Library("torchvision", "FRAGMENT")
    else:
        return None  # defined a second time, they clash
    for name in ("nms", "qnms"):  # asked for by torchvision's import, never called
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return library


@pytest.fixture
def optimized():
    """Compilation as users have it, for what depends on how XLA rounds."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture
def x64():
    """64-bit floats, for the invariances that are exact up to rounding."""
    with jax.enable_x64(True):
        yield
