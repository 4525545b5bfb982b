"""What a library does and its files of weights don't say: padding, epsilon, momentum, normalisation of images."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Literal

Source = Literal["torchvision", "timm", "timm_tf", "corenet", "keras", "tflite"]
Padding = Literal["same", "symmetric", "keras_v1"]


@dataclasses.dataclass(frozen=True)
class Convention:
    """What a library does and its files don't say."""

    padding: Padding
    epsilon: float
    decay: float
    """Of the running statistics: 1 - PyTorch's momentum."""
    normalisation: tuple[float, float] | None = None
    """Mean and deviation of all channels; None: ImageNet's."""
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    activation: Literal["relu", "relu6"] | None = None


WIDTH_RULES: Mapping[tuple[str, str], str] = {
    ("torchvision", "mobilenet_v3"): "torchvision",
    ("corenet", "mobilenet_v1"): "corenet",
    ("corenet", "mobilenet_v2"): "corenet",
    ("keras", "mobilenet_v3"): "keras",
}
"""By source and family; standard elsewhere."""
HALF = (0.5, 0.5)
"""Pixels run from -1 to 1."""
CONVENTIONS: Mapping[tuple[str, str], Convention] = {
    # torchvision/models: mobilenetv2.py, mobilenetv3.py (epsilon 0.001, momentum 0.01), resnet.py
    ("torchvision", "mobilenet_v2"): Convention("symmetric", 1e-5, 0.9),
    ("torchvision", "mobilenet_v3"): Convention("symmetric", 1e-3, 0.99),
    ("torchvision", "resnet50"): Convention("symmetric", 1e-5, 0.9),
    # timm/models: efficientnet.py, mobilenetv3.py, resnet.py; its tf_ models keep TensorFlow's padding and epsilon
    ("timm", "mobilenet_v1"): Convention("symmetric", 1e-5, 0.9, HALF, "bicubic"),
    ("timm", "mobilenet_v2"): Convention("symmetric", 1e-5, 0.9, None, "bicubic"),
    ("timm", "mobilenet_v3"): Convention("symmetric", 1e-5, 0.9, None, "bicubic"),
    ("timm", "mobilenet_v4"): Convention("symmetric", 1e-5, 0.9, None, "bicubic"),
    ("timm", "resnet50"): Convention("symmetric", 1e-5, 0.9, None, "bicubic"),
    ("timm_tf", "mobilenet_v3"): Convention("same", 1e-3, 0.99, HALF),
    # apple/corenet projects/mobilenet_v{1,2}: pixels from 0 to 1; V1 has ReLU. Its V3 is another network.
    ("corenet", "mobilenet_v1"): Convention("symmetric", 1e-5, 0.9, (0.0, 1.0), activation="relu"),
    ("corenet", "mobilenet_v2"): Convention("symmetric", 1e-5, 0.9, (0.0, 1.0)),
    # keras/src/applications: mobilenet.py, mobilenet_v2.py, mobilenet_v3.py; "tf" mode of preprocess_input
    ("keras", "mobilenet_v1"): Convention("keras_v1", 1e-3, 0.99, HALF),
    ("keras", "mobilenet_v2"): Convention("same", 1e-3, 0.999, HALF),
    ("keras", "mobilenet_v3"): Convention("same", 1e-3, 0.999, HALF),
    # TensorFlow's padding; the norms are folded, so the epsilon is only that of the identity
    ("tflite", "mobilenet_v1"): Convention("same", 1e-3, 0.997, HALF),
    ("tflite", "mobilenet_v2"): Convention("same", 1e-3, 0.997, HALF),
    ("tflite", "mobilenet_v3"): Convention("same", 1e-3, 0.997, HALF),
}
"""By source and family."""
