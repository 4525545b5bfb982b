"""Reads a config file and the flags that change it."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import pathlib
import re
import typing
from collections.abc import Sequence
from typing import Any, TypeAlias

from mnv2_jax.config.build import build, from_text
from mnv2_jax.config.checks import check_read
from mnv2_jax.config.options import OPTIONS
from mnv2_jax.config.origins import Loaded, Origin, Preset, Source
from mnv2_jax.config.schema import flatten, linear_lr, to_dict
from mnv2_jax.errors import UserError, nearest
from mnv2_jax.json_files import read_json
from mnv2_jax.registry import modules_for


def load(spec: str, overrides: Sequence[str] = ()) -> Loaded:
    """Reads ``NAME[:ARG]``, ``FILE.py[:ARG]`` or ``FILE.json`` and applies overrides.

    Args:
      spec: the value of ``--config``; a name is one of `named`, whatever the folder that the command is started in.
      overrides: ``a.b=value`` each; later ones win. See `from_text` for the values.

    Raises:
      UserError: on anything that can't be read, isn't declared, is out of range, or is overridden for nothing.
    """
    path, arg = _file_and_argument(spec)
    if path.suffix not in (".py", ".json"):
        raise UserError(
            f"--config={spec}: expected a .py or .json file, of which .py takes an argument, or a config's name, as in"
            " --config=w1_0:res=128"
        )
    if not os.path.isfile(path):
        hint = f"; there is no folder {str(path.parent)!r} here"
        if os.path.isdir(path.parent):
            siblings = [str(p) for pattern in ("*.py", "*.json") for p in path.parent.glob(pattern)]
            hint = nearest(str(path), siblings) if siblings else "; no config is there"
        if path.stem in named():
            hint += f"; by its name, {path.stem}, the package's own is found from anywhere"
        raise UserError(f"--config={spec}: no file {str(path)!r}{hint}")
    name, recipe, tree, origins = _read_json(path) if path.suffix == ".json" else _run_python(path, arg, spec)
    keys = [override.partition("=")[0] for override in overrides]
    for override in overrides:
        _set(tree, override)
    config = build(tree)
    # What the modules have registered that a config file imports stays known to the run where a flag names others.
    if missing := [module for module in modules_for(to_dict(config)) if module not in config.modules]:
        config = dataclasses.replace(config, modules=(*config.modules, *missing))
        origins.setdefault("modules", "file")
    check_read(config, keys)
    origins |= dict.fromkeys(keys, "flag")
    every = {key: origins.get(key, "default") for key in OPTIONS}
    workdir = str(path.parent) if path.name == "config.json" else f"runs/{name}"
    return Loaded(name, config, every, recipe, workdir)


def named() -> dict[str, pathlib.Path]:
    """The package's own config files by their names: within it where it is installed, beside it in a checkout."""
    package = pathlib.Path(__file__).parents[1]
    files = sorted((package / "configs").glob("*.py")) or sorted((package.parent / "configs").glob("*.py"))
    return {path.stem: path for path in files}


def _file_and_argument(spec: str) -> tuple[pathlib.Path, str]:
    """Splits ``NAME:ARG``, or ``FILE.py:ARG`` at a colon behind ``.py``; others belong to files' names, as in
    ``runs/12:30/config.json``.

    Where several files could be meant, it is the last before which there is one, or else the first.

    Raises:
      UserError: for a name that no config has.
    """
    path, arg = _split_behind_py(spec)
    name, _, its_arg = spec.partition(":")
    known = named()
    is_file = path.suffix in (".py", ".json") and (name not in known or os.path.isfile(path))
    if is_file or not name or os.sep in name:
        return path, arg
    if name in known:
        return known[name], its_arg
    hint = f"; did you mean '{name}.py'?" if os.path.isfile(f"{name}.py") else nearest(name, known)
    raise UserError(f"--config={spec}: no config is named {name!r}{hint} (a file is given with its .py or .json)")


def _split_behind_py(spec: str) -> tuple[pathlib.Path, str]:
    ends = [match.end() for match in re.finditer(r"\.py(?=:)", spec)] + [len(spec)]
    paths = [os.path.expanduser(spec[:end]) for end in ends]
    place = max((place for place, path in enumerate(paths) if os.path.isfile(path)), default=0)
    return pathlib.Path(paths[place]), spec[ends[place] + 1 :]


_Read: TypeAlias = tuple[str, str, dict[str, Any], dict[str, Origin]]
"""Name, recipe, the nested config and whose its values are."""


def _run_python(path: pathlib.Path, arg: str, spec: str) -> _Read:
    """Runs ``get_config(arg)`` of a config file, which the user has called ``spec``."""
    module_spec = importlib.util.spec_from_file_location(f"_config_{path.stem}", path)
    assert module_spec is not None
    assert module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    try:
        module_spec.loader.exec_module(module)
        found = module.get_config(arg)
        tree = typing.cast(dict[str, Any], found.to_dict())
    except UserError as error:
        raise UserError(f"--config={spec}: {error}") from error
    except Exception as error:
        mend = "; start where it lies, or put its folder on PYTHONPATH" if isinstance(error, ImportError) else ""
        raise UserError(f"--config={path}: {type(error).__name__} in the config file: {error}{mend}") from error
    source = found.source if isinstance(found, Preset) else Source()
    return path.stem + source.variant, source.recipe, tree, source.origins_in(tree)


def _read_json(path: pathlib.Path) -> _Read:
    tree = read_json(path)
    _forget_derived(tree)
    name = path.resolve().parent.name if path.name == "config.json" else path.stem
    return name, "", tree, dict.fromkeys(flatten(tree), "json")


def _forget_derived(tree: dict[str, Any]) -> None:
    """Unsets the learning rate where it is what the batch makes it: so it stands in a config.json of 0.4.0 where nobody
    had said one, and it is to follow another batch.
    """
    optim, data = tree.get("optim"), tree.get("data")
    if isinstance(optim, dict) and isinstance(data, dict):
        try:
            derived = linear_lr(optim["reference_lr"], data["batch_size"], optim["reference_batch_size"])
        except (KeyError, TypeError, ZeroDivisionError):
            return  # `build` will say what is wrong
        if optim.get("peak_lr") == derived:
            optim["peak_lr"] = None


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
