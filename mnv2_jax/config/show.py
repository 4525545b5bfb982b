"""A config for people and for scripts: every value, and whose it is."""

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
"""Width of the column of values; longer values stand out."""


def as_json(loaded: Loaded) -> str:
    """One object: workdir, recipe, config (as a run's config.json), origins by key, and `Config.peak_lr`."""
    return json.dumps(
        {
            "workdir": loaded.workdir,
            "recipe": loaded.recipe or None,
            "config": to_dict(loaded.config),
            "origins": dict(loaded.origins),
            "peak_lr": loaded.config.peak_lr,
        }
    )


def as_text(loaded: Loaded) -> str:
    """A line a key, by section: a star where it isn't the default, value, origin, and with what it would be read."""
    return "\n".join(_lines(loaded))


def _lines(loaded: Loaded) -> Iterator[str]:
    config, long = loaded.config, max(len(key.rpartition(".")[2]) for key in OPTIONS)
    yield f"{loaded.workdir}{f', recipe {loaded.recipe}' if loaded.recipe else ''}; * isn't the default"
    for section, keys in itertools.groupby(OPTIONS, key=lambda key: key.rpartition(".")[0]):
        yield f"\n{section}" if section else ""
        for key in keys:
            value, name = operator.attrgetter(key)(config), key.removeprefix(f"{section}.")
            said = f"None: {config.peak_lr:g}" if key == "optim.peak_lr" and value is None else _word(value)
            star = " " if value == OPTIONS[key].default else "*"
            idle = f"  only with {' and with '.join(wanted)}" if (wanted := missing(config, key)) else ""
            yield f"{star} {name:<{long}}  {said:<{_WIDTH}}  {loaded.origins[key]:<7}{idle}".rstrip()


def _word(value: Any) -> str:
    """Value as the command line takes it."""
    return f"({', '.join(map(str, value))})" if isinstance(value, tuple) else str(value)
