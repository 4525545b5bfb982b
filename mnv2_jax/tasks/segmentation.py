"""Semantic segmentation: a class for each pixel, cross-entropy over the valid pixels, mean IoU."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mnv2_jax.config import IGNORED, Config
from mnv2_jax.data.sources import Dataset
from mnv2_jax.data.views.segmentation import EvalView, TrainView
from mnv2_jax.errors import UserError
from mnv2_jax.models.registry import for_classes
from mnv2_jax.nn.resize import resize_bilinear, resize_each
from mnv2_jax.ops import segmentation as ops
from mnv2_jax.ops.random import example_keys
from mnv2_jax.registry import TASKS
from mnv2_jax.report.segmentation import SEGMENTATION
from mnv2_jax.tasks.alone import Alone
from mnv2_jax.tasks.base import Aux, Evaluation, Kind
from mnv2_jax.tasks.class_maps import Canvas, at_size, check_canvas, class_maps, framing, stride_of
from mnv2_jax.tasks.numbered import check_head, check_num_classes, check_options, same_classes, worst_and_typical
from mnv2_jax.types import Array, Batch, Key, PyTree, Variables

_SCALARS = ("miou", "pixel_accuracy", "mean_accuracy")
"""Entries of a summary that go into the log."""
_MAP = 160
"""Sides of the small class maps of which pictures are drawn, in pixels."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Segmentation(Alone):
    """The `tasks.base.Task` of segmentation. The network's output is ``{"logits": [b, h, w, k], ...}`` of any size."""

    score = "miou"

    aux_weight: float
    class_weights: tuple[float, ...] | None = None
    """Factors for a pixel's training loss, by class."""

    @property
    def train_view(self) -> TrainView:
        """View of image and mask for training; colours are changed on the device."""
        return TrainView(self.data, self.augment.rotation_degrees)

    @property
    def eval_view(self) -> EvalView:
        """View of image and mask for evaluation, at the image's own size."""
        return EvalView(self.data, int(self.model.options.align_corners))

    def init(self, key: Key) -> Variables:
        """Initialises the variables, which don't depend on the size of images."""
        return self.model.init(key, jax.ShapeDtypeStruct((1, *self.data.train_size, 3), jnp.float32))

    def loss(self, params: PyTree, model_state: PyTree, frozen: PyTree, batch: Batch, key: Key) -> tuple[Array, Aux]:
        """Mean of `pixel_loss` over the valid pixels of the batch, whose number is the weight of the batch.

        The loss of the auxiliary head is added with `LossConfig.aux_weight`. Metrics: loss, and pixel_accuracy.
        """
        del frozen
        dropout_keys = example_keys(key, batch["epoch"], batch["index"])
        variables = {"params": params, **model_state}
        images = self._coloured_batch(batch)
        outputs, new_state = self.model.apply(variables, images, train=True, dropout_keys=dropout_keys)
        mask = batch["class_map"]
        is_valid = mask != IGNORED
        logits = self.resized(outputs["logits"], mask.shape[1:])
        weight = is_valid.sum().astype(logits.dtype)

        def mean(values: Array) -> Array:
            return values.sum() / jnp.maximum(weight, 1)

        loss = mean(self.pixel_loss(logits, mask))
        if "aux" in outputs:
            aux = self.resized(outputs["aux"], mask.shape[1:])
            loss = loss + self.aux_weight * mean(self.pixel_loss(aux, mask))
        right = is_valid & (ops.predictions(logits) == mask)
        accuracy = mean(right.astype(logits.dtype))
        return loss, Aux(new_state, {"loss": loss, "pixel_accuracy": accuracy}, weight)

    def resized(self, logits: Array, size: tuple[int, ...]) -> Array:
        """Resizes logits [b, h, w, k] to the height and width of a mask."""
        height, width = size
        return resize_bilinear(logits, (height, width), align_corners=self.model.options.align_corners)

    def on_masks(self, logits: Array, batch: Batch) -> Array:
        """Resizes the logits of an evaluation's batch [b, p, q, k] to the canvas of the masks [b, h, w, k]."""
        canvas = batch["class_map"].shape[1:]
        if self.data.eval_short_side is None and batch["image"].shape[1:3] == canvas:
            return self.resized(logits, canvas)
        is_aligned, stride = self.model.options.align_corners, stride_of(self.model.options)
        size, seen = batch["size"].astype(logits.dtype), batch["seen"].astype(logits.dtype)
        if is_aligned:  # a factor of distances, of which a side of one pixel has none
            size, seen = jnp.maximum(size - 1, 1), jnp.maximum(seen - 1, 1)
        scales = stride * size / seen
        return resize_each(logits, scales, (canvas[0], canvas[1]), align_corners=is_aligned)

    def pixel_loss(self, logits: Array, mask: Array) -> Array:
        """Computes the training loss of each pixel [b, h, w]; 0 where the mask, uint8 [b, h, w], is ignored.

        A variant with another loss overrides this method.
        """
        each = ops.pixel_losses(logits, mask)
        if self.class_weights is None:
            return each
        weights = jnp.asarray(self.class_weights, each.dtype)
        return each * weights[jnp.where(mask == IGNORED, 0, mask).astype(jnp.int32)]

    def metrics(self, variables: Variables, batch: Batch) -> tuple[PyTree, dict[str, Array]]:
        """Counts pixels by true and predicted class, at the size of the mask."""

        def network(images: Array) -> PyTree:
            return self.model.apply(variables, images, train=False)[0]

        outputs = Canvas(self.data, self.model.options).outputs(network, self._normalised(batch["image"]))
        mask = batch["class_map"]
        logits = self.on_masks(outputs["logits"], batch)
        predicted = ops.predictions(logits)
        counts = ops.confusion(predicted, mask, len(self.class_names))
        rows = {
            "iou": ops.image_ious(counts),
            "pixels": counts.sum((1, 2)),
            "loss": ops.pixel_losses(logits, mask).sum((1, 2)),
            "map": ops.small_maps(predicted, batch["size"], _MAP),
        }
        return ops.split_counts(ops.masked(counts, batch["mask"])), rows

    def summarise(self, sums: PyTree, rows: Mapping[str, np.ndarray]) -> Evaluation:
        """`ops.segmentation.summarise` with this task's class names, the mean loss, and `examples`."""
        counts = ops.join_counts(sums)
        tables = ops.summarise(counts, self.class_names)
        scalars = {name: tables.pop(name) for name in _SCALARS}
        pixels = int(rows["pixels"].sum(dtype=np.int64))
        loss = float(rows["loss"].sum(dtype=np.float64)) / max(pixels, 1)
        unanswered = int(counts[:, -1].sum())
        chosen = examples(rows)
        place_of = {int(index): place for place, index in enumerate(rows["index"])}
        doubts = {
            "no pixel of these masks has a class that counts, so that scores are 0; mnv2 inspect prints their values": (
                pixels == 0
            ),
            f"the network's outputs for {unanswered} pixels are not numbers; these pixels count as wrong": (
                unanswered > 0
            ),
        }
        return Evaluation(
            {**scalars, "loss": loss, "pixels": pixels, "count": len(rows["iou"])},
            tables,
            chosen,
            notes=[doubt for doubt, is_there in doubts.items() if is_there],
            maps={example["index"]: rows["map"][place_of[example["index"]]] for example in chosen},
        )

    def headline(self, scalars: Mapping[str, float]) -> str:
        """One line, such as ``mIoU 61.20%, pixel accuracy 89.10%, loss 0.3412, 233 images``."""
        s = scalars
        return (
            f"mIoU {s['miou']:.2%}, pixel accuracy {s['pixel_accuracy']:.2%}, loss {s['loss']:.4f}, {s['count']} images"
        )

    def details(self, evaluation: Evaluation) -> list[str]:
        """IoU and share of pixels by class, and the files of the worst images."""
        rows = evaluation.tables["per_class"]
        total = max(sum(row["pixels"] for row in rows), 1)
        lines = [
            f"  {row['label']:<30} {_percent(row['iou']):>8}  accuracy {_percent(row['accuracy']):>8}"
            f"  {row['pixels'] / total:8.2%} of the pixels"
            for row in rows
        ]
        worst = [example for example in evaluation.examples if example["why"] == "worst" and "path" in example]
        return lines + [f"  {example['path']}: IoU {example['iou']:.1%}" for example in worst[:5]]


def _percent(share: float | None) -> str:
    return "none" if share is None else f"{share:.2%}"


def examples(rows: Mapping[str, np.ndarray]) -> list[dict[str, Any]]:
    """Selects the worst images by their mean IoU, and those around the median.

    Args:
      rows: index, iou and pixels, each [n].

    Returns:
      At most `MOST_EXAMPLES` images: index in the split, why ("worst" or "typical"), iou (0 to 1) and pixels. Images
      without a labelled pixel are left out.
    """
    labelled = np.flatnonzero(rows["pixels"] > 0)
    order = labelled[np.argsort(rows["iou"][labelled], kind="stable")]
    chosen = worst_and_typical(order.tolist())
    facts = ("index", "iou", "pixels")
    return [{"why": why, **{name: rows[name][row].item() for name in facts}} for why, row in chosen]


def make_task(config: Config, dataset: Dataset, evaluates: bool) -> Segmentation:
    """Makes the task of a config and its data.

    Raises:
      UserError: if the data have no masks, the network has no dense head, or an option is of classification alone.
    """
    del evaluates
    if any("mask" not in split.targets for split in (dataset.train, dataset.eval) if len(split)):
        raise UserError(
            f"data.name={dataset.name!r} has no masks, which task=segmentation needs; use mask_folder, ade20k,"
            " voc_segmentation or cityscapes"
        )
    check_dense(config)
    check_num_classes(config, dataset)
    names = dataset.class_names
    return Segmentation(
        model=for_classes(config.model, config.norm, len(names)),
        data=config.data,
        augment=config.augment,
        class_names=names,
        seed=config.seed,
        aux_weight=config.loss.aux_weight,
        class_weights=class_weights(config, names),
    )


def check_dense(config: Config) -> None:
    """Refuses options that only a classification has, so that none is silently without effect.

    Raises:
      UserError: naming the option.
    """
    if config.model.head == "classifier":
        raise UserError("task=segmentation needs a dense head; set model.head=deeplabv3 or lraspp")
    for key, size in (("eval_canvas", config.data.eval_canvas), ("eval_window", config.data.eval_window)):
        if size is not None:
            check_canvas(size, config.model, f"data.{key}")
    check_options(
        config,
        {
            "data.crop": config.data.crop in ("scale", "none"),
            "data.eval_resolution": config.data.eval_resolution is None,
            "data.scales": not config.data.scales,
            "loss.class_weights": config.loss.class_weights != "balanced",
        },
    )


def class_weights(config: Config, class_names: Sequence[str]) -> tuple[float, ...] | None:
    """Returns the factors of `LossConfig.class_weights` by class; a class that isn't named has 1.

    They aren't scaled: the mean over the valid pixels stays comparable between data.

    Raises:
      UserError: for a name that isn't a class.
    """
    requested = config.loss.class_weights
    if isinstance(requested, str):
        return None
    weights = dict(requested)
    for name in weights:
        if name not in class_names:
            raise UserError(f"loss.class_weights: the data have no class {name!r}; they are {', '.join(class_names)}")
    return tuple(weights.get(name, 1.0) for name in class_names)


TASKS.add(
    "segmentation",
    Kind(
        name="segmentation",
        model=for_classes,
        make=make_task,
        answers=class_maps,
        page=SEGMENTATION,
        with_known_classes=same_classes,
        check_head=check_head,
        framing=framing,
        at_size=at_size,
    ),
    __name__,
)
