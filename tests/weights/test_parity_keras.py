"""keras.applications: their networks with random weights, through their files, endpoint by endpoint."""

import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mnv2_jax.models.registry import create_model
from mnv2_jax.ops.augment import normalise
from mnv2_jax.weights.file import shapes_of
from mnv2_jax.weights.load import load_weights
from tests.weights import parity

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),  # Keras's variables
]

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
    "MobileNetV3Large 1.25": ("MobileNetV3Large", {"alpha": 1.25}, f"{V3}_large", {"width": 1.25}),
    "MobileNetV3Small": ("MobileNetV3Small", {}, f"{V3}_small", {}),
    "MobileNetV3Small 0.5": ("MobileNetV3Small", {"alpha": 0.5}, f"{V3}_small", {"width": 0.5}),
    "MobileNetV3Large minimalistic": ("MobileNetV3Large", {"minimalistic": True}, f"{V3}_large_minimalistic", {}),
    "MobileNetV3Small minimalistic": ("MobileNetV3Small", {"minimalistic": True}, f"{V3}_small_minimalistic", {}),
}
FORMS = ("h5", "weights.h5", "keras")
FILES = [
    *((name, form) for name in ("MobileNet", "MobileNetV2", "MobileNetV3Large") for form in FORMS),
    *(("MobileNet 0.5", "h5"), ("MobileNet 0.25", "keras"), ("MobileNetV2 0.35", "weights.h5")),
    *(("MobileNetV2 1.4", "h5"), ("MobileNetV3Large 0.75", "weights.h5"), ("MobileNetV3Small", "keras")),
    *(("MobileNetV3Large minimalistic", "h5"), ("MobileNetV3Small minimalistic", "weights.h5")),
    *(("MobileNetV3Large 1.25", "keras"), ("MobileNetV3Small 0.5", "h5")),
]


@pytest.fixture(scope="module")
def keras():
    """Keras over JAX (see conftest.py)."""
    return pytest.importorskip("keras", reason="pip install .[parity]")


def build(keras, name, size):
    klass, options, _, _ = MODELS[name]
    if "V3" in klass:
        options = {"include_preprocessing": False, **options}
    make = getattr(keras.applications, klass)
    return make(input_shape=(*size, 3), weights=None, classifier_activation=None, **options)


def randomise(keras, model):
    rng = np.random.default_rng(0)
    for variable in model.weights:
        shape = tuple(variable.shape)
        is_depthwise = len(shape) == 4 and re.search(r"depthwise|conv_dw", variable.path)
        drawn = parity.values(rng, (*shape[:2], 1, shape[2]) if is_depthwise else shape)
        variable.assign(drawn.reshape(shape))  # a depthwise kernel is [r, s, c, 1]
    norms = [layer for layer in model.layers if isinstance(layer, keras.layers.BatchNormalization)]
    for norm in norms:
        norm.momentum = 0.0
    state = [[v.value for v in group] for group in (model.trainable_variables, model.non_trainable_variables)]
    with jax.numpy_rank_promotion("allow"):
        _, statistics = jax.jit(functools.partial(model.stateless_call, training=True))(*state, parity.CALIBRATION)
    for variable, value in zip(model.non_trainable_variables, statistics, strict=True):
        variable.assign(value)


def saved(model, path):
    if path.name.endswith(".weights.h5"):
        model.save_weights(path)
    else:
        model.save(path)
    return path


STEM = dict.fromkeys(("conv1_bn", "bn_Conv1", "conv_bn"), "stem")
BEFORE = {**STEM, "Conv_1_bn": "head", "conv_1_bn": "head", "conv_2": "hidden"}
"""Name of the layer before each endpoint."""
LAST = re.compile(r"(conv_pw_\d+|block_\d+|expanded_conv(?:_\d+)?)_(?:relu|project_bn|project_BN|add)")
"""Output of a block: its sum, or otherwise the norm of its projection."""


def endpoints(keras, model, x):
    """Outputs of a Keras model's layers, by our endpoint names."""
    points, blocks = {"logits": model.output}, {}
    for layer, following in itertools.pairwise(model.layers):
        if layer.name in BEFORE:
            points[BEFORE[layer.name]] = following.output
        elif found := LAST.fullmatch(layer.name):
            blocks[found[1]] = layer.output
        elif re.fullmatch(r"global_average_pooling2d(_\d+)?", layer.name):
            points["pooled"] = layer.output
    points |= {f"block_{i}": output for i, output in enumerate(blocks.values(), 1)}
    tapped = keras.Model(model.input, points)
    with jax.numpy_rank_promotion("allow"):
        return {point: np.asarray(y) for point, y in jax.jit(tapped)(x).items()}


@pytest.mark.parametrize("size", ["large", "small", "large_minimalistic", "small_minimalistic"])
def test_the_published_widths_are_the_same_network_by_every_rule(size):
    for width in (0.75, 1.0):
        standard, theirs = (
            shapes_of(create_model(f"{V3}_{size}", 5, width=width, width_rule=rule)) for rule in ("standard", "keras")
        )
        assert standard == theirs


@pytest.mark.parametrize(("name", "form"), FILES)
def test_keras_applications(name, form, keras, tmp_path):
    model = build(keras, name, parity.SIZES[0])
    randomise(keras, model)
    _, _, ours, options = MODELS[name]
    weights = load_weights(saved(model, tmp_path / f"model.{form}"), ours, **options)
    assert weights.info.source == "keras"
    for size in parity.SIZES:
        sized = build(keras, name, size)  # its padding is decided as it is built
        sized.set_weights(model.get_weights())
        x = parity.images(size)
        parity.compare("keras", f"{name} .{form}", weights, x, endpoints(keras, sized, x))


# --- what users put before and behind them ----------------------------------------------------------------------

PIXELS = np.random.default_rng(0).integers(0, 256, (8, 8, 8, 3)).repeat(8, 1).repeat(8, 2).astype(np.float32)


def base(keras, name="MobileNetV2", **options):
    options = {"alpha": 0.35 if name == "MobileNetV2" else 0.25, "include_top": False, "weights": None} | options
    return getattr(keras.applications, name)(input_shape=(64, 64, 3), **options)


def behind(keras, features, units=5, **options):
    """An image's classes from a map of features."""
    options = {"activation": "softmax"} | options
    return keras.layers.Dense(units, **options)(keras.layers.GlobalAveragePooling2D()(features))


def augmented_sequential(keras):
    layers = keras.layers
    augment = keras.Sequential([layers.RandomFlip("horizontal"), layers.RandomRotation(0.1), layers.RandomZoom(0.1)])
    inside = keras.Sequential([layers.Rescaling(1 / 255), base(keras), layers.GlobalAveragePooling2D()])
    return keras.Sequential([keras.Input((64, 64, 3)), augment, inside, layers.Dense(5, activation="softmax")])


def functional(keras, *before, size=64, units=5, **options):
    x = image = keras.Input((size, size, 3))
    for layer in before:
        x = layer(x)
    return keras.Model(image, behind(keras, base(keras)(x, training=False), units, **options))


def adapted(keras):
    layer = keras.layers.Normalization()
    layer.adapt(PIXELS / 255)
    return functional(keras, keras.layers.Rescaling(1 / 255), layer)


PREPARED = {
    "augmented, nested": augmented_sequential,
    "preprocess_input": lambda k: functional(k, k.applications.mobilenet_v2.preprocess_input),
    "preprocess_input of PyTorch": lambda k: functional(k, k.applications.densenet.preprocess_input),
    "arithmetic": lambda k: functional(k, lambda x: k.ops.cast(x, "float32") / 255, lambda x: 2.0 * x - 1.0),
    "given": lambda k: functional(k, k.layers.Normalization(mean=[99.0, 120.0, 140.0], variance=[3e3, 4e3, 5e3])),
    "adapted": adapted,
    "resized and cropped": lambda k: functional(
        k, k.layers.Resizing(64, 64, crop_to_aspect_ratio=True), k.layers.Rescaling(1 / 127.5, -1), size=None
    ),
    "V3's own": lambda k: k.applications.MobileNetV3Small(weights=None, classes=5, input_shape=(64, 64, 3), alpha=0.75),
    "one logit": lambda k: functional(k, k.layers.Rescaling(1 / 255), units=1, activation="sigmoid"),
    "without a bias": lambda k: functional(k, k.layers.Rescaling(1 / 255), use_bias=False),
}


@pytest.mark.parametrize("name", PREPARED)
def test_probabilities_of_models_that_prepare_their_images(name, keras, tmp_path):
    model = PREPARED[name](keras)
    rng = np.random.default_rng(0)
    for variable in model.weights:
        if len(variable.shape) > 1:
            is_depthwise = len(variable.shape) == 4 and re.search(r"depthwise|conv_dw", variable.path)
            shape = (*variable.shape[:2], 1, variable.shape[2]) if is_depthwise else variable.shape
            variable.assign(parity.values(rng, shape).reshape(variable.shape))
    with jax.numpy_rank_promotion("allow"):
        theirs = np.asarray(model.predict(PIXELS, verbose=0))
    theirs = np.concatenate([1 - theirs, theirs], axis=1) if theirs.shape[1] == 1 else theirs
    assert np.ptp(theirs, axis=0).max() > 0.01  # else they would say little of the image
    ours = (f"{V3}_small", {"width": 0.75}) if "V3" in name else (V2, {"width": 0.35})
    for form in ("keras", "h5"):
        weights = load_weights(saved(model, tmp_path / f"m.{form}"), ours[0], **ours[1])
        wanted = weights.info.preprocessing
        assert wanted.resolution == 64
        images = normalise(jnp.asarray(PIXELS, jnp.uint8), wanted.mean, wanted.std)
        logits, _ = weights.model.apply(jax.device_put(weights.variables), images)
        np.testing.assert_allclose(jax.nn.softmax(logits), theirs, atol=1e-5)
