"""Records where the values of a config come from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, TypeAlias

import ml_collections

from mnv2_jax.config.schema import HEAD, STRUCTURE, Config, flatten

_FROM_WEIGHTS = (*(f"model.{key}" for key in STRUCTURE if key != "width"), "norm.epsilon", "data.mean", "data.std")
_HEAD = tuple(f"model.{key}" for key in HEAD)


def from_weights(config: Config) -> tuple[str, ...]:
    """Returns the keys whose values a training takes from `init.weights`, except `Loaded.explicit_keys`.

    Those of the head are among them with ``init.head=load``. (The width must agree.)
    """
    return _FROM_WEIGHTS + (_HEAD if config.init.head == "load" else ())


Origin: TypeAlias = Literal["default", "recipe", "file", "json", "argument", "flag"]
"""Origin of a value. default: `schema`. recipe: the recipe, adapted to the network and the batch size. file: a .py
file, outside of its recipe. json: a .json file, such as the resolved config of a run. argument: the text after the
config's colon. flag: a --config.KEY of the command line."""


class Loaded(NamedTuple):
    """A config, and the origins of its values."""

    name: str
    """Name of the experiment: the stem of the file, followed by data and recipe if the argument changes them. For a
    config.json it is the name of its folder."""
    config: Config
    origins: Mapping[str, Origin]
    """Origin of every key."""
    recipe: str = ""
    """Name of the recipe that gave the values with the origin "recipe"; "" where the file names no recipe."""
    workdir: str = ""
    """Default run folder: runs/ and the name; for a config.json, its folder."""

    @property
    def explicit_keys(self) -> frozenset[str]:
        """Keys that the command line or a .json file sets. Values of other keys give way to those of the weights."""
        return frozenset(key for key, origin in self.origins.items() if origin in ("argument", "flag", "json"))

    @property
    def from_weights(self) -> frozenset[str]:
        """Keys whose values the training will take from `init.weights`."""
        if self.config.init.weights is None:
            return frozenset()
        return frozenset(from_weights(self.config)) - self.explicit_keys


class Source(NamedTuple):
    """Contribution of a preset to a config file: recipe, variant, and values with their origins. Empty by default."""

    recipe: str = ""
    variant: str = ""
    """Text that is appended to the name of the config file."""
    origins: Mapping[str, Origin] = {}
    """Origins of the values, by key."""
    values: Mapping[str, Any] = {}
    """Values by key. The config file has changed a value that is different now."""

    def origins_in(self, tree: Mapping[str, Any]) -> dict[str, Origin]:
        """Returns the origin of every key of the tree that a config file returns."""
        unchanged = {key for key, value in flatten(tree).items() if (key, value) in self.values.items()}
        return {key: self.origins[key] if key in unchanged else "file" for key in flatten(tree)}


class Preset(ml_collections.ConfigDict):
    """Result of `presets.preset`: a `ConfigDict` that a config file may change, which remembers its `Source`."""

    source = Source()

    def begin(self, source: Source) -> None:
        """Sets the source of the values."""
        object.__setattr__(self, "source", source)  # `self.source = …` would make it a key of the config
