"""Annotations of an option's type: the values that it can have, and the conditions under which it is used.

    momentum: Annotated[float, Within(0, 0.99999), read_when("optim.name", "sgd", "rmsprop")] = 0.9

Bounds hold for a number, and for every entry of a tuple. If there are several conditions, all must hold; of ``a | b``
one is enough.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import Any, TypeAlias

_LARGEST_INT = 2**31 - 1
"""Largest integer that an option can have, as arrays of integers have 32 bits."""


# --- values -------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Within:
    """Allows numbers from `low` to `high`, both included."""

    low: float
    high: float

    def __contains__(self, number: float) -> bool:
        return self.low <= number <= (min(self.high, _LARGEST_INT) if isinstance(number, int) else self.high)

    def __str__(self) -> str:
        return f"at least {self.low:g}{self._at_most()}"

    def _at_most(self) -> str:
        return "" if self.high == math.inf else f" and at most {self.high:g}"

    def fault(self, value: Any) -> str:
        """Says in words how the value of an option breaks this rule; "" if it doesn't."""
        entries = value if isinstance(value, tuple) else (value,)
        if all(number in self for number in entries):
            return ""
        return f"is out of range; {'each' if isinstance(value, tuple) else 'it'} must be {self}"


@dataclasses.dataclass(frozen=True)
class AtLeast(Within):
    """Allows numbers of at least `low`."""

    high: float = math.inf


@dataclasses.dataclass(frozen=True)
class Above(Within):
    """Allows numbers greater than `low`, and at most `high`."""

    high: float = math.inf

    def __contains__(self, number: float) -> bool:
        return number > self.low and super().__contains__(number)

    def __str__(self) -> str:
        return f"above {self.low:g}{self._at_most()}"


@dataclasses.dataclass(frozen=True)
class Growing:
    """Requires that every entry of a tuple is greater than the one before; with `loosely`, at least as great."""

    loosely: bool = False

    def __str__(self) -> str:
        return "growing from entry to entry"

    def fault(self, value: Any) -> str:
        """Says in words how the value of an option breaks this rule; "" if it doesn't."""
        grows = all(a < b or (self.loosely and a == b) for a, b in itertools.pairwise(value))
        return "" if grows else "must grow from entry to entry"


@dataclasses.dataclass(frozen=True)
class Ending:
    """Matches names that end with a suffix."""

    suffix: str

    def __contains__(self, name: str) -> bool:
        return name.endswith(self.suffix)

    def __str__(self) -> str:
        return f"…{self.suffix}"


Rule: TypeAlias = Within | Growing


# --- conditions ---------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Condition:
    """A condition on other options, under which an option is used."""

    words: str
    """The condition in words, such as "optim.name=sgd or rmsprop"."""
    holds: Callable[[Callable[[str], Any]], bool]
    """Tells whether the condition holds. Its argument is a function from the key of another option to its value, which
    is None if that option is unset or isn't used itself."""
    compared: tuple[tuple[str, Any], ...]
    """The keys of other options, each with the value that it is compared with."""

    def __or__(self, other: Condition) -> Condition:
        return Condition(
            f"{self.words} or {other.words}",
            lambda value_of: self.holds(value_of) or other.holds(value_of),
            self.compared + other.compared,
        )


def read_when(key: str, *values: Any) -> Condition:
    """Makes the condition that another option has one of these values, or lies in one of these `Within` or `Ending`.

    The value None stands for an option that is unset.
    """
    words = _words(values)
    return Condition(
        f"{key} {words}" if isinstance(values[0], Within) else f"{key}={words}",
        lambda value_of: _matches_one(value_of(key), values),
        tuple((key, value) for value in values),
    )


def read_unless(key: str, *values: Any) -> Condition:
    """Makes the opposite condition of `read_when`; with the value None it is that the other option is set."""
    opposite = read_when(key, *values)
    return Condition(
        f"{key} set" if values == (None,) else f"{key} other than {_words(values)}",
        lambda value_of: not opposite.holds(value_of),
        opposite.compared,
    )


def _matches_one(actual: Any, values: tuple[Any, ...]) -> bool:
    return any(
        actual is not None and actual in value if isinstance(value, Within | Ending) else actual == value
        for value in values
    )


def _words(values: tuple[Any, ...]) -> str:
    *first, last = (",".join(value) if isinstance(value, tuple) else str(value) for value in values)
    return f"{', '.join(first)} or {last}" if first else last
