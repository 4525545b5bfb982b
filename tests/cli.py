"""Runs the public commands, as a user would, on the real config shrunk."""

import json
import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[1]
W0_25 = ROOT / "configs" / "w0_25.py"
SHRUNK = (
    f"--config={W0_25}:data=digits,batch=32,res=16",
    "--config.model.depth=0.5",
    "--config.train.steps=12",
    "--config.train.eval_every_epochs=0.1",
    "--config.log.every_steps=1",
    "--config.checkpoint.every_steps=2",
)
"""12 steps of MobileNetV2 0.25 on digits, evaluated about every 4."""


def command(verb, *arguments):
    """The command line of ``python -m mnv2_jax.VERB``."""
    return [sys.executable, "-m", f"mnv2_jax.{verb}", *map(str, arguments)]


def environment(devices=1):
    """The environment of a machine with so many (CPU) devices."""
    return os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "PYTHONWARNINGS": "error",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",  # compiles in two thirds of the time
    }


def run(verb, *arguments, devices=1, cwd=None):
    """Runs a verb to its end."""
    return subprocess.run(
        command(verb, *arguments),
        env=environment(devices),
        cwd=cwd or ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def answer(result):
    """The one JSON object of a run with --json that went well."""
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def metrics(workdir, split):
    """The lines of metrics.jsonl of a split, without what depends on the clock."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    clock = {"seconds", "images_per_second", "data_wait_share"}
    return [{k: v for k, v in line.items() if k not in clock} for line in lines if line["split"] == split]


def digests(workdir):
    """SHA-256 of every array of the newest checkpoint."""
    steps = [p for p in (workdir / "checkpoints").iterdir() if p.name.isdigit()]
    newest = max(steps, key=lambda p: int(p.name))
    return newest.name, json.loads((newest / "digest" / "metadata").read_text())
