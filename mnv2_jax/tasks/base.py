"""The contract of a task: pure functions between batches and numbers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, Self, runtime_checkable

import numpy as np

from mnv2_jax.config import Config, DataConfig, ModelConfig, NormConfig, build
from mnv2_jax.data.images import evaluation_view
from mnv2_jax.data.sources import Dataset
from mnv2_jax.data.views.base import View
from mnv2_jax.errors import UserError
from mnv2_jax.models.base import Model
from mnv2_jax.nn.forms import Forms
from mnv2_jax.registry import TASKS, module_of
from mnv2_jax.report.page import PLAIN, Page
from mnv2_jax.types import Array, Batch, Key, PyTree, Variables
from mnv2_jax.weights.file import Weights, WeightsInfo


class Aux(NamedTuple):
    """Results of a loss besides its mean."""

    model_state: PyTree
    """The new model state."""
    metrics: dict[str, Array]
    """Further means [] to log, averaged in the same way as the loss."""
    weight: Array | None = None
    """Divisor of the mean loss, []; None: the number of rows. It weighs the losses of the parts of a batch."""


class Evaluation(NamedTuple):
    """Results on a whole split, as values that JSON can hold."""

    scalars: Mapping[str, float]
    """Numbers for the log and summary.json."""
    tables: Mapping[str, Any]
    """Tables for evaluation.json and the report."""
    examples: Sequence[Mapping[str, Any]] = ()
    """At most `MOST_EXAMPLES` interesting images, whose pictures the report shows: their "index" in the split, and
    further facts. "path" (`Split.path_of`) is added before they are written or printed."""
    skipped: Sequence[str] = ()
    """One line for each image that was left out because it can't be decoded."""
    notes: Sequence[str] = ()
    """Notes on anything that makes the numbers doubtful, one line each."""
    predictions: Mapping[str, np.ndarray] = {}
    """Columns [n] of a table of all images, by name: "index" in the split, and the answers, as text or numbers. A
    number that isn't finite means that there is no answer. {}: the task has no such table."""
    maps: Mapping[int, np.ndarray] = {}
    """Answers for the examples, by index, from which their pictures are drawn: class maps, uint8 [h, w], or boxes,
    [n, 5]."""


MOST_EXAMPLES = 24
"""Most examples of an evaluation."""


class Task(Protocol):
    """A model with its loss and metrics. Every method that takes arrays is traced, and no method keeps state."""

    @property
    def model(self) -> Model:
        """The network that is trained."""

    @property
    def score(self) -> str:
        """Name of the scalar that ranks evaluations: higher is better."""

    @property
    def train_view(self) -> View:
        """View of an example of the train split, for training."""

    @property
    def eval_view(self) -> View:
        """View of an example for evaluation and prediction."""

    @property
    def columns(self) -> Mapping[str, np.ndarray]:
        """Arrays [n, ...] over the train split. Each training batch gets the rows of its images, as float32."""

    @property
    def frozen(self) -> PyTree:
        """Arrays that the loss reads but that aren't trained, such as a teacher's variables; {} if there are none."""

    @property
    def notes(self) -> Sequence[str]:
        """Notes to print before a training, one line each."""

    def init(self, key: Key) -> Variables:
        """Initialises the variables: ``{"params": ..., "batch_stats": ...}``."""

    def training_from(self, part: str) -> Self:
        """Returns the same task, in which only this part of the network and the parts after it are trained."""

    def with_forms(self, forms: Forms) -> Self:
        """Returns the same task, in which the network computes its convolutions by these `nn.forms`."""

    def loss(self, params: PyTree, model_state: PyTree, frozen: PyTree, batch: Batch, key: Key) -> tuple[Array, Aux]:
        """Computes the training loss of a batch, in which every row counts.

        Args:
          params: the variables by which the loss is differentiated.
          model_state: the other variables, such as running statistics.
          frozen: the property `frozen`.
          batch: see `types.Batch`.
          key: random key of this step; random choices are made for each example separately.

        Returns:
          The mean loss [], and its further results.
        """

    def metrics(self, variables: Variables, batch: Batch) -> tuple[PyTree, dict[str, Array]]:
        """Computes metrics of a batch: sums over its unmasked rows, and small arrays [b, ...] with values of each row.

        Sums of batches are merged by addition, and are integers where possible.
        """

    def summarise(self, sums: PyTree, rows: Mapping[str, np.ndarray]) -> Evaluation:
        """Turns the metrics of a whole split into its results, on the host.

        Args:
          sums: the sums of `metrics`, merged over all batches.
          rows: the rows of `metrics` for all images, [n, ...] in the order of the split, and their "index", int32 [n].
        """

    def headline(self, scalars: Mapping[str, float]) -> str:
        """One line for the terminal with the main numbers of an evaluation and their names."""

    def details(self, evaluation: Evaluation) -> list[str]:
        """Lines for the terminal below the headline."""


class Answers(Protocol):
    """Turns a network's outputs into answers for people. It is built from weights alone, without a data set."""

    def decode(self, outputs: PyTree) -> PyTree:
        """Turns outputs [b, ...] into answers of fixed shapes, a pytree of [b, ...]. Pure and traced."""

    def to_json(self, answer: PyTree) -> dict[str, Any]:
        """Turns the answer for one image, whose arrays have no batch axis, into values for JSON.

        What an image can have several of is a list of dicts with equal keys; each dict with a "probability" can be left
        out where that is too low.
        """

    def to_text(self, entries: Mapping[str, Any]) -> list[str]:
        """Turns the entries of `to_json` into lines for the terminal."""


class Likeness(NamedTuple):
    """How alike the answers of two computations of one network are."""

    difference: float
    """Largest difference of an array, as a share of its largest absolute value, or of 1 if that is larger."""
    agreement: float
    """Share of the answers that are the same."""
    unsure: float
    """Share of the answers that may be others by rounding alone, such as those at the border between two classes."""


@runtime_checkable
class HasLooseOrder(Protocol):
    """`Answers` that can't be compared place by place, because rounding may exchange places, or leave one out."""

    def compare(self, expected: Mapping[str, np.ndarray], actual: Mapping[str, np.ndarray]) -> Likeness:
        """Compares decoded answers [n, ...] for the same n images."""
        ...


@runtime_checkable
class HasLoops(Protocol):
    """`Answers` whose `Answers.decode` has loops, which formats of files lack."""

    def without_loops(self) -> Answers:
        """Returns answers whose `Answers.decode` is a list of operators that compute the same."""
        ...


@runtime_checkable
class HasFiles(Protocol):
    """`Answers` that can be written to files."""

    @property
    def endings(self) -> tuple[str, ...]:
        """Endings of the names of the files for one image."""
        ...

    def files(self, image: np.ndarray, answer: PyTree, min_confidence: float) -> Mapping[str, bytes]:
        """Makes the files for one image, uint8 [h, w, 3], by their `endings`.

        What is less probable than ``min_confidence`` is left out.
        """
        ...


@runtime_checkable
class HasUsualConfidence(Protocol):
    """`Answers` of which only the more probable ones are of interest."""

    @property
    def usual_confidence(self) -> float:
        """Least probability of the answers that are given to people who ask for no other, from 0 to 1."""
        ...


class Framing(Protocol):
    """How an image is prepared for a network, and an answer is brought back to the image. It must be picklable."""

    def __call__(self, image: np.ndarray) -> np.ndarray:
        """Makes the network's input, uint8 [p, q, 3], of an image, uint8 [h, w, 3], as in evaluation."""
        ...

    def outputs(self, network: Callable[[Array], PyTree], images: Array) -> PyTree:
        """Computes the outputs for normalised inputs [b, p, q, 3] by a network, which may be called several times."""
        ...

    def restore(self, answer: PyTree, size: tuple[int, int]) -> PyTree:
        """Brings the answer for one image to the image's height and width."""
        ...


class Once:
    """The part of a `Framing` whose inputs a network sees once."""

    def outputs(self, network: Callable[[Array], PyTree], images: Array) -> PyTree:
        """Computes the outputs of the network."""
        return network(images)


@dataclasses.dataclass(frozen=True)
class Crop(Once):
    """The `Framing` of tasks whose answers have no place in the image: the crop of evaluation."""

    data: DataConfig

    def __call__(self, image: np.ndarray) -> np.ndarray:
        """Cuts the crop out of an image."""
        return evaluation_view(image, self.data)

    def restore(self, answer: PyTree, size: tuple[int, int]) -> PyTree:
        """Returns the answer as it is."""
        del size
        return answer


def _crop(weights: Weights) -> Crop:
    return Crop(build({"data": dataclasses.asdict(weights.info.preprocessing)}).data)


def _square(weights: Weights, size: tuple[int, int] | None) -> tuple[Weights, tuple[int, int]]:
    preprocessing = weights.info.preprocessing
    height, width = size or (preprocessing.resolution, preprocessing.resolution)
    if height != width:
        raise UserError(
            f"--resolution={height}x{width}: the crop of evaluation of the task {weights.info.task!r} is a square; give"
            " one number"
        )
    info = dataclasses.replace(weights.info, preprocessing=dataclasses.replace(preprocessing, resolution=height))
    return weights._replace(info=info), (height, width)


def _same_dataset(dataset: Dataset, info: WeightsInfo, num_classes: int) -> Dataset:
    del info, num_classes
    return dataset


def _accept_any_head(config: Config, weights: Weights, dataset: Dataset) -> None:
    del config, weights, dataset


def _same_weights(weights: Weights, dataset: Dataset) -> Weights:
    del dataset
    return weights


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kind:
    """Everything about a kind of task. The rest of the package uses these fields and knows no task by name."""

    name: str
    """Value of `config.Config.task` that selects this kind."""
    model: Callable[[ModelConfig, NormConfig, int], Model]
    """Builds the network from model options, norm options and the number of classes; also used without a data set."""
    make: Callable[[Config, Dataset, bool], Task]
    """Builds the task from a config and its data; the last argument says that the task is only evaluated.

    Raises `UserError` if config and data don't fit together.
    """
    answers: Callable[[Weights, int | None], Answers]
    """Builds the answers from weights and the requested most answers per image; None: the task's default number."""
    saved_as: str | None = None
    """Name of another task, if this one is a variant of it with the same answers: the weights are saved as that task's,
    and can be used without the variant's module. Unset: they are saved as this task's."""
    framing: Callable[[Weights], Framing] = _crop
    """Makes from weights what prepares an image for them."""
    at_size: Callable[[Weights, tuple[int, int] | None], tuple[Weights, tuple[int, int]]] = _square
    """Returns weights whose `framing` makes images of one height and width, and these; None: the usual ones of the
    weights. Raises `UserError` if the network or the framing can't have that size."""
    page: Page = PLAIN
    """Parts that this task adds to the report."""
    with_known_classes: Callable[[Dataset, WeightsInfo, int], Dataset] = _same_dataset
    """Adapts the data to the classes of weights with this many classes, for their evaluation. Raises `UserError` if the
    classes don't fit."""
    check_head: Callable[[Config, Weights, Dataset], None] = _accept_any_head
    """Raises `UserError` if the head of the weights can't be trained further on these data."""
    arrange_weights: Callable[[Weights, Dataset], Weights] = _same_weights
    """Puts the head of the weights into the order of the data's classes; called after `check_head`."""


def register_task(kind: Kind) -> None:
    """Registers a task under its name.

    A run of the task imports the module that defines ``kind.make`` again when it is opened. So that must be a module
    that can be imported, not a script.

    Raises:
      UserError: if the name is already registered.
    """
    TASKS.add(kind.name, kind, module_of(kind.make))


def kind_of(config: Config) -> Kind:
    """Returns the kind of task that a config names.

    Raises:
      UserError: if no module registers that name.
    """
    kind: Kind = TASKS.find(config.task, config.modules)
    return kind
