"""Declarations of all options by key, such as ``optim.momentum``, collected from `schema`."""

from __future__ import annotations

import dataclasses
import operator
import typing
from collections.abc import Mapping
from typing import Any, NamedTuple

from mnv2_jax.config.rules import Condition, Rule
from mnv2_jax.config.schema import Config


class Option(NamedTuple):
    """Declaration of an option."""

    type: Any
    default: Any
    rules: tuple[Rule, ...]
    """Rules that its value must keep, unless that is None."""
    conditions: tuple[Condition, ...]
    """Conditions under which the option is used. All of them must hold."""


def _declared(section: type, prefix: str = "") -> dict[str, Option]:
    options: dict[str, Option] = {}
    types, annotated = typing.get_type_hints(section), typing.get_type_hints(section, include_extras=True)
    for field in dataclasses.fields(section):
        key, kind = prefix + field.name, types[field.name]
        if dataclasses.is_dataclass(kind):
            options |= _declared(typing.cast(type, kind), f"{key}.")
            continue
        annotations = getattr(annotated[field.name], "__metadata__", ())
        rules = tuple(rule for rule in annotations if not isinstance(rule, Condition))
        conditions = tuple(condition for condition in annotations if isinstance(condition, Condition))
        options[key] = Option(kind, field.default, rules, conditions)
    return options


OPTIONS: Mapping[str, Option] = _declared(Config)
"""All options, in the order of `schema`."""


def missing(config: Config, key: str) -> list[str]:
    """Returns the conditions, in words, that keep a config from using an option; empty if the option is used."""
    return [
        condition.words
        for condition in OPTIONS[key].conditions
        if not condition.holds(lambda other: None if missing(config, other) else operator.attrgetter(other)(config))
    ]
