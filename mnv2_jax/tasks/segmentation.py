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
from mnv2_jax.models.plan import has_classes
from mnv2_jax.models.registry import for_classes
from mnv2_jax.nn.resize import resize_bilinear, resize_each
from mnv2_jax.ops import segmentation as ops
from mnv2_jax.ops.random import example_keys, stream_key
from mnv2_jax.registry import TASKS
from mnv2_jax.report.segmentation import SEGMENTATION
from mnv2_jax.tasks.alone import Alone
from mnv2_jax.tasks.base import MOST_EXAMPLES, Aux, Evaluation, Kind
from mnv2_jax.tasks.class_maps import Canvas, at_size, check_canvas, class_maps, framing, stride_of
from mnv2_jax.types import Array, Batch, Key, PyTree, Variables
from mnv2_jax.weights.file import Weights, WeightsInfo

_COLOR = 2
"""Number that is folded into an image's random key for its colours; that of classification."""
_SCALARS = ("miou", "pixel_accuracy", "mean_accuracy")
"""Entries of a summary that go into the log."""
_MAP = 160
"""Sides of the small class maps of which pictures are drawn, in pixels."""
_TYPICAL = MOST_EXAMPLES // 2
"""Number of examples around the median; the others are the worst."""


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
        outputs, new_state = self.model.apply(variables, self._augmented(batch), train=True, dropout_keys=dropout_keys)
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

    def _augmented(self, batch: Batch) -> Array:
        base = example_keys(stream_key(self.seed, "augment"), batch["epoch"], batch["index"])

        def keys() -> Key:
            return jax.vmap(jax.random.fold_in, (0, None))(base, _COLOR)

        return self._normalised(self._coloured(keys, batch["image"]))


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
    num_worst = min(MOST_EXAMPLES - _TYPICAL, -(-len(order) // 2))
    rest = order[num_worst:]
    middle = max((len(rest) - _TYPICAL) // 2, 0)
    chosen = [("worst", row) for row in order[:num_worst]] + [("typical", row) for row in rest[middle:][:_TYPICAL]]
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
    names = dataset.class_names
    if config.model.num_classes not in (None, len(names)):
        raise UserError(
            f"model.num_classes={config.model.num_classes}, but {dataset.name} has {len(names)} classes; leave it unset"
        )
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
    default = Config()
    only = {
        "data.crop": config.data.crop in ("scale", "none"),
        "data.eval_resolution": config.data.eval_resolution is None,
        "data.scales": not config.data.scales,
        "loss.label_smoothing": config.loss.label_smoothing == 0,
        "loss.class_weights": config.loss.class_weights != "balanced",
        "distill.teacher": config.distill.teacher is None and config.distill.logits is None,
        **{
            f"augment.{name}": getattr(config.augment, name) == getattr(default.augment, name)
            for name in (
                *("policy", "shift_fraction", "erase_probability"),
                *("mixup_alpha", "cutmix_alpha"),
            )
        },
    }
    for key, is_allowed in only.items():
        if not is_allowed:
            raise UserError(f"{key}: task=segmentation doesn't have this option with this value; leave it out")


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


def check_head(config: Config, weights: Weights, dataset: Dataset) -> None:
    """Refuses weights whose head can't be trained further on these data.

    Raises:
      UserError: saying how to start with a new head, or that a part of the new head would be frozen.
    """
    if config.init.head == "new":
        _check_frozen(config, weights, dataset)
        return
    try:
        same_classes(dataset, weights.info, weights.model.num_classes)
    except UserError as error:
        name = config.init.weights
        raise UserError(f"init.weights={name!r}: {error}, or give --config.init.head=new for a new head") from error


def _check_frozen(config: Config, weights: Weights, dataset: Dataset) -> None:
    model, first = for_classes(config.model, config.norm, len(dataset.class_names)), config.finetune.train_from[0]
    # An unknown part is refused elsewhere.
    before = model.parts[: model.parts.index(first)] if first in model.parts else ()
    frozen = [part for part in before if part in model.head_parts]
    if not frozen:
        return
    random = jax.eval_shape(model.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32))["params"]
    held = weights.variables["params"]
    for part in frozen:
        if has_classes(part) or _shapes(held.get(part)) != _shapes(random[part]):
            raise UserError(
                f"finetune.train_from={list(config.finetune.train_from)} freezes {part}, which is new with"
                f" init.head=new, so it would stay random; begin with {part}"
            )


def _shapes(tree: PyTree) -> PyTree:
    return jax.tree.map(np.shape, tree)


def same_classes(dataset: Dataset, info: WeightsInfo, num_classes: int) -> Dataset:
    """Returns the data, whose classes must be those of the weights in the same order: masks hold numbers of classes.

    Raises:
      UserError: naming the first class that differs.
    """
    ours, theirs = dataset.class_names, info.labels
    if len(ours) != num_classes:
        reason = f"the weights have {num_classes} classes and {dataset.name} has {len(ours)}"
    elif theirs and ours != theirs:
        place = next(place for place, names in enumerate(zip(ours, theirs, strict=True)) if len({*names}) > 1)
        reason = f"class {place} is {theirs[place]!r} in the weights and {ours[place]!r} in {dataset.name}"
    else:
        return dataset
    raise UserError(f"{reason}; let the data have the classes of the weights in the same order")


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
