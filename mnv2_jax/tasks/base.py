"""The contract of a task: pure functions between batches and numbers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, Self

import numpy as np

from mnv2_jax.config import Config, ModelConfig, NormConfig
from mnv2_jax.data.sources import Dataset
from mnv2_jax.data.views.base import View
from mnv2_jax.models.base import Model
from mnv2_jax.nn.forms import Forms
from mnv2_jax.registry import TASKS, module_of
from mnv2_jax.report.page import PLAIN, Page
from mnv2_jax.types import Array, Batch, Key, PyTree, Variables
from mnv2_jax.weights.file import Weights, WeightsInfo


class Aux(NamedTuple):
    """Results of a loss besides its mean."""

    model_state: PyTree
    """The new one."""
    metrics: dict[str, Array]
    """Further means [] to log, over what the loss is a mean of."""
    weight: Array | None = None
    """Divisor of the mean, []; None: the number of rows. Parts of a batch are averaged by it."""


class Evaluation(NamedTuple):
    """Results on a whole split, fit for JSON."""

    scalars: Mapping[str, float]
    """For the log and summary.json."""
    tables: Mapping[str, Any]
    """For evaluation.json and the report."""
    examples: Sequence[Mapping[str, Any]] = ()
    """At most `MOST_EXAMPLES` images worth a look, whose pictures the report shows: "index" in the split, and more. In
    what is written and printed "path" comes to it (`Split.where`)."""
    skipped: Sequence[str] = ()
    """A line for each image that can't be decoded, and was left out."""
    notes: Sequence[str] = ()
    """Notes, a line each: whatever makes the numbers doubtful."""
    predictions: Mapping[str, np.ndarray] = {}
    """Columns [n] of a table of all images, by their names: "index" in the split, and what was answered. Text, or
    numbers, of which one that isn't finite stands for nothing. {}: the task has none."""


MOST_EXAMPLES = 24


class Task(Protocol):
    """A model with its loss and metrics. Every method of arrays is traced; none keeps state."""

    @property
    def model(self) -> Model:
        """The network that is trained."""

    @property
    def score(self) -> str:
        """Name of the scalar by which an evaluation is better than another: the higher the better."""

    @property
    def train_view(self) -> View:
        """View of an example of the train split."""

    @property
    def eval_view(self) -> View:
        """View of an example where nothing is trained."""

    @property
    def columns(self) -> Mapping[str, np.ndarray]:
        """Arrays [n, ...] of the images to train on, whose rows each batch of them takes along, as float32."""

    @property
    def frozen(self) -> PyTree:
        """Arrays that the loss reads and nobody trains, as a teacher's; {} where there are none."""

    @property
    def notes(self) -> Sequence[str]:
        """Notes to print before a training, a line each."""

    def init(self, key: Key) -> Variables:
        """Fresh variables: ``{"params": ..., "batch_stats": ...}``."""

    def training_from(self, part: str) -> Self:
        """The same task, of whose network only this part and what follows it are trained."""

    def with_forms(self, forms: Forms) -> Self:
        """The same task, whose network's layers are computed in these forms."""

    def loss(self, params: PyTree, model_state: PyTree, frozen: PyTree, batch: Batch, key: Key) -> tuple[Array, Aux]:
        """The training loss of a batch, every row of which counts.

        Args:
          params: what is differentiated.
          model_state: the variables that are not, as running statistics.
          frozen: as the property.
          batch: see `types.Batch`.
          key: of this step; what it decides is decided by example.

        Returns:
          The mean loss [], and the rest.
        """

    def metrics(self, variables: Variables, batch: Batch) -> tuple[PyTree, dict[str, Array]]:
        """Sums over the batch's unmasked rows, which merge by addition, integers where they can be; and of each row
        what is no sum, small arrays [b, ...].
        """

    def summarise(self, sums: PyTree, rows: Mapping[str, np.ndarray]) -> Evaluation:
        """Turns the sums over a whole split into its results, on the host.

        Args:
          sums: merged over all batches.
          rows: of all images, in the order of the split, [n, ...]; with their "index", int32 [n].
        """

    def headline(self, scalars: Mapping[str, float]) -> str:
        """Line for the terminal on an evaluation: numbers with their names."""

    def details(self, evaluation: Evaluation) -> list[str]:
        """Lines for the terminal below the headline."""


class Answers(Protocol):
    """Meaning of a network's outputs to people; made of weights alone."""

    def decode(self, outputs: PyTree) -> PyTree:
        """Answers of fixed shapes, a pytree of [b, ...], of outputs [b, ...]. Pure, and traced."""

    def to_json(self, answer: PyTree) -> dict[str, Any]:
        """The answer for one image, whose arrays have no axis of the batch, as JSON has it."""

    def to_text(self, answer: PyTree) -> list[str]:
        """The same as lines of a terminal."""


def _as_they_are(dataset: Dataset, info: WeightsInfo, num_classes: int) -> Dataset:
    del info, num_classes
    return dataset


def _fits(config: Config, weights: Weights, dataset: Dataset) -> None:
    del config, weights, dataset


def _unchanged(weights: Weights, dataset: Dataset) -> Weights:
    del dataset
    return weights


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kind:
    """Everything that `config.Config.task` names; the rest of the package asks it, and knows no task by name."""

    name: str
    model: Callable[[ModelConfig, NormConfig, int], Model]
    """From options, norms and the number of the data's classes to the network; for weights without a data set, too."""
    make: Callable[[Config, Dataset, bool], Task]
    """From a config and its data to the task; the last says whether it is for an evaluation only.

    Raises `UserError` where they don't go together.
    """
    answers: Callable[[Weights, int | None], Answers]
    """From weights, and how many answers an image at most, where that is asked for."""
    saved_as: str | None = None
    """Which task's weights those of its networks are, where it is a variant of another and answers as that does: they
    are used without its module. Unset: its own."""
    page: Page = PLAIN
    """Parts of the report that this task adds."""
    as_known: Callable[[Dataset, WeightsInfo, int], Dataset] = _as_they_are
    """The data as weights of so many classes are evaluated on them. Raises `UserError` if they can't be."""
    check_head: Callable[[Config, Weights, Dataset], None] = _fits
    """Refuses, by a `UserError`, weights whose head can't be trained on with these data."""
    arranged: Callable[[Weights, Dataset], Weights] = _unchanged
    """The same weights with their head in the order of the data's classes; after `check_head`."""


def register_task(kind: Kind) -> None:
    """Makes a task known under its name.

    The module that ``kind.make`` stands in is imported again by whoever opens a run of it, so it must be one that can
    be: not a script.

    Raises:
      UserError: if the name is taken.
    """
    TASKS.add(kind.name, kind, module_of(kind.make))


def kind_of(config: Config) -> Kind:
    """The kind that a config names.

    Raises:
      UserError: if nobody registers it.
    """
    kind: Kind = TASKS.find(config.task, config.modules)
    return kind
