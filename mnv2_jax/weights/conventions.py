"""Conventions of libraries that their files don't state: padding, epsilon, momentum and preprocessing of images."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Literal

Source = Literal["torchvision", "timm", "timm_tf", "corenet", "transformers", "keras", "tflite"]
Padding = Literal["same", "symmetric", "keras_v1"]


@dataclasses.dataclass(frozen=True)
class Convention:
    """Conventions of a library that its files don't state."""

    padding: Padding
    epsilon: float
    decay: float
    """Decay of the running statistics: 1 - PyTorch's momentum."""
    normalisation: tuple[float, float] | None = None
    """Mean and standard deviation of all channels; None: ImageNet's."""
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    activation: Literal["relu", "relu6"] | None = None
    antialias: bool = True
    """Whether images were resized with antialiasing in the training; see `config.DataConfig.antialias`."""
    align_corners: bool = False
    """How a dense head resizes its logits; see `config.ModelConfig.align_corners`."""


WIDTH_RULES: Mapping[tuple[str, str], str] = {
    ("torchvision", "mobilenet_v3"): "torchvision",
    ("corenet", "mobilenet_v1"): "corenet",
    ("corenet", "mobilenet_v2"): "corenet",
    ("keras", "mobilenet_v3"): "keras",
}
"""Width rules by source and family; all others have the standard rule."""
HALF = (0.5, 0.5)
"""Normalisation to pixels from -1 to 1."""
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
    # TF-slim's weights. With TensorFlow's resizing instead of Pillow's, timm measured 0.00 to 0.48 points more for
    # these six networks: 75.77 % instead of 75.52 % for tf_mobilenetv3_large_100 ("*tfp" in its README of 2020).
    ("timm_tf", "mobilenet_v3"): Convention("same", 1e-3, 0.99, HALF, antialias=False),
    # apple/corenet projects/mobilenet_v{1,2}: pixels from 0 to 1; V1 has ReLU. CoreNet's V3 is a different network.
    ("corenet", "mobilenet_v1"): Convention("symmetric", 1e-5, 0.9, (0.0, 1.0), activation="relu", align_corners=True),
    ("corenet", "mobilenet_v2"): Convention("symmetric", 1e-5, 0.9, (0.0, 1.0), align_corners=True),
    # Hugging Face's transformers/models/mobilenet_v2: the weights and the conventions are those of TensorFlow's DeepLab
    ("transformers", "mobilenet_v2"): Convention("same", 1e-3, 0.997, HALF, antialias=False, align_corners=True),
    # keras/src/applications: mobilenet.py, mobilenet_v2.py, mobilenet_v3.py; "tf" mode of preprocess_input. The weights
    # are TF-slim's, and image_dataset_from_directory resizes like slim's pipeline, without antialiasing.
    ("keras", "mobilenet_v1"): Convention("keras_v1", 1e-3, 0.99, HALF, antialias=False),
    ("keras", "mobilenet_v2"): Convention("same", 1e-3, 0.999, HALF, antialias=False),
    ("keras", "mobilenet_v3"): Convention("same", 1e-3, 0.999, HALF, antialias=False),
    # TensorFlow's padding and resizing; the norms are folded, so this epsilon only serves the identities in their place
    ("tflite", "mobilenet_v1"): Convention("same", 1e-3, 0.997, HALF, antialias=False),
    ("tflite", "mobilenet_v2"): Convention("same", 1e-3, 0.997, HALF, antialias=False),
    ("tflite", "mobilenet_v3"): Convention("same", 1e-3, 0.997, HALF, antialias=False),
}
"""Conventions by source and family."""
