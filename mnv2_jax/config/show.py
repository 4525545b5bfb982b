"""Prints a config as text or JSON, with every value and its origin."""

from __future__ import annotations

import itertools
import json
import operator
from collections.abc import Iterator
from typing import Any

from mnv2_jax.config.options import OPTIONS, missing
from mnv2_jax.config.origins import Loaded
from mnv2_jax.config.schema import to_dict

_WIDTH = 26
"""Width of the column of values; longer values push the rest of their line to the right."""


def as_json(loaded: Loaded) -> str:
    """Writes a JSON object with workdir, recipe, config (as in config.json), origins by key, and `Config.peak_lr`.

    The origin "weights" stands for values that a training will replace by those of `init.weights`.
    """
    return json.dumps(
        {
            "workdir": loaded.workdir,
            "recipe": loaded.recipe or None,
            "config": to_dict(loaded.config),
            "origins": {**loaded.origins, **dict.fromkeys(loaded.from_weights, "weights")},
            "peak_lr": loaded.config.peak_lr,
        }
    )


def as_text(loaded: Loaded) -> str:
    """Writes a line for each key, by section: a star unless the value is the default, then the value and its origin.

    The line of an unused option ends with the condition under which it would be used.
    """
    return "\n".join(_lines(loaded))


def _lines(loaded: Loaded) -> Iterator[str]:
    config, width = loaded.config, max(len(key.rpartition(".")[2]) for key in OPTIONS)
    yield f"{loaded.workdir}{f', recipe {loaded.recipe}' if loaded.recipe else ''}; * marks changes of the default"
    for section, keys in itertools.groupby(OPTIONS, key=lambda key: key.rpartition(".")[0]):
        yield f"\n{section}" if section else ""
        for key in keys:
            value, name = operator.attrgetter(key)(config), key.removeprefix(f"{section}.")
            text = f"None: {config.peak_lr:g}" if key == "optim.peak_lr" and value is None else _as_flag(value)
            text = "as in init.weights" if key in loaded.from_weights else text
            star = " " if value == OPTIONS[key].default else "*"
            unused = f"  only with {' and with '.join(conditions)}" if (conditions := missing(config, key)) else ""
            yield f"{star} {name:<{width}}  {text:<{_WIDTH}}  {loaded.origins[key]:<7}{unused}".rstrip()


def _as_flag(value: Any) -> str:
    """Writes a value as the command line takes it."""
    return f"({', '.join(map(str, value))})" if isinstance(value, tuple) else str(value)
