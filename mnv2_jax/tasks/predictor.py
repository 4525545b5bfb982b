"""A network with its preprocessing and its labels as one function from images to answers."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import math
import os
import pathlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from mnv2_jax import graph
from mnv2_jax.config import build
from mnv2_jax.data.images import DamagedImageError, damaged_images, decode, rgb
from mnv2_jax.data.shared import NumpyBatch, empty
from mnv2_jax.data.workers import in_order
from mnv2_jax.errors import UserError
from mnv2_jax.ops.augment import normalise
from mnv2_jax.processes import runtime
from mnv2_jax.registry import TASKS, import_modules
from mnv2_jax.runs.weights import load_weights
from mnv2_jax.tasks.base import Framing
from mnv2_jax.types import Array, PyTree
from mnv2_jax.weights.file import Weights

BATCHES = (1, 4, 32)
"""Sizes of batches for which the network is compiled. Images are put into the smallest batch that holds them."""

ImageLike: TypeAlias = str | os.PathLike[str] | Image.Image | np.ndarray
"""The path of an image file, a Pillow image, or uint8 [h, w, 3]."""


class Predictor:
    """Answers what a network sees in images: ``Predictor("runs/w1_0")("cat.jpg")``.

    Images are prepared as in evaluation. Norms are folded into the convolutions before them, so answers equal those of
    an evaluation up to rounding. Each size of a batch (`BATCHES`) is compiled when it is first needed.
    """

    def __init__(
        self,
        source: str | os.PathLike[str] | Weights,
        *,
        top: int | None = None,
        checkpoint: Literal["latest", "best"] | None = None,
        modules: Iterable[str] = (),
    ):
        """Opens the weights.

        Args:
          source: a run folder, a file of weights, the name of published weights, or what `load_weights` returns.
          top: largest number of answers for each image, for tasks that give several; None: the default of the task.
          checkpoint: which checkpoint of a run; None for `config.Config.usual_checkpoint`.
          modules: modules that register the task or the model of a file; a run remembers its own.

        Raises:
          UserError: if the weights can't be opened.
        """
        runtime.configure()
        import_modules(modules)
        self.weights = source if isinstance(source, Weights) else load_weights(source, checkpoint=checkpoint)
        info = self.weights.info
        self.answers = TASKS.find(info.task).answers(self.weights, top)
        """Turns outputs into answers, and answers into JSON and text."""
        self._data = build({"data": dataclasses.asdict(info.preprocessing)}).data
        self._framing = TASKS.find(info.task).framing(self.weights)
        # Whatever the size of images, the folded variables are the same.
        of_any_size = (1, self.resolution, self.resolution, 3)
        self._arrays = jax.jit(lambda held: graph.known(self._graph(held, of_any_size)))(self.weights.variables)
        self._answer = jax.jit(self._answer_batch)
        self._describe = jax.jit(
            lambda variables, images: _embedding(self.weights.model, variables, self._pixels(images))
        )

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the classes in logit order; empty if they aren't known."""
        return self.weights.info.labels

    @property
    def resolution(self) -> int:
        """Height and width of the network's input in pixels."""
        return self._data.seen_resolution

    def __call__(self, images: ImageLike | Sequence[ImageLike]) -> Any:
        """Answers for one image, or for a sequence of images.

        Args:
          images: paths, Pillow images, or uint8 arrays [h, w, 3] of any height and width.

        Returns:
          For one image the dict of `tasks.base.Answers.to_json`; for classification ``{"top": [{"index", "label",
          "probability"}, ...]}``, the most probable class first. For a sequence a list of them, in its order.

        Raises:
          UserError: if images can't be read (it names all that can't be decoded), or if outputs are NaN or infinite.
        """
        if isinstance(images, str | os.PathLike | Image.Image | np.ndarray):
            return self([images])[0]
        return list(map(self.answers.to_json, self.arrays(images)))

    def arrays(self, images: Sequence[ImageLike]) -> list[PyTree]:
        """Returns the answers for images as arrays: what `tasks.base.Answers.decode` makes, at the size of the image.

        For a segmentation each is ``{"class": uint8 [h, w]}``. The arguments and errors are those of `__call__`.
        """
        prepared, sizes = self._prepared(images)
        answers = self.decode(prepared, list(map(_name, images)))
        return [self._framing.restore(answer, size) for answer, size in zip(answers, sizes, strict=True)]

    def features(self, images: Sequence[ImageLike]) -> np.ndarray:
        """Returns the input of the classifier, float32 [n, c], for searches, clusters or a classifier of your own.

        Raises:
          UserError: as `__call__`, and for weights that have no vector for an image, such as those of a segmentation.
        """
        batches = _batches(self._prepared(images)[0])
        rows = [jax.device_get(self._describe(self.weights.variables, batch))[:count] for batch, count in batches]
        return np.concatenate(rows)

    def preprocess(self, image: ImageLike) -> np.ndarray:
        """Prepares an image as in evaluation: uint8 [p, q, 3], RGB; for a classification a square of `resolution`.

        Raises:
          UserError: if a file can't be read.
          DamagedImageError: if it can't be decoded.
        """
        return self._framing(pixels_of(image))

    def decode(self, images: Sequence[np.ndarray], names: Sequence[str]) -> Iterator[PyTree]:
        """Yields the answer for each prepared image, as `tasks.base.Answers` takes it.

        Args:
          images: prepared images, each uint8 [p, q, 3]; neighbours of one shape make a batch.
          names: names of the images in errors.

        Raises:
          UserError: if the outputs for an image are NaN or infinite.
        """
        remaining = iter(names)
        for batch, count in _batches(images):
            decoded, is_finite = jax.device_get(self._answer(self._arrays, batch))
            for row, name in zip(range(count), remaining, strict=False):
                if not is_finite[row]:
                    raise UserError(
                        f"{name}: the network's outputs are NaN or infinite; its weights are bad, give others"
                    )
                yield jax.tree.map(lambda leaf, row=row: leaf[row], decoded)

    def stream(self, paths: Sequence[str], num_workers: int = 0) -> Iterator[tuple[str, dict[str, Any] | UserError]]:
        """Yields each path with its answer, as `__call__` returns it, or with the error if it can't be read or decoded.

        Only a few batches are in memory at a time.

        Args:
          paths: paths of image files.
          num_workers: processes that decode the files; 0: this process does.

        Raises:
          UserError: if the outputs for an image are NaN or infinite.
        """
        for path, answer in self.stream_arrays(paths, num_workers):
            yield path, answer if isinstance(answer, UserError) else self.answers.to_json(answer)

    def stream_arrays(self, paths: Sequence[str], num_workers: int = 0) -> Iterator[tuple[str, Any]]:
        """Yields each path with its answer as `arrays` returns it, or with the error; see `stream`."""
        prepare = _Prepare(tuple(paths), self._framing)
        with contextlib.closing(in_order(prepare, 0, prepare.num_batches, num_workers)) as batches:
            for number, batch in enumerate(batches):
                names, failed = prepare.paths_of(number), batch["failed"].tolist()
                sound = [row for row in range(len(names)) if not failed[row]]
                answers = self.decode([batch[_key(row)] for row in sound], [names[row] for row in sound])
                for name, has_failed, (height, width) in zip(names, failed, batch["size"].tolist(), strict=True):
                    if has_failed:
                        yield name, self._error_of(name)
                    else:
                        yield name, self._framing.restore(next(answers), (height, width))

    def _error_of(self, path: str) -> UserError:
        try:
            self.preprocess(path)
        except UserError as error:
            return error
        return UserError(f"{path}: couldn't be read a moment ago, and can be read now; start again")

    def _prepared(self, images: Sequence[ImageLike]) -> tuple[list[np.ndarray], list[tuple[int, int]]]:
        """Returns the prepared images, and the sizes that they had."""
        prepared, sizes, damaged = list[np.ndarray](), list[tuple[int, int]](), list[str]()
        for image in images:
            try:
                pixels = pixels_of(image)
                prepared.append(self._framing(pixels))
                sizes.append((pixels.shape[0], pixels.shape[1]))
            except DamagedImageError as error:
                damaged.append(str(error))
        if damaged:
            raise damaged_images(damaged, f"{len(images):,} images")
        return prepared, sizes

    def _pixels(self, images: Array) -> Array:
        return normalise(images, self._data.mean, self._data.std)

    def _graph(self, variables: PyTree, shape: tuple[int, ...]) -> graph.Graph:
        spec = jax.ShapeDtypeStruct(shape, jnp.float32)
        return graph.fold(graph.trace(lambda images: self.weights.model.apply(variables, images)[0], spec))

    def _answer_batch(self, arrays: Sequence[Array], images: Array) -> tuple[PyTree, Array]:
        """Computes decoded outputs, and whether they are finite, bool [b]; ``arrays`` are the folded variables."""

        def network(images: Array) -> PyTree:
            template = graph.abstract(functools.partial(self._graph, shape=images.shape), self.weights.variables)
            return graph.run(graph.with_known(template, arrays), images)

        outputs = self._framing.outputs(network, self._pixels(images))
        finite = [jnp.isfinite(leaf.reshape(len(images), -1)).all(axis=1) for leaf in jax.tree.leaves(outputs)]
        return self.answers.decode(outputs), jnp.stack(finite).all(axis=0)


def _embedding(model: Any, variables: PyTree, pixels: Array) -> Array:
    points = model.endpoints(variables, pixels)
    if "pooled" not in points:
        raise UserError("the head of these weights makes no vector for an image; take features from a classification")
    return points["hidden"] if "hidden" in points else points["pooled"]


_BATCH_PIXELS = BATCHES[-1] * 384**2
"""Most pixels in a batch of several images."""


def _batches(images: Sequence[np.ndarray]) -> Iterator[tuple[np.ndarray, int]]:
    """Yields batches of one of the `BATCHES` sizes, filled up with zeros, and the number of images in each.

    Images of a batch follow each other and have one shape.
    """
    for shape, group in itertools.groupby(images, key=np.shape):
        most = max(size for size in BATCHES if size == 1 or size * math.prod(shape[:2]) <= _BATCH_PIXELS)
        same = list(group)
        for start in range(0, len(same), most):
            part = same[start : start + most]
            size = next(size for size in BATCHES if size >= len(part))
            yield np.stack([*part, *[np.zeros(shape, np.uint8)] * (size - len(part))]), len(part)


@dataclasses.dataclass(frozen=True)
class _Prepare:
    """The function from a batch's number to its images; picklable."""

    paths: tuple[str, ...]
    framing: Framing

    @property
    def num_batches(self) -> int:
        return -(-len(self.paths) // BATCHES[-1])

    def paths_of(self, number: int) -> tuple[str, ...]:
        return self.paths[number * BATCHES[-1] : (number + 1) * BATCHES[-1]]

    def __call__(self, number: int) -> NumpyBatch:
        paths = self.paths_of(number)
        batch = {"failed": np.zeros(len(paths), bool), "size": np.zeros((len(paths), 2), np.int32)}
        for row, path in enumerate(paths):
            try:
                pixels = pixels_of(path)
                prepared = self.framing(pixels)
                batch["size"][row] = pixels.shape[:2]
            except UserError:
                batch["failed"][row] = True
                continue
            shared = batch[_key(row)] = empty(prepared.shape)
            shared[...] = prepared
        return batch


def _key(row: int) -> str:
    return f"image_{row}"


def _name(image: ImageLike) -> str:
    return os.fspath(image) if isinstance(image, str | os.PathLike) else "an image"


def pixels_of(image: ImageLike) -> np.ndarray:
    """Reads an image, uint8 [h, w, 3].

    Raises:
      UserError: if a file can't be read.
      DamagedImageError: if it can't be decoded.
    """
    if isinstance(image, Image.Image):
        return np.asarray(rgb(image))
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
            raise UserError(f"an image is {image.dtype} {list(image.shape)}; give uint8 [height, width, 3], RGB")
        return image
    try:
        content = pathlib.Path(image).read_bytes()
    except OSError as error:
        raise UserError(f"{image}: can't be read ({error.strerror}); restore it or leave it out") from error
    return decode(content, os.fspath(image))
