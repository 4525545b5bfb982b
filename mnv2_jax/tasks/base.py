"""What a task is: pure functions between batches and numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, Self

from mnv2_jax.types import Array, Batch, Key, PyTree, Variables


class Task(Protocol):
    """A model with its loss and metrics. Every method but `summarise` is traced; none keeps state."""

    def init(self, key: Key) -> Variables:
        """Fresh variables: ``{"params": ..., "batch_stats": ...}``."""

    def training_from(self, part: str) -> Self:
        """The same task, of whose network only this part and what follows it are trained."""

    def loss(
        self, params: PyTree, model_state: PyTree, batch: Batch, key: Key
    ) -> tuple[Array, tuple[PyTree, dict[str, Array]]]:
        """The training loss of a batch, every row of which counts.

        Args:
          params: what is differentiated.
          model_state: the variables that are not, as running statistics.
          batch: uint8 images and labels, see `types.Batch`.
          key: of this step; what it decides is decided by example.

        Returns:
          The mean loss [], the new model state, and further means [] to log.
        """

    def metrics(self, variables: Variables, batch: Batch) -> tuple[PyTree, dict[str, Array]]:
        """Sums over the batch's unmasked rows, which merge by addition; and of each row [b] what was said of it:
        prediction (`ops.metrics.NO_ANSWER` where there is none), its confidence, and the loss.
        """

    def summarise(self, sums: PyTree) -> Mapping[str, Any]:
        """What the merged sums come to, on the host and fit for JSON."""
