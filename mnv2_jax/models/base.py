"""The protocol of a model: pure functions over plain dicts of arrays."""

from __future__ import annotations

from typing import Any, Protocol, Self

from mnv2_jax.config import ModelConfig, NormConfig
from mnv2_jax.nn.forms import Forms
from mnv2_jax.types import Key, PyTree, Variables


class Model(Protocol):
    """A network without its weights; hashable, and equal to a network that computes the same function."""

    def __hash__(self) -> int: ...

    @property
    def name(self) -> str:
        """Name of the network in a config."""

    @property
    def options(self) -> ModelConfig:
        """Options from which `tasks.base.Kind.model` makes the network, besides norms and the number of classes."""

    @property
    def norm(self) -> NormConfig:
        """Options of the network's norms."""

    @property
    def num_classes(self) -> int:
        """Number of classes of the data."""

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of the parts that have parameters, in order; the branches of a part x are named x and x_norm."""

    @property
    def head_parts(self) -> tuple[str, ...]:
        """Names of the `parts` that weights of another task lack."""

    def init(self, key: Key, x: Any) -> Variables:
        """Draws fresh variables for images [b, h, w, 3] (or their shape); the collection "params" is trained."""

    def apply(
        self, variables: Variables, x: Any, train: bool = False, dropout_keys: Key | None = None
    ) -> tuple[Any, PyTree]:
        """Computes the outputs, a pytree of [b, ...], of float images [b, h, w, 3].

        Returns them and the new state: all variables except params. ``dropout_keys`` is [b], one typed PRNG key per
        example, and is needed in training.
        """

    def training_from(self, part: str) -> Self:
        """Returns the same model with only ``part`` and the parts behind it trained."""

    def with_forms(self, forms: Forms) -> Self:
        """Returns the same function up to rounding, with its convolutions computed by these `nn.forms`."""
