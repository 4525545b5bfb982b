"""Estimates time and memory of a config's train step on TPU slices by compiling it for them without a TPU."""

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
    "JAX_ENABLE_COMPILATION_CACHE": "0",  # so that every measurement compiles
    "TPU_SKIP_MDS_QUERY": "1",  # don't ask a metadata server which machine this is
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # no lock file: there is no device to lock
}


def check_libtpu() -> None:
    """Raises `UserError` if libtpu, the compiler for TPUs, isn't installed."""
    if importlib.util.find_spec("libtpu") is None:
        raise UserError("pod needs libtpu, the compiler for TPUs; install it with pip install -e '.[pods]'")


def load(spec: str, overrides: Sequence[str], topology: Topology, batch_per_chip: int | None) -> config.Config:
    """Loads the config for a slice, with a batch of `data.batch_size` or of ``batch_per_chip`` images per chip.

    Groups of batch norm may span several chips, as in training.

    Raises:
      UserError: if the config can't be used, or its batch doesn't divide over the chips.
    """
    if batch_per_chip is not None:
        overrides = [*overrides, f"data.batch_size={batch_per_chip * topology.num_chips}"]
    from mnv2_jax.training.initial import resolve_weights

    settings = resolve_weights(config.load(spec, overrides))[0]
    if settings.model.dtype == "float64":
        raise UserError("model.dtype='float64': TPUs can't multiply float64; set model.dtype to float32 or bfloat16")
    if settings.optim.accumulate_steps != 1:
        raise UserError(
            f"optim.accumulate_steps={settings.optim.accumulate_steps}: XLA counts the work of a loop once, however"
            " often the loop runs; set optim.accumulate_steps to 1 and the batch size to that of a microbatch"
        )
    try:
        config.check_devices(settings, topology.num_chips)
    except UserError as error:
        raise UserError(f"--topology={topology.name}: {error}") from error
    return settings


def measure(settings: config.Config, topology: Topology, timeout_s: float) -> dict[str, Any]:
    """Compiles the step in another process and models its time.

    Args:
      settings: config that `load` has checked.
      topology: slice to compile for.
      timeout_s: time limit of the process in seconds.

    Returns:
      topology, chips, batch_size, compile_seconds, per_chip (the results of `pod_compile.compile_step`, and hbm_bytes)
      and model: compute_seconds, memory_seconds, all_reduce_seconds, step_seconds, images_per_second,
      imagenet_epoch_seconds.

    Raises:
      UserError: if the compiler refuses the program, crashes, or exceeds the time limit.
    """
    request = json.dumps({"topology": topology.name, "config": config.to_dict(settings)})
    try:
        completed = subprocess.run(
            [sys.executable, "-m", "mnv2_jax.bench.pod_compile"],
            input=request,
            env=os.environ | _ENVIRONMENT,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout_s,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise UserError(
            f"--topology={topology.name}: the compilation took longer than {timeout_s:g} s; raise the limit with"
            " --timeout_s"
        ) from error
    if completed.returncode == UserError.exit_code:
        raise UserError(_last_line(completed.stderr).removeprefix("error: "))
    if completed.returncode:
        raise UserError(
            f"--topology={topology.name}: the compiler crashed ({_crash_reason(completed)}); try another topology,"
            " another model or another version of libtpu"
        )
    return _with_model(topology, settings.data.batch_size, json.loads(completed.stdout))


def _crash_reason(completed: subprocess.CompletedProcess[str]) -> str:
    if completed.returncode < 0:
        return signal.Signals(-completed.returncode).name
    return f"exit code {completed.returncode}: {_last_line(completed.stderr)}"


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
        f"{'':<19} {'per chip':^56} | {'model, ms':^31} | {'':>11} {'ImageNet':>9} {'compile':>9}",
        f"{'topology':<12} {'batch':>6} {'peak MB':>8} {'of HBM':>7} {'GFLOP':>8} {'GB moved':>9} {'all-reduces':>12}"
        f" {'MB':>7} | {'compute':>7} {'memory':>7} {'reduce':>7} {'step':>7} | {'images/s':>11} {'epoch, s':>9}"
        f" {'time, s':>9}",
    )
)
"""Two header lines of the table."""


def row(results: Mapping[str, Any]) -> str:
    """Formats the results of `measure` as one row of the table."""
    chip, model = results["per_chip"], results["model"]
    ms = " ".join(f"{1e3 * model[f'{name}_seconds']:>7.2f}" for name in ("compute", "memory", "all_reduce", "step"))
    other_collectives = "".join(f"  and {count} {name}" for name, count in sorted(chip["other_collectives"].items()))
    return (
        f"{results['topology']:<12} {results['batch_size']:>6} {chip['peak_bytes'] / 1e6:>8,.0f}"
        f" {chip['peak_bytes'] / chip['hbm_bytes']:>7.1%} {chip['flops'] / 1e9:>8,.1f}"
        f" {chip['bytes_accessed'] / 1e9:>9.2f} {chip['all_reduces']:>12} {chip['all_reduce_bytes'] / 1e6:>7.1f} |"
        f" {ms} | {model['images_per_second']:>11,.0f} {model['imagenet_epoch_seconds']:>9.1f}"
        f" {results['compile_seconds']:>9.0f}{other_collectives}"
    )


def foot(topologies: Sequence[Topology]) -> str:
    """Returns the notes under the table, which explain the model and list the chips' peak rates."""
    lines = [
        "The step was compiled, not run. Its time is modelled from the chip's peak rates: the longer of compute and"
        " memory time, plus the time of the all-reduces. The input pipeline is assumed to keep up."
    ]
    for name, chip in CHIPS.items():
        if any(topology.chip is chip for topology in topologies):
            lines.append(
                f"  {name}: {chip.flops / 1e12:g} TFLOP/s (bfloat16, also used to multiply float32),"
                f" {chip.memory / 2**30:g} GiB at {chip.bandwidth / 1e9:g} GB/s, {chip.ici / 1e9:g} GB/s sent to other"
                f" chips (docs.cloud.google.com/tpu/docs/{name})"
            )
    return "\n".join(lines)
