"""Tries learning rates: ``python -m mnv2_jax.lr_find --config=w0_35:data=digits``."""

from __future__ import annotations

import argparse
import math
import sys

from mnv2_jax import config
from mnv2_jax.errors import UserError, exit_on_user_error
from mnv2_jax.flags import Parser, workdir_type

FEWEST_STEPS, MOST_STEPS = 20, 100_000

_HELP_AFTER = """\
Smith's range test (arXiv:1506.01186): a fresh state takes the config's own training steps, while the learning rate
grows by the same factor each step, until the smoothed loss is four times its least. The state is thrown away. Batch
size, optimiser, augmentation, init.weights and the proportions of rates (finetune.*) are the config's; its schedule
isn't read. What is suggested is a peak for a schedule that warms up to it, a place to begin from: rates a few times as
high or low are worth a training each. Where a network learns slowly from scratch, give some hundred --steps.

examples:
  python -m mnv2_jax.lr_find --config=w0_35:data=digits
  python -m mnv2_jax.lr_find --config=finetune:data=folder:DIR --config.init.weights=v2.safetensors --out=lr
"""


def main() -> None:
    """Flags, config, test."""
    parser = Parser("Tries learning rates on a config's training batches, and suggests one.", _HELP_AFTER)
    parser.add_argument("--config", metavar="NAME[:ARG]", help="a config by name, a .py file or a run's config.json")
    parser.add_argument("--config.KEY", metavar="VALUE", help="sets a key of the config; --config.data.batch_size=64")
    parser.add_argument("--from", type=_rate, default=1e-6, metavar="LR", dest="lowest", help="default: 1e-6")
    parser.add_argument("--to", type=_rate, default=10.0, metavar="LR", dest="highest", help="default: 10")
    parser.add_argument(
        "--steps", type=_steps, default=100, metavar="N", help="from the one to the other; default: 100"
    )
    parser.add_argument(
        "--out", type=workdir_type, metavar="DIR", help="for lr_find.json and lr_find.html, a page with the curve"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output, all text on stderr")
    args, overrides = parser.parse(sys.argv[1:])
    if args.config is None:
        raise UserError("--config is missing; try --config=w0_35:data=digits")
    if args.lowest >= args.highest:
        raise UserError(f"--from={args.lowest:g} --to={args.highest:g}: the rate is to grow; give a larger --to")
    loaded = config.load(args.config, overrides)

    from mnv2_jax import verbs  # JAX takes seconds to import; a mistyped key doesn't wait for it

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
    if not FEWEST_STEPS <= value <= MOST_STEPS:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number from {FEWEST_STEPS} to {MOST_STEPS}")
    return value


if __name__ == "__main__":
    exit_on_user_error(main)
