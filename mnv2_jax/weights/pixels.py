"""Turns the layers before a Keras model's first convolution into the fields of a `Preprocessing`.

    image ─► Resizing, CenterCrop ─► Rescaling, Normalization, x / 127.5 - 1 ─► first convolution

Together, such layers change pixel values by one factor and one offset per channel. Augmentation layers do nothing in
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
    "truediv": "divide",  # of tf.math, and of Python on tensors
    "truedivide": "divide",  # of keras.ops
    "divide": "divide",
    "div": "divide",
    "realdiv": "divide",  # of TensorFlow itself
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
"""Operations that some version of Keras lists as a layer; their names are written without underscores."""
_FLOATS = {"float16", "bfloat16", "float32", "float64"}
_INTERPOLATIONS = ("bilinear", "bicubic")
_SMALLEST_DEVIATION = 1e-7
"""Smallest divisor of a Normalization layer."""


@dataclasses.dataclass(frozen=True)
class Step:
    """A layer between the image and the first convolution."""

    name: str
    listed: Mapping[str, Any]
    """Entry of the layer in the model's config: class_name, config and inbound_nodes."""
    arrays: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    """mean and var of a Normalization that learnt them from data."""

    @property
    def class_name(self) -> str:
        """Class of the layer, without the package under which it is registered."""
        return str(self.listed["class_name"]).rpartition(">")[2]

    @property
    def config(self) -> Mapping[str, Any]:
        """Options of the layer."""
        return dict(self.listed["config"])

    def refusal(self, problem: str) -> UserError:
        """Makes the error for a layer that no `Preprocessing` can express.

        Args:
          problem: what the layer does, beginning with a verb.
        """
        return UserError(
            f"layer {self.name!r} ({self.class_name}) {problem} before the first convolution, which our preprocessing"
            " can't express; save the model without this layer, and apply it to the images yourself"
        )


@dataclasses.dataclass(frozen=True)
class Pixels:
    """Preprocessing by all layers up to some layer."""

    size: tuple[int, int] | None
    """Height and width of the map; None: any."""
    factor: np.ndarray
    """Factors for pixels from 0 to 255, [3], in the order RGB."""
    offset: np.ndarray
    """Offsets added to the scaled pixels, [3]."""
    is_scaled: bool = False
    """Whether any of the layers changes pixel values."""
    view: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Fields of `Preprocessing` that resizing and cropping set."""

    def fields(self) -> dict[str, Any]:
        """Fields of `Preprocessing` that the layers determine.

        Raises:
          UserError: if a channel's factor is negative or 0.
        """
        fields = dict(self.view)
        if self.is_scaled:
            if not np.all(self.factor > 0):
                raise UserError(
                    f"its layers multiply pixels by {self.factor.tolist()} before the first convolution, which our"
                    " preprocessing can't express; save the model without them, and apply them to the images yourself"
                )
            std = 1 / (255 * self.factor)
            fields |= {"mean": _rounded(-self.offset * std), "std": _rounded(std)}
        return fields


def _rounded(values: np.ndarray) -> tuple[float, ...]:
    """Rounds to 7 digits, which restores round numbers such as 0.5."""
    return tuple(float(f"{value:.7g}") + 0.0 for value in values)


def preprocessing_of(steps: Sequence[Step], size: tuple[int, int] | None, version: str) -> dict[str, Any]:
    """Computes the fields of `weights.file.Preprocessing` that the layers determine.

    Args:
      steps: the layers from the image to the first convolution.
      size: height and width of the image; None: any.
      version: version of Keras.

    Raises:
      UserError: naming a layer that no `Preprocessing` can express.
    """
    pixels = Pixels(size, np.ones(3), np.zeros(3))
    for step in steps:
        pixels = _after(pixels, step, version)
    return pixels.fields()


def _after(pixels: Pixels, step: Step, version: str) -> Pixels:
    class_name, config = step.class_name, step.config
    if class_name == "Rescaling":
        return _scaled(pixels, _three(step, config["scale"]), _three(step, config.get("offset", 0)))
    if class_name == "Normalization":
        return _normalised(pixels, step)
    if class_name == "Resizing":
        return _resized(pixels, step, (config["height"], config["width"]), config)
    if class_name == "CenterCrop":
        return _cropped(pixels, step)
    if class_name == "RandomCrop" and not version.startswith("3."):  # in Keras 2 it resizes in inference
        return _resized(pixels, step, (config["height"], config["width"]), {"crop_to_aspect_ratio": True})
    is_linear = class_name == "Activation" and config.get("activation") == "linear"
    if class_name.startswith("Random") or class_name in _TRAINING_ONLY | _NOTHING or is_linear:
        return pixels
    operation = _operation(step)
    if operation is None:
        raise step.refusal("changes images in an unknown way")
    if operation == "resize":
        options = dict(config, **_named_arguments(step))
        options.setdefault("interpolation", options.get("method", "bilinear"))  # tf.image calls it method
        return _resized(pixels, step, tuple(options["size"]), options)
    if operation == "cast":
        kind = _named_arguments(step).get("dtype", config.get("dtype"))
        if class_name != "TensorFlowOpLayer" and kind not in _FLOATS:
            raise step.refusal(f"casts pixels to {kind}")
        return pixels
    return _computed(pixels, step, operation)


# --- values -----------------------------------------------------------------------------------------------------


def _scaled(pixels: Pixels, factor: np.ndarray, offset: np.ndarray) -> Pixels:
    return dataclasses.replace(
        pixels, factor=pixels.factor * factor, offset=pixels.offset * factor + offset, is_scaled=True
    )


def _normalised(pixels: Pixels, step: Step) -> Pixels:
    config = step.config
    moments = config.get("mean"), config.get("variance")
    if None in moments:
        if not {"mean", "var"} <= set(step.arrays):
            raise UserError(f"doesn't hold the mean of layer {step.name!r}; save the whole model as .keras")
        moments = step.arrays["mean"], step.arrays["var"]
    mean, variance = (_three(step, value) for value in moments)
    deviation = np.maximum(np.sqrt(variance), _SMALLEST_DEVIATION)
    if config.get("invert"):
        return _scaled(pixels, deviation, mean)
    return _scaled(pixels, 1 / deviation, -mean / deviation)


def _computed(pixels: Pixels, step: Step, operation: str) -> Pixels:
    """Applies arithmetic with a constant."""
    arguments = _arguments(step)
    constants = [value for value in arguments if not _is_map(value)]
    if len(constants) != 1 or len(arguments) != 2:
        raise step.refusal("computes with something other than one constant")
    comes_first = not _is_map(arguments[0])
    value, one = _three(step, constants[0]), np.ones(3)
    if operation == "divide":
        if comes_first or not np.all(value):
            raise step.refusal("divides a constant by pixels" if comes_first else "divides pixels by zero")
        return _scaled(pixels, 1 / value, 0 * one)
    if operation == "multiply":
        return _scaled(pixels, value, 0 * one)
    if operation == "add":
        return _scaled(pixels, one, value)
    return _scaled(pixels, -one, value) if comes_first else _scaled(pixels, one, -value)


def _three(step: Step, value: Any) -> np.ndarray:
    """Expands a number, or three numbers along the last axis, to one number per channel."""
    while isinstance(value, dict):  # how Keras 3 writes a NumPy array or a tensor
        value = value["config"]["value"]
    array = np.asarray(value, np.float64)
    if array.size not in (1, 3) or (array.size == 3 and array.shape[-1] != 3) or not np.all(np.isfinite(array)):
        raise step.refusal(f"computes with numbers of shape {list(array.shape)}, not with one per channel,")
    return np.broadcast_to(array.reshape(-1), (3,))


# --- size -------------------------------------------------------------------------------------------------------


def _resized(pixels: Pixels, step: Step, size: tuple[int, ...], config: Mapping[str, Any]) -> Pixels:
    height, width = size
    interpolation = config.get("interpolation", "bilinear")
    if height != width:
        raise step.refusal(f"resizes to {height}×{width}")
    if interpolation not in _INTERPOLATIONS:
        raise step.refusal(f"resizes by {interpolation}")
    if config.get("pad_to_aspect_ratio") or config.get("preserve_aspect_ratio"):
        raise step.refusal("resizes and adds edges")
    view = dict(
        pixels.view, interpolation=interpolation, antialias=bool(config.get("antialias", False)), resolution=height
    )
    # If images may have any size, this layer shows how they become one size. Otherwise that happens outside the model.
    if pixels.size is None:
        crop = "resize_crop" if config.get("crop_to_aspect_ratio") else "central"
        view |= {"eval_crop": crop, "eval_crop_fraction": 1.0}
    elif config.get("crop_to_aspect_ratio") and pixels.size[0] != pixels.size[1]:
        raise step.refusal(f"crops images of {pixels.size[0]}×{pixels.size[1]}")
    return dataclasses.replace(pixels, size=(height, width), view=view)


def _cropped(pixels: Pixels, step: Step) -> Pixels:
    height, width = step.config["height"], step.config["width"]
    if pixels.size == (height, width):
        return pixels
    if pixels.size is None or height != width or pixels.size[0] != pixels.size[1] or height > pixels.size[0]:
        given_size = "any size" if pixels.size is None else f"{pixels.size[0]}×{pixels.size[1]}"
        raise step.refusal(f"crops {height}×{width} out of {given_size}")
    share = pixels.view.get("eval_crop_fraction", 1.0) * height / pixels.size[0]
    view = dict(pixels.view, eval_crop_fraction=share, resolution=height)
    return dataclasses.replace(pixels, size=(height, width), view=view)


# --- operations, as the versions of Keras list them -------------------------------------------------------------


def _operation(step: Step) -> str | None:
    """Operation of a layer, a value of `_OPERATIONS`; None for any other layer."""
    name = step.class_name
    if name == "TFOpLambda":  # in Keras 2
        name = str(step.config.get("function")).rpartition(".")[2]
    elif name == "TensorFlowOpLayer":  # up to TensorFlow 2.3
        name = _node(step)["op"]
    return _OPERATIONS.get(name.replace("_", "").lower())


def _node(step: Step) -> Mapping[str, Any]:
    definition = step.config["node_def"]
    return dict(json.loads(definition) if isinstance(definition, str) else definition)


def _call(step: Step) -> tuple[list[Any], Mapping[str, Any]]:
    """Positional arguments and keyword arguments of a layer's call; constants keep their value."""
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
    if step.class_name == "TensorFlowOpLayer":
        constants = {int(place): value for place, value in step.config["constants"].items()}
        return [constants.get(place, ["", 0, 0]) for place in (0, 1)]
    arguments, named = _call(step)
    return [*arguments, *(value for name, value in named.items() if name in ("x", "x1", "x2", "y", "bias"))]


def _is_map(argument: Any) -> bool:
    """Whether an argument is the output of a layer: ["name", 0, 0] in Keras 2, a dict in Keras 3."""
    if isinstance(argument, dict):
        return argument.get("class_name") == "__keras_tensor__"
    return isinstance(argument, list) and isinstance(argument[0], str)
