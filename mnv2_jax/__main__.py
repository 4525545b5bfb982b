"""The command ``mnv2``, which runs every verb: ``mnv2 train …``, ``mnv2 predict …``; or ``python -m mnv2_jax …``."""

from __future__ import annotations

import importlib
import sys

from mnv2_jax.errors import UserError, exit_on_user_error, nearest

DOORS = {
    "train": ("main", "trains or resumes a run, evaluates it, or prints its model or config (--mode)"),
    "predict": ("predict", "prints the most probable classes of images"),
    "export": (
        "export.__main__",
        "writes and checks files for other runtimes: LiteRT, ONNX, Core ML, browsers, …",
    ),
    "convert": ("convert", "writes the weights of a run or of another library to one file"),
    "inspect": ("inspect", "reports classes, sizes, damage and duplicates in a folder of images"),
    "lr_find": ("lr_find", "tries a range of learning rates and suggests one"),
    "study": ("study.__main__", "plans, trains and reports a study: claims, runs, verdicts"),
    "report": ("report.__main__", "rewrites the report page of a run, or exports its log as CSV"),
    "prepare": ("data.prepare.__main__", "packs the ImageNet files into shards"),
    "bench": ("bench.__main__", "measures how fast this machine is"),
}
"""Every verb, with the module that runs it and a description for the help."""


def main() -> None:
    """Passes the rest of the command line to the module of the verb."""
    verb = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if verb in ("-h", "--help"):
        verbs = "\n".join(f"  {name:<8} {description}" for name, (_, description) in DOORS.items())
        print(f"usage: mnv2 VERB …\n\n{verbs}\n\nmnv2 VERB --help prints the options of a verb.")
        return
    if verb not in DOORS:
        raise UserError(f"mnv2 {verb}: no such command{nearest(verb, DOORS)}")
    sys.argv[:2] = [f"mnv2 {verb}"]
    importlib.import_module(f"mnv2_jax.{DOORS[verb][0]}").main()


def run() -> None:
    """Runs the console script. Like `python -m`, it finds modules in the current folder: a run may need one of them."""
    if "" not in sys.path and not sys.flags.safe_path:
        sys.path.insert(0, "")
    exit_on_user_error(main)


if __name__ == "__main__":
    run()
