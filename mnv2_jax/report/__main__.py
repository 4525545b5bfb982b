"""Rewrites the report of a run, or writes its log as CSV: ``python -m mnv2_jax.report --workdir=RUN [--csv=FILE]``."""

from __future__ import annotations

import sys

from mnv2_jax.errors import UserError, exit_on_user_error
from mnv2_jax.flags import Parser, file_type, folder_type
from mnv2_jax.report.page import write_report
from mnv2_jax.runs.folder import read_run
from mnv2_jax.runs.metrics_log import write_csv
from mnv2_jax.tasks.base import kind_of


def main() -> None:
    """Parses the flags and writes the page or the CSV."""
    parser = Parser(
        "Writes report.html from the files in a run folder. The run may be finished, stopped or still training."
        "\nNeither the data nor an accelerator is needed."
    )
    parser.add_argument("--workdir", type=folder_type, metavar="RUN", help="the run folder")
    parser.add_argument(
        "--csv",
        type=file_type,
        metavar="FILE.csv",
        help="write the log as CSV instead: one row per line of metrics.jsonl, one column per key",
    )
    args, overrides = parser.parse(sys.argv[1:])
    if overrides:
        raise UserError(f"--config.{overrides[0]} has no effect on the report; leave it out")
    if args.workdir is None:
        raise UserError("--workdir is missing; give a run folder, such as --workdir=runs/w0_35")
    config, _ = read_run(args.workdir)
    if args.csv is not None:
        write_csv(args.workdir, args.csv)
        print(args.csv)
        return
    print(write_report(args.workdir, kind_of(config).page))


if __name__ == "__main__":
    exit_on_user_error(main)
