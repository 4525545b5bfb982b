"""keras.applications: their networks with random weights, through their files, endpoint by endpoint."""

import os
import re

import jax
import numpy as np
import pytest

from mnv2_jax.convert.load import load_weights
from tests.convert import parity

pytestmark = pytest.mark.parity

V1, V2, V3 = "mobilenet_v1", "mobilenet_v2", "mobilenet_v3"
MODELS = {
    "MobileNet": ("MobileNet", {}, V1, {}),
    "MobileNet 0.5": ("MobileNet", {"alpha": 0.5}, V1, {"width": 0.5}),
    "MobileNet 0.25": ("MobileNet", {"alpha": 0.25}, V1, {"width": 0.25}),
    "MobileNetV2": ("MobileNetV2", {}, V2, {}),
    "MobileNetV2 0.35": ("MobileNetV2", {"alpha": 0.35}, V2, {"width": 0.35}),
    "MobileNetV2 1.4": ("MobileNetV2", {"alpha": 1.4}, V2, {"width": 1.4}),
    "MobileNetV3Large": ("MobileNetV3Large", {}, f"{V3}_large", {}),
    "MobileNetV3Large 0.75": ("MobileNetV3Large", {"alpha": 0.75}, f"{V3}_large", {"width": 0.75}),
    "MobileNetV3Small": ("MobileNetV3Small", {}, f"{V3}_small", {}),
    "MobileNetV3Large minimalistic": ("MobileNetV3Large", {"minimalistic": True}, f"{V3}_large_minimalistic", {}),
    "MobileNetV3Small minimalistic": ("MobileNetV3Small", {"minimalistic": True}, f"{V3}_small_minimalistic", {}),
}
FORMS = ("h5", "weights.h5", "keras")
FILES = [
    *((name, form) for name in ("MobileNet", "MobileNetV2", "MobileNetV3Large") for form in FORMS),
    *(("MobileNet 0.5", "h5"), ("MobileNet 0.25", "keras"), ("MobileNetV2 0.35", "weights.h5")),
    *(("MobileNetV2 1.4", "h5"), ("MobileNetV3Large 0.75", "weights.h5"), ("MobileNetV3Small", "keras")),
    *(("MobileNetV3Large minimalistic", "h5"), ("MobileNetV3Small minimalistic", "weights.h5")),
]


@pytest.fixture(scope="module")
def keras():
    """Keras over JAX, which it would otherwise compute with TensorFlow."""
    os.environ["KERAS_BACKEND"] = "jax"
    return pytest.importorskip("keras", reason="pip install .[parity]")


def build(keras, name, size):
    klass, options, _, _ = MODELS[name]
    options = {"include_preprocessing": False, **options} if "V3" in klass else options
    make = getattr(keras.applications, klass)
    return make(input_shape=(*size, 3), weights=None, classifier_activation=None, **options)


def randomise(model):
    rng = np.random.default_rng(0)
    for variable in model.weights:
        is_depthwise = variable.path.endswith("depthwise/kernel") or "conv_dw" in variable.path
        shape = tuple(variable.shape)
        if is_depthwise and len(shape) == 4:
            variable.assign(np.moveaxis(parity.values(rng, (*shape[:2], 1, shape[2])), 2, 3))
        else:
            variable.assign(parity.values(rng, shape))


def endpoints(keras, model, x):
    """What its layers give, by our names of them."""
    layers = model.layers
    names = [layer.name for layer in layers]

    def last_before(name):
        return layers[names.index(name) - 1]

    if "conv1_relu" in names:
        blocks = [name for name in names if re.fullmatch(r"conv_pw_\d+_relu", name)]
        points = {"stem": model.get_layer("conv1_relu"), "logits": model.get_layer("predictions")}
    else:
        # A block ends in its sum, or else in the norm of its projection.
        found = {}
        for name in names:
            if end := re.fullmatch(r"(expanded_conv|block)_(\d*)_?(project_bn|add)", name.lower()):
                found[end[1], end[2]] = name
        blocks = list(found.values())
        head, stem = ("out_relu", "Conv1_relu") if "out_relu" in names else (None, None)
        points = {
            "stem": model.get_layer(stem) if stem else layers[names.index("conv_bn") + 1],
            "head": model.get_layer(head) if head else layers[names.index("conv_1_bn") + 1],
            "logits": model.get_layer("predictions"),
        }
        if "conv_2" in names:
            points["hidden"] = layers[names.index("conv_2") + 1]
    points |= {f"block_{i}": model.get_layer(name) for i, name in enumerate(blocks, 1)}
    (points["pooled"],) = [layer for layer in layers if re.fullmatch(r"global_average_pooling2d(_\d+)?", layer.name)]
    return keras.Model(model.input, {point: layer.output for point, layer in points.items()})(x)
