"""Types of recipes, and the function `but`, which derives one from another."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

Tree: TypeAlias = dict[str, Any]
Recipe: TypeAlias = Tree | Callable[[str, float], Tree]
"""A tree of config keys, or a function from a model's name and width to such a tree."""


def but(recipe: Tree, **sections: Tree) -> Tree:
    """Returns a copy of ``recipe`` in which some keys have other values, given by section."""
    return recipe | {name: recipe.get(name, {}) | section for name, section in sections.items()}
