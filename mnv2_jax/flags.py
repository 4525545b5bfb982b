"""Command-line flags: an argparse parser with one-line errors, which collects ``--config.KEY=VALUE`` by itself."""

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
from mnv2_jax.config.synonyms import synonym_of
from mnv2_jax.errors import UserError, nearest

_LONGEST_PATH = ("checkpoints", *4 * ("x" * 50,))
"""Parts of a path that is at least as long as any within a run folder."""


class Parser(argparse.ArgumentParser):
    """An argument parser that raises `UserError`, and suggests the nearest flag for an unknown one."""

    def __init__(self, description: str, epilog: str = ""):
        super().__init__(
            prog=_command(),
            description=description,
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def add_config_flags(self, example: str) -> None:
        """Adds the flags for a config and its keys. ``example``: a key and its value, for the help."""
        self.add_argument(
            "--config", metavar="NAME[:ARG]", help="the name of a config, a .py file, or the config.json of a run"
        )
        self.add_argument("--config.KEY", metavar="VALUE", help=f"set one key of the config, as in --config.{example}")

    def add_mode_flag(self) -> None:
        """Adds the flag for what to do with a run."""
        self.add_argument(
            "--mode",
            choices=("train", "eval", "summary", "config"),
            default="train",
            help="train: start or resume the run (default); eval: evaluate one of its checkpoints, or init.weights;"
            " summary: print the layers of the model; config: print every key, its value and where that comes from",
        )

    def add_json_flag(self) -> None:
        """Adds the flag for an answer that scripts can read."""
        self.add_argument(
            "--json",
            action="store_true",
            help="print one JSON object to standard output, and all text to standard error",
        )

    def add_cluster_flags(self) -> None:
        """Adds the flags for one of several processes, with the names that `jax.distributed.initialize` has."""
        self.add_argument(
            "--coordinator_address",
            metavar="HOST:PORT",
            help="address of process 0, where several processes train together; this flag and the next two are not"
            " needed on TPUs and under SLURM",
        )
        self.add_argument(
            "--num_processes", type=int, metavar="N", help="number of processes, each of which you start yourself"
        )
        self.add_argument("--process_id", type=int, metavar="I", help="number of this process, 0 to N - 1")

    def add_checkpoint_flag(self) -> None:
        """Adds the flag for the checkpoint of a run."""
        self.add_argument(
            "--checkpoint",
            choices=("latest", "best"),
            help="checkpoint of a run (default: latest; best if the config sets train.patience)",
        )

    def add_modules_flag(self) -> None:
        """Adds the flag for the modules of a file, `modules_of` its value; a run remembers its own."""
        self.add_argument(
            "--modules", default="", metavar="A,B", help="modules that register the task or model of a file"
        )

    def add_evaluation_flags(self) -> None:
        """Adds the flags for the checkpoint to evaluate, and for the file that gets the predictions."""
        self.add_argument(
            "--checkpoint",
            choices=("latest", "best"),
            help="with --mode=eval: checkpoint to evaluate (default: latest; best if the config sets train.patience)",
        )
        self.add_argument(
            "--predictions",
            type=file_type,
            metavar="FILE.csv",
            help="with --mode=eval: file to write, with a line for every image: its index, path, label, prediction,"
            " confidence, loss, and the next four classes",
        )

    def error(self, message: str) -> NoReturn:
        """Raises a `UserError`, where argparse would print the usage and exit."""
        raise UserError(f"{message}; see --help")

    def _takes_config(self) -> bool:
        return any("--config.KEY" in action.option_strings for action in self._actions)

    def parse(self, argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
        """Parses a command line.

        Returns:
          The flags, and the values of ``--config.KEY`` as ``a.b=value``, in their order.

        Raises:
          UserError: for a flag that doesn't exist, or a value that a flag can't have.
        """
        if len(argv) == 2 and argv[0] in ("-h", "--help") and self._takes_config():
            print(explain(argv[1]))
            self.exit()
        overrides, plain, remaining = [], [], list(argv)
        while remaining:
            item = remaining.pop(0)
            if not item.startswith("--config."):
                plain.append(item)
            elif "=" in item or not remaining:
                overrides.append(item.removeprefix("--config."))
            else:
                overrides.append(f"{item.removeprefix('--config.')}={remaining.pop(0)}")
        args, unknown = self.parse_known_intermixed_args(plain)  # images may stand between flags
        if unknown:
            flags = [flag for action in self._actions for flag in action.option_strings]
            word = unknown[0].partition("=")[0]
            synonym = synonym_of(word) if word.startswith("-") and self._takes_config() else None
            hint = nearest(word, flags) if synonym is None else f"; did you mean {synonym!r}?"
            raise UserError(f"unknown argument {unknown[0]!r}{hint}")
        return args, overrides


def modules_of(args: argparse.Namespace) -> list[str]:
    """Returns the value of the flag that `Parser.add_modules_flag` adds."""
    return [name for name in args.modules.split(",") if name]


def _command() -> str | None:
    """Returns the command as it was typed, ``mnv2 train`` or ``python -m mnv2_jax.main``; for a script None, so that
    argparse takes its file name.
    """
    if sys.argv[0].startswith("mnv2 "):  # as `mnv2_jax.__main__` sets it
        return sys.argv[0]
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return None if spec is None else f"python -m {spec.name.removesuffix('.__main__')}"


def folder_type(text: str) -> pathlib.Path:
    """Converts the text of a flag to a path, where ~ is the home directory.

    Raises:
      argparse.ArgumentTypeError: for the URL of a bucket, which has neither locks nor files that can be appended to.
    """
    if "://" in text:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a folder; mount a shared file system (NFS, Lustre) and give a path on it"
        )
    return pathlib.Path(os.path.expanduser(text))


def file_type(text: str) -> pathlib.Path:
    """Converts the text of a flag to a path, where ~ is the home directory."""
    return pathlib.Path(os.path.expanduser(text))


def run_folder_type(text: str) -> pathlib.Path:
    """Converts the text of a flag to the path of a run folder, as `folder_type` does.

    Raises:
      argparse.ArgumentTypeError: as there.
      UserError: if no checkpoint could be written: the path is not UTF-8, or leaves no room for the file
        names.
    """
    path, full_path = folder_type(text), os.path.realpath(os.path.expanduser(text))
    try:
        full_path.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"--workdir={text!r}: {full_path!r} is not UTF-8, so no checkpoint can be written there; give another"
        ) from error
    try:
        os.stat(os.path.join(full_path, *_LONGEST_PATH))
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise UserError(
                f"--workdir={text!r}: the path is too long for the files of a run; give a shorter one"
            ) from error
    return path


def config_of_run(workdir: pathlib.Path | None) -> str:
    """Returns the path of a run's config.json, which is the ``--config`` where that flag is missing.

    Raises:
      UserError: if ``workdir`` is None, or no run is there.
    """
    if workdir is None:
        raise UserError("--config is missing; try --config=w0_35:data=digits")
    if not (workdir / "config.json").is_file():
        raise UserError(f"--workdir={workdir}: no run is there (no config.json); give the folder of a run")
    return str(workdir / "config.json")


def cluster_flags(args: argparse.Namespace) -> tuple[str | None, int | None, int | None]:
    """Returns the values of the flags that `Parser.add_cluster_flags` adds."""
    return args.coordinator_address, args.num_processes, args.process_id


def describe_config(arguments: Iterable[str], recipes: Iterable[str]) -> str:
    """Writes the help on configs: keys of the argument, names, recipes, and every config key with its default."""
    keys = config.flatten(config.to_dict(config.Config()))
    lines = [f"{key}={value}" for key, value in keys.items()]
    filled = textwrap.fill("   ".join(lines), 116, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False)
    return (
        f"names of configs: {', '.join(config.config_files())}\n"
        f"keys of ARG: {', '.join(arguments)}; as in --config=w1_0:data=folder:DIR,res=128\n"
        f"recipes, for recipe=: {', '.join(recipes)}\n"
        "--help KEY and --help SECTION explain config keys, as in --help optim.momentum and --help optim\n"
        "Values of config keys: write names and paths as they are, other values as in Python; None unsets a key.\n\n"
        f"config keys and their defaults, which recipes change:\n{filled}"
    )
