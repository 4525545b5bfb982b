"""Pieces that recipes are made of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

Tree: TypeAlias = dict[str, Any]
Recipe: TypeAlias = Tree | Callable[[str, float], Tree]
"""A tree of config keys, or what makes one of a model's name and width."""


def but(recipe: Tree, **sections: Tree) -> Tree:
    """``recipe`` with other values of some keys."""
    return recipe | {name: recipe.get(name, {}) | section for name, section in sections.items()}
