"""Command line of the benchmarks: reads the flags, runs one benchmark, prints a table."""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mnv2_jax import config
from mnv2_jax.bench import gpu as gpu_bench
from mnv2_jax.bench import input as input_bench
from mnv2_jax.bench import pod as pod_bench
from mnv2_jax.bench.pod_model import parse_topology
from mnv2_jax.errors import UserError, exit_on_user_error
from mnv2_jax.flags import Parser

_HELP_AFTER = """\
step     times the train step of a config on one batch of noise that stays on the devices; needs no data
infer    times inference of a config, from normalised images to logits; :batch=1 times one image
compile  times tracing and compilation of the train step, in a new process each time and without compilation caches
memory   measures the memory of the train step and finds the largest batch that fits
input    times the training batches of the worker processes, and compares them with two other rates: the same number of
         processes that only decode the same image files, and the train step fed from memory. All settings are those
         of --config, by default MobileNetV2 1.0 at 224 px. The clock starts after the workers have started and the
         batches that they prepared are used up.
pod      compiles the train step of a config for TPU slices on this machine. It needs neither a TPU nor data. It reports
         memory, FLOPs, bytes and all-reduces of each chip, and a modelled step time from the chips' peak rates. One
         compilation takes minutes. --config.norm.group_size=BATCH computes batch norm over the whole batch.
gpu      runs all GPU measurements, the most important first, each in its own process with a time limit: checks, forms
         of the convolutions, train step and inference compared with timm's, the profile, CIFAR-10. Results are written
         to OUT/results.json and OUT/report.md as they come, so a run that is stopped early keeps what it has.

Our network and its rivals take turns, each in its own process. Each number is the median over the turns, with the
minimum and the maximum. "ours / rival" below 1 means that our network takes less time.

examples:
  python -m mnv2_jax.bench step --config=w1_0:recipe=torchvision_v2_IMAGENET1K_V1,batch=32 --against=torch
  python -m mnv2_jax.bench infer --config=w1_0:batch=1 --against=torch,xla --roofline
  python -m mnv2_jax.bench compile --config=w1_0 --repeats=3
  python -m mnv2_jax.bench memory --config=w1_0:batch=32
  python -m mnv2_jax.bench input --data=folder:PATH
  python -m mnv2_jax.bench pod --topology=v5e:2x2,v5e:16x16 --config=w1_0:batch=2048
  python -m mnv2_jax.bench gpu --out=measured --minutes=10 --cifar=cifar10.npz
"""

_WITH_RIVALS = ("step", "infer", "compile", "memory")
_BENCHMARKS_OF_FLAG: Mapping[str, Sequence[str]] = {
    "data": ("input",),
    "repeats": ("step", "infer", "compile", "input"),
    "against": _WITH_RIVALS,
    "roofline": ("step", "infer"),
    **dict.fromkeys(("topology", "batch_per_chip", "timeout_s"), ("pod",)),
    **dict.fromkeys(("out", "minutes", "cifar", "parts", "runs", "allow_cpu"), ("gpu",)),
}
"""Benchmarks that take each flag. All of them take --json, and all but gpu take --config."""

_REPEATS = {"step": 7, "infer": 7, "compile": 1, "input": 10}


def _parser() -> Parser:
    parser = Parser("Runs one benchmark and prints a table.", _HELP_AFTER)
    parser.add_argument("what", choices=tuple(_BENCHMARKS), help="the benchmark to run")
    parser.add_argument("--config", metavar="NAME[:ARG]", help="as for mnv2_jax.main; optional for input")
    parser.add_argument(
        "--against",
        metavar="WHOM",
        help="rivals to compare with: torch, timm's same network in PyTorch, eager and compiled (needs the extra"
        " parity); xla, our network with XLA's own convolutions; answers, our network up to the answers of the task,"
        " such as boxes; or some of them, as in torch,xla",
    )
    parser.add_argument(
        "--roofline",
        action="store_true",
        default=None,
        help="step, infer: also report the share of the speed that the device's measured bandwidth and rate allow",
    )
    parser.add_argument(
        "--data", metavar="NAME:PATH", help="input: images to read, e.g. folder:photos, which holds train/CLASS/*.jpg"
    )
    parser.add_argument("--repeats", type=int, help="number of turns (default: 7; compile: 1; input: 10)")
    parser.add_argument(
        "--topology",
        metavar="CHIP:AxB,...",
        help="pod: slices of v4, v5e, v5p or v6e chips, e.g. v5e:2x2,v5e:16x16; v4 and v5p: AxBxC",
    )
    parser.add_argument("--batch_per_chip", type=int, help="pod: images per chip, instead of data.batch_size")
    parser.add_argument("--timeout_s", type=float, help="pod: time limit of one compilation in seconds (default: 7200)")
    parser.add_argument("--out", metavar="DIR", type=pathlib.Path, help="gpu: folder for the results")
    parser.add_argument("--minutes", type=float, help="gpu: stop after this many minutes")
    parser.add_argument("--cifar", metavar="PATH", type=pathlib.Path, help="gpu: CIFAR-10 as a folder or a cifar10.npz")
    parser.add_argument("--parts", metavar="NAME,...", help="gpu: run only these parts, in this order")
    parser.add_argument(
        "--runs", metavar="DIR", type=pathlib.Path, help="gpu: folder of the CIFAR-10 run (default: runs/gpu)"
    )
    parser.add_argument(
        "--allow-cpu", action="store_true", default=None, help="gpu: without a GPU, try the script in a small form"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object to standard output")
    return parser


def main() -> None:
    """Runs the benchmark that the command line names."""
    parser = _parser()
    args, overrides = parser.parse(sys.argv[1:])
    flags = {action.dest: action.option_strings[0] for action in parser._actions if action.option_strings}
    for name, benchmarks in _BENCHMARKS_OF_FLAG.items():
        if getattr(args, name) is not None and args.what not in benchmarks:
            raise UserError(f"{args.what} takes no {flags[name]}; only {' and '.join(benchmarks)} can use it")
    args.repeats = _REPEATS.get(args.what) if args.repeats is None else args.repeats
    if args.repeats is not None and args.repeats < 1:
        raise UserError(f"--repeats={args.repeats} must be at least 1")
    if args.config is None and args.what not in ("input", "gpu"):
        raise UserError(f"{args.what} needs a config: give --config=NAME[:ARG]")
    if args.what in ("step", "infer", "compile", "memory", "input"):
        from mnv2_jax.processes import together

        together.check_devices()
    _BENCHMARKS[args.what](args, overrides)


def _show(args: argparse.Namespace, results: Any, table: Callable[[Any], str]) -> None:
    print(json.dumps(results) if args.json else table(results), flush=True)


# --- step, infer, compile, memory ---------------------------------------------------------------------------


def _contest(args: argparse.Namespace, overrides: list[str]) -> None:
    from mnv2_jax.bench import contest, synthetic

    settings, entries = synthetic.load(args.config, overrides), _entries(args.against)
    mode = "train" if args.what == "step" else "infer"
    if mode == "train" and any(entry.answers for entry in entries):
        raise UserError(f"--against={args.against}: only infer has answers; leave them out")
    rows = contest.compare(entries, mode, settings, args.repeats)
    results = {"what": args.what, **_description(settings), "rows": rows}
    if args.roofline:
        from mnv2_jax.bench import roofline

        results["roofline"] = roofline.of(settings, mode, rows)
    _show(args, results, contest.table)


def _compile(args: argparse.Namespace, overrides: list[str]) -> None:
    from mnv2_jax.bench import costs, synthetic

    settings = synthetic.load(args.config, overrides)
    rows = costs.compile_times(_entries(args.against), "train", settings, args.repeats)
    _show(args, {"what": "compile", **_description(settings), "rows": rows}, costs.compile_table)


def _memory(args: argparse.Namespace, overrides: list[str]) -> None:
    from mnv2_jax.bench import costs, synthetic

    settings = synthetic.load(args.config, overrides)
    results = costs.memory(_entries(args.against), settings)
    _show(args, {"what": "memory", **_description(settings), **results}, costs.memory_table)


def _entries(against: str | None) -> list[Any]:
    from mnv2_jax.bench.contest import OUR_ENTRY, RIVALS

    entries = [OUR_ENTRY]
    for name in against.split(",") if against else ():
        if name not in RIVALS:
            raise UserError(f"--against={against}: no rival {name!r}; choose from {' and '.join(RIVALS)}")
        entries += RIVALS[name]
    return entries


def _description(settings: config.Config) -> dict[str, Any]:
    model, data = settings.model, settings.data
    return {
        "model": model.name,
        "width": model.width,
        "dtype": model.dtype,
        **({"head": model.head} if model.head != "classifier" else {}),
        "resolution": data.size or data.resolution,
        "batch": data.batch_size,
        "optimizer": settings.optim.name,
    }


# --- input --------------------------------------------------------------------------------------------------


def _input(args: argparse.Namespace, overrides: list[str]) -> None:
    loaded = _config_of_input(args.config, args.data, overrides)
    _show(args, input_bench.time_input(loaded, args.repeats), input_bench.table)


def _config_of_input(spec: str | None, data: str | None, overrides: list[str]) -> config.Loaded:
    if data is not None:
        # A TFDS name contains colons itself. With any other name only the first colon separates.
        name, separator, path = data.rpartition(":") if data.startswith("tfds:") else data.partition(":")
        if not separator or not name or not path:
            raise UserError(f"--data={data!r} must be NAME:PATH, e.g. --data=folder:photos")
        overrides = [f"data.name={name}", f"data.path={path}", *overrides]
    if spec is not None:
        return config.load(spec, overrides)
    if data is None or len(overrides) > 2:
        raise UserError("input needs --data=folder:PATH; to change other settings, give --config=NAME[:ARG] too")
    return config.Loaded("input", config.build({"data": {"name": name, "path": path, "batch_size": 64}}), {})


# --- pod ----------------------------------------------------------------------------------------------------


def _pod(args: argparse.Namespace, overrides: list[str]) -> None:
    """Prints a row for each slice as soon as it is compiled; errors of slices that fail are raised after the last."""
    if args.topology is None:
        raise UserError("pod needs --topology=CHIP:AxB, e.g. --topology=v5e:16x16, or several separated by commas")
    for flag in ("batch_per_chip", "timeout_s"):
        value = getattr(args, flag)
        if value is not None and not value > 0:
            raise UserError(f"--{flag}={value:g} must be above 0")
    topologies = [parse_topology(name) for name in args.topology.split(",")]
    settings = [pod_bench.load(args.config, overrides, topology, args.batch_per_chip) for topology in topologies]
    pod_bench.check_libtpu()
    if not args.json:
        print(pod_bench.HEAD, flush=True)
    rows, errors = [], []
    for topology, slice_settings in zip(topologies, settings, strict=True):
        try:
            rows.append(
                pod_bench.measure(slice_settings, topology, 7200.0 if args.timeout_s is None else args.timeout_s)
            )
        except UserError as error:
            errors.append(str(error))
            continue
        if not args.json:
            print(pod_bench.row(rows[-1]), flush=True)
    print(json.dumps({"slices": rows}) if args.json else pod_bench.foot(topologies), flush=True)
    if errors:
        raise UserError("; ".join(errors))


# --- gpu ----------------------------------------------------------------------------------------------------


def _gpu(args: argparse.Namespace, overrides: list[str]) -> None:
    if args.config is not None or overrides:
        raise UserError(
            "gpu takes no --config: its measurements are fixed, so that numbers of different GPUs can be compared"
        )
    if args.out is None or args.minutes is None:
        raise UserError("gpu needs --out=DIR for the results, and --minutes=N, after which it stops")
    optional = {name: getattr(args, name) for name in ("cifar", "runs") if getattr(args, name) is not None}
    parts = tuple(args.parts.split(",")) if args.parts else ()
    options = gpu_bench.Options(
        out=args.out, minutes=args.minutes, parts=parts, allow_cpu=bool(args.allow_cpu), **optional
    )
    result_path = args.out / (gpu_bench.RESULTS if args.json else gpu_bench.REPORT)
    try:
        gpu_bench.measure(options)
    except gpu_bench.NotMeasuredError:
        print(result_path.read_text(), flush=True)
        raise
    print(result_path.read_text(), flush=True)


_BENCHMARKS: Mapping[str, Callable[[argparse.Namespace, list[str]], None]] = {
    "step": _contest,
    "infer": _contest,
    "compile": _compile,
    "memory": _memory,
    "input": _input,
    "pod": _pod,
    "gpu": _gpu,
}


if __name__ == "__main__":
    exit_on_user_error(main)
