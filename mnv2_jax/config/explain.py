"""Prints the documentation of options, which it takes from `schema`, for ``--help KEY``."""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
import typing
from collections.abc import Mapping
from typing import Any

from mnv2_jax.config import schema
from mnv2_jax.config.options import OPTIONS
from mnv2_jax.config.rules import Within
from mnv2_jax.config.synonyms import KEYS
from mnv2_jax.errors import UserError, nearest

_WIDTH = 100


def explain(word: str) -> str:
    """Writes type, default, bounds, conditions and meaning of an option, or of all options of a section.

    Args:
      word: a key such as ``optim.momentum``, a section such as ``optim``, or another library's word for a key, such as
        ``lr``.

    Raises:
      UserError: if there is no such option or section.
    """
    word = word.removeprefix("--config.").rstrip(".")
    keys = [key for key in OPTIONS if key == word or key.startswith(f"{word}.")]
    if not keys and word in KEYS:
        keys = [KEYS[word]]
    if not keys:
        sections = {key.partition(".")[0] for key in OPTIONS if "." in key}
        raise UserError(f"--help {word}: there is no such option or section{nearest(word, {*OPTIONS, *sections})}")
    return "\n\n".join(map(_describe, keys))


def _describe(key: str) -> str:
    option = OPTIONS[key]
    lines = [f"--config.{key}={option.default!r}   {_type(option.type)}"]
    has_entries = typing.get_origin(option.type) is tuple
    lines += [f"each {rule}" if has_entries and isinstance(rule, Within) else str(rule) for rule in option.rules]
    lines += [f"used only with {condition.words}" for condition in option.conditions]
    meaning = textwrap.fill(" ".join(_meanings().get(key, "").split()), _WIDTH)
    return "\n".join([lines[0], *(textwrap.indent(line, "    ") for line in (*lines[1:], meaning) if line)])


def _type(hint: Any) -> str:
    if typing.get_origin(hint) is typing.Literal:
        return " | ".join(map(str, typing.get_args(hint)))
    if typing.get_origin(hint) is typing.Union:  # of a Literal and another type
        return " | ".join(map(_type, typing.get_args(hint)))
    return hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "").replace("NoneType", "None")


@functools.cache
def _meanings() -> Mapping[str, str]:
    """Returns the docstring below each option in `schema`, by key."""
    classes = {node.name: node for node in ast.parse(inspect.getsource(schema)).body if isinstance(node, ast.ClassDef)}
    meanings: dict[str, str] = {}

    def read(name: str, prefix: str) -> None:
        body = classes[name].body
        for node, after in zip(body, [*body[1:], None], strict=True):
            if not (isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)):
                continue
            key = prefix + node.target.id
            if isinstance(node.annotation, ast.Name) and node.annotation.id in classes:
                read(node.annotation.id, f"{key}.")
            elif isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
                meanings[key] = str(after.value.value)

    read("Config", "")
    return meanings
