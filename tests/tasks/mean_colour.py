"""A task other than classification in one file: the mean colour of an image and of each of its 4×4 parts.

    config.task = "mean_colour"

Its target is a map, its model isn't from the package, and its loss is a mean over the parts that aren't black.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from mnv2_jax.config import Config, DataConfig, ModelConfig, NormConfig
from mnv2_jax.data.images import evaluation_view
from mnv2_jax.data.views.base import Array
from mnv2_jax.ops.augment import normalise
from mnv2_jax.report.page import Page
from mnv2_jax.tasks.base import Aux, Evaluation, Kind, register_task

PARTS = 4
DARK = 0.05


@dataclasses.dataclass(frozen=True)
class Colours:
    """A `View`: image, and the mean colours of its parts, 0 to 1; flipped at random in training."""

    data: DataConfig
    varies: bool

    @property
    def spec(self):
        size = self.data.resolution
        return {"image": Array((size, size, 3), np.uint8), "colours": Array((PARTS, PARTS, 3), np.float32)}

    def at(self, resolution):
        return dataclasses.replace(self, data=dataclasses.replace(self.data, resolution=resolution))

    def __call__(self, example, draw):
        size = self.data.resolution
        image = np.asarray(evaluation_view(example["image"], self.data, size))
        if draw is not None and np.random.default_rng(draw).random() < 0.5:
            image = image[:, ::-1]
        parts = image.reshape(PARTS, size // PARTS, PARTS, size // PARTS, 3)
        return {"image": image, "colours": parts.mean((1, 3), dtype=np.float32) / 255}


@dataclasses.dataclass(frozen=True)
class Model:
    """A `Model` of one convolution and one linear layer per part, without state."""

    options: ModelConfig
    norm: NormConfig
    num_classes: int
    train_from: str = "stem"
    name = "mean_colour"
    parts = ("stem", "colours")
    head_parts = ("colours",)

    def init(self, key, x):
        one, other = jax.random.split(key)
        dtype = jnp.dtype(self.options.dtype) if self.options.dtype == "float64" else jnp.float32
        stem = jax.random.normal(one, (3, 3, x.shape[-1], 8), dtype) / 5
        return {
            "params": {"stem": {"kernel": stem}, "colours": {"kernel": jax.random.normal(other, (8, 3), dtype) / 3}}
        }

    def apply(self, variables, x, train=False, dropout_keys=None):
        del dropout_keys
        params = variables["params"]
        stem = params["stem"]["kernel"]
        if train and self.train_from != "stem":
            stem = jax.lax.stop_gradient(stem)
        x = jax.lax.conv_general_dilated(
            jnp.asarray(x, stem.dtype), stem, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        b, h, w, c = x.shape
        parts = jax.nn.relu(x).reshape(b, PARTS, h // PARTS, PARTS, w // PARTS, c).mean((2, 4))
        colours = parts @ params["colours"]["kernel"]
        return {"mean": colours.mean((1, 2)), "parts": colours}, {}

    def training_from(self, part):
        return dataclasses.replace(self, train_from=part)

    def with_forms(self, forms):
        del forms  # it has no layer that comes in several
        return self


@dataclasses.dataclass(frozen=True)
class MeanColour:
    """The `Task` of mean colours."""

    model: Model
    data: DataConfig
    score = "closeness"
    columns = property(lambda self: {})
    frozen = property(lambda self: {})
    notes = ("colours are learnt",)
    train_view = property(lambda self: Colours(self.data, varies=True))
    eval_view = property(lambda self: Colours(dataclasses.replace(self.data), varies=False))

    def init(self, key):
        return self.model.init(key, jax.ShapeDtypeStruct((1, 8, 8, 3), jnp.float32))

    def training_from(self, part):
        return dataclasses.replace(self, model=self.model.training_from(part))

    def with_forms(self, forms):
        return dataclasses.replace(self, model=self.model.with_forms(forms))

    def _errors(self, variables, batch, train):
        """Squared error of each part [b, 4, 4], whether it counts, and the new state."""
        images = normalise(batch["image"], self.data.mean, self.data.std)
        outputs, state = self.model.apply(variables, images, train=train)
        colours = batch["colours"]
        return ((outputs["parts"] - colours) ** 2).mean(-1), colours.mean(-1) > DARK, state

    def loss(self, params, model_state, frozen, batch, key):
        del frozen, key
        errors, counts, state = self._errors({"params": params, **model_state}, batch, True)
        weight = counts.sum().astype(errors.dtype)
        mean = jnp.where(counts, errors, 0).sum() / weight
        return mean, Aux(state, {"loss": mean}, weight)

    def metrics(self, variables, batch):
        errors, counts, _ = self._errors(variables, batch, False)
        counts &= batch["mask"][:, None, None]
        sums = {"error": jnp.where(counts, errors, 0).sum(), "count": counts.sum(dtype=jnp.int32)}
        return sums, {"error": errors.mean((1, 2))}

    def summarise(self, sums, rows):
        loss, worst = float(sums["error"]) / int(sums["count"]), np.argsort(-rows["error"], kind="stable")[:3]
        examples = [{"index": int(rows["index"][row]), "error": float(rows["error"][row])} for row in worst]
        scalars = {"loss": loss, "closeness": 1 - loss**0.5, "parts": int(sums["count"])}
        return Evaluation(scalars, {"images": len(rows["error"])}, examples)

    def headline(self, scalars):
        return f"closeness {scalars['closeness']:.3f}"

    def details(self, evaluation):
        return [f"worst: image {example['index']}" for example in evaluation.examples]


@dataclasses.dataclass(frozen=True)
class Answer:
    """The `Answers` of the task: a colour."""

    def decode(self, outputs):
        return {"rgb": jnp.clip(jnp.round(255 * outputs["mean"]), 0, 255).astype(jnp.int32)}

    def to_json(self, answer):
        return {"rgb": answer["rgb"].tolist()}

    def to_text(self, entries):
        return ["#" + "".join(f"{value:02x}" for value in entries["rgb"])]


def _sections(evaluation, dataset, pictures):
    del dataset
    return f"<section><h2>Colours</h2>{evaluation['images']} images{''.join(pictures.values())}</section>"


def make(config: Config, dataset, evaluates):
    """Makes the task of a config."""
    del evaluates
    return MeanColour(Model(config.model, config.norm, len(dataset.class_names)), config.data)


register_task(
    Kind(
        name="mean_colour", model=Model, make=make, answers=lambda weights, top: Answer(), page=Page(sections=_sections)
    )
)
