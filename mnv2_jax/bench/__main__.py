"""The door of the benchmarks: flags, one measurement, a table."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

from mnv2_jax import config
from mnv2_jax.bench import input as input_bench
from mnv2_jax.bench import pod as pod_bench
from mnv2_jax.bench import step as step_bench
from mnv2_jax.bench.pod_model import parse_topology
from mnv2_jax.errors import UserError, exit_on_user_error
from mnv2_jax.flags import Parser

_HELP_AFTER = """\
step   the train step and inference of a config on one batch that stays on the devices, once with this project's
       convolutions and once with XLA's; a ratio above 1 says how many times faster ours are. On GPU and TPU both are
       the same.
input  the batches of training as worker processes make them, beside decoding the same image files whole and doing
       nothing else in as many processes, and beside the train step fed from memory: of --config, or else of MobileNetV2
       1.0 at 224 px. Worker processes are started, and what they have prepared is used up, before the clock runs.
pod    the train step of a config compiled for TPU slices on this machine, which needs no TPU, and no data: memory,
       FLOPs, bytes and all-reduces of each chip, and the time that the chips' peaks leave a step, by a model. A
       compilation takes minutes. With --config.norm.group_size=BATCH, batch norm goes over the whole batch.

What is compared by step and input runs turn by turn; the numbers are medians over the turns.

examples:
  python -m mnv2_jax.bench step --config=configs/w1_0.py
  python -m mnv2_jax.bench input --data=folder:PATH
  python -m mnv2_jax.bench input --config=configs/w1_0.py --data=imagenet:PATH
  python -m mnv2_jax.bench pod --topology=v5e:2x2,v5e:16x16 --config=configs/w1_0.py:batch=2048
"""

_OF = {"data": ("input",), "repeats": ("step", "input")} | dict.fromkeys(
    ("topology", "batch_per_chip", "timeout_s"), ("pod",)
)
"""Which benchmarks take a flag; the others are taken by all."""


def main() -> None:
    """Flags, a measurement, a table."""
    parser = Parser("Measures ratios within one run; pod: compiles for TPUs.", _HELP_AFTER)
    parser.prog = "python -m mnv2_jax.bench"
    parser.add_argument("what", choices=("step", "input", "pod"), help="what to time")
    parser.add_argument("--config", metavar="FILE[:ARG]", help="as for mnv2_jax.main; input can do without")
    parser.add_argument(
        "--data", metavar="NAME:PATH", help="input: images to read, as folder:photos; train/CLASS/*.jpg lie below"
    )
    parser.add_argument("--repeats", type=int, help="step, input: turns (default: 10)")
    parser.add_argument(
        "--topology", metavar="CHIP:AxB,...", help="pod: slices, as v5e:2x2,v5e:16x16; v4, v5e, v5p, v6e; AxBxC in 3D"
    )
    parser.add_argument("--batch_per_chip", type=int, help="pod: images a chip, in place of data.batch_size over all")
    parser.add_argument("--timeout_s", type=float, help="pod: seconds that a compilation may take (default: 7200)")
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    args, overrides = parser.parse(sys.argv[1:])
    for name, takers in _OF.items():
        if getattr(args, name) is not None and args.what not in takers:
            raise UserError(f"{args.what} takes no --{name}; it is for {' and '.join(takers)}")
    repeats = 10 if args.repeats is None else args.repeats
    if repeats < 1:
        raise UserError(f"--repeats={repeats} must be at least 1")
    if args.what == "input":
        settings, given = _settings_of_input(args.config, args.data, overrides)
        found = input_bench.time_input(settings, given, repeats)
        print(json.dumps(found) if args.json else input_bench.table(found))
        return
    if args.config is None:
        raise UserError(f"{args.what} takes a config: give --config=FILE[:ARG]")
    if args.what == "pod":
        timeout_s = 7200.0 if args.timeout_s is None else args.timeout_s
        _pod(args.config, overrides, args.topology, args.batch_per_chip, timeout_s, as_json=args.json)
        return
    _, settings = config.load(args.config, overrides)
    timed = step_bench.time_step(settings, config.given(args.config, overrides), repeats)
    print(json.dumps(timed) if args.json else step_bench.table(timed))


def _pod(
    spec: str,
    overrides: Sequence[str],
    names: str | None,
    batch_per_chip: int | None,
    timeout_s: float,
    *,
    as_json: bool,
) -> None:
    """A row for each slice, printed as it comes; what can't be compiled is an error after the last."""
    if names is None:
        raise UserError("pod compiles for slices: give --topology=CHIP:AxB, as v5e:16x16, or several behind commas")
    for flag, value in (("batch_per_chip", batch_per_chip), ("timeout_s", timeout_s)):
        if value is not None and not value > 0:
            raise UserError(f"--{flag}={value:g} must be above 0")
    topologies = [parse_topology(name) for name in names.split(",")]
    settings = [pod_bench.load(spec, overrides, topology, batch_per_chip) for topology in topologies]
    pod_bench.check_libtpu()
    if not as_json:
        print(pod_bench.HEAD, flush=True)
    rows, errors = [], []
    for topology, its in zip(topologies, settings, strict=True):
        try:
            rows.append(pod_bench.measure(its, topology, timeout_s))
        except UserError as error:
            errors.append(str(error))
            continue
        if not as_json:
            print(pod_bench.row(rows[-1]), flush=True)
    print(json.dumps({"slices": rows}) if as_json else pod_bench.foot(topologies), flush=True)
    if errors:
        raise UserError("; ".join(errors))


def _settings_of_input(
    spec: str | None, data: str | None, overrides: list[str]
) -> tuple[config.Config, frozenset[str]]:
    """The config, and which of its keys were given."""
    if data is not None:
        name, separator, path = data.rpartition(":")
        if not separator or not name or not path:
            raise UserError(f"--data={data!r} is not of the form NAME:PATH, as folder:photos")
        overrides = [f"data.name={name}", f"data.path={path}", *overrides]
    if spec is not None:
        return config.load(spec, overrides)[1], config.given(spec, overrides)
    if data is None or len(overrides) > 2:
        raise UserError("input needs --data=folder:PATH, and a --config=FILE[:ARG] if it shall have other settings")
    return config.build({"data": {"name": name, "path": path, "batch_size": 64}}), frozenset()


if __name__ == "__main__":
    exit_on_user_error(main)
