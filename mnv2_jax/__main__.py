"""All commands behind one name: ``mnv2 train …``, ``mnv2 predict …``, or ``python -m mnv2_jax …``."""

from __future__ import annotations

import importlib
import sys

from mnv2_jax.errors import UserError, exit_on_user_error, nearest

DOORS = {
    "train": "main",
    "predict": "predict",
    "convert": "convert",
    "inspect": "inspect",
    "lr_find": "lr_find",
    "report": "report.__main__",
    "prepare": "data.prepare.__main__",
    "bench": "bench.__main__",
}
"""Modules by the words that open them; ``train`` evaluates and summarises, too (--mode)."""


def main() -> None:
    """Hands the rest of the command line to a door."""
    verb = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if verb in ("-h", "--help"):
        print(f"usage: mnv2 {{{','.join(DOORS)}}} …\n\nmnv2 VERB --help says what each takes.")
        return
    if verb not in DOORS:
        raise UserError(f"mnv2 {verb}: no such command{nearest(verb, DOORS)}")
    sys.argv[:2] = [f"mnv2 {verb}"]
    importlib.import_module(f"mnv2_jax.{DOORS[verb]}").main()


def run() -> None:
    """The console script. It finds modules in the current folder, as `python -m` does: a run's own may lie there."""
    if "" not in sys.path and not sys.flags.safe_path:
        sys.path.insert(0, "")
    exit_on_user_error(main)


if __name__ == "__main__":
    run()
