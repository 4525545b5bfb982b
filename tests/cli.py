"""Runs the public commands as a user would, on a real config with fewer layers and steps."""

import contextlib
import importlib
import io
import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import jax
import pytest

from mnv2_jax.errors import UserError, line_and_code

ROOT = pathlib.Path(__file__).parents[1]
W0_25 = ROOT / "configs" / "w0_25.py"
SHRUNK = (
    f"--config={W0_25}:data=digits,batch=32,res=16",
    "--config.model.depth=0.3",
    "--config.train.steps=12",
    "--config.train.eval_every_epochs=0.1",
    "--config.log.every_steps=1",
    "--config.log.batch_hash=True",
    "--config.checkpoint.every_steps=2",
)
"""Arguments for 12 steps of MobileNetV2 0.25 on digits, with an evaluation about every 4 steps."""
SHORT = (
    SHRUNK[0],
    "--config.modules=tests.short",
    "--config.model.name=short",
    "--config.data.name=noise",
)
"""Arguments for the network and the data of tests/short.py, for tests of runs rather than of networks."""
SHORT_RUN = (
    *SHORT,
    "--config.train.steps=24",
    "--config.train.eval_every_epochs=0.2",
    "--config.log.every_steps=1",
    "--config.log.batch_hash=True",
    "--config.log.tensorboard=False",
    "--config.checkpoint.every_steps=2",
)
"""Arguments for 24 such steps, with an evaluation about every 9. A process takes half the time of `SHRUNK`'s 12."""
OLDER_EMITTERS = "--xla_cpu_use_fusion_emitters=false" if jax.__version_info__ < (0, 11) else ""
"""Value for XLA_FLAGS that selects faster compilation. jaxlib 0.11 lacks the flag, and XLA aborts on unknown flags."""


def command(verb, *arguments):
    """Returns the command line of ``python -m mnv2_jax.VERB``."""
    return [sys.executable, "-m", f"mnv2_jax.{verb}", *map(str, arguments)]


def environment(devices=1):
    """Returns the environment of a machine with this number of CPU devices."""
    return os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} {OLDER_EMITTERS}",
        "PYTHONWARNINGS": "error",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",  # takes two thirds of the compilation time
    }


def run(verb, *arguments, devices=1, cwd=None):
    """Runs a verb in another process and waits for its end."""
    return subprocess.run(
        command(verb, *arguments),
        env=environment(devices),
        cwd=cwd or ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def here(verb, *arguments, stdout=None, devices=None):
    """Runs a verb in this process, which saves the seconds of a start.

    ``stdout`` is an `io.StringIO` that does something when it is written to; ``devices`` is how many of this process's
    devices the verb may use (default: all).
    """
    out, err, code = stdout or io.StringIO(), io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.setattr("sys.argv", [verb, *map(str, arguments)])
        patch.setattr("jax.distributed.initialize", lambda **_: None)  # JAX has started already, as one process
        if devices is not None:
            from mnv2_jax.training import mesh as meshes  # after the hook of conftest.py, which `nn` must not escape

            mesh = meshes.make_mesh(jax.devices()[:devices])
            patch.setattr(meshes, "make_mesh", lambda _: mesh)
        try:
            importlib.import_module(f"mnv2_jax.{verb}").main()
        except UserError as error:
            line, code = line_and_code(error)
            print(line, file=err)
    return subprocess.CompletedProcess(command(verb, *arguments), code, out.getvalue(), err.getvalue())


def start(verb, *arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **variables):
    """Starts a verb with ``variables`` added to its environment and pipes for its output."""
    return subprocess.Popen(
        command(verb, *arguments),
        env=environment() | variables,
        cwd=ROOT,
        stdout=stdout,
        stderr=stderr,
        text=True,
    )


def until(process, condition):
    """Polls a condition until it is true; returns False if the process ends first or after 200 s."""
    deadline = time.monotonic() + 200
    while process.poll() is None and time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.001)
    return False


def answer(result):
    """Returns the JSON object that a successful command with --json printed."""
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def metrics(workdir, split):
    """Returns the lines of a split in metrics.jsonl, without the keys that depend on the clock."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    clock = {"seconds", "images_per_second", "images_per_second_per_device", "data_wait_share"}
    return [{k: v for k, v in line.items() if k not in clock} for line in lines if line["split"] == split]


def digests(workdir):
    """Returns the newest checkpoint's step and the SHA-256 of each of its arrays."""
    steps = [p for p in (workdir / "checkpoints").iterdir() if p.name.isdigit()]
    newest = max(steps, key=lambda p: int(p.name))
    return newest.name, json.loads((newest / "digest" / "metadata").read_text())


def logged_steps(workdir):
    """Counts the steps that a run has logged; steps that a resumed run repeats count twice."""
    path = workdir / "metrics.jsonl"
    return path.read_text().count('"train"') if path.exists() else 0


def checkpoints(workdir):
    """Returns the steps of the finished checkpoints, oldest first."""
    folder = workdir / "checkpoints"
    return sorted(int(p.name) for p in folder.iterdir() if p.name.isdigit()) if folder.is_dir() else []


def contents(folder):
    """Returns the contents of all files below a folder by relative path."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def stop_after(workdir, steps):
    """Asks this process to stop once a run has logged a number of steps."""

    def wait():
        while logged_steps(workdir) < steps:
            time.sleep(0.001)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, daemon=True).start()


def assert_same(workdir, uninterrupted):
    """Asserts that two finished runs have bitwise the same losses, batches, evaluations and parameters."""
    train, steps = metrics(workdir, "train"), json.loads((workdir / "summary.json").read_text())["steps"]
    for split in ("train", "eval"):
        assert metrics(workdir, split) == metrics(uninterrupted, split)
    assert [line["step"] for line in train] == list(range(1, steps + 1))
    assert len({line["batch_hash"] for line in train}) > 1
    assert digests(workdir) == digests(uninterrupted)
    one, other = (json.loads((w / "summary.json").read_text()) for w in (workdir, uninterrupted))
    assert one["eval"] == other["eval"]
