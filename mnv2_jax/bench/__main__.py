"""The door of the benchmarks: flags, one measurement, a table."""

from __future__ import annotations

import json
import sys

from mnv2_jax import config
from mnv2_jax.bench import input as input_bench
from mnv2_jax.bench import step as step_bench
from mnv2_jax.errors import UserError, exit_on_user_error
from mnv2_jax.flags import Parser

_HELP_AFTER = """\
step   the train step and inference of a config on one batch that stays on the devices, once with this project's
       convolutions and once with XLA's; a ratio above 1 says how many times faster ours are. On GPU and TPU both are
       the same.
input  the batches of training as worker processes make them, beside decoding the same image files whole and doing
       nothing else in as many processes, and beside the train step fed from memory: of --config, or else of MobileNetV2
       1.0 at 224 px. Worker processes are started, and what they have prepared is used up, before the clock runs.

What is compared runs turn by turn; the numbers are medians over the turns.

examples:
  python -m mnv2_jax.bench step --config=configs/w1_0.py
  python -m mnv2_jax.bench input --data=folder:PATH
  python -m mnv2_jax.bench input --config=configs/w1_0.py --data=imagenet:PATH
"""


def main() -> None:
    """Flags, a measurement, a table."""
    parser = Parser("Measures ratios within one run.", _HELP_AFTER)
    parser.prog = "python -m mnv2_jax.bench"
    parser.add_argument("what", choices=("step", "input"), help="what to time")
    parser.add_argument("--config", metavar="FILE[:ARG]", help="as for mnv2_jax.main; input can do without")
    parser.add_argument(
        "--data", metavar="NAME:PATH", help="input: images to read, as folder:photos; train/CLASS/*.jpg lie below"
    )
    parser.add_argument("--repeats", type=int, default=10, help="turns (default: 10)")
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    args, overrides = parser.parse(sys.argv[1:])
    if args.repeats < 1:
        raise UserError(f"--repeats={args.repeats} must be at least 1")
    if args.what == "input":
        settings, given = _settings_of_input(args.config, args.data, overrides)
        found = input_bench.time_input(settings, given, args.repeats)
        print(json.dumps(found) if args.json else input_bench.table(found))
        return
    if args.config is None or args.data is not None:
        raise UserError("step times a config: give --config=FILE[:ARG], and data in its argument rather than by --data")
    _, settings = config.load(args.config, overrides)
    timed = step_bench.time_step(settings, config.given(args.config, overrides), args.repeats)
    print(json.dumps(timed) if args.json else step_bench.table(timed))


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
