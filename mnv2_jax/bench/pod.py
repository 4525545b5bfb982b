"""Time and memory of a config's train step on TPU slices, found by compiling it for them without a TPU."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from mnv2_jax import config
from mnv2_jax.bench.pod_model import CHIPS, IMAGENET_IMAGES, Cost, Topology, step_time
from mnv2_jax.errors import UserError

_ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "JAX_ENABLE_COMPILATION_CACHE": "0",  # so that the seconds are those of a compilation
    "TPU_SKIP_MDS_QUERY": "1",  # asks no metadata server what machine this is
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # no lock file: there is no device to lock
}


def check_libtpu() -> None:
    """Raises `UserError` where the compiler isn't installed."""
    if importlib.util.find_spec("libtpu") is None:
        raise UserError("pod needs libtpu, the compiler for TPUs; pip install -e '.[pods]'")


def load(spec: str, overrides: Sequence[str], topology: Topology, batch_per_chip: int | None) -> config.Config:
    """The config of a slice: its batch is `data.batch_size`, or so many images a chip.

    Batch norm over the whole batch is let through, so that it can be compared; training refuses groups that don't lie
    on one device.

    Raises:
      UserError: if the config can't be used, or its batch doesn't divide over the chips.
    """
    if batch_per_chip is not None:
        overrides = [*overrides, f"data.batch_size={batch_per_chip * topology.num_chips}"]
    from mnv2_jax.training.initial import resolve_weights

    settings = resolve_weights(config.load(spec, overrides))[0]
    if settings.model.dtype == "float64":
        raise UserError("model.dtype='float64': TPUs multiply no float64; take float32 or bfloat16")
    if settings.optim.accumulate_steps != 1:
        raise UserError(
            f"optim.accumulate_steps={settings.optim.accumulate_steps}: XLA counts what a loop does once, however often"
            " it does it; set it to 1, and the batch to a microbatch"
        )
    try:
        config.check_devices(settings, topology.num_chips)
    except UserError as error:
        raise UserError(f"--topology={topology.name}: {error}") from error
    return settings


def measure(settings: config.Config, topology: Topology, timeout_s: float) -> dict[str, Any]:
    """Compiles the step in another process, and adds the model of its time.

    Args:
      settings: checked by `load`.
      topology: what to compile for.
      timeout_s: seconds for everything.

    Returns:
      topology, chips, batch_size, compile_seconds, per_chip (see `pod_compile.compile_step`, and hbm_bytes) and
      model: compute_seconds, memory_seconds, all_reduce_seconds, step_seconds, images_per_second,
      imagenet_epoch_seconds.

    Raises:
      UserError: if the compiler refuses the program, crashes, or takes longer.
    """
    asked = json.dumps({"topology": topology.name, "config": config.to_dict(settings)})
    try:
        done = subprocess.run(
            [sys.executable, "-m", "mnv2_jax.bench.pod_compile"],
            input=asked,
            env=os.environ | _ENVIRONMENT,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout_s,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise UserError(
            f"--topology={topology.name}: not compiled in {timeout_s:g} s; give it longer with --timeout_s"
        ) from error
    if done.returncode == UserError.exit_code:
        raise UserError(_last_line(done.stderr).removeprefix("error: "))
    if done.returncode:
        raise UserError(
            f"--topology={topology.name}: the compiler crashed ({_how(done)}); take another topology, another model"
            " or another libtpu"
        )
    return _with_model(topology, settings.data.batch_size, json.loads(done.stdout))


def _how(done: subprocess.CompletedProcess[str]) -> str:
    if done.returncode < 0:
        return signal.Signals(-done.returncode).name
    return f"exit code {done.returncode}: {_last_line(done.stderr)}"


def _last_line(text: str) -> str:
    return text.strip().rpartition("\n")[2]


def _with_model(topology: Topology, batch_size: int, compiled: dict[str, Any]) -> dict[str, Any]:
    seconds = compiled.pop("compile_seconds")
    time = step_time(topology, Cost(*(compiled[name] for name in Cost._fields)))
    rate = batch_size / time.step
    return {
        "topology": topology.name,
        "chips": topology.num_chips,
        "batch_size": batch_size,
        "compile_seconds": seconds,
        "per_chip": {**compiled, "hbm_bytes": topology.chip.memory},
        "model": {
            "compute_seconds": time.compute,
            "memory_seconds": time.memory,
            "all_reduce_seconds": time.network,
            "step_seconds": time.step,
            "images_per_second": rate,
            "imagenet_epoch_seconds": IMAGENET_IMAGES / rate,
        },
    }


HEAD = "\n".join(
    (
        f"{'':<19} {'per chip':^56} | {'model, ms':^31} | {'':>11} {'ImageNet':>9} {'compiled':>9}",
        f"{'topology':<12} {'batch':>6} {'peak MB':>8} {'of HBM':>7} {'GFLOP':>8} {'GB moved':>9} {'all-reduces':>12}"
        f" {'MB':>7} | {'compute':>7} {'memory':>7} {'reduce':>7} {'step':>7} | {'images/s':>11} {'epoch, s':>9}"
        f" {'in s':>9}",
    )
)
"""Over the rows of a table."""


def row(found: Mapping[str, Any]) -> str:
    """Row of a table with the results of `measure`."""
    chip, model = found["per_chip"], found["model"]
    ms = " ".join(f"{1e3 * model[f'{name}_seconds']:>7.2f}" for name in ("compute", "memory", "all_reduce", "step"))
    others = "".join(f"  and {count} {name}" for name, count in sorted(chip["other_collectives"].items()))
    return (
        f"{found['topology']:<12} {found['batch_size']:>6} {chip['peak_bytes'] / 1e6:>8,.0f}"
        f" {chip['peak_bytes'] / chip['hbm_bytes']:>7.1%} {chip['flops'] / 1e9:>8,.1f}"
        f" {chip['bytes_accessed'] / 1e9:>9.2f} {chip['all_reduces']:>12} {chip['all_reduce_bytes'] / 1e6:>7.1f} |"
        f" {ms} | {model['images_per_second']:>11,.0f} {model['imagenet_epoch_seconds']:>9.1f}"
        f" {found['compile_seconds']:>9.0f}{others}"
    )


def foot(topologies: Sequence[Topology]) -> str:
    """Under the rows: what the times rest on."""
    lines = [
        "Compiled, not run. The times are a model of the step alone, whose images must come as fast: the longer of"
        " computing and memory, and the all-reduces, each at the peak of the chip."
    ]
    for name, chip in CHIPS.items():
        if any(topology.chip is chip for topology in topologies):
            lines.append(
                f"  {name}: {chip.flops / 1e12:g} TFLOP/s (bfloat16, in which float32 is multiplied too),"
                f" {chip.memory / 2**30:g} GiB at {chip.bandwidth / 1e9:g} GB/s, {chip.ici / 1e9:g} GB/s out to other"
                f" chips (docs.cloud.google.com/tpu/docs/{name})"
            )
    return "\n".join(lines)
