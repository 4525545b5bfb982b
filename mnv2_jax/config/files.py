"""Reads a config file and the flags that change it."""

from __future__ import annotations

import importlib.util
import os
import pathlib
import re
import typing
from collections.abc import Sequence
from typing import Any

from mnv2_jax.config.build import build, from_text
from mnv2_jax.config.checks import check_read
from mnv2_jax.config.schema import Config, flatten
from mnv2_jax.errors import UserError, nearest
from mnv2_jax.json_files import read_json
from mnv2_jax.registry import TASKS


def load(spec: str, overrides: Sequence[str] = ()) -> tuple[str, Config]:
    """Reads ``FILE.py[:ARG]`` or ``FILE.json`` and applies overrides.

    Args:
      spec: the value of ``--config``.
      overrides: ``a.b=value`` each; later ones win. See `from_text` for the values.

    Returns:
      The name of the config (the file's stem; the run's folder for a ``config.json``) and the `Config`.

    Raises:
      UserError: on anything that can't be read, isn't declared, is out of range, or is overridden for nothing.
    """
    path, arg = _file_and_argument(spec)
    if path.suffix not in (".py", ".json"):
        raise UserError(
            f"--config={spec}: expected a .py or .json file, of which .py takes an argument, as in"
            " --config=configs/w1_0.py:res=128"
        )
    if not os.path.isfile(path):
        hint = f"; there is no folder {str(path.parent)!r} here"
        if os.path.isdir(path.parent):
            siblings = [str(p) for pattern in ("*.py", "*.json") for p in path.parent.glob(pattern)]
            hint = nearest(str(path), siblings) if siblings else "; no config is there"
        raise UserError(f"--config={spec}: no file {str(path)!r}{hint}")
    if path.suffix == ".json":
        tree = read_json(path)
        _forget_derived(tree)
        name = path.resolve().parent.name if path.name == "config.json" else path.stem
    else:
        tree, name = _run_python(path, arg), path.stem
        if modules := TASKS.modules_of(str(tree.get("task"))):  # which the file has imported
            tree.setdefault("modules", modules)
    for override in overrides:
        _set(tree, override)
    config = build(tree)
    check_read(config, [override.partition("=")[0] for override in overrides])
    return name, config


def given(spec: str, overrides: Sequence[str] = ()) -> frozenset[str]:
    """Keys whose values are said and no recipe's: those of the overrides, the resolution where ``res=`` sets it, and
    all of a .json file, which has what a run was resolved to.
    """
    keys = {override.partition("=")[0] for override in overrides}
    path, argument = _file_and_argument(spec)
    if path.suffix == ".json":
        return frozenset(keys | set(flatten(read_json(path))))
    return frozenset(keys | {"data.resolution" for item in argument.split(",") if item.startswith("res=")})


def _file_and_argument(spec: str) -> tuple[pathlib.Path, str]:
    """Splits ``FILE.py:ARG`` at a colon behind ``.py``; others belong to names, as in ``runs/12:30/config.json``.

    Where several could be meant, it is the last before which there is a file, or else the first.
    """
    ends = [match.end() for match in re.finditer(r"\.py(?=:)", spec)] + [len(spec)]
    paths = [os.path.expanduser(spec[:end]) for end in ends]
    place = max((place for place, path in enumerate(paths) if os.path.isfile(path)), default=0)
    return pathlib.Path(paths[place]), spec[ends[place] + 1 :]


def _run_python(path: pathlib.Path, arg: str) -> dict[str, Any]:
    """Runs ``get_config(arg)`` of a config file."""
    module_spec = importlib.util.spec_from_file_location(f"_config_{path.stem}", path)
    assert module_spec is not None
    assert module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    try:
        module_spec.loader.exec_module(module)
        return typing.cast(dict[str, Any], module.get_config(arg).to_dict())
    except UserError as error:
        raise UserError(f"--config={path}{':' + arg if arg else ''}: {error}") from error
    except Exception as error:
        raise UserError(f"--config={path}: {type(error).__name__} in the config file: {error}") from error


def _forget_derived(tree: dict[str, Any]) -> None:
    """Unsets the learning rate of a run's config if it is what the batch size made it, so that it follows a new one."""
    optim, data = tree.get("optim"), tree.get("data")
    if isinstance(optim, dict) and isinstance(data, dict):
        try:
            derived = optim["reference_lr"] * (data["batch_size"] / optim["reference_batch_size"])
        except (KeyError, TypeError, ZeroDivisionError):
            return  # `build` will say what is wrong
        if optim.get("peak_lr") == derived:
            del optim["peak_lr"]


def _set(tree: dict[str, Any], override: str) -> None:
    """Writes ``a.b=value`` into the nested dict; unknown keys are left for `build` to refuse."""
    key, separator, text = override.partition("=")
    if not separator:
        raise UserError(f"--config.{key}: expected --config.{key}=VALUE")
    *parents, leaf = key.split(".")
    node = tree
    for depth, parent in enumerate(parents):
        node = node.setdefault(parent, {})
        if not isinstance(node, dict):
            raise UserError(f"--config.{key}: {'.'.join(parents[: depth + 1])!r} is a value, not a section")
    node[leaf] = from_text(key, text)
