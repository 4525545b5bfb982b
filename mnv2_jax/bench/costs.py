"""Measures the compilation time and the memory of a config."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import psutil

from mnv2_jax.bench.contest import OUR_ENTRY, Contender, Entry, contenders, describe
from mnv2_jax.config import Config
from mnv2_jax.errors import UserError

_NO_CACHES = {"JAX_ENABLE_COMPILATION_CACHE": "0", "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1"}
_HOST_SHARE = 0.9
"""Share of the host's free memory that a program on the CPU may take; other processes need memory too."""


def compile_times(entries: Sequence[Entry], mode: str, settings: Config, repeats: int) -> list[dict[str, Any]]:
    """Times tracing and compilation, in a new process each time and without compilation caches.

    Args:
      entries: contenders, ours first.
      mode: "train" or "infer".
      settings: config with `model.num_classes` set.
      repeats: number of processes per entry.

    Returns:
      One row per entry: name; ``seconds`` (median), ``seconds_min`` and ``seconds_max`` of tracing and compiling (for
      PyTorch of the first steps, which compile); ``trace_seconds`` (median; ours only); and ``ratio``, our median
      divided by the entry's. Or name and ``unavailable``, the reason.

    Raises:
      UserError: if our own network can't run.
    """
    seconds: dict[str, list[dict[str, float]]] = {entry.name: [] for entry in entries}
    reasons: dict[str, str] = {}
    for _ in range(repeats):
        for entry in entries:
            if entry.name in reasons:
                continue
            with contenders([entry], mode, settings, environment=_NO_CACHES) as (contender,):
                _record(contender, seconds, reasons)
    if OUR_ENTRY.name in reasons:
        raise UserError(f"the config can't run on this device: {reasons[OUR_ENTRY.name]}")
    rows: list[dict[str, Any]] = []
    for name, times in seconds.items():
        if name in reasons:
            rows.append({"name": name, "unavailable": reasons[name]})
            continue
        totals = [sum(time.values()) for time in times]
        rows.append(
            {
                "name": name,
                "seconds": statistics.median(totals),
                "seconds_min": min(totals),
                "seconds_max": max(totals),
                "trace_seconds": statistics.median(time["trace_seconds"] for time in times),
                "ratio": (rows[0]["seconds"] if rows else statistics.median(totals)) / statistics.median(totals),
            }
        )
    return rows


def _record(contender: Contender, seconds: dict[str, list[dict[str, float]]], reasons: dict[str, str]) -> None:
    name, facts = contender.entry.name, contender.facts
    if contender.unavailable is not None:
        reasons[name] = contender.unavailable
    elif facts.get("compile_seconds") is None:
        reasons[name] = "it does not compile"
    else:
        seconds[name].append({key: facts.get(key) or 0.0 for key in ("trace_seconds", "compile_seconds")})


def compile_table(results: Mapping[str, Any]) -> str:
    """Formats the rows of `compile_times` as a table."""
    lines = [f"compilation of the train step of {describe(results)}"]
    lines += [f"{'':<16} {'seconds':>8} {'(min to max)':>18} {'tracing, s':>14} {'ours / rival':>12}"]
    for row in results["rows"]:
        if "unavailable" in row:
            lines.append(f"{row['name']:<16} not measured: {row['unavailable']}")
            continue
        spread = f"({row['seconds_min']:.1f} to {row['seconds_max']:.1f})"
        lines.append(
            f"{row['name']:<16} {row['seconds']:>8.1f} {spread:>18} {row['trace_seconds']:>14.1f} {row['ratio']:>12.2f}"
        )
    return "\n".join(lines)


def memory(entries: Sequence[Entry], settings: Config) -> dict[str, Any]:
    """Measures the memory of the train step, and finds the largest batch that fits.

    Returns:
      ``rows``, one per entry: name; ``program_bytes``, which XLA plans on a device for arguments, results and
      temporaries (None for PyTorch, which doesn't plan); and ``peak_bytes``, the peak use while steps ran (None if the
      device doesn't report it, like a CPU). Or name and ``unavailable``. And ``largest``, see `largest_batch`.

    Raises:
      UserError: if our own network can't run, or if not even a small batch fits.
    """
    rows: list[dict[str, Any]] = []
    with contenders(entries, "train", settings) as processes:
        if processes[0].unavailable is not None:
            raise UserError(f"the config can't run on this device: {processes[0].unavailable}")
        for contender in processes:
            contender.take_turn()
            contender.read_peak()
            if contender.unavailable is not None:
                rows.append({"name": contender.entry.name, "unavailable": contender.unavailable})
                continue
            planned = contender.facts.get("program_bytes")
            rows.append({"name": contender.entry.name, "program_bytes": planned, "peak_bytes": contender.peak_bytes})
        limit, devices = (processes[0].facts[key] for key in ("memory_limit_bytes", "devices"))
    return {"rows": rows, "largest": largest_batch(settings, limit, devices)}


def largest_batch(settings: Config, limit_bytes: int | None, devices: int) -> dict[str, Any]:
    """Finds the largest batch whose train step fits into a device's memory.

    XLA's plans for two small batches give the memory per image. The largest batch is then compiled, and on an
    accelerator also run.

    Args:
      settings: config whose batch size is varied, in steps of `norm.group_size` times `optim.accumulate_steps` images
        per device.
      limit_bytes: memory of a device; None takes the host's free memory, which a CPU device uses.
      devices: number of devices over which a batch is spread.

    Returns:
      ``images``, ``program_bytes``, ``limit_bytes``, and ``was_run``, False if the batch was only compiled.

    Raises:
      UserError: if not even the smallest batches fit.
    """
    was_given = limit_bytes is not None
    limit = limit_bytes if limit_bytes is not None else int(_HOST_SHARE * psutil.virtual_memory().available)
    unit = settings.norm.group_size * settings.optim.accumulate_steps * devices
    first, second = (_planned(settings, unit * units) for units in (1, 3))
    if first is None or second is None:
        raise UserError(f"a batch of {3 * unit} images does not fit into the memory of this device")
    unit_bytes = max((second - first) / 2, 1.0)
    units = int((limit - first) // unit_bytes) + 1
    while units > 0:
        planned = _planned(settings, unit * units, runs=was_given)
        if planned is not None and planned <= limit:
            return {"images": unit * units, "program_bytes": planned, "limit_bytes": limit, "was_run": was_given}
        if planned is not None:  # an image takes more memory in a large batch
            unit_bytes = max(unit_bytes, (planned - first) / max(units - 1, 1))
        units = min(units - max(1, units // 50), int((limit - first) // unit_bytes) + 1)
    raise UserError(f"not even a batch of {unit} images fits into {limit / 1e9:.1f} GB")


def _planned(settings: Config, images: int, *, runs: bool = False) -> int | None:
    """Returns the bytes that XLA plans for a batch of ``images``; None if the batch doesn't fit."""
    data = dataclasses.replace(settings.data, batch_size=images)
    with contenders([OUR_ENTRY], "train", dataclasses.replace(settings, data=data)) as (contender,):
        if runs and contender.unavailable is None:
            contender.take_turn()
        planned: int | None = contender.facts.get("program_bytes") if contender.unavailable is None else None
        return planned


def memory_table(results: Mapping[str, Any]) -> str:
    """Formats the results of `memory` as a table."""
    lines = [f"memory of the train step of {describe(results)}", f"{'':<16} {'planned GB':>11} {'peak GB':>9}"]
    for row in results["rows"]:
        if "unavailable" in row:
            lines.append(f"{row['name']:<16} not measured: {row['unavailable']}")
            continue
        planned, peak = ("" if row[key] is None else f"{row[key] / 1e9:.2f}" for key in ("program_bytes", "peak_bytes"))
        lines.append(f"{row['name']:<16} {planned:>11} {peak:>9}")
    largest = results["largest"]
    how = "run" if largest["was_run"] else "compiled, not run"
    lines.append(
        f"The largest batch that fits: {largest['images']} images, {largest['program_bytes'] / 1e9:.1f} of"
        f" {largest['limit_bytes'] / 1e9:.1f} GB ({how})."
    )
    return "\n".join(lines)
