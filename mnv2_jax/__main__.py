"""All commands behind one name: ``mnv2 train …``, ``mnv2 predict …``, or ``python -m mnv2_jax …``."""

from __future__ import annotations

import importlib
import sys

from mnv2_jax.errors import UserError, exit_on_user_error, nearest

DOORS = {
    "train": ("main", "trains, goes on with a run, evaluates it, or shows its model or config (--mode)"),
    "predict": ("predict", "names the likeliest classes of images"),
    "convert": ("convert", "makes a file of weights of a run or of another library's file"),
    "inspect": ("inspect", "says what lies in a folder of images"),
    "lr_find": ("lr_find", "tries learning rates"),
    "report": ("report.__main__", "writes the page of a run anew, or its log as CSV"),
    "prepare": ("data.prepare.__main__", "packs ImageNet's files into shards"),
    "bench": ("bench.__main__", "measures this machine"),
}
"""Modules by the words that open them, and what each does."""


def main() -> None:
    """Hands the rest of the command line to a door."""
    verb = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if verb in ("-h", "--help"):
        verbs = "\n".join(f"  {word:<8} {what}" for word, (_, what) in DOORS.items())
        print(f"usage: mnv2 VERB …\n\n{verbs}\n\nmnv2 VERB --help says more.")
        return
    if verb not in DOORS:
        raise UserError(f"mnv2 {verb}: no such command{nearest(verb, DOORS)}")
    sys.argv[:2] = [f"mnv2 {verb}"]
    importlib.import_module(f"mnv2_jax.{DOORS[verb][0]}").main()


def run() -> None:
    """The console script. It finds modules in the current folder, as `python -m` does: a run's own may lie there."""
    if "" not in sys.path and not sys.flags.safe_path:
        sys.path.insert(0, "")
    exit_on_user_error(main)


if __name__ == "__main__":
    run()
