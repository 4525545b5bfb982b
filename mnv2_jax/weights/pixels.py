"""Preprocessing that the layers of a Keras model do before its first convolution, as a `Preprocessing`.

    image ─► Resizing, CenterCrop ─► Rescaling, Normalization, x / 127.5 - 1 ─► first convolution

All that such layers do to the values of a pixel is a factor and an offset a channel. Layers that augment do nothing in
inference.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mnv2_jax.errors import UserError

_TRAINING_ONLY = {"AugMix", "CutMix", "Equalization", "MixUp", "RandAugment", "Solarization"}
_NOTHING = {
    *("InputLayer", "Identity", "ActivityRegularization", "Augmenter", "Dropout", "SpatialDropout2D"),
    *("GaussianNoise", "GaussianDropout", "AlphaDropout"),
}
_OPERATIONS = {
    "truediv": "divide",  # tf.math's, and Python's on tensors
    "truedivide": "divide",  # keras.ops'
    "divide": "divide",
    "div": "divide",
    "realdiv": "divide",  # TensorFlow's own
    "multiply": "multiply",
    "mul": "multiply",
    "add": "add",
    "addv2": "add",
    "biasadd": "add",
    "subtract": "subtract",
    "sub": "subtract",
    "cast": "cast",
    "resize": "resize",
}
"""Operations that any version of Keras lists as a layer, without underscores."""
_FLOATS = {"float16", "bfloat16", "float32", "float64"}
_INTERPOLATIONS = ("bilinear", "bicubic")
_SMALLEST_DEVIATION = 1e-7
"""Normalization divides by no less."""


@dataclasses.dataclass(frozen=True)
class Step:
    """A layer between the image and the first convolution."""

    name: str
    listed: Mapping[str, Any]
    """Layer as the model's config lists it: class_name, config and inbound_nodes."""
    arrays: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    """mean and var of a Normalization that has learnt them."""

    @property
    def klass(self) -> str:
        """Without the package that it was registered in."""
        return str(self.listed["class_name"]).rpartition(">")[2]

    @property
    def config(self) -> Mapping[str, Any]:
        """Options of the layer."""
        return dict(self.listed["config"])

    def refused(self, what: str) -> UserError:
        """With what it does that no `Preprocessing` says."""
        return UserError(
            f"layer {self.name!r} ({self.klass}) {what} before the first convolution, which our preprocessing can't"
            " express; save the model without it, and do it to the images"
        )


@dataclasses.dataclass(frozen=True)
class Pixels:
    """Preprocessing up to a layer."""

    size: tuple[int, int] | None
    """Height and width of the map; None: any."""
    factor: np.ndarray
    """[3], of a pixel from 0 to 255, RGB."""
    offset: np.ndarray
    """[3], added to it then."""
    is_scaled: bool = False
    """Whether any layer said so."""
    view: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Fields of `Preprocessing` that resizing and cropping set."""

    def said(self) -> dict[str, Any]:
        """Fields of `Preprocessing`, those that no layer says left out.

        Raises:
          UserError: if a channel is inverted or lost.
        """
        told = dict(self.view)
        if self.is_scaled:
            if not np.all(self.factor > 0):
                raise UserError(
                    f"its layers multiply pixels by {self.factor.tolist()} before the first convolution, which our"
                    " preprocessing can't express; save the model without them, and do it to the images"
                )
            std = 1 / (255 * self.factor)
            told |= {"mean": _rounded(-self.offset * std), "std": _rounded(std)}
        return told


def _rounded(values: np.ndarray) -> tuple[float, ...]:
    """Without the last digits, which hide the number that was meant."""
    return tuple(float(f"{value:.7g}") + 0.0 for value in values)


def preprocessing_of(steps: Sequence[Step], size: tuple[int, int] | None, version: str) -> dict[str, Any]:
    """Fields of `weights.file.Preprocessing`, as far as layers say them.

    Args:
      steps: from the image to the first convolution.
      size: height and width of the image; None: any.
      version: of Keras.

    Raises:
      UserError: naming the layer, if it does something that no `Preprocessing` says.
    """
    pixels = Pixels(size, np.ones(3), np.zeros(3))
    for step in steps:
        pixels = _after(pixels, step, version)
    return pixels.said()


def _after(pixels: Pixels, step: Step, version: str) -> Pixels:
    klass, config = step.klass, step.config
    if klass == "Rescaling":
        return _scaled(pixels, _three(step, config["scale"]), _three(step, config.get("offset", 0)))
    if klass == "Normalization":
        return _normalised(pixels, step)
    if klass == "Resizing":
        return _resized(pixels, step, (config["height"], config["width"]), config)
    if klass == "CenterCrop":
        return _cropped(pixels, step)
    if klass == "RandomCrop" and not version.startswith("3."):  # Keras 2 resizes in inference
        return _resized(pixels, step, (config["height"], config["width"]), {"crop_to_aspect_ratio": True})
    is_linear = klass == "Activation" and config.get("activation") == "linear"
    if klass.startswith("Random") or klass in _TRAINING_ONLY | _NOTHING or is_linear:
        return pixels
    operation = _operation(step)
    if operation is None:
        raise step.refused("changes images")
    if operation == "resize":
        told = dict(config, **_named_arguments(step))
        told.setdefault("interpolation", told.get("method", "bilinear"))  # method: tf.image's word
        return _resized(pixels, step, tuple(told["size"]), told)
    if operation == "cast":
        kind = _named_arguments(step).get("dtype", config.get("dtype"))
        if klass != "TensorFlowOpLayer" and kind not in _FLOATS:
            raise step.refused(f"makes {kind} of pixels")
        return pixels
    return _computed(pixels, step, operation)


# --- values -----------------------------------------------------------------------------------------------------


def _scaled(pixels: Pixels, factor: np.ndarray, offset: np.ndarray) -> Pixels:
    return dataclasses.replace(
        pixels, factor=pixels.factor * factor, offset=pixels.offset * factor + offset, is_scaled=True
    )


def _normalised(pixels: Pixels, step: Step) -> Pixels:
    config = step.config
    told = config.get("mean"), config.get("variance")
    if None in told:
        if not {"mean", "var"} <= set(step.arrays):
            raise UserError(f"the mean of layer {step.name!r} isn't in it; save the whole model as .keras")
        told = step.arrays["mean"], step.arrays["var"]
    mean, variance = (_three(step, value) for value in told)
    deviation = np.maximum(np.sqrt(variance), _SMALLEST_DEVIATION)
    if config.get("invert"):
        return _scaled(pixels, deviation, mean)
    return _scaled(pixels, 1 / deviation, -mean / deviation)


def _computed(pixels: Pixels, step: Step, operation: str) -> Pixels:
    """After arithmetic with a constant."""
    arguments = _arguments(step)
    constants = [value for value in arguments if not _is_map(value)]
    if len(constants) != 1 or len(arguments) != 2:
        raise step.refused("computes with something else than a constant")
    comes_first = not _is_map(arguments[0])
    value, one = _three(step, constants[0]), np.ones(3)
    if operation == "divide":
        if comes_first or not np.all(value):
            raise step.refused("divides a constant by pixels" if comes_first else "divides pixels by zero")
        return _scaled(pixels, 1 / value, 0 * one)
    if operation == "multiply":
        return _scaled(pixels, value, 0 * one)
    if operation == "add":
        return _scaled(pixels, one, value)
    return _scaled(pixels, -one, value) if comes_first else _scaled(pixels, one, -value)


def _three(step: Step, value: Any) -> np.ndarray:
    """A number, or three along the last axis, for the channels."""
    while isinstance(value, dict):  # a NumPy array or a tensor, in Keras 3
        value = value["config"]["value"]
    array = np.asarray(value, np.float64)
    if array.size not in (1, 3) or (array.size == 3 and array.shape[-1] != 3) or not np.all(np.isfinite(array)):
        raise step.refused(f"computes with numbers {list(array.shape)}, not one a channel,")
    return np.broadcast_to(array.reshape(-1), (3,))


# --- size -------------------------------------------------------------------------------------------------------


def _resized(pixels: Pixels, step: Step, size: tuple[int, ...], config: Mapping[str, Any]) -> Pixels:
    height, width = size
    interpolation = config.get("interpolation", "bilinear")
    if height != width:
        raise step.refused(f"resizes to {height}×{width}")
    if interpolation not in _INTERPOLATIONS:
        raise step.refused(f"resizes by {interpolation}")
    if config.get("pad_to_aspect_ratio") or config.get("preserve_aspect_ratio"):
        raise step.refused("resizes with edges added")
    view = dict(
        pixels.view, interpolation=interpolation, antialias=bool(config.get("antialias", False)), resolution=height
    )
    # What makes images of one size is known only if they come in any.
    if pixels.size is None:
        crop = "resize_crop" if config.get("crop_to_aspect_ratio") else "central"
        view |= {"eval_crop": crop, "eval_crop_fraction": 1.0}
    elif config.get("crop_to_aspect_ratio") and pixels.size[0] != pixels.size[1]:
        raise step.refused(f"cuts images of {pixels.size[0]}×{pixels.size[1]}")
    return dataclasses.replace(pixels, size=(height, width), view=view)


def _cropped(pixels: Pixels, step: Step) -> Pixels:
    height, width = step.config["height"], step.config["width"]
    if pixels.size == (height, width):
        return pixels
    if pixels.size is None or height != width or pixels.size[0] != pixels.size[1] or height > pixels.size[0]:
        known = "any size" if pixels.size is None else f"{pixels.size[0]}×{pixels.size[1]}"
        raise step.refused(f"cuts {height}×{width} out of {known}")
    share = pixels.view.get("eval_crop_fraction", 1.0) * height / pixels.size[0]
    view = dict(pixels.view, eval_crop_fraction=share, resolution=height)
    return dataclasses.replace(pixels, size=(height, width), view=view)


# --- operations, as versions of Keras list them -----------------------------------------------------------------


def _operation(step: Step) -> str | None:
    """One of `_OPERATIONS`; None for any other layer."""
    name = step.klass
    if name == "TFOpLambda":  # of Keras 2
        name = str(step.config.get("function")).rpartition(".")[2]
    elif name == "TensorFlowOpLayer":  # up to TensorFlow 2.3
        name = _node(step)["op"]
    return _OPERATIONS.get(name.replace("_", "").lower())


def _node(step: Step) -> Mapping[str, Any]:
    told = step.config["node_def"]
    return dict(json.loads(told) if isinstance(told, str) else told)


def _call(step: Step) -> tuple[list[Any], Mapping[str, Any]]:
    """Its arguments in order, a constant as it is, and those with names."""
    (node,) = step.listed["inbound_nodes"]
    if isinstance(node, dict):
        return list(node["args"]), node["kwargs"]
    while isinstance(node[0], list):
        (node,) = node
    named = node[3] if len(node) > 3 else {}
    first = node[2] if node[0] == "_CONSTANT_VALUE" else node[:3]
    return [first], named


def _named_arguments(step: Step) -> dict[str, Any]:
    return {name: value for name, value in _call(step)[1].items() if value is not None}


def _arguments(step: Step) -> list[Any]:
    if step.klass == "TensorFlowOpLayer":
        constants = {int(place): value for place, value in step.config["constants"].items()}
        return [constants.get(place, ["", 0, 0]) for place in (0, 1)]
    arguments, named = _call(step)
    return [*arguments, *(value for name, value in named.items() if name in ("x", "x1", "x2", "y", "bias"))]


def _is_map(argument: Any) -> bool:
    """["name", 0, 0] in Keras 2."""
    if isinstance(argument, dict):
        return argument.get("class_name") == "__keras_tensor__"
    return isinstance(argument, list) and isinstance(argument[0], str)
