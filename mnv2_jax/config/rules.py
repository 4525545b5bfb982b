"""Rules beside an option's type: the values that it can have, and the options with which it is read.

    momentum: Annotated[float, Within(0, 0.99999), read_when("optim.name", "sgd", "rmsprop")] = 0.9

Bounds hold for a number, and for every entry of a tuple. Of several conditions all must hold, of ``a | b`` one.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import Any, TypeAlias

_LARGEST_INT = 2**31 - 1
"""Arrays of integers have 32 bits."""


# --- values -------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Within:
    """Numbers from `low` to `high`, both included."""

    low: float
    high: float

    def __contains__(self, number: float) -> bool:
        return self.low <= number <= (min(self.high, _LARGEST_INT) if isinstance(number, int) else self.high)

    def __str__(self) -> str:
        return f"at least {self.low:g}{self._at_most()}"

    def _at_most(self) -> str:
        return "" if self.high == math.inf else f" and at most {self.high:g}"

    def fault(self, value: Any) -> str:
        """Fault of the value of an option; "" where there is none."""
        entries = value if isinstance(value, tuple) else (value,)
        if all(number in self for number in entries):
            return ""
        return f"is out of range; {'each' if isinstance(value, tuple) else 'it'} must be {self}"


@dataclasses.dataclass(frozen=True)
class AtLeast(Within):
    """Numbers from `low` on."""

    high: float = math.inf


@dataclasses.dataclass(frozen=True)
class Above(Within):
    """Numbers greater than `low`, and at most `high`."""

    high: float = math.inf

    def __contains__(self, number: float) -> bool:
        return number > self.low and super().__contains__(number)

    def __str__(self) -> str:
        return f"above {self.low:g}{self._at_most()}"


@dataclasses.dataclass(frozen=True)
class Growing:
    """Every entry of a tuple is greater than the one before; or, `loosely`, not less."""

    loosely: bool = False

    def __str__(self) -> str:
        return "growing from entry to entry"

    def fault(self, value: Any) -> str:
        """Fault of the value of an option; "" where there is none."""
        grows = all(a < b or (self.loosely and a == b) for a, b in itertools.pairwise(value))
        return "" if grows else "must grow from entry to entry"


@dataclasses.dataclass(frozen=True)
class Ending:
    """Names that end so."""

    suffix: str

    def __contains__(self, name: str) -> bool:
        return name.endswith(self.suffix)

    def __str__(self) -> str:
        return f"…{self.suffix}"


Rule: TypeAlias = Within | Growing


# --- conditions ---------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Condition:
    """With what an option is read."""

    words: str
    holds: Callable[[Callable[[str], Any]], bool]
    """Given what finds the value of another option by its key: None of one that is unset, or isn't read itself."""
    compared: tuple[tuple[str, Any], ...]
    """The keys, each with what its value is compared with."""

    def __or__(self, other: Condition) -> Condition:
        return Condition(
            f"{self.words} or {other.words}",
            lambda value_of: self.holds(value_of) or other.holds(value_of),
            self.compared + other.compared,
        )


def read_when(key: str, *values: Any) -> Condition:
    """Read where another option is one of these values, or in one of these `Within` or `Ending`; None: unset."""
    said = _words(values)
    return Condition(
        f"{key} {said}" if isinstance(values[0], Within) else f"{key}={said}",
        lambda value_of: _is_one(value_of(key), values),
        tuple((key, value) for value in values),
    )


def read_unless(key: str, *values: Any) -> Condition:
    """Read where another option is none of these values, and in none of these `Within` or `Ending`; None: set."""
    opposite = read_when(key, *values)
    return Condition(
        f"{key} set" if values == (None,) else f"{key} other than {_words(values)}",
        lambda value_of: not opposite.holds(value_of),
        opposite.compared,
    )


def _is_one(found: Any, values: tuple[Any, ...]) -> bool:
    return any(
        found is not None and found in value if isinstance(value, Within | Ending) else found == value
        for value in values
    )


def _words(values: tuple[Any, ...]) -> str:
    *most, last = (",".join(value) if isinstance(value, tuple) else str(value) for value in values)
    return f"{', '.join(most)} or {last}" if most else last
