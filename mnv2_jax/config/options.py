"""The options by their keys, as ``optim.momentum``: what `schema` says of each."""

from __future__ import annotations

import dataclasses
import operator
import typing
from collections.abc import Mapping
from typing import Any, NamedTuple

from mnv2_jax.config.rules import Condition, Rule
from mnv2_jax.config.schema import Config


class Option(NamedTuple):
    """Declaration of a key."""

    type: Any
    default: Any
    rules: tuple[Rule, ...]
    """Rules for its value, unless it is None."""
    conditions: tuple[Condition, ...]
    """With what it is read: all of these."""


def _declared(section: type, prefix: str = "") -> dict[str, Option]:
    options: dict[str, Option] = {}
    types, annotated = typing.get_type_hints(section), typing.get_type_hints(section, include_extras=True)
    for field in dataclasses.fields(section):
        key, kind = prefix + field.name, types[field.name]
        if dataclasses.is_dataclass(kind):
            options |= _declared(typing.cast(type, kind), f"{key}.")
            continue
        said = getattr(annotated[field.name], "__metadata__", ())
        rules = tuple(one for one in said if not isinstance(one, Condition))
        conditions = tuple(one for one in said if isinstance(one, Condition))
        options[key] = Option(kind, field.default, rules, conditions)
    return options


OPTIONS: Mapping[str, Option] = _declared(Config)
"""All, in their order."""


def missing(config: Config, key: str) -> list[str]:
    """With what an option would be read that the config hasn't, in words; nothing where it is read."""
    return [
        condition.words
        for condition in OPTIONS[key].conditions
        if not condition.holds(lambda other: None if missing(config, other) else operator.attrgetter(other)(config))
    ]
