"""Origins of the values of a config."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, TypeAlias

import ml_collections

from mnv2_jax.config.schema import Config, flatten

Origin: TypeAlias = Literal["default", "recipe", "file", "json", "argument", "flag"]
"""default: `schema`. recipe: the recipe, as it is for the network and the batch. file: the .py file, beside its recipe.
json: a .json file, which has what a run was resolved to. argument: the text behind the config's colon. flag: a
--config.KEY of the command line."""


class Loaded(NamedTuple):
    """A config, and where it comes from."""

    name: str
    """The file's stem, with data and recipe where the argument asks for others than the file's; for a config.json the
    name of its folder."""
    config: Config
    origins: Mapping[str, Origin]
    """Origin of every key."""
    recipe: str = ""
    """Name of the recipe that values of that origin come from; "" where the file names none."""
    workdir: str = ""
    """The folder of its run where no other is asked for: runs/ and the name, or where a config.json lies."""

    @property
    def said(self) -> frozenset[str]:
        """The keys that the command line says, or a .json file: other values give way to those of weights."""
        return frozenset(key for key, origin in self.origins.items() if origin in ("argument", "flag", "json"))


class Source(NamedTuple):
    """Start of a config: recipe, variant and the values that it began with; empty by default."""

    recipe: str = ""
    variant: str = ""
    """Text that is appended to the name of the config file."""
    origins: Mapping[str, Origin] = {}
    values: Mapping[str, Any] = {}
    """Values by key, as `origins`; one that has changed since is the config file's."""

    def origins_in(self, tree: Mapping[str, Any]) -> dict[str, Origin]:
        """The origin of every key of what a config file returns."""
        same = {key for key, value in flatten(tree).items() if (key, value) in self.values.items()}
        return {key: self.origins[key] if key in same else "file" for key in flatten(tree)}


class Preset(ml_collections.ConfigDict):
    """Result of `presets.preset`: a `ConfigDict` to be changed as any other, which knows where it began."""

    source = Source()

    def begin(self, source: Source) -> None:
        """Says where it began."""
        object.__setattr__(self, "source", source)  # and not as a key
