"""Trains, evaluates or summarises: ``python -m mnv2_jax.main --config=configs/w1_0.py``."""

from __future__ import annotations

import sys

from mnv2_jax import config, presets
from mnv2_jax.errors import UserError, exit_on_user_error
from mnv2_jax.flags import Parser, cluster_flags, describe_config, run_folder_type
from mnv2_jax.processes.cluster import Cluster


def main() -> None:
    """Flags, config, one verb."""
    parser = Parser(
        "Trains (and goes on with) a run, evaluates it, or summarises its model.",
        describe_config(presets.ARGUMENT_KEYS, presets.RECIPES),
    )
    parser.add_argument("--config", metavar="FILE[:ARG]", help="a .py config or a run's config.json")
    parser.add_argument("--config.KEY", metavar="VALUE", help="sets a key of the config; --config.optim.peak_lr=0.2")
    parser.add_argument("--workdir", type=run_folder_type, help="the run's folder (default: runs/NAME OF THE CONFIG)")
    parser.add_argument("--mode", choices=("train", "eval", "summary"), default="train", help="default: train")
    parser.add_argument(
        "--checkpoint", choices=("latest", "best"), help="to evaluate (default: latest; best with patience)"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output, all text on stderr")
    parser.add_cluster_flags()
    args, overrides = parser.parse(sys.argv[1:])
    if args.checkpoint and args.mode != "eval":
        raise UserError(f"--checkpoint={args.checkpoint} is read with --mode=eval only; leave it out")
    if args.config is None and args.mode != "train" and args.workdir is not None:
        args.config = str(args.workdir / "config.json")
        if not (args.workdir / "config.json").is_file():
            raise UserError(f"--workdir={args.workdir}: no run is there (no config.json); give the folder of a run")
    if args.config is None:
        raise UserError("--config is missing; try --config=configs/w0_35.py:data=digits")
    name, settings = config.load(args.config, overrides)
    given, given_now = config.given(args.config, overrides), [item.partition("=")[0] for item in overrides]
    default = args.config.removesuffix("/config.json") if args.config.endswith("/config.json") else f"runs/{name}"
    workdir = args.workdir or run_folder_type(default)

    from mnv2_jax import verbs  # JAX takes seconds to import; a mistyped key doesn't wait for it
    from mnv2_jax.processes import together

    out = verbs.Output(args.json)
    if args.mode == "summary":
        return verbs.summarise(settings, given, out)
    with together.joined(Cluster(*cluster_flags(args)), settings.faults, args.mode):
        if args.mode == "train":
            verbs.train(settings, given, workdir, out)
        elif settings.init.weights is None or "init.weights" not in given_now:
            verbs.evaluate(settings, given_now, workdir, args.checkpoint, out)
        elif args.workdir or args.checkpoint:
            raise UserError("--config.init.weights says what is evaluated; leave --workdir and --checkpoint out")
        else:
            verbs.evaluate_weights(settings, given, out)


if __name__ == "__main__":
    exit_on_user_error(main)
