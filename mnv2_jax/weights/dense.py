"""Networks of other libraries that find classes of pixels or boxes: names of layers, and what their files don't say."""

from __future__ import annotations

import pathlib
import types
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from mnv2_jax.data.mask_classes import VOC
from mnv2_jax.errors import UserError
from mnv2_jax.models.anchors import NUM_MAPS, shapes_of
from mnv2_jax.models.heads import SSDLITE
from mnv2_jax.models.plan import Plan
from mnv2_jax.models.registry import Model
from mnv2_jax.weights import by_name, names
from mnv2_jax.weights.coco_classes import COCO
from mnv2_jax.weights.conventions import Source
from mnv2_jax.weights.layers import ForeignNetwork
from mnv2_jax.weights.names import Names
from mnv2_jax.weights.state_dicts import StateDict

WIDTHS = tuple(
    {"width": width, "width_rule": rule}
    for rule in ("standard", "divisor4")  # DeepLab's deeplabv3_mnv2_dm05 has the latter
    for width in (1.0, 0.5, 0.75, 0.35, 0.25, 1.3, 1.4)
)
"""Widths of MobileNetV2, among which that of a TFLite file is found by its channels."""


def _num_classes(tensors: Mapping[str, np.ndarray], table: Names) -> int:
    return by_name.num_classes(tensors, table)


def _no_options(tensors: Mapping[str, np.ndarray], table: Names) -> dict[str, Any]:
    del tensors, table
    return {}


class DenseForm(NamedTuple):
    """A form of network for pixels or boxes that a library writes."""

    model: str
    """Network of the features, where the user names none."""
    options: Mapping[str, Any]
    """Fields of `config.ModelConfig` that the file doesn't hold, as published."""
    resolution: int
    """Short side of images, in pixels, in the published evaluation."""
    names: Callable[[Plan], Names]
    """Table of names, features and head."""
    first: str
    """Our name of the layer whose outputs are `config.ModelConfig.head_channels`; empty: the head has no such layer."""
    head_epsilon: float
    """Epsilon of the norms of the head."""
    aux: str = ""
    """Beginning of the names of an auxiliary head of our form; empty: the library has none."""
    unused: Mapping[str, str] = types.MappingProxyType({})
    """What is left out: a text for the note, by the beginning of the tensors' names."""
    is_pool_first: bool = False
    """Whether the pooled image stands before the other branches in the input of the projection."""
    task: str = "segmentation"
    """Task of the network."""
    num_classes: Callable[[Mapping[str, np.ndarray], Names], int] = _num_classes
    """Counts the classes, from the tensors and the table of names."""
    more_options: Callable[[Mapping[str, np.ndarray], Names], dict[str, Any]] = _no_options
    """Reads further fields of `config.ModelConfig` from the shapes of the tensors."""
    preprocessing: Mapping[str, Any] = types.MappingProxyType({"eval_crop_fraction": 1.0})
    """Fields of `file.Preprocessing` in the published evaluation; whole images are evaluated."""
    decay: float | None = None
    """Decay of the norms' statistics, where it isn't that of the library's classifiers."""
    classes: Mapping[int, tuple[str, ...]] = types.MappingProxyType({len(VOC): VOC})
    """Names of the classes that are meant where a file has this many and doesn't name them."""
    has_x_first: bool = False
    """Whether codes of boxes are in the order x, y, width, height."""


def _torchvision(plan: Plan) -> Names:
    """Names of the features, which torchvision cuts out of ``features``."""
    return {
        layer: name.replace("features.", "backbone.", 1)
        for layer, name in names.torchvision_v3(plan).items()
        if name.startswith("features.")
    }


def _torchvision_lraspp(plan: Plan) -> Names:
    return _torchvision(plan) | {
        "lraspp/conv": "classifier.cbr.0",
        "lraspp/conv_norm": "classifier.cbr.1",
        "lraspp/gate": "classifier.scale.1",
        "low_classifier": "classifier.low_classifier",
        "classifier": "classifier.high_classifier",
    }


def _torchvision_deeplabv3(plan: Plan) -> Names:
    table = _torchvision(plan)
    for place, branch in enumerate(("pointwise", "dilated_1", "dilated_2", "dilated_3")):
        table |= {
            f"aspp/{branch}": f"classifier.0.convs.{place}.0",
            f"aspp/{branch}_norm": f"classifier.0.convs.{place}.1",
        }
    return table | {
        "aspp/pool": "classifier.0.convs.4.1",
        "aspp/pool_norm": "classifier.0.convs.4.2",
        "aspp/project": "classifier.0.project.0",
        "aspp/project_norm": "classifier.0.project.1",
        "aspp/conv": "classifier.1",
        "aspp/conv_norm": "classifier.2",
        "classifier": "classifier.4",
    }


def _torchvision_ssdlite(plan: Plan) -> Names:
    """Names of torchvision's SSDLite, which cuts its features behind an expansion: features.0 ends with it."""
    tap = int((SSDLITE.tap(plan) or "").removeprefix("block_"))
    table = Names()
    for layer, name in names.torchvision_v3(plan).items():
        place, _, rest = name.removeprefix("features.").partition(".")
        if not name.startswith("features."):
            continue
        if int(place) < tap:
            table[layer] = f"backbone.features.0.{place}.{rest}"
        elif int(place) > tap:
            table[layer] = f"backbone.features.1.{int(place) - tap}.{rest}"
        elif rest.startswith("block.0."):
            table[layer] = f"backbone.features.0.{place}.{rest.removeprefix('block.0.')}"
        else:
            table[layer] = f"backbone.features.1.0.{rest.removeprefix('block.')}"
    for number in range(4):
        for index, layer in enumerate(("reduce", "depthwise", "project")):
            at = f"backbone.extra.{number}.{index}"
            table |= {f"extra_{number + 1}/{layer}": f"{at}.0", f"extra_{number + 1}/{layer}_norm": f"{at}.1"}
    for kind, library in (("boxes", "regression"), ("classifier", "classification")):
        for number in range(NUM_MAPS):
            ours, at = f"map_{number + 1}_{kind}", f"head.{library}_head.module_list.{number}"
            table |= {ours: f"{at}.1", f"{ours}/depthwise": f"{at}.0.0", f"{ours}/depthwise_norm": f"{at}.0.1"}
    return table


def _ssdlite_classes(tensors: Mapping[str, np.ndarray], table: Names) -> int:
    anchors = len(shapes_of("torchvision")[0])
    return len(tensors[f"{table['map_1_classifier']}.weight"]) // anchors - 1  # the first is the background


def _ssdlite_tail(tensors: Mapping[str, np.ndarray], table: Names) -> dict[str, Any]:
    kernel = tensors.get(f"{table['head']}.weight", np.empty(0))
    return {"reduced_tail": "torchvision" if len(kernel) == 480 else None}


def _corenet_deeplabv3(plan: Plan) -> Names:
    features = {
        layer: f"encoder.{name}"
        for layer, name in names.corenet(plan).items()
        if not name.startswith(("classifier.", "conv_1x1_exp."))
    }
    at = "seg_head.aspp.aspp_layer"
    places = {
        "aspp/pointwise": f"{at}.convs.0",
        **{f"aspp/dilated_{number}": f"{at}.convs.{number}" for number in (1, 2, 3)},
        "aspp/pool": f"{at}.convs.4.aspp_pool.conv_1x1",
        "aspp/project": f"{at}.project",
        "aux/conv": "seg_head.aux_head.0",
    }
    head = {layer: f"{place}.block.conv" for layer, place in places.items()}
    head |= {f"{layer}_norm": f"{place}.block.norm" for layer, place in places.items()}
    return (
        features
        | head
        | {
            "aux_classifier": "seg_head.aux_head.2.block.conv",
            "classifier": "seg_head.classifier.block.conv",
        }
    )


def _transformers_deeplabv3(plan: Plan) -> Names:
    places = {"pointwise": "conv_aspp", "pool": "conv_pool", "project": "conv_projection"}
    head = {f"aspp/{layer}": f"segmentation_head.{place}.convolution" for layer, place in places.items()}
    head |= {f"aspp/{layer}_norm": f"segmentation_head.{place}.normalization" for layer, place in places.items()}
    return names.transformers_v2(plan) | head | {"classifier": "segmentation_head.classifier.convolution"}


DENSE: Mapping[tuple[Source, str], DenseForm] = {
    # torchvision/models/segmentation/lraspp.py, deeplabv3.py, mobilenetv3.py (dilated=True)
    ("torchvision", "lraspp"): DenseForm(
        model="mobilenet_v3_large",
        options={"output_stride": 16, "dilation_from": "same"},
        resolution=520,
        names=_torchvision_lraspp,
        first="lraspp/conv",
        head_epsilon=1e-5,
    ),
    ("torchvision", "deeplabv3"): DenseForm(
        model="mobilenet_v3_large",
        options={"output_stride": 16, "dilation_from": "same", "aspp_rates": (12, 24, 36), "aspp_conv": True},
        resolution=520,
        names=_torchvision_deeplabv3,
        first="aspp/pointwise",
        head_epsilon=1e-5,
        # It has 10 channels at stride 8, and ours at least 128 at stride 16. Inference needs neither.
        unused={"aux_classifier.": "the auxiliary head, which is of another form and only used in training,"},
    ),
    # torchvision/models/detection/ssdlite.py; GeneralizedRCNNTransform resizes without antialiasing
    ("torchvision", "ssdlite"): DenseForm(
        model="mobilenet_v3_large",
        options={"anchors": "torchvision", "box_scores": "softmax"},
        resolution=320,
        names=_torchvision_ssdlite,
        first="",
        head_epsilon=1e-3,
        task="detection",
        num_classes=_ssdlite_classes,
        more_options=_ssdlite_tail,
        preprocessing={
            "mean": (0.5, 0.5, 0.5),
            "std": (0.5, 0.5, 0.5),
            "antialias": False,
            "eval_min_score": 0.001,
            "eval_nms_iou": 0.55,
            "eval_max_boxes": 300,
        },
        decay=0.97,
        classes={len(COCO): COCO},
        has_x_first=True,
    ),
    # apple/corenet projects/mobilenet_v2/segmentation/deeplabv3_ade20k.yaml, heads/deeplabv3.py, modules/aspp_block.py
    ("corenet", "deeplabv3"): DenseForm(
        model="mobilenet_v2",
        options={"output_stride": 8, "aspp_rates": (12, 24, 36)},
        resolution=512,
        names=_corenet_deeplabv3,
        first="aspp/pointwise",
        head_epsilon=1e-5,
        aux="seg_head.aux_head.",
    ),
    # transformers/models/mobilenet_v2/modeling_mobilenet_v2.py; the stride is that of deeplabv3_mobilenet_v2_1.0_513
    ("transformers", "deeplabv3"): DenseForm(
        model="mobilenet_v2",
        options={"output_stride": 8},
        resolution=513,
        names=_transformers_deeplabv3,
        first="aspp/pointwise",
        head_epsilon=1e-5,
        unused={"mobilenet_v2.conv_1x1.": "the last convolution of the classifier, which DeepLab doesn't use,"},
        is_pool_first=True,
    ),
    # TensorFlow's research/deeplab, model_zoo.md; order and options of its layers are read from the file
    ("tflite", "deeplabv3"): DenseForm(
        model="mobilenet_v2",
        options={},
        resolution=513,
        names=lambda plan: {},
        first="",
        head_epsilon=1e-3,
        is_pool_first=True,
    ),
}
"""Forms by source and kind of head."""


def form_of(path: pathlib.Path, foreign: StateDict | ForeignNetwork, library: Source) -> DenseForm | None:
    """Returns the form of a dense network; None for a classifier.

    Raises:
      UserError: if the library has no such network.
    """
    if foreign.head == "classifier":
        return None
    if (library, foreign.head) not in DENSE:
        raise UserError(
            f"{path}: is {foreign.source}'s {foreign.head}, which {library} doesn't have; leave the library out"
        )
    return DENSE[library, foreign.head]


def options_of(path: pathlib.Path, form: DenseForm, foreign: StateDict, table: Names) -> dict[str, Any]:
    """Returns the options of the head, as far as shapes and names of the tensors tell them, with the published others.

    Raises:
      UserError: if the layer is missing whose shape is needed.
    """
    options = {**form.options, "head": foreign.head, **form.more_options(foreign.tensors, table)}
    if not form.first:
        return options
    name = f"{table[form.first]}.weight"
    if name not in foreign.tensors:
        raise UserError(
            f"{path}: isn't a whole {foreign.head} of {foreign.source}: it lacks {name}; give other weights"
        )
    return {
        **options,
        "head_channels": len(foreign.tensors[name]),
        "aux_head": bool(form.aux) and any(name.startswith(form.aux) for name in foreign.tensors),
    }


def used(form: DenseForm, tensors: Mapping[str, np.ndarray]) -> tuple[Mapping[str, np.ndarray], list[str]]:
    """Leaves out what is unused; returns the other tensors, and notes."""
    notes = []
    for beginning, text in form.unused.items():
        kept = {name: array for name, array in tensors.items() if not name.startswith(beginning)}
        if len(kept) < len(tensors):
            notes.append(f"{text} was left out: {beginning.rstrip('.')}")
        tensors = kept
    return tensors, notes


def adapt(form: DenseForm, model: Model, leaves: dict[str, np.ndarray]) -> list[str]:
    """Changes leaves in place where the library's head computes otherwise than ours, and returns notes.

    A norm of ours divides by √(var + epsilon) with one epsilon in the whole network; where the head's was another, the
    scale makes up for it, so inference is the same.
    """
    notes = []
    if form.head_epsilon != model.norm.epsilon:
        for part in model.head_parts:
            for place in [
                place for place in leaves if place.startswith(f"params/{part}/") and place.endswith("/scale")
            ]:
                var = leaves[place.replace("params", "batch_stats", 1).removesuffix("scale") + "var"].astype(np.float64)
                ratio = np.sqrt((var + model.norm.epsilon) / (var + form.head_epsilon))
                leaves[place] = (leaves[place] * ratio).astype(np.float32)
        notes.append(
            f"the norms of the head had an epsilon of {form.head_epsilon:g}; their scales were changed for"
            f" {model.norm.epsilon:g}, which gives the same outputs"
        )
    for place in [place for place in leaves if form.has_x_first and place.split("/")[1].endswith("_boxes")]:
        if place.count("/") == 2:  # the values of boxes, not the depthwise convolution before them
            codes = leaves[place].reshape(*leaves[place].shape[:-1], -1, 4)
            leaves[place] = codes[..., [1, 0, 3, 2]].reshape(leaves[place].shape)
    if form.is_pool_first:
        kernel = leaves["params/aspp/project/kernel"]
        leaves["params/aspp/project/kernel"] = np.roll(kernel, -model.options.head_channels, axis=2)
    return notes
