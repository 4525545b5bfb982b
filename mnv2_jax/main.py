"""Trains or evaluates a run, or prints its model or config: ``python -m mnv2_jax.main --config=w1_0``."""

from __future__ import annotations

import sys

from mnv2_jax import config, presets
from mnv2_jax.errors import UserError, exit_on_user_error
from mnv2_jax.flags import Parser, cluster_flags, config_of_run, describe_config, run_folder_type
from mnv2_jax.processes.cluster import Cluster


def main() -> None:
    """Reads the flags and the config, and runs the mode."""
    parser = Parser(
        "Trains or resumes a run, evaluates it, prints the layers of its model, or prints its config.",
        describe_config(presets.ARGUMENT_KEYS, presets.RECIPES),
    )
    parser.add_config_flags("optim.peak_lr=0.2")
    parser.add_argument("--workdir", type=run_folder_type, help="the run folder (default: as --mode=config prints it)")
    parser.add_mode_flag()
    parser.add_evaluation_flags()
    parser.add_json_flag()
    parser.add_cluster_flags()
    args, overrides = parser.parse(sys.argv[1:])
    for flag, value in (("checkpoint", args.checkpoint), ("predictions", args.predictions)):
        if value and args.mode != "eval":
            raise UserError(f"--{flag}={value} is used with --mode=eval only; leave it out")
    if args.config is None:
        args.config = config_of_run(args.workdir)
    loaded = config.load(args.config, overrides)
    workdir = args.workdir or run_folder_type(loaded.workdir)
    if args.mode == "config":
        loaded = loaded._replace(workdir=str(workdir))
        return print(config.as_json(loaded) if args.json else config.as_text(loaded))

    from mnv2_jax import verbs  # JAX takes seconds to import; a mistyped key should fail before that
    from mnv2_jax.processes import together

    out = verbs.Output(args.json)
    if args.mode == "summary":
        return verbs.print_summary(loaded, out)
    with together.joined(Cluster(*cluster_flags(args)), loaded.config.faults, args.mode):
        if args.mode == "train":
            verbs.train(loaded, workdir, out)
        elif loaded.config.init.weights is None or loaded.origins["init.weights"] != "flag":
            verbs.evaluate(loaded, workdir, args.checkpoint, out, args.predictions)
        elif args.workdir or args.checkpoint:
            raise UserError("--config.init.weights is evaluated instead of a run; leave --workdir and --checkpoint out")
        else:
            verbs.evaluate_weights(loaded, out, args.predictions)


if __name__ == "__main__":
    exit_on_user_error(main)
