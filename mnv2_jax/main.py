"""Trains, evaluates, summarises or explains: ``python -m mnv2_jax.main --config=w1_0``."""

from __future__ import annotations

import sys

from mnv2_jax import config, presets
from mnv2_jax.errors import UserError, exit_on_user_error
from mnv2_jax.flags import Parser, cluster_flags, config_of_run, describe_config, run_folder_type
from mnv2_jax.processes.cluster import Cluster


def main() -> None:
    """Flags, config, one verb."""
    parser = Parser(
        "Trains (and goes on with) a run, evaluates it, summarises its model, or shows its config.",
        describe_config(presets.ARGUMENT_KEYS, presets.RECIPES),
    )
    parser.add_argument("--config", metavar="NAME[:ARG]", help="a config by name, a .py file or a run's config.json")
    parser.add_argument("--config.KEY", metavar="VALUE", help="sets a key of the config; --config.optim.peak_lr=0.2")
    parser.add_argument("--workdir", type=run_folder_type, help="the run's folder (default: as --mode=config says)")
    parser.add_argument(
        "--mode", choices=("train", "eval", "summary", "config"), default="train", help="default: train"
    )
    parser.add_evaluation_flags()
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output, all text on stderr")
    parser.add_cluster_flags()
    args, overrides = parser.parse(sys.argv[1:])
    for flag, value in (("checkpoint", args.checkpoint), ("predictions", args.predictions)):
        if value and args.mode != "eval":
            raise UserError(f"--{flag}={value} is read with --mode=eval only; leave it out")
    if args.config is None:
        args.config = config_of_run(args.workdir)
    loaded = config.load(args.config, overrides)
    workdir = args.workdir or run_folder_type(loaded.workdir)
    if args.mode == "config":
        loaded = loaded._replace(workdir=str(workdir))
        return print(config.as_json(loaded) if args.json else config.as_text(loaded))

    from mnv2_jax import verbs  # JAX takes seconds to import; a mistyped key doesn't wait for it
    from mnv2_jax.processes import together

    out = verbs.Output(args.json)
    if args.mode == "summary":
        return verbs.summarise(loaded, out)
    with together.joined(Cluster(*cluster_flags(args)), loaded.config.faults, args.mode):
        if args.mode == "train":
            verbs.train(loaded, workdir, out)
        elif loaded.config.init.weights is None or loaded.origins["init.weights"] != "flag":
            verbs.evaluate(loaded, workdir, args.checkpoint, out, args.predictions)
        elif args.workdir or args.checkpoint:
            raise UserError("--config.init.weights says what is evaluated; leave --workdir and --checkpoint out")
        else:
            verbs.evaluate_weights(loaded, out, args.predictions)


if __name__ == "__main__":
    exit_on_user_error(main)
