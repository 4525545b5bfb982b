"""The door of the benchmarks: flags, one measurement, a table."""

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
step     the train step of a config, on one batch of noise that stays on the devices; no data are needed
infer    its inference, from normalised images to logits; :batch=1 for one image
compile  seconds from a config to the first step, a new process each time, without what was compiled before
memory   the memory of the train step, and the largest batch that fits
input    the batches of training as worker processes make them, beside decoding the same image files whole and doing
         nothing else in as many processes, and beside the train step fed from memory: of --config, or else of
         MobileNetV2 1.0 at 224 px. Worker processes are started, and what they have prepared is used up, before the
         clock runs.
pod      the train step of a config compiled for TPU slices on this machine, which needs no TPU, and no data: memory,
         FLOPs, bytes and all-reduces of each chip, and the time that the chips' peaks leave a step, by a model. A
         compilation takes minutes. With --config.norm.group_size=BATCH, batch norm goes over the whole batch.
gpu      all that is to be measured on a GPU, part by part in order of worth, each in a process with a limit of its own:
         checks, forms of the convolutions, the train step and inference beside timm's, the profile, CIFAR-10. What was
         measured is in OUT/results.json and OUT/report.md, whenever it ends.

Rivals take turns with ours, each in a process of its own; numbers are medians over the turns, with the least and the
most. "ours / it" below 1 says that ours takes less time.

examples:
  python -m mnv2_jax.bench step --config=w1_0:recipe=torchvision_v2_IMAGENET1K_V1,batch=32 --against=torch
  python -m mnv2_jax.bench infer --config=w1_0:batch=1 --against=torch,xla --roofline
  python -m mnv2_jax.bench compile --config=w1_0 --repeats=3
  python -m mnv2_jax.bench memory --config=w1_0:batch=32
  python -m mnv2_jax.bench input --data=folder:PATH
  python -m mnv2_jax.bench pod --topology=v5e:2x2,v5e:16x16 --config=w1_0:batch=2048
  python -m mnv2_jax.bench gpu --out=measured --minutes=10 --cifar=cifar10.npz
"""

_MEASURED = ("step", "infer", "compile", "memory")
_OF: Mapping[str, Sequence[str]] = {
    "data": ("input",),
    "repeats": ("step", "infer", "compile", "input"),
    "against": _MEASURED,
    "roofline": ("step", "infer"),
    **dict.fromkeys(("topology", "batch_per_chip", "timeout_s"), ("pod",)),
    **dict.fromkeys(("out", "minutes", "cifar", "parts", "runs", "allow_cpu"), ("gpu",)),
}
"""Which benchmarks take a flag; --json is taken by all, --config by all but gpu."""

_REPEATS = {"step": 7, "infer": 7, "compile": 1, "input": 10}


def _parser() -> Parser:
    parser = Parser("Measures ratios within one run; pod: compiles for TPUs.", _HELP_AFTER)
    parser.add_argument("what", choices=tuple(_VERBS), help="what to measure")
    parser.add_argument("--config", metavar="NAME[:ARG]", help="as for mnv2_jax.main; input can do without")
    parser.add_argument(
        "--against",
        metavar="WHOM",
        help="torch: the same network of timm in PyTorch, eager and compiled (needs the extra parity); xla: ours with"
        " XLA's own convolutions; or both behind a comma",
    )
    parser.add_argument(
        "--roofline",
        action="store_true",
        default=None,
        help="step, infer: the share of what the device's measured bandwidth and rate allow",
    )
    parser.add_argument(
        "--data", metavar="NAME:PATH", help="input: images to read, as folder:photos; train/CLASS/*.jpg lie below"
    )
    parser.add_argument("--repeats", type=int, help="turns (default: 7; compile: 1; input: 10)")
    parser.add_argument(
        "--topology", metavar="CHIP:AxB,...", help="pod: slices, as v5e:2x2,v5e:16x16; v4, v5e, v5p, v6e; AxBxC in 3D"
    )
    parser.add_argument("--batch_per_chip", type=int, help="pod: images a chip, in place of data.batch_size over all")
    parser.add_argument("--timeout_s", type=float, help="pod: seconds that a compilation may take (default: 7200)")
    parser.add_argument("--out", metavar="DIR", type=pathlib.Path, help="gpu: where results are written")
    parser.add_argument("--minutes", type=float, help="gpu: when to stop")
    parser.add_argument("--cifar", metavar="PATH", type=pathlib.Path, help="gpu: CIFAR-10, a folder or a cifar10.npz")
    parser.add_argument("--parts", metavar="NAME,...", help="gpu: only these parts, in this order")
    parser.add_argument(
        "--runs", metavar="DIR", type=pathlib.Path, help="gpu: where the run on CIFAR-10 lies (default: runs/gpu)"
    )
    parser.add_argument(
        "--allow-cpu", action="store_true", default=None, help="gpu: try the script, in a small form, without a GPU"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    return parser


def main() -> None:
    """Flags, a measurement, a table."""
    parser = _parser()
    args, overrides = parser.parse(sys.argv[1:])
    flags = {action.dest: action.option_strings[0] for action in parser._actions if action.option_strings}
    for name, takers in _OF.items():
        if getattr(args, name) is not None and args.what not in takers:
            raise UserError(f"{args.what} takes no {flags[name]}; it is for {' and '.join(takers)}")
    args.repeats = _REPEATS.get(args.what) if args.repeats is None else args.repeats
    if args.repeats is not None and args.repeats < 1:
        raise UserError(f"--repeats={args.repeats} must be at least 1")
    if args.config is None and args.what not in ("input", "gpu"):
        raise UserError(f"{args.what} takes a config: give --config=FILE[:ARG]")
    if args.what in ("step", "infer", "compile", "memory", "input"):
        from mnv2_jax.processes import together

        together.check_devices()
    _VERBS[args.what](args, overrides)


def _show(args: argparse.Namespace, found: Any, table: Callable[[Any], str]) -> None:
    print(json.dumps(found) if args.json else table(found), flush=True)


# --- step, infer, compile, memory ---------------------------------------------------------------------------


def _contest(args: argparse.Namespace, overrides: list[str]) -> None:
    from mnv2_jax.bench import contest, synthetic

    settings, entries = synthetic.load(args.config, overrides), _entries(args.against)
    what = "train" if args.what == "step" else "infer"
    rows = contest.compare(entries, what, settings, args.repeats)
    found = {"what": args.what, **_described(settings), "rows": rows}
    if args.roofline:
        from mnv2_jax.bench import roofline

        found["roofline"] = roofline.of(settings, what, rows)
    _show(args, found, contest.table)


def _compile(args: argparse.Namespace, overrides: list[str]) -> None:
    from mnv2_jax.bench import costs, synthetic

    settings = synthetic.load(args.config, overrides)
    rows = costs.compile_times(_entries(args.against), "train", settings, args.repeats)
    _show(args, {"what": "compile", **_described(settings), "rows": rows}, costs.compile_table)


def _memory(args: argparse.Namespace, overrides: list[str]) -> None:
    from mnv2_jax.bench import costs, synthetic

    settings = synthetic.load(args.config, overrides)
    found = costs.memory(_entries(args.against), settings)
    _show(args, {"what": "memory", **_described(settings), **found}, costs.memory_table)


def _entries(against: str | None) -> list[Any]:
    from mnv2_jax.bench.contest import OUR_ENTRY, RIVALS

    entries = [OUR_ENTRY]
    for name in against.split(",") if against else ():
        if name not in RIVALS:
            raise UserError(f"--against={against}: no rival {name!r}; there are {' and '.join(RIVALS)}")
        entries += RIVALS[name]
    return entries


def _described(settings: config.Config) -> dict[str, Any]:
    model, data = settings.model, settings.data
    return {
        "model": model.name,
        "width": model.width,
        "dtype": model.dtype,
        "resolution": data.resolution,
        "batch": data.batch_size,
        "optimizer": settings.optim.name,
    }


# --- input --------------------------------------------------------------------------------------------------


def _input(args: argparse.Namespace, overrides: list[str]) -> None:
    loaded = _config_of_input(args.config, args.data, overrides)
    _show(args, input_bench.time_input(loaded, args.repeats), input_bench.table)


def _config_of_input(spec: str | None, data: str | None, overrides: list[str]) -> config.Loaded:
    if data is not None:
        # A name by TFDS has colons itself; elsewhere later ones belong to the path.
        name, separator, path = data.rpartition(":") if data.startswith("tfds:") else data.partition(":")
        if not separator or not name or not path:
            raise UserError(f"--data={data!r} is not of the form NAME:PATH, as folder:photos")
        overrides = [f"data.name={name}", f"data.path={path}", *overrides]
    if spec is not None:
        return config.load(spec, overrides)
    if data is None or len(overrides) > 2:
        raise UserError("input needs --data=folder:PATH, and a --config=FILE[:ARG] if it shall have other settings")
    return config.Loaded("input", config.build({"data": {"name": name, "path": path, "batch_size": 64}}), {})


# --- pod ----------------------------------------------------------------------------------------------------


def _pod(args: argparse.Namespace, overrides: list[str]) -> None:
    """A row for each slice, printed as it comes; what can't be compiled is an error after the last."""
    if args.topology is None:
        raise UserError("pod compiles for slices: give --topology=CHIP:AxB, as v5e:16x16, or several behind commas")
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
    for topology, its in zip(topologies, settings, strict=True):
        try:
            rows.append(pod_bench.measure(its, topology, 7200.0 if args.timeout_s is None else args.timeout_s))
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
        raise UserError("gpu takes no --config; what it measures is fixed, so that numbers can be compared")
    if args.out is None or args.minutes is None:
        raise UserError("gpu takes --out=DIR, where results are written, and --minutes=N, when it stops")
    given = {name: getattr(args, name) for name in ("cifar", "runs") if getattr(args, name) is not None}
    parts = tuple(args.parts.split(",")) if args.parts else ()
    options = gpu_bench.Options(
        out=args.out, minutes=args.minutes, parts=parts, allow_cpu=bool(args.allow_cpu), **given
    )
    written = args.out / (gpu_bench.RESULTS if args.json else gpu_bench.REPORT)
    try:
        gpu_bench.measure(options)
    except gpu_bench.NotMeasuredError:
        print(written.read_text(), flush=True)
        raise
    print(written.read_text(), flush=True)


_VERBS: Mapping[str, Callable[[argparse.Namespace, list[str]], None]] = {
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
