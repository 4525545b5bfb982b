"""Finds a learning rate by a range test: ``python -m mnv2_jax.lr_find --config=w0_35:data=digits``."""

from __future__ import annotations

import argparse
import math
import sys

from mnv2_jax import config
from mnv2_jax.errors import UserError, exit_on_user_error
from mnv2_jax.flags import Parser, folder_type

MIN_STEPS, MAX_STEPS = 20, 100_000

_HELP_AFTER = """\
The command runs Smith's range test (arXiv:1506.01186): a fresh network takes the config's own training steps, while
the learning rate grows by the same factor each step, until the smoothed loss is four times its lowest value. Then the
network is thrown away. Batch size, optimiser, augmentation, init.weights and the ratios of learning rates (finetune.*)
come from the config; its schedule is not used. The suggestion is the peak of a schedule with a warm-up, and only a
starting point: also try training at a few times that rate, and at a fraction of it. A network that learns slowly from
scratch needs some hundred --steps.

examples:
  python -m mnv2_jax.lr_find --config=w0_35:data=digits
  python -m mnv2_jax.lr_find --config=finetune:data=folder:DIR --config.init.weights=v2.safetensors --out=lr
"""


def main() -> None:
    """Reads the flags and the config, and runs the range test."""
    parser = Parser("Tries learning rates on the training batches of a config, and suggests one.", _HELP_AFTER)
    parser.add_config_flags("data.batch_size=64")
    parser.add_argument(
        "--from", type=_rate, default=1e-6, metavar="LR", dest="lowest", help="first learning rate (default: 1e-6)"
    )
    parser.add_argument(
        "--to", type=_rate, default=10.0, metavar="LR", dest="highest", help="last learning rate (default: 10)"
    )
    parser.add_argument(
        "--steps", type=_steps, default=100, metavar="N", help="training steps between the two rates (default: 100)"
    )
    parser.add_argument(
        "--out",
        type=folder_type,
        metavar="DIR",
        help="folder for lr_find.json and lr_find.html, a page with the curve (default: write nothing)",
    )
    parser.add_json_flag()
    args, overrides = parser.parse(sys.argv[1:])
    if args.config is None:
        raise UserError("--config is missing; try --config=w0_35:data=digits")
    if args.lowest >= args.highest:
        raise UserError(f"--from={args.lowest:g} --to={args.highest:g}: the rate must grow; give a larger --to")
    loaded = config.load(args.config, overrides)

    from mnv2_jax import verbs  # JAX takes seconds to import; a mistyped key should fail before that

    verbs.find_lr(loaded, args.lowest, args.highest, args.steps, args.out, verbs.Output(args.json))


def _rate(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} must be a number above 0")
    return value


def _steps(text: str) -> int:
    value = int(text) if text.isdecimal() else 0
    if not MIN_STEPS <= value <= MAX_STEPS:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number from {MIN_STEPS} to {MAX_STEPS}")
    return value


if __name__ == "__main__":
    exit_on_user_error(main)
