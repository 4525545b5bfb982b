"""The function that every exported file computes: from images to outputs, in float32."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from mnv2_jax import graph as graphs
from mnv2_jax.errors import UserError
from mnv2_jax.export.idioms import recognise
from mnv2_jax.nn.forms import LIBRARY, Forms
from mnv2_jax.ops.augment import normalise
from mnv2_jax.registry import TASKS
from mnv2_jax.tasks.base import Answers, HasLoops
from mnv2_jax.tasks.predictor import ImageLike, pixels_of
from mnv2_jax.types import Array, PyTree
from mnv2_jax.weights.file import Weights

Pixels: TypeAlias = Literal["uint8", "float32"]
Outputs: TypeAlias = Literal["raw", "answers"]
Storage: TypeAlias = Literal["float32", "float16", "dynamic"]
"""How the weights of a function in floats are stored: as they are, in half precision, or kernels in 8 bits."""
LOGITS = "logits"
"""Name of the output of a network that returns an array, and of classes' logits among several outputs."""
INPUT = "images"
"""Name of the input in every format."""


class Exportable(NamedTuple):
    """What is exported of weights, besides the format."""

    weights: Weights
    size: tuple[int, int]
    """Height and width of the images, which are those of the framing of the weights; see `tasks.base.Kind.at_size`."""
    pixels: Pixels
    """Type of the input, [b, h, w, 3], RGB: uint8 in 0..255, or float32 in 0..1."""
    outputs: Outputs
    """raw: the network's outputs, such as logits. answers: those of `tasks.base.Answers.decode`, as top classes."""

    @property
    def answers(self) -> Answers | None:
        """What makes answers of the network's outputs; None: those are exported."""
        return None if self.outputs == "raw" else TASKS.find(self.weights.info.task).answers(self.weights, None)

    @property
    def variables(self) -> PyTree:
        """Variables of the network."""
        return self.weights.variables

    def spec(self, batch: Any = 1) -> jax.ShapeDtypeStruct:
        """Returns the shape and type of the input."""
        return jax.ShapeDtypeStruct((batch, *self.size, 3), jnp.dtype(self.pixels))

    def prepared(self, image: ImageLike) -> np.ndarray:
        """Prepares an image as in evaluation: uint8 [h, w, 3].

        Raises:
          UserError: if a file can't be read.
          DamagedImageError: if it can't be decoded.
        """
        return TASKS.find(self.weights.info.task).framing(self.weights)(pixels_of(image))

    def to_input(self, images: np.ndarray) -> np.ndarray:
        """Turns images, uint8 [n, h, w, 3], into the input."""
        return images if self.pixels == "uint8" else (images / np.float32(255)).astype(np.float32)

    def apply(
        self, variables: PyTree, images: Array, forms: Forms = LIBRARY, has_loops: bool = True
    ) -> dict[str, Array]:
        """Computes the outputs by their names.

        By default a convolution is XLA's operator, which other formats have too, and not the CPU's fast form, which is
        many operators. Without loops answers are those of `tasks.base.HasLoops.without_loops`.
        """
        info, model = self.weights.info, self.weights.model.with_forms(forms)
        raw, _ = model.apply(variables, normalise(images, info.preprocessing.mean, info.preprocessing.std))
        answers = self.answers
        if not has_loops and isinstance(answers, HasLoops):
            answers = answers.without_loops()
        decoded = raw if answers is None else answers.decode(raw)
        return decoded if isinstance(decoded, dict) else {LOGITS: decoded}

    def restored(self, outputs: dict[str, Array]) -> PyTree:
        """Turns raw outputs by their names into what the network returns, an array or a dict."""
        spec = jax.ShapeDtypeStruct(self.spec().shape, jnp.float32)
        returned, _ = jax.eval_shape(self.weights.model.apply, self.variables, spec)
        return outputs if isinstance(returned, dict) else outputs[LOGITS]

    def graph(self) -> graphs.Graph:
        """Traces the function at batch 1, with norms folded and idioms recognised; the known values are arrays."""
        template = graphs.abstract(self._folded, self.variables)
        arrays = jax.jit(lambda held: graphs.known(self._folded(held)))(self.variables)
        return recognise(graphs.with_known(template, jax.device_get(arrays)))

    def _folded(self, variables: PyTree) -> graphs.Graph:
        return graphs.fold(graphs.trace(lambda images: self.apply(variables, images, has_loops=False), self.spec()))

    def facts(self) -> Mapping[str, str]:
        """Texts that are stored in or beside a file: labels, preprocessing, source, and what the input is."""
        info = self.weights.info
        return {
            "labels": json.dumps(info.labels),
            "preprocessing": json.dumps(dataclasses.asdict(info.preprocessing)),
            "input": json.dumps({"name": INPUT, "layout": "NHWC", "channels": "RGB", "range": _RANGES[self.pixels]}),
            "task": info.task,
            "source": info.source,
            "notes": json.dumps(info.notes),
        }


_RANGES = {"uint8": [0, 255], "float32": [0.0, 1.0]}


def check_finite(weights: Weights) -> None:
    """Raises a `UserError` that names an array of the weights, if one holds NaN or infinity."""
    for path, array in jax.tree_util.tree_leaves_with_path(weights.variables):
        if not np.isfinite(array).all():
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            raise UserError(f"{name} of these weights holds NaN or infinity; give others")


def in_float32(weights: Weights) -> Weights:
    """Returns the weights with a network that computes in float32."""
    kind = TASKS.find(weights.info.task)
    options = dataclasses.replace(weights.model.options, dtype="float32")
    return weights._replace(model=kind.model(options, weights.model.norm, weights.model.num_classes))
