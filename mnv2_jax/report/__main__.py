"""Writes a run's report anew: ``python -m mnv2_jax.report --workdir=RUN``."""

from __future__ import annotations

import sys

from mnv2_jax.errors import UserError, exit_on_user_error
from mnv2_jax.flags import Parser, workdir_type
from mnv2_jax.report.page import write_report
from mnv2_jax.runs.folder import read_run
from mnv2_jax.tasks.base import kind_of


def main() -> None:
    """Flags, then the page."""
    parser = Parser(
        "Writes report.html from what a run's folder holds, whether it is finished, was stopped, or is being trained."
        "\nNeither data nor devices are needed."
    )
    parser.add_argument("--workdir", type=workdir_type, metavar="RUN", help="the run's folder")
    args, overrides = parser.parse(sys.argv[1:])
    if overrides:
        raise UserError(f"--config.{overrides[0]} is not read here; leave it out")
    if args.workdir is None:
        raise UserError("--workdir is missing; give the folder of a run, as --workdir=runs/w0_35")
    config, _ = read_run(args.workdir)
    print(write_report(args.workdir, kind_of(config).page))


if __name__ == "__main__":
    exit_on_user_error(main)
