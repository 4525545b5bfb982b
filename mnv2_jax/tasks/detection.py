"""Detection: boxes of objects by SSD's loss over anchors, COCO's mean average precision."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mnv2_jax.config import Config
from mnv2_jax.data.boxes import Renumbered, annotations_of
from mnv2_jax.data.sources import Dataset
from mnv2_jax.data.split import Split
from mnv2_jax.data.views.detection import EvalView, TrainView, overlaps, shares_within
from mnv2_jax.errors import UserError
from mnv2_jax.models.anchors import anchors
from mnv2_jax.models.registry import for_classes
from mnv2_jax.ops import boxes as ops
from mnv2_jax.ops.random import example_keys
from mnv2_jax.registry import TASKS
from mnv2_jax.report.detection import DETECTION
from mnv2_jax.tasks.alone import Alone
from mnv2_jax.tasks.base import Aux, Evaluation, Kind
from mnv2_jax.tasks.box_lists import SHOWN, BoxLists, box_lists, framing
from mnv2_jax.tasks.coco import check_installed, coco_scores
from mnv2_jax.tasks.numbered import check_head, check_num_classes, check_options, same_classes, worst_and_typical
from mnv2_jax.types import Array, Batch, Key, PyTree, Variables
from mnv2_jax.weights.file import WeightsInfo

_NEGATIVES = 3
"""Anchors of the background that train, for each anchor of an object (SSD's paper, section 2.2)."""


def _sigmoid_loss(logits: Array, labels: Array) -> Array:
    targets = jax.nn.one_hot(labels, logits.shape[-1], dtype=logits.dtype)
    return optax.sigmoid_binary_cross_entropy(logits, targets).sum(-1)


_CLASS_LOSSES = {"softmax": optax.softmax_cross_entropy_with_integer_labels, "sigmoid": _sigmoid_loss}
"""Losses [b, a] from logits [b, a, k + 1] and classes [b, a], 0 for the background, by `ModelConfig.box_scores`."""
_SCALARS = ("ap", "ap50", "ap75")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Detection(Alone):
    """The `tasks.base.Task` of detection. The network's output is ``{"boxes": [b, a, 4], "logits": [b, a, k + 1]}``."""

    score = "ap"

    truth: Split
    """The split that is evaluated, whose boxes are read as they are."""

    @property
    def train_view(self) -> TrainView:
        """View of image and boxes for training; colours are changed on the device."""
        return TrainView(self.data)

    @property
    def eval_view(self) -> EvalView:
        """View of image and boxes for evaluation."""
        return EvalView(self.data)

    def init(self, key: Key) -> Variables:
        """Initialises the variables, which don't depend on the size of images."""
        return self.model.init(key, jax.ShapeDtypeStruct((1, *self.data.train_size, 3), jnp.float32))

    def loss(self, params: PyTree, model_state: PyTree, frozen: PyTree, batch: Batch, key: Key) -> tuple[Array, Aux]:
        """SSD's loss: of the classes of an object's anchors and of the hardest others, and of the objects' boxes.

        The sum over the batch is divided by its weight, the number of anchors of objects, in which an image without
        any counts as one. Metrics: loss, box_loss and class_loss.
        """
        del frozen
        dropout_keys = example_keys(key, batch["epoch"], batch["index"])
        variables = {"params": params, **model_state}
        images = self._coloured_batch(batch)
        outputs, new_state = self.model.apply(variables, images, train=True, dropout_keys=dropout_keys)
        of_boxes, of_classes, counts = self.image_losses(outputs, batch)
        weight = counts.sum()
        box_loss, class_loss = of_boxes.sum() / weight, of_classes.sum() / weight
        loss = box_loss + class_loss
        return loss, Aux(new_state, {"loss": loss, "box_loss": box_loss, "class_loss": class_loss}, weight)

    def image_losses(self, outputs: PyTree, batch: Batch) -> tuple[Array, Array, Array]:
        """Sums the losses of boxes and of classes for each image, [b] each, and counts its anchors of objects, [b].

        An image without one counts as 1, and its three hardest anchors train as background.
        """
        codes, logits = outputs["boxes"], outputs["logits"]
        size = batch["image"].shape[1:3]
        at = jnp.asarray(anchors(self.model.options.anchors, *size), codes.dtype)
        boxes = batch["boxes"].astype(codes.dtype)
        matches = jax.vmap(ops.match, (None, 0, 0, 0))(at, boxes, batch["classes"], batch["ignored"])
        is_object, place = matches >= 0, jnp.maximum(matches, 0)
        targets = jax.vmap(ops.encode, (0, None))(jnp.take_along_axis(boxes, place[..., None], 1), at)
        of_boxes = jnp.where(is_object, optax.huber_loss(codes, targets).sum(-1), 0)
        labels = jnp.where(is_object, jnp.take_along_axis(batch["classes"], place, 1) + 1, 0)
        each = _CLASS_LOSSES[self.model.options.box_scores](logits, labels)
        negatives = ops.hard_negatives(each, matches, _NEGATIVES, least=_NEGATIVES)
        of_classes = jnp.where(is_object | negatives, each, 0)
        counts = jnp.maximum(is_object.sum(1), 1).astype(codes.dtype)
        return of_boxes.sum(1), of_classes.sum(1), counts

    def metrics(self, variables: Variables, batch: Batch) -> tuple[PyTree, dict[str, Array]]:
        """Finds boxes, in pixels of each image, and sums the losses."""
        outputs, _ = self.model.apply(variables, self._normalised(batch["image"]), train=False)
        of_boxes, of_classes, counts = self.image_losses(outputs, batch)
        answers = BoxLists(self.class_names, self.model.options, self.data).decode(outputs)
        rows = {**answers, "size": batch["size"], "loss": of_boxes + of_classes, "weight": counts}
        return {"images": batch["mask"].sum(dtype=jnp.int32)}, rows

    def summarise(self, sums: PyTree, rows: Mapping[str, np.ndarray]) -> Evaluation:
        """COCO's numbers (`tasks.coco`), the mean loss, and `examples`."""
        del sums
        indices = rows["index"].tolist()
        annotations = annotations_of(self.truth)
        truths = [{name: read(index) for name, read in self.truth.targets.items()} for index in indices]
        if annotations is not None and annotations.areas is not None:
            truths = [{**truths[n], "areas": annotations.areas[annotations.of(i)]} for n, i in enumerate(indices)]
        sides = np.tile(rows["size"], 2)[:, None].astype(np.float64)
        found = Found(rows["box"] * sides, rows["class"], rows["probability"])
        tables = coco_scores(indices, truths, *found, self.class_names)
        scalars = {name: tables.pop(name) or 0.0 for name in _SCALARS}
        loss = float(rows["loss"].sum(dtype=np.float64) / max(rows["weight"].sum(dtype=np.float64), 1))
        chosen = examples(indices, truths, found)
        places = {index: place for place, index in enumerate(indices)}
        boxes = sum(row["boxes"] for row in tables["per_class"])
        doubts = [] if boxes else ["no box of these images counts, so that scores are 0; mnv2 inspect shows the boxes"]
        most = max((int((~truth["crowd"]).sum()) for truth in truths), default=0)
        if most > self.data.eval_max_boxes:
            doubts.append(
                f"an image has {most:,} boxes, but at most {self.data.eval_max_boxes:,} are found"
                f" (data.eval_max_boxes), so that not all can be right"
            )
        return Evaluation(
            {**scalars, "loss": loss, "boxes": boxes, "count": len(truths)},
            tables,
            chosen,
            notes=doubts,
            maps={each["index"]: found.shown(places[each["index"]]) for each in chosen},
        )

    def headline(self, scalars: Mapping[str, float]) -> str:
        """One line, such as ``mAP 41.20%, AP50 80.10%, AP75 38.00%, loss 2.3412, 72 images``."""
        s = scalars
        return (
            f"mAP {s['ap']:.2%}, AP50 {s['ap50']:.2%}, AP75 {s['ap75']:.2%}, loss {s['loss']:.4f}, {s['count']} images"
        )

    def details(self, evaluation: Evaluation) -> list[str]:
        """Average precision by class, and the files of the worst images."""
        lines = [
            f"  {row['label']:<30} AP {_percent(row['ap']):>8}  AP50 {_percent(row['ap50']):>8}  {row['boxes']:,} boxes"
            for row in evaluation.tables["per_class"]
        ]
        worst = [each for each in evaluation.examples if each["why"] == "worst" and "path" in each]
        return lines + [f"  {each['path']}: {each['missed']} missed, {each['wrong']} wrong" for each in worst[:5]]


def _percent(share: float | None) -> str:
    return "none" if share is None else f"{share:.2%}"


class Found(NamedTuple):
    """The boxes that were found in images, d places each."""

    boxes: np.ndarray
    """[n, d, 4], (y0, x0, y1, x1) in pixels."""
    classes: np.ndarray
    """[n, d]."""
    scores: np.ndarray
    """[n, d], 0 where there is no box."""

    def shown(self, place: int) -> np.ndarray:
        """Returns the boxes of an image that are drawn, [k, 5]: the box and its class."""
        rows = np.concatenate([self.boxes[place], self.classes[place][:, None]], 1)
        return rows[self.scores[place] >= SHOWN]


def examples(indices: Sequence[int], truths: Sequence[Mapping[str, np.ndarray]], found: Found) -> list[dict[str, Any]]:
    """Selects the images with the most mistakes, and those around the median.

    Found boxes count here from a probability of `SHOWN` on. A mistake is a true box that none of its class meets with
    an IoU of 0.5, or a found box that meets no true box of its class. As COCO's scores have it, a found box meets a
    crowd with half of its own area.

    Args:
      indices: numbers of the images in the split.
      truths: their boxes [n, 4], classes [n] and crowd [n].
      found: what was found in them.

    Returns:
      At most `MOST_EXAMPLES` images: index, why ("worst" or "typical"), boxes, missed and wrong.
    """
    rows = []
    for place, (index, truth) in enumerate(zip(indices, truths, strict=True)):
        shown, counts = found.shown(place), ~truth["crowd"]
        boxes, crowd = truth["boxes"], truth["crowd"][:, None]
        meets = np.where(crowd, shares_within(boxes, shown[:, :4]), overlaps(boxes, shown[:, :4])) >= 0.5
        meets &= truth["classes"][:, None] == shown[:, 4]
        missed, wrong = int((~meets.any(1) & counts).sum()), int((~meets.any(0)).sum())
        rows.append({"index": index, "boxes": int(counts.sum()), "missed": missed, "wrong": wrong})
    rows.sort(key=lambda row: -(row["missed"] + row["wrong"]))
    return [{"why": why, **row} for why, row in worst_and_typical(rows)]


def make_task(config: Config, dataset: Dataset, evaluates: bool) -> Detection:
    """Makes the task of a config and its data.

    Raises:
      UserError: if the data have no boxes, the network has no head for them, or an option is of another task.
    """
    del evaluates
    if any("boxes" not in split.targets for split in (dataset.train, dataset.eval) if len(split)):
        raise UserError(
            f"data.name={dataset.name!r} has no boxes, which task=detection needs; use box_folder, coco or"
            " voc_detection"
        )
    check_installed()  # before hours of training, not at the first evaluation
    if config.model.head != "ssdlite":
        raise UserError("task=detection needs a head for boxes; set model.head=ssdlite")
    check_options(
        config,
        {
            "data.crop": config.data.crop in ("iou", "none"),
            "data.size": config.data.size is None,
            "model.strides": {*config.model.strides} == {2},  # anchors lie on maps of these strides
            "model.output_stride": config.model.output_stride == 32,
            "augment.rotation_degrees": config.augment.rotation_degrees == 0,
            "loss.class_weights": config.loss.class_weights == "none",
        },
    )
    check_num_classes(config, dataset)
    return Detection(
        model=for_classes(config.model, config.norm, len(dataset.class_names)),
        data=config.data,
        augment=config.augment,
        class_names=dataset.class_names,
        seed=config.seed,
        truth=dataset.eval,
    )


def known_classes(dataset: Dataset, info: WeightsInfo, num_classes: int) -> Dataset:
    """Returns the data with the classes of the weights, which have all classes of the data by name, for an evaluation.

    So weights for the 90 ids of COCO's categories are evaluated on data with its 80 categories. A class of which the
    data have no boxes isn't in the means.

    Raises:
      UserError: naming the first class that differs, if the weights lack one.
    """
    names, classes = info.labels, dataset.eval.targets.get("classes")
    if len(names) != num_classes or not {*dataset.class_names} <= {*names} or classes is None:
        return same_classes(dataset, info, num_classes)
    numbers = np.array([names.index(name) for name in dataset.class_names], np.int32)
    targets: dict[str, Callable[[int], Any]] = {**dataset.eval.targets, "classes": Renumbered(classes, numbers)}
    evaluated = dataclasses.replace(dataset.eval, targets=targets)
    return dataclasses.replace(dataset, class_names=names, eval=evaluated)


TASKS.add(
    "detection",
    Kind(
        name="detection",
        model=for_classes,
        make=make_task,
        answers=box_lists,
        page=DETECTION,
        with_known_classes=known_classes,
        check_head=check_head,
        framing=framing,
    ),
    __name__,
)
