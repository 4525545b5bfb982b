"""Costs of a config besides the time of its steps: compilation and memory."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import psutil

from mnv2_jax.bench.contest import OUR_ENTRY, Contender, Entry, contenders, described
from mnv2_jax.config import Config
from mnv2_jax.errors import UserError

_NO_CACHES = {"JAX_ENABLE_COMPILATION_CACHE": "0", "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1"}
_HOST_SHARE = 0.9
"""Share of the host's free memory, which others use too, that a program on the CPU may take."""


def compile_times(entries: Sequence[Entry], what: str, settings: Config, repeats: int) -> list[dict[str, Any]]:
    """Seconds from a config to the first step, a new process each time, without what was compiled before.

    Args:
      entries: who takes part, ours first.
      what: "train" or "infer".
      settings: with `model.num_classes` set.
      repeats: processes of each.

    Returns:
      A row an entry: name, ``seconds`` (median), ``seconds_min``, ``seconds_max`` of tracing and compiling (of PyTorch:
      of the first steps, which compile), ``trace_seconds`` (median; ours only) and ``ratio``: our median over its. Or
      name and ``unavailable``, the reason.
    """
    seconds: dict[str, list[dict[str, float]]] = {entry.name: [] for entry in entries}
    reasons: dict[str, str] = {}
    for _ in range(repeats):
        for entry in entries:
            if entry.name in reasons:
                continue
            with contenders([entry], what, settings, environment=_NO_CACHES) as (contender,):
                _record(contender, seconds, reasons)
    if OUR_ENTRY.name in reasons:
        raise UserError(f"the config can't be run here: {reasons[OUR_ENTRY.name]}")
    rows: list[dict[str, Any]] = []
    for name, found in seconds.items():
        if name in reasons:
            rows.append({"name": name, "unavailable": reasons[name]})
            continue
        totals = [sum(one.values()) for one in found]
        rows.append(
            {
                "name": name,
                "seconds": statistics.median(totals),
                "seconds_min": min(totals),
                "seconds_max": max(totals),
                "trace_seconds": statistics.median(one["trace_seconds"] for one in found),
                "ratio": (rows[0]["seconds"] if rows else statistics.median(totals)) / statistics.median(totals),
            }
        )
    return rows


def _record(contender: Contender, seconds: dict[str, list[dict[str, float]]], reasons: dict[str, str]) -> None:
    name, facts = contender.entry.name, contender.facts
    if contender.unavailable is not None:
        reasons[name] = contender.unavailable
    elif facts.get("compile_seconds") is None:
        reasons[name] = "it compiles nothing"
    else:
        seconds[name].append({key: facts.get(key) or 0.0 for key in ("trace_seconds", "compile_seconds")})


def compile_table(found: Mapping[str, Any]) -> str:
    """Table of the results of `compile_times`."""
    lines = [f"compiling the train step of {described(found)}"]
    lines += [f"{'':<16} {'seconds':>8} {'(least to most)':>18} {'of it tracing':>14} {'ours / it':>10}"]
    for row in found["rows"]:
        if "unavailable" in row:
            lines.append(f"{row['name']:<16} not measured: {row['unavailable']}")
            continue
        spread = f"({row['seconds_min']:.1f} to {row['seconds_max']:.1f})"
        lines.append(
            f"{row['name']:<16} {row['seconds']:>8.1f} {spread:>18} {row['trace_seconds']:>14.1f} {row['ratio']:>10.2f}"
        )
    return "\n".join(lines)


def memory(entries: Sequence[Entry], settings: Config) -> dict[str, Any]:
    """The memory of the train step, and the largest batch that fits.

    Returns:
      ``rows``, one an entry: name, ``program_bytes`` (of a device: what XLA has planned for arguments, results and what
      lies between; None for PyTorch, which doesn't plan) and ``peak_bytes`` (the most in use while steps ran; None
      where the device doesn't say, as a CPU); or name and ``unavailable``. And ``largest``: see `largest_batch`.
    """
    rows: list[dict[str, Any]] = []
    with contenders(entries, "train", settings) as found:
        if found[0].unavailable is not None:
            raise UserError(f"the config can't be run here: {found[0].unavailable}")
        for contender in found:
            contender.take_turn()
            contender.read_peak()
            if contender.unavailable is not None:
                rows.append({"name": contender.entry.name, "unavailable": contender.unavailable})
                continue
            planned = contender.facts.get("program_bytes")
            rows.append({"name": contender.entry.name, "program_bytes": planned, "peak_bytes": contender.peak_bytes})
        limit, devices = (found[0].facts[key] for key in ("memory_limit_bytes", "devices"))
    return {"rows": rows, "largest": largest_batch(settings, limit, devices)}


def largest_batch(settings: Config, limit_bytes: int | None, devices: int) -> dict[str, Any]:
    """The most images whose train step fits.

    What XLA plans for two batches gives the size of an image; the largest batch is compiled, and on an accelerator run.

    Args:
      settings: the batch is changed, in steps of `norm.group_size` times `optim.accumulate_steps` images a device.
      limit_bytes: of a device's memory; None: the host's, which is a CPU device's.
      devices: over which a batch is spread.

    Returns:
      ``images``, ``program_bytes``, ``limit_bytes``, and ``was_run``: whether steps were taken, or it was only planned.
    """
    was_given = limit_bytes is not None
    limit = limit_bytes if limit_bytes is not None else int(_HOST_SHARE * psutil.virtual_memory().available)
    unit = settings.norm.group_size * settings.optim.accumulate_steps * devices
    first, second = (_planned(settings, unit * units) for units in (1, 3))
    if first is None or second is None:
        raise UserError(f"a batch of {3 * unit} images does not fit this device")
    each = max((second - first) / 2, 1.0)
    units = int((limit - first) // each) + 1
    while units > 0:
        planned = _planned(settings, unit * units, runs=was_given)
        if planned is not None and planned <= limit:
            return {"images": unit * units, "program_bytes": planned, "limit_bytes": limit, "was_run": was_given}
        if planned is not None:  # an image takes more in a large batch
            each = max(each, (planned - first) / max(units - 1, 1))
        units = min(units - max(1, units // 50), int((limit - first) // each) + 1)
    raise UserError(f"not even {unit} images fit into {limit / 1e9:.1f} GB")


def _planned(settings: Config, images: int, *, runs: bool = False) -> int | None:
    """Bytes of the program of a batch; None where it doesn't fit."""
    data = dataclasses.replace(settings.data, batch_size=images)
    with contenders([OUR_ENTRY], "train", dataclasses.replace(settings, data=data)) as (contender,):
        if runs and contender.unavailable is None:
            contender.take_turn()
        planned: int | None = contender.facts.get("program_bytes") if contender.unavailable is None else None
        return planned


def memory_table(found: Mapping[str, Any]) -> str:
    """Table of the results of `memory`."""
    lines = [f"the train step of {described(found)}", f"{'':<16} {'planned GB':>11} {'peak GB':>9}"]
    for row in found["rows"]:
        if "unavailable" in row:
            lines.append(f"{row['name']:<16} not measured: {row['unavailable']}")
            continue
        planned, peak = ("" if row[key] is None else f"{row[key] / 1e9:.2f}" for key in ("program_bytes", "peak_bytes"))
        lines.append(f"{row['name']:<16} {planned:>11} {peak:>9}")
    largest = found["largest"]
    how = "run" if largest["was_run"] else "planned, not run"
    lines.append(
        f"The largest batch that fits: {largest['images']} images, {largest['program_bytes'] / 1e9:.1f} of"
        f" {largest['limit_bytes'] / 1e9:.1f} GB ({how})."
    )
    return "\n".join(lines)
