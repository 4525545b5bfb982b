"""The protocol of a model: pure functions over plain dicts of arrays."""

from __future__ import annotations

from typing import Any, Protocol, Self

from mnv2_jax.config import ModelConfig, NormConfig
from mnv2_jax.nn.forms import Forms
from mnv2_jax.types import Key, PyTree, Variables


class Model(Protocol):
    """A network without its weights; hashable, and equal where it computes the same."""

    def __hash__(self) -> int: ...

    @property
    def name(self) -> str:
        """Name of the network in a config."""

    @property
    def options(self) -> ModelConfig:
        """Options from which `tasks.base.Kind.model` makes it, besides norms and the number of classes."""

    @property
    def norm(self) -> NormConfig:
        """Options of its norms."""

    @property
    def num_classes(self) -> int:
        """Classes of the data."""

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of the parts that have parameters, in order; the branches of a part x are named x and x_norm."""

    @property
    def head_parts(self) -> tuple[str, ...]:
        """Those of `parts` that weights of another task lack."""

    def init(self, key: Key, x: Any) -> Variables:
        """Fresh variables, of which "params" are trained, for images [b, h, w, 3] (or their shape)."""

    def apply(
        self, variables: Variables, x: Any, train: bool = False, dropout_keys: Key | None = None
    ) -> tuple[Any, PyTree]:
        """Outputs, a pytree of [b, ...], of float images [b, h, w, 3]; and the new state: all variables but params.

        ``dropout_keys`` is [b], one typed PRNG key an example; given in training.
        """

    def training_from(self, part: str) -> Self:
        """The same model, of whose parts only this one and those behind it are trained."""

    def with_forms(self, forms: Forms) -> Self:
        """The same model, its layers computed in these forms: the same function up to rounding."""
