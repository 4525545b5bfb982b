"""Image classification: augmentation on the device, smoothed cross-entropy, top-1, top-5, ECE and confusion matrix."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mnv2_jax.config import Config
from mnv2_jax.data.views.classification import EvalView, TrainView
from mnv2_jax.errors import UserError, nearest
from mnv2_jax.models.registry import from_config
from mnv2_jax.ops import augment, losses, metrics, mixing
from mnv2_jax.ops.metrics import NO_ANSWER
from mnv2_jax.ops.mixing import Targets
from mnv2_jax.ops.random import example_keys, stream_key
from mnv2_jax.report.sections import has_top5
from mnv2_jax.tasks.alone import Alone
from mnv2_jax.tasks.base import MOST_EXAMPLES, Aux, Evaluation
from mnv2_jax.types import Array, Batch, Key, PyTree, Variables

_PURPOSES = {"shift": 0, "flip": 1, "color": 2, "rotation": 3, "erasing": 4, "translation": 5}
"""Numbers that are folded into an image's random key, one for each kind of augmentation."""
_MIXING = 2**32 - 1
"""Number that is folded into the step's key for mixing. Other keys fold in an epoch first, which is never so high."""
_NOT_SCORED = -1e9
"""Logit of a class that evaluation doesn't choose. It is finite, because 0 times infinity is not a number."""
_SCALARS = ("top1", "top5", "loss", "ece", "count")
"""Entries of a summary that go into the log."""
_MATRIX_CLASSES = 30
"""Most classes for which the terminal shows the confusion matrix."""
_NAMED_MISTAKES = 5
"""Most mistakes whose files the terminal shows."""
_RANKS = 5
"""Number of classes per image whose probabilities are in `Evaluation.predictions`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Classification(Alone):
    """The `tasks.base.Task` of classification. Register a subclass with `tasks.builtin.register_classification`."""

    score = "top1"

    label_smoothing: float
    group_size: int
    """`norm.group_size`; images are mixed within such a group."""
    class_weights: tuple[float, ...] | None = None
    """Factors for an example's training loss, by label."""
    scored: tuple[int, ...] | None = None
    """Labels among which evaluation chooses, if the data have only some of the classes; unset: all."""

    @property
    def train_view(self) -> TrainView:
        """View of image and label for training; `view` does the rest of the augmentation on the device."""
        return TrainView(self.data, self.augment)

    @property
    def eval_view(self) -> EvalView:
        """Function that cuts the evaluation crop out of an example, and returns it with its label."""
        return EvalView(self.data)

    def init(self, key: Key) -> Variables:
        """Initialises the variables for images of the config's resolution."""
        size = self.data.resolution
        return self.model.init(key, jnp.zeros((1, size, size, 3)))

    def loss(self, params: PyTree, model_state: PyTree, frozen: PyTree, batch: Batch, key: Key) -> tuple[Array, Aux]:
        """Mean of `label_losses`. Metrics: loss, and top1 against the label with the larger share of a mixed image."""
        del frozen
        images, targets = self.view(batch, key)
        logits, new_state = self.forward(params, model_state, images, batch, key)
        # A training batch is always full, so it needs no mask: counting rows over devices would add an all-reduce.
        each = self.label_losses(logits, targets)
        right = (metrics.predictions(logits) == targets.larger).astype(each.dtype)
        return each.mean(), Aux(new_state, {"loss": each.mean(), "top1": right.mean()})

    def view(self, batch: Batch, key: Key) -> tuple[Array, Targets]:
        """Makes the network's input from a training batch: images [b, h, w, 3], augmented, normalised and mixed.

        Args:
          batch: uint8 images of any size and number, in whole norm groups.
          key: random key of the step, for mixing. The augmentation of single images depends on (seed, epoch, index).
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
        """Returns training logits [b, k] for a view of the batch, and the new model state. Dropout is by example."""
        dropout_keys = example_keys(key, batch["epoch"], batch["index"])
        return self.model.apply({"params": params, **model_state}, images, train=True, dropout_keys=dropout_keys)

    def label_loss(self, logits: Array, labels: Array) -> Array:
        """Smoothed cross-entropy of each example [b]. A variant with another loss overrides this method.

        Args:
          logits: [b, k], float32 or wider.
          labels: int32 [b].
        """
        return losses.softmax_cross_entropy(logits, labels, self.label_smoothing)

    def label_losses(self, logits: Array, targets: Targets) -> Array:
        """`label_loss` of each example [b], averaged by the shares of its labels and weighed by the class weights.

        Class weights are 1 on average over the split, and aren't divided by their sum over the batch. So the mean
        doesn't depend on how the batch is divided.
        """
        main_loss = self._weighed(logits, targets.labels)
        if targets.partners is None or targets.share is None:
            return main_loss
        return targets.share * main_loss + (1 - targets.share) * self._weighed(logits, targets.partners)

    def metrics(self, variables: Variables, batch: Batch) -> tuple[PyTree, dict[str, Array]]:
        """`ops.metrics.classification_sums` of images without augmentation, label smoothing and class weights."""
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
        tables = metrics.summarise_classification(sums, self.class_names)
        scalars = {name: tables.pop(name) for name in _SCALARS}
        unanswered = scalars["count"] - sum(map(sum, tables["confusion"]))
        doubts = [f"the network's outputs for {unanswered} images are not numbers; these images count as wrong"]
        return Evaluation(
            scalars,
            tables,
            worst_mistakes(rows),
            notes=doubts if unanswered else (),
            predictions=predictions(rows, self.class_names),
        )

    def headline(self, scalars: Mapping[str, float]) -> str:
        """One line, such as ``top-1 97.22%, top-5 100.00%, loss 0.1025, ECE 0.0132, 360 images``; see `has_top5`."""
        s = scalars
        top5 = f" top-5 {s['top5']:.2%}," if has_top5(len(self.class_names)) else ""
        return f"top-1 {s['top1']:.2%},{top5} loss {s['loss']:.4f}, ECE {s['ece']:.4f}, {s['count']} images"

    def details(self, evaluation: Evaluation) -> list[str]:
        """Accuracy by class, the confusion matrix if there are few classes, and the files of the worst mistakes."""
        tables, names = evaluation.tables, self.class_names
        lines = [
            f"  {row['label']:<30} {row['accuracy']:>8.2%}  of {row['count']}"
            for row in tables["per_class"]
            if row["count"]
        ]
        if len(tables["confusion"]) <= _MATRIX_CLASSES:
            lines += ["confusion matrix: a row for each true class, a column for each predicted class, in this order"]
            lines += [
                f"  {name:<30.30} {' '.join(f'{n:>5}' for n in row)}"
                for name, row in zip(names, tables["confusion"], strict=True)
            ]
        located = [mistake for mistake in evaluation.examples if "path" in mistake][:_NAMED_MISTAKES]
        if located:
            lines += ["worst mistakes, those with the highest loss first; --predictions=FILE.csv writes all images"]
            lines += [
                f"  {mistake['path']}: {names[mistake['label']]}, predicted as {names[mistake['prediction']]}"
                f" ({mistake['confidence']:.0%})"
                for mistake in located
            ]
        return lines

    def _weighed(self, logits: Array, labels: Array) -> Array:
        each = self.label_loss(logits, labels)
        if each.shape != labels.shape:
            raise UserError(
                f"{type(self).__name__}.label_loss returned an array {list(each.shape)} for {len(labels)} images;"
                f" return the loss of each image, [{len(labels)}]"
            )
        return each if self.class_weights is None else jnp.asarray(self.class_weights, each.dtype)[labels] * each

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
        images = self._normalised(self._coloured(lambda: keys("color"), images))
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
    """Finds the wrongly classified images with the highest loss. Images without an answer are left out.

    Args:
      rows: index, label, prediction, confidence and loss, each [n].

    Returns:
      At most `MOST_EXAMPLES` images, worst first: index in the split, label, prediction, confidence (0 to 1) and loss.
    """
    prediction = rows["prediction"]
    wrong = np.flatnonzero((prediction != NO_ANSWER) & (prediction != rows["label"]))
    worst = wrong[np.argsort(-rows["loss"][wrong], kind="stable")][:MOST_EXAMPLES]
    names = ("index", "label", "prediction", "confidence", "loss")
    return [{name: rows[name][row].item() for name in names} for row in worst.tolist()]


def predictions(rows: Mapping[str, np.ndarray], class_names: Sequence[str]) -> dict[str, np.ndarray]:
    """Makes the columns of `Evaluation.predictions`.

    Args:
      rows: the rows of `worst_mistakes`; and ranked and probabilities, [n, r], of the most probable classes, best
        first.
      class_names: names by label.

    Returns:
      index, label, prediction, confidence (0 to 1), loss (nats); prediction_2, confidence_2 … for the next classes. An
      image without an answer has "" and NaN.
    """
    names = np.array([*class_names, ""], object)  # `NO_ANSWER` indexes the last name
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
    """Makes the task of a config, with a head for the classes of the data.

    Args:
      config: the experiment.
      class_names: names by label.
      class_counts: number of training images by label, for `loss.class_weights`; not needed for an evaluation.
      scored, notes: as in `Classification`; a note on the class weights is added.

    Raises:
      UserError: if a class to balance has no training images, or `loss.class_weights` names an unknown class.
    """
    model = from_config(dataclasses.replace(config.model, num_classes=len(class_names)), config.norm)
    weights, requested = None, config.loss.class_weights
    if class_counts is not None and requested != "none":
        if isinstance(requested, str):
            weights = balanced_weights(class_names, class_counts)
        else:
            weights = named_weights(dict(requested), class_names, class_counts)
    if weights is not None:
        notes += (f"class weights of the loss: {min(weights):.3g} to {max(weights):.3g}, 1 on average over the images",)
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
    """Returns class weights by label, in the proportions of the named weights, scaled so that an example weighs 1 on
    average. A class without a named weight counts as 1 before scaling.

    Raises:
      UserError: for a name that isn't a class.
    """
    for name in weights:
        if name not in class_names:
            raise UserError(f"loss.class_weights: the data have no class {name!r}{nearest(name, class_names)}")
    unscaled = [weights.get(name, 1.0) for name in class_names]
    mean = sum(weight * int(count) for weight, count in zip(unscaled, class_counts, strict=True)) / sum(class_counts)
    return tuple(weight / mean for weight in unscaled)


def balanced_weights(class_names: Sequence[str], class_counts: Sequence[int]) -> tuple[float, ...]:
    """Returns class weights by label, n / (k * images of the class): each class has the same total weight, and an
    example weighs 1 on average.

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
