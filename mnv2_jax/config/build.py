"""Builds a `Config` from a nested mapping, and checks that keys are declared and values have their type and range."""

from __future__ import annotations

import ast
import dataclasses
import math
import re
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal

from mnv2_jax.config.checks import check
from mnv2_jax.config.options import OPTIONS
from mnv2_jax.config.schema import GONE, Config
from mnv2_jax.config.synonyms import synonym_of
from mnv2_jax.errors import UserError, nearest


def build(tree: Mapping[str, Any]) -> Config:
    """Turns a nested mapping into a checked `Config`.

    Raises:
      UserError: naming the key, for an unknown key, a wrong type or an impossible value.
    """
    config: Config = _build(Config, tree, "")
    check(config)
    return config


def from_text(key: str, text: str) -> Any:
    """Parses the value of a key such as ``data.path`` from the command line.

    Names and paths are taken as they are, whatever they look like. Several names are written in brackets, with commas
    between them, and numbers by name in braces (``{cat: 3, dog: 0.5}``). Other values are Python literals. None unsets
    an optional key; so does none, unless the key holds a name.

    Raises:
      UserError: if the text is a mapping but the key holds none, or if it isn't a mapping of numbers where one belongs.
    """
    hint = OPTIONS[key].type if key in OPTIONS else None
    kinds = typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else (hint,)
    if text == "None" and type(None) in kinds:
        return None
    if str in kinds:
        return text
    if typing.get_origin(hint) is tuple and typing.get_args(hint)[0] is str:
        return _parse_names(text)
    if _NUMBERS_BY_NAME in kinds and re.search("[{:=]", text):
        return _parse_numbers_by_name(key, text.strip())
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):  # the last two if it is nested too deeply
        return {"true": True, "false": False}.get(text.lower(), text)
    if isinstance(value, dict):
        raise UserError(f"--config.{key}: {key!r} is a section; set one of its keys")
    return value


_NUMBERS_BY_NAME = tuple[tuple[str, float], ...]
"""Declared type of numbers by name, which a config file writes as a mapping."""


def _parse_numbers_by_name(key: str, text: str) -> list[tuple[str, Any]]:
    """Parses ``{cat: 3, 'a, b': 0.5}`` into pairs of a name and a number."""
    pair = re.compile(r"""\s*(?:'([^']*)'|"([^"]*)"|([^,]*?))\s*:\s*([-+.\w]+)\s*(?:,|$)""")
    inner, start, pairs = text.removeprefix("{").removesuffix("}"), 0, []
    while inner[start:].strip():
        match = pair.match(inner, start)
        try:
            name, number = (match[1] or match[2] or match[3], float(match[4])) if match else ("", math.nan)
        except ValueError:
            name, number = "", math.nan
        if match is None or not name or math.isnan(number):
            raise UserError(f"--config.{key}={text}: write numbers by name as in {{cat: 3, dog: 0.5}}")
        pairs.append((name, number))
        start = match.end()
    return pairs


def _parse_names(text: str) -> list[str]:
    """Parses ``(a, 'b')``, ``[a, b]`` or ``a`` into strings."""
    inner = text.strip()
    if inner[:1] + inner[-1:] not in ("()", "[]"):
        return [text]
    items = (item.strip() for item in inner[1:-1].split(","))
    return [item[1:-1] if item[:1] == item[-1:] and item[:1] in ("'", '"') else item for item in items if item]


def _build(cls: type, tree: Any, prefix: str) -> Any:
    if not isinstance(tree, Mapping):
        raise UserError(f"config key {prefix[:-1]!r} is a section, not a value ({tree!r}); set one of its keys")
    hints = typing.get_type_hints(cls)
    values = {}
    for key, value in tree.items():
        if prefix + key in GONE:
            if value == GONE[prefix + key]:
                continue
            raise UserError(f"{prefix + key}={value!r}: this option no longer exists; leave it out")
        if key not in hints:
            raise UserError(f"unknown config key {prefix + key!r}{_suggest(prefix + key)}")
        hint = hints[key]
        is_section = dataclasses.is_dataclass(hint)
        values[key] = _build(hint, value, f"{prefix}{key}.") if is_section else _check_type(prefix + key, value, hint)
    return cls(**values)


def _suggest(key: str) -> str:
    """Writes the hint for an unknown key: our key for another library's word, or else the nearest declared key.

    A key of the same section that is close comes before keys of other sections.
    """
    if (synonym := synonym_of(key.rpartition(".")[2])) is not None:
        return f"; did you mean {synonym.removeprefix('--config.')!r}?"
    section = key.rpartition(".")[0]
    siblings = {k for k in OPTIONS if k.rpartition(".")[0] == section}
    hint = nearest(key, siblings) if siblings else ""
    return hint if "did you mean" in hint else nearest(key, OPTIONS)


def _check_type(key: str, value: Any, hint: Any) -> Any:
    """Checks that a value has the declared type. Converts int to float, a whole float to int, and lists to tuples.

    Raises:
      UserError: if the value has another type.
    """
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        if _NUMBERS_BY_NAME in arguments:
            is_numbers = isinstance(value, Mapping | list | tuple)
            return _check_type(key, value, _NUMBERS_BY_NAME if is_numbers else arguments[0])
        kind = next(a for a in arguments if a is not type(None))
        if value is None or (kind is not str and value in ("none", "null")):  # words that a command line may have
            return None
        return _check_type(key, value, kind)
    if hint == _NUMBERS_BY_NAME and isinstance(value, Mapping):
        value = tuple((str(name) if type(name) is int else name, number) for name, number in value.items())
    if origin is Literal:
        if value not in arguments or isinstance(value, bool):
            raise UserError(f"{key}={value!r} is not a choice{nearest(str(value), map(str, arguments))}")
        return value
    if origin is tuple and arguments[-1] is ... and isinstance(value, str | int | float):  # a single entry
        value = (value,)
    if origin is tuple and isinstance(value, list | tuple):
        kinds = [arguments[0]] * len(value) if arguments[-1] is ... else list(arguments)
        if len(kinds) != len(value):
            raise UserError(f"{key}={value!r} has {len(value)} entries; expected {len(kinds)}")
        return tuple(_check_type(key, item, kind) for item, kind in zip(value, kinds, strict=True))
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if hint is int and isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, hint if origin is None else origin) or (isinstance(value, bool) and hint is not bool):
        expected = getattr(hint, "__name__", str(hint)) if origin is None else "a tuple"
        raise UserError(f"{key}={value!r} is {type(value).__name__}; expected {expected}")
    if hint is float and not math.isfinite(value):
        raise UserError(f"{key}={value!r} is not finite; give a finite number")
    return value
