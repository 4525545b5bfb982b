"""Reads a config file, and applies the flags that change it."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import pathlib
import re
import types
import typing
from collections.abc import Sequence
from typing import Any, TypeAlias

import ml_collections

from mnv2_jax.config.build import build, from_text
from mnv2_jax.config.checks import check_read
from mnv2_jax.config.options import OPTIONS
from mnv2_jax.config.origins import Loaded, Origin, Preset, Source
from mnv2_jax.config.schema import flatten, linear_lr, to_dict
from mnv2_jax.errors import UserError, nearest
from mnv2_jax.json_files import read_json
from mnv2_jax.registry import line_of, modules_for


def load(spec: str, overrides: Sequence[str] = ()) -> Loaded:
    """Reads ``NAME[:ARG]``, ``FILE.py[:ARG]`` or ``FILE.json``, and applies overrides.

    Args:
      spec: value of ``--config``. Names are those of `config_files`, in whatever folder the command is started.
      overrides: changes of values, each as ``a.b=value``; later ones win. `from_text` parses the values.

    Raises:
      UserError: if a file can't be read, a key isn't declared, a value is out of range, or an override has no effect.
    """
    path, arg = _file_and_argument(spec)
    if path.suffix not in (".py", ".json"):
        raise UserError(
            f"--config={spec}: expected a config's name, a .py file or a .json file; a name and a .py file may have an"
            " argument, as in --config=w1_0:res=128"
        )
    if not os.path.isfile(path):
        hint = f"; there is no folder {str(path.parent)!r}"
        if os.path.isdir(path.parent):
            siblings = [str(p) for pattern in ("*.py", "*.json") for p in path.parent.glob(pattern)]
            hint = nearest(str(path), siblings) if siblings else "; that folder holds no config"
        if path.stem in config_files():
            hint += f"; for the package's own config, give its name alone, --config={path.stem}"
        raise UserError(f"--config={spec}: no file {str(path)!r}{hint}")
    name, recipe, tree, origins = _read_json(path) if path.suffix == ".json" else _run_python(path, arg, spec)
    keys = [override.partition("=")[0] for override in overrides]
    for override in overrides:
        _set(tree, override)
    config = build(tree)
    # The run needs the modules that the config file imports, even where --config.modules names others.
    if missing := [module for module in modules_for(to_dict(config)) if module not in config.modules]:
        config = dataclasses.replace(config, modules=(*config.modules, *missing))
        origins.setdefault("modules", "file")
    check_read(config, keys)
    origins |= dict.fromkeys(keys, "flag")
    all_origins = {key: origins.get(key, "default") for key in OPTIONS}
    workdir = str(path.parent) if path.name == "config.json" else f"runs/{name}"
    return Loaded(name, config, all_origins, recipe, workdir)


def config_files() -> dict[str, pathlib.Path]:
    """Returns the package's own config files by name; they are in an installed package, or beside it in a checkout."""
    package = pathlib.Path(__file__).parents[1]
    files = sorted((package / "configs").glob("*.py")) or sorted((package.parent / "configs").glob("*.py"))
    return {path.stem: path for path in files}


def _file_and_argument(spec: str) -> tuple[pathlib.Path, str]:
    """Splits ``NAME:ARG`` or ``FILE.py:ARG`` into a file and its argument.

    A file's argument begins after a colon that follows ``.py``; other colons belong to the file's name, as in
    ``runs/12:30/config.json``. If there are several such colons, the last one counts before which a file exists, or
    else the first.

    Raises:
      UserError: for a name that no config has.
    """
    path, arg = _split_after_py(spec)
    name, _, name_arg = spec.partition(":")
    configs = config_files()
    is_file = path.suffix in (".py", ".json") and (name not in configs or os.path.isfile(path))
    if is_file or not name or os.sep in name:
        return path, arg
    if name in configs:
        return configs[name], name_arg
    hint = f"; did you mean '{name}.py'?" if os.path.isfile(f"{name}.py") else nearest(name, configs)
    raise UserError(f"--config={spec}: no config is named {name!r}{hint} (write a file with its .py or .json)")


def _split_after_py(spec: str) -> tuple[pathlib.Path, str]:
    ends = [match.end() for match in re.finditer(r"\.py(?=:)", spec)] + [len(spec)]
    paths = [os.path.expanduser(spec[:end]) for end in ends]
    chosen = max((index for index, path in enumerate(paths) if os.path.isfile(path)), default=0)
    return pathlib.Path(paths[chosen]), spec[ends[chosen] + 1 :]


_ConfigFile: TypeAlias = tuple[str, str, dict[str, Any], dict[str, Origin]]
"""Content of a config file: name, recipe, the nested config, and the origins of its values by key."""


def _run_python(path: pathlib.Path, arg: str, spec: str) -> _ConfigFile:
    """Runs ``get_config(arg)`` of a config file; ``spec`` is the value of ``--config``, for errors."""
    try:
        module = run_file(path, f"_config_{path.stem}")
        function = getattr(module, "get_config", None)
        if function is None:
            functions = [name for name, value in vars(module).items() if callable(value)]
            raise UserError(f"it defines no get_config(arg){nearest('get_config', functions) if functions else ''}")
        returned = function(arg)
        if not isinstance(returned, ml_collections.ConfigDict):
            raise UserError(f"get_config returned {returned!r:.60}; let it return the ConfigDict of presets.preset")
        tree = typing.cast(dict[str, Any], returned.to_dict())
    except UserError as error:
        raise UserError(f"--config={spec}: {error}") from error
    except Exception as error:
        raise UserError(f"--config={path}: {reason_in_file(error)}") from error
    source = returned.source if isinstance(returned, Preset) else Source()
    return path.stem + source.variant, source.recipe, tree, source.origins_in(tree)


def run_file(path: pathlib.Path, name: str) -> types.ModuleType:
    """Runs a Python file as a module of this name, whatever the file raises; `sys.modules` doesn't get it."""
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def reason_in_file(error: Exception) -> str:
    """Writes an error of a user's file in one line: its kind, its message, what to do about it, and its FILE:LINE."""
    mend = ""
    if isinstance(error, ImportError):
        mend = "; start in the folder of that module, or put that folder on PYTHONPATH"
    text = error.args[0] if isinstance(error, AttributeError | KeyError) and error.args else error
    return f"{type(error).__name__} in the file: {' '.join(str(text).split())}{mend}{line_of(error)}"


def _read_json(path: pathlib.Path) -> _ConfigFile:
    tree = read_json(path)
    _unset_derived_lr(tree)
    name = path.resolve().parent.name if path.name == "config.json" else path.stem
    return name, "", tree, dict.fromkeys(flatten(tree), "json")


def _unset_derived_lr(tree: dict[str, Any]) -> None:
    """Unsets the peak learning rate if it equals what the batch size gives, so that it follows another batch size.

    Version 0.4.0 wrote that number to config.json even where the rate was unset.
    """
    optim, data = tree.get("optim"), tree.get("data")
    if isinstance(optim, dict) and isinstance(data, dict):
        try:
            derived = linear_lr(optim["reference_lr"], data["batch_size"], optim["reference_batch_size"])
        except (KeyError, TypeError, ZeroDivisionError):
            return  # `build` reports the error
        if optim.get("peak_lr") == derived:
            optim["peak_lr"] = None


def _set(tree: dict[str, Any], override: str) -> None:
    """Writes the value of ``a.b=value`` into the nested dict. `build` refuses unknown keys later."""
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
