"""Command lines: argparse, with errors of one line and ``--config.KEY=VALUE`` set aside."""

from __future__ import annotations

import argparse
import errno
import os
import pathlib
import sys
import textwrap
from collections.abc import Iterable, Sequence
from typing import NoReturn

from mnv2_jax import config
from mnv2_jax.config.explain import explain
from mnv2_jax.config.synonyms import called
from mnv2_jax.errors import UserError, nearest

_DEEPEST = ("checkpoints", *4 * ("x" * 50,))
"""At least as long as any path in a run's folder."""


class Parser(argparse.ArgumentParser):
    """An argument parser that raises `UserError`, and names the nearest flag for one that it doesn't know."""

    def __init__(self, description: str, epilog: str = ""):
        super().__init__(
            prog=_command(),
            description=description,
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def add_cluster_flags(self) -> None:
        """Which of several processes this is; the names are those of `jax.distributed.initialize`."""
        self.add_argument(
            "--coordinator_address",
            metavar="HOST:PORT",
            help="of process 0; these three aren't needed on TPU and SLURM",
        )
        self.add_argument(
            "--num_processes", type=int, metavar="N", help="that train together; each is started by itself"
        )
        self.add_argument("--process_id", type=int, metavar="I", help="which of them this is, 0 to N - 1")

    def add_evaluation_flags(self) -> None:
        """Which checkpoint of a run is evaluated, and where all answers are to be written."""
        self.add_argument(
            "--checkpoint", choices=("latest", "best"), help="to evaluate (default: latest; best with patience)"
        )
        self.add_argument(
            "--predictions",
            type=file_type,
            metavar="FILE.csv",
            help="of an evaluation: for every image index, path, label, prediction, confidence, loss, and the next four"
            " classes",
        )

    def error(self, message: str) -> NoReturn:
        """Instead of printing the usage and exiting."""
        raise UserError(f"{message}; see --help")

    def _takes_config(self) -> bool:
        return any("--config.KEY" in action.option_strings for action in self._actions)

    def parse(self, argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
        """The flags, and the overrides as ``a.b=value`` in their order.

        Raises:
          UserError: for a flag that doesn't exist or a value that can't be.
        """
        if len(argv) == 2 and argv[0] in ("-h", "--help") and self._takes_config():
            print(explain(argv[1]))
            self.exit()
        overrides, plain, rest = [], [], list(argv)
        while rest:
            item = rest.pop(0)
            if not item.startswith("--config."):
                plain.append(item)
            elif "=" in item or not rest:
                overrides.append(item.removeprefix("--config."))
            else:
                overrides.append(f"{item.removeprefix('--config.')}={rest.pop(0)}")
        args, unknown = self.parse_known_intermixed_args(plain)  # images may stand between flags
        if unknown:
            flags = [flag for action in self._actions for flag in action.option_strings]
            word = unknown[0].partition("=")[0]
            meant = called(word) if word.startswith("-") and self._takes_config() else None
            hint = nearest(word, flags) if meant is None else f"; did you mean {meant!r}?"
            raise UserError(f"unknown argument {unknown[0]!r}{hint}")
        return args, overrides


def _command() -> str | None:
    """``mnv2 train`` or ``python -m mnv2_jax.main``, as it was typed; None, argparse's own word, for a file."""
    if sys.argv[0].startswith("mnv2 "):  # by `mnv2_jax.__main__`
        return sys.argv[0]
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return None if spec is None else f"python -m {spec.name.removesuffix('.__main__')}"


def workdir_type(text: str) -> pathlib.Path:
    """A path, with ~ for the home directory.

    Raises:
      UserError: for a bucket, which has neither locks nor files that grow.
    """
    if "://" in text:
        raise UserError(
            f"--workdir={text!r} is no folder; mount a shared file system (NFS, Lustre) and give a path on it"
        )
    return pathlib.Path(os.path.expanduser(text))


def file_type(text: str) -> pathlib.Path:
    """A path, with ~ for the home directory."""
    return pathlib.Path(os.path.expanduser(text))


def run_folder_type(text: str) -> pathlib.Path:
    """Does what `workdir_type` does, for a folder that holds checkpoints.

    Raises:
      UserError: too, where they could not be written: the path isn't UTF-8, or has no room for their names.
    """
    path, whole = workdir_type(text), os.path.realpath(os.path.expanduser(text))
    try:
        whole.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"--workdir={text!r}: {whole!r} is not UTF-8, and no checkpoint can be written there; give another"
        ) from error
    try:
        os.stat(os.path.join(whole, *_DEEPEST))
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise UserError(f"--workdir={text!r}: too long for what lies in it; give a shorter path") from error
    return path


def config_of_run(workdir: pathlib.Path | None) -> str:
    """The ``--config`` of what a run was, where none is given.

    Raises:
      UserError: if there is no run.
    """
    if workdir is None:
        raise UserError("--config is missing; try --config=w0_35:data=digits")
    if not (workdir / "config.json").is_file():
        raise UserError(f"--workdir={workdir}: no run is there (no config.json); give the folder of a run")
    return str(workdir / "config.json")


def cluster_flags(args: argparse.Namespace) -> tuple[str | None, int | None, int | None]:
    """Values of the flags of `Parser.add_cluster_flags`."""
    return args.coordinator_address, args.num_processes, args.process_id


def describe_config(arguments: Iterable[str], recipes: Iterable[str]) -> str:
    """The keys of a config's argument, the recipes, and every config key with its default, for ``--help``."""
    keys = config.flatten(config.to_dict(config.Config()))
    lines = [f"{key}={value}" for key, value in keys.items()]
    filled = textwrap.fill("   ".join(lines), 116, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False)
    return (
        f"argument of a config: {', '.join(arguments)}; as in w1_0:data=folder:DIR,res=128\n"
        f"configs by name: {', '.join(config.named())}\n"
        "--help KEY and --help SECTION say what keys mean, as --help optim.momentum or --help optim\n"
        "values of keys: names and paths as they stand, other values as in Python; None unsets a key\n"
        f"recipes: {', '.join(recipes)}\n\nconfig keys and their defaults, which recipes change:\n{filled}"
    )
