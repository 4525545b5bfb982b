"""Image classification: augmentation on the device, smoothed cross-entropy, top-1/top-5/ECE/confusion."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mnv2_jax.config import AugmentConfig, Config, DataConfig
from mnv2_jax.data.views.classification import EvalView, TrainView
from mnv2_jax.errors import UserError, nearest
from mnv2_jax.models.registry import Model, from_config
from mnv2_jax.nn.forms import Forms
from mnv2_jax.ops import augment, losses, metrics, mixing
from mnv2_jax.ops.metrics import NO_ANSWER
from mnv2_jax.ops.mixing import Targets
from mnv2_jax.ops.random import example_keys, stream_key
from mnv2_jax.report.sections import has_top5
from mnv2_jax.tasks.base import MOST_EXAMPLES, Aux, Evaluation
from mnv2_jax.types import Array, Batch, Key, PyTree, Variables

_PURPOSES = {"shift": 0, "flip": 1, "color": 2, "rotation": 3, "erasing": 4, "translation": 5}
"""Numbers that an image's key is folded with, one for each purpose."""
_MIXING = 2**32 - 1
"""Number that the step's key is folded with; other keys are folded with an epoch first, which is never so high."""
_NOT_SCORED = -1e9
"""Logit of a class that is no answer: finite, for 0 times infinity is not a number."""
_SCALARS = ("top1", "top5", "loss", "ece", "count")
"""The part of a summary that goes into logs."""
_MATRIX_CLASSES = 30
"""Up to so many a terminal shows the confusion matrix."""
_RANKS = 5
"""Number of classes whose probabilities `Evaluation.predictions` has, an image."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Classification:
    """A `tasks.base.Task`. A variant is a subclass, made known by `tasks.builtin.register_classification`."""

    score = "top1"

    model: Model
    data: DataConfig
    augment: AugmentConfig
    class_names: tuple[str, ...]
    label_smoothing: float
    seed: int
    """Seed of augmentation, which follows from (seed, epoch, index) alone."""
    group_size: int
    """`norm.group_size`, within which images are mixed."""
    class_weights: tuple[float, ...] | None = None
    """Factors of an example's training loss, by label."""
    scored: tuple[int, ...] | None = None
    """Labels between which evaluation chooses, for data with some of the classes; unset: all."""
    notes: tuple[str, ...] = ()
    """Notes to print before a training."""

    @property
    def columns(self) -> Mapping[str, np.ndarray]:
        """None."""
        return {}

    @property
    def frozen(self) -> PyTree:
        """None."""
        return {}

    @property
    def train_view(self) -> TrainView:
        """Image and label; what moves no pixel to another row is done on the devices (`view`)."""
        return TrainView(self.data, self.augment)

    @property
    def eval_view(self) -> EvalView:
        """Image and label, by the crop of evaluation."""
        return EvalView(self.data)

    def init(self, key: Key) -> Variables:
        """Fresh variables for images of the config's resolution."""
        size = self.data.resolution
        return self.model.init(key, jnp.zeros((1, size, size, 3)))

    def training_from(self, part: str) -> Classification:
        """The same task, of whose network only this part and what follows it are trained."""
        return dataclasses.replace(self, model=self.model.training_from(part))

    def with_forms(self, forms: Forms) -> Classification:
        """The same task, whose network's layers are computed in these forms."""
        return dataclasses.replace(self, model=self.model.with_forms(forms))

    def loss(self, params: PyTree, model_state: PyTree, frozen: PyTree, batch: Batch, key: Key) -> tuple[Array, Aux]:
        """Mean of `label_losses`; metrics: loss, and top1, which goes by the larger share of a mixed image."""
        del frozen
        images, targets = self.view(batch, key)
        logits, new_state = self.forward(params, model_state, images, batch, key)
        # A training batch is whole, it needs no mask: a count summed over the devices would be one more all-reduce.
        each = self.label_losses(logits, targets)
        right = (metrics.predictions(logits) == targets.larger).astype(each.dtype)
        return each.mean(), Aux(new_state, {"loss": each.mean(), "top1": right.mean()})

    def view(self, batch: Batch, key: Key) -> tuple[Array, Targets]:
        """Makes the network's input of a training batch: normalised images [b, h, w, 3], augmented and mixed.

        Args:
          batch: uint8 images of any size and number, in whole norm groups.
          key: the step's; mixing follows from it, what is done to single images from (seed, epoch, index).
        """
        images, labels = self._augmented(batch), batch["label"]
        if self.augment.mixup_alpha == 0 and self.augment.cutmix_alpha == 0:
            return images, Targets(labels)
        weights, share = mixing.draw_weights(
            jax.random.fold_in(key, _MIXING),
            *images.shape[1:3],
            mixup_alpha=self.augment.mixup_alpha,
            cutmix_alpha=self.augment.cutmix_alpha,
            probability=self.augment.mix_probability,
            cutmix_share=self.augment.cutmix_share,
        )
        other_images, other_labels = (mixing.partners(x, self.group_size) for x in (images, labels))
        return mixing.mix(images, other_images, weights), Targets(labels, other_labels, share)

    def forward(
        self, params: PyTree, model_state: PyTree, images: Array, batch: Batch, key: Key
    ) -> tuple[Array, PyTree]:
        """Training logits [b, k] of a view of the batch, and the new model state; dropout goes by example."""
        dropout_keys = example_keys(key, batch["epoch"], batch["index"])
        return self.model.apply({"params": params, **model_state}, images, train=True, dropout_keys=dropout_keys)

    def label_loss(self, logits: Array, labels: Array) -> Array:
        """Smoothed cross-entropy of each example [b]: what a variant with another loss overrides.

        Args:
          logits: [b, k], float32 or wider.
          labels: int32 [b].
        """
        return losses.softmax_cross_entropy(logits, labels, self.label_smoothing)

    def label_losses(self, logits: Array, targets: Targets) -> Array:
        """`label_loss` of each example [b], by the shares of its labels and their classes' weights.

        The weights aren't divided by their sum over the batch, they are 1 on average over the split: so the mean is the
        same however the batch is cut up.
        """
        own = self._weighed(logits, targets.labels)
        if targets.partners is None or targets.share is None:
            return own
        return targets.share * own + (1 - targets.share) * self._weighed(logits, targets.partners)

    def metrics(self, variables: Variables, batch: Batch) -> tuple[PyTree, dict[str, Array]]:
        """`ops.metrics.classification_sums` of the unaugmented images, without label smoothing and class weights."""
        logits, _ = self.model.apply(variables, self._normalised(batch["image"]), train=False)
        if self.scored is not None:
            is_scored = jnp.zeros((1, logits.shape[-1]), bool).at[0, jnp.asarray(self.scored)].set(True)
            logits = jnp.where(is_scored, logits, _NOT_SCORED)
        each = losses.softmax_cross_entropy(logits, batch["label"])
        highest, ranked = jax.lax.top_k(logits, min(_RANKS, logits.shape[-1]))
        total = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
        rows = {
            "label": batch["label"],
            "prediction": metrics.predictions(logits),
            "confidence": jax.nn.softmax(logits).max(axis=-1),
            "loss": each,
            "ranked": ranked,
            "probabilities": jnp.exp(highest - total),
        }
        return metrics.classification_sums(logits, batch["label"], each, batch["mask"]), rows

    def summarise(self, sums: PyTree, rows: Mapping[str, np.ndarray]) -> Evaluation:
        """`ops.metrics.summarise_classification` with this task's class names, and the `worst_mistakes`."""
        found = metrics.summarise_classification(sums, self.class_names)
        scalars = {name: found.pop(name) for name in _SCALARS}
        unanswered = scalars["count"] - sum(map(sum, found["confusion"]))
        doubts = [f"of {unanswered} images the network's outputs are not numbers: they count as wrong"]
        return Evaluation(
            scalars,
            found,
            worst_mistakes(rows),
            notes=doubts if unanswered else (),
            predictions=predictions(rows, self.class_names),
        )

    def headline(self, scalars: Mapping[str, float]) -> str:
        """Line such as ``top-1 97.22%, top-5 100.00%, loss 0.1025, ECE 0.0132, 360 images``; see `has_top5`."""
        s = scalars
        top5 = f" top-5 {s['top5']:.2%}," if has_top5(len(self.class_names)) else ""
        return f"top-1 {s['top1']:.2%},{top5} loss {s['loss']:.4f}, ECE {s['ece']:.4f}, {s['count']} images"

    def details(self, evaluation: Evaluation) -> list[str]:
        """Accuracy by class, and the confusion matrix of few classes."""
        tables = evaluation.tables
        lines = [
            f"  {row['label']:<30} {row['accuracy']:>8.2%}  of {row['count']}"
            for row in tables["per_class"]
            if row["count"]
        ]
        if len(tables["confusion"]) <= _MATRIX_CLASSES:
            lines += ["confusion, a row a true class:"]
            lines += ["  " + " ".join(f"{n:>5}" for n in row) for row in tables["confusion"]]
        return lines

    def _weighed(self, logits: Array, labels: Array) -> Array:
        each = self.label_loss(logits, labels)
        return each if self.class_weights is None else jnp.asarray(self.class_weights, each.dtype)[labels] * each

    def _normalised(self, images: Array) -> Array:
        return augment.normalise(images, self.data.mean, self.data.std)

    def _augmented(self, batch: Batch) -> Array:
        data, images = self.data, batch["image"]
        base = example_keys(stream_key(self.seed, "augment"), batch["epoch"], batch["index"])

        def keys(purpose: str) -> Key:
            return jax.vmap(jax.random.fold_in, (0, None))(base, _PURPOSES[purpose])

        if data.crop == "shift":
            images = augment.random_shift(keys("shift"), images, data.pad_pixels)
        if data.flip:
            images = augment.random_flip(keys("flip"), images)
        if self.augment.rotation_degrees > 0 or self.augment.shift_fraction > 0:
            images = augment.random_affine(
                keys("rotation"),
                keys("translation"),
                augment.as_float(images),
                self.augment.rotation_degrees,
                self.augment.shift_fraction,
            )
        if self.augment.color == "inception":
            images = augment.inception_color(keys("color"), augment.as_float(images))
        elif self.augment.color == "jitter":
            images = augment.color_jitter(keys("color"), augment.as_float(images), self.augment.color_jitter)
        images = self._normalised(images)
        if self.augment.erase_probability > 0:
            images = augment.random_erasing(
                keys("erasing"),
                images,
                self.augment.erase_probability,
                self.augment.erase_area,
                self.augment.erase_fill,
            )
        return images


def worst_mistakes(rows: Mapping[str, np.ndarray]) -> list[dict[str, Any]]:
    """The wrongly classified images of highest loss: those of which the network was surest. It answered something.

    Args:
      rows: index, label, prediction, confidence and loss, each [n].

    Returns:
      At most `MOST_EXAMPLES`, the worst first: index in the split, label, prediction, confidence (0 to 1) and loss.
    """
    prediction = rows["prediction"]
    wrong = np.flatnonzero((prediction != NO_ANSWER) & (prediction != rows["label"]))
    worst = wrong[np.argsort(-rows["loss"][wrong], kind="stable")][:MOST_EXAMPLES]
    names = ("index", "label", "prediction", "confidence", "loss")
    return [{name: rows[name][row].item() for name in names} for row in worst.tolist()]


def predictions(rows: Mapping[str, np.ndarray], class_names: Sequence[str]) -> dict[str, np.ndarray]:
    """The columns of `Evaluation.predictions`.

    Args:
      rows: those of `worst_mistakes`; ranked and probabilities, [n, r]: the likeliest classes, the likeliest first.
      class_names: by label.

    Returns:
      index, label, prediction, confidence (0 to 1), loss (nats); prediction_2, confidence_2 … of the next classes. A
      network that has no answer has "" and NaN.
    """
    names = np.array([*class_names, ""], object)  # `NO_ANSWER` is the last
    is_none = rows["prediction"] == NO_ANSWER
    columns = {
        "index": rows["index"],
        "label": names[rows["label"]],
        "prediction": names[rows["prediction"]],
        "confidence": np.where(is_none, np.nan, rows["confidence"]),
        "loss": rows["loss"],
    }
    for rank in range(1, rows["ranked"].shape[1]):
        columns[f"prediction_{rank + 1}"] = names[np.where(is_none, NO_ANSWER, rows["ranked"][:, rank])]
        columns[f"confidence_{rank + 1}"] = np.where(is_none, np.nan, rows["probabilities"][:, rank])
    return columns


def make_task(
    config: Config,
    class_names: tuple[str, ...],
    class_counts: Sequence[int] | None = None,
    scored: tuple[int, ...] | None = None,
    notes: tuple[str, ...] = (),
) -> Classification:
    """The task of a config, its head sized by the classes of the data.

    Args:
      config: the experiment.
      class_names: by label.
      class_counts: training images by label, by which `loss.class_weights` go; not needed to evaluate.
      scored, notes: as in `Classification`.

    Raises:
      UserError: if a class that is to be balanced has no training images, or one that is weighed isn't there.
    """
    model = from_config(dataclasses.replace(config.model, num_classes=len(class_names)), config.norm)
    weights, asked = None, config.loss.class_weights
    if class_counts is not None and asked != "none":
        if isinstance(asked, str):
            weights = balanced_weights(class_names, class_counts)
        else:
            weights = named_weights(dict(asked), class_names, class_counts)
    return Classification(
        model=model,
        data=config.data,
        augment=config.augment,
        class_names=class_names,
        label_smoothing=config.loss.label_smoothing,
        seed=config.seed,
        group_size=config.norm.group_size,
        class_weights=weights,
        scored=scored,
        notes=notes,
    )


def named_weights(
    weights: Mapping[str, float], class_names: Sequence[str], class_counts: Sequence[int]
) -> tuple[float, ...]:
    """Weights by label in the proportions of those given by name, 1 for the others: an example weighs 1 on average.

    Raises:
      UserError: for a name that is no class's.
    """
    for name in weights:
        if name not in class_names:
            raise UserError(f"loss.class_weights: the data have no class {name!r}{nearest(name, class_names)}")
    asked = [weights.get(name, 1.0) for name in class_names]
    mean = sum(weight * int(count) for weight, count in zip(asked, class_counts, strict=True)) / sum(class_counts)
    return tuple(weight / mean for weight in asked)


def balanced_weights(class_names: Sequence[str], class_counts: Sequence[int]) -> tuple[float, ...]:
    """n / (k * images of the class) by label: every class weighs the same, and an example 1 on average.

    Raises:
      UserError: naming a class without images.
    """
    for name, count in zip(class_names, class_counts, strict=True):
        if count == 0:
            raise UserError(
                f"loss.class_weights='balanced', but class {name!r} has no training images; give it some, leave the"
                " class out, or set loss.class_weights=none"
            )
    return tuple(sum(map(int, class_counts)) / (len(class_counts) * int(count)) for count in class_counts)
