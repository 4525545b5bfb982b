import contextlib
import io
import itertools
import json
import sys
import zipfile

import numpy as np
import pytest

from mnv2_jax.errors import UserError
from mnv2_jax.weights.keras_files import read_keras

h5py = pytest.importorskip("h5py")


# --- small files, made by hand ----------------------------------------------------------------------------------

SHAPES = {"Conv2D": [(3, 3, 3, 4)], "DepthwiseConv2D": [(3, 3, 4, 1)], "Dense": [(4, 5), (5,)]}
SHAPES["BatchNormalization"] = [(4,)] * 4
NAMES = {"DepthwiseConv2D": ["depthwise_kernel"], "BatchNormalization": ["gamma", "beta", "moving_mean"]}
NAMES["BatchNormalization"] += ["moving_variance"]
GROUPS = {"DepthwiseConv2D": "depthwise_conv2d", "BatchNormalization": "batch_normalization"}
ORDER = ("Conv2D", "BatchNormalization", "ReLU", "DepthwiseConv2D", "BatchNormalization", "Activation", "Dense")
OURS = ("conv", "norm", "depthwise", "norm", "dense")


def arrays_of(number, klass):
    rng = np.random.default_rng(number)
    return [rng.uniform(0.5, 1.5, shape).astype(np.float32) for shape in SHAPES.get(klass, [])]


def layers_of(order=ORDER):
    """Names (whose sorted order differs from the layers' order), classes and arrays."""
    return [(f"{'zyxwvut'[i % 7]}{i}", klass, arrays_of(i, klass)) for i, klass in enumerate(order)]


def config_of(layers, **changes):
    """Config as Keras 2 writes it, in which each layer gets the output of the one before."""
    listed = []
    for before, (name, klass, _) in itertools.pairwise([(None, None, None), *layers]):
        config = {"name": name, **changes.get(name, {})}
        config |= {"epsilon": 0.001} if klass == "BatchNormalization" else {}
        config |= {"max_value": 6.0} if klass == "ReLU" else {}
        config |= {"activation": "hard_silu" if klass == "Activation" else "softmax" if klass == "Dense" else "linear"}
        nodes = [[[before[0], 0, 0, {}]]] if before[0] else []
        listed.append({"class_name": klass, "name": name, "config": config, "inbound_nodes": nodes})
    first = {"name": "in", "batch_input_shape": [None, 32, 32, 3]}
    listed.insert(0, {"class_name": "InputLayer", "name": "in", "config": first, "inbound_nodes": []})
    return {"class_name": "Functional", "config": {"name": "m", "layers": listed}}


def write_named(group, layers):
    group.attrs["layer_names"] = np.array([name.encode() for name, _, _ in layers])  # as Keras does, of fixed length
    for name, klass, arrays in layers:
        inner = group.create_group(name)
        paths = [f"{name}/{leaf}:0" for leaf in NAMES.get(klass, ["kernel", "bias"])][: len(arrays)]
        inner.attrs["weight_names"] = np.array([path.encode() for path in paths] or np.empty(0))
        for path, array in zip(paths, arrays, strict=True):
            inner[path] = array


def write_numbered(group, layers):
    numbers = {}
    for name, klass, arrays in layers:
        base = GROUPS.get(klass, klass.lower())
        number = numbers[base] = numbers.get(base, -1) + 1
        variables = group.create_group(f"layers/{base}_{number}/vars" if number else f"layers/{base}/vars")
        variables.attrs["name"] = name
        for i, array in enumerate(arrays):
            variables[str(i)] = array


def whole(path, layers, **changes):
    with h5py.File(path, "w") as file:
        file.attrs["model_config"] = json.dumps(config_of(layers, **changes))
        write_named(file.create_group("model_weights"), layers)
        file["optimizer_weights/x:0"] = np.ones(3)


def legacy(path, layers):
    with h5py.File(path, "w") as file:
        write_named(file, layers)


def numbered(path, layers):
    with h5py.File(path, "w") as file:
        write_numbered(file, layers)


def zipped(path, layers, **changes):
    content = io.BytesIO()
    with h5py.File(content, "w") as file:
        write_numbered(file, layers)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("metadata.json", "{}")
        archive.writestr("config.json", json.dumps(config_of(layers, **changes)))
        archive.writestr("model.weights.h5", content.getvalue())


FORMS = {"whole": whole, "legacy": legacy, "numbered": numbered, "zipped": zipped}
CONFIGURED = ("whole", "zipped")


@pytest.fixture(params=FORMS)
def form(request):
    return request.param


def of_kind(network, kind):
    return [layer for layer in network.layers if layer.kind == kind]


# --- what is read -----------------------------------------------------------------------------------------------


def test_layers_of_each_kind_come_in_order(form, tmp_path):
    layers = layers_of(ORDER[:-1] * 12 + ORDER[-1:])  # more than 10: as text, 10 is before 2
    FORMS[form](tmp_path / "m", layers)
    network = read_keras(tmp_path / "m")
    for klass, kind in {"Conv2D": "conv", "DepthwiseConv2D": "depthwise", "BatchNormalization": "norm"}.items():
        assert [layer.name for layer in of_kind(network, kind)] == [name for name, k, _ in layers if k == klass]
    if form != "numbered":
        assert [layer.kind for layer in network.layers] == [*OURS[:-1] * 12, "dense"]
    assert network.source == "keras"
    assert not network.folded


def test_arrays_have_our_names_and_layouts(form, tmp_path):
    layers = layers_of()
    FORMS[form](tmp_path / "m", layers)
    read = {layer.name: layer.arrays for layer in read_keras(tmp_path / "m").layers}
    expected = {name: arrays for name, _, arrays in layers if arrays}
    np.testing.assert_array_equal(read["z0"]["kernel"], expected["z0"][0])
    np.testing.assert_array_equal(read["w3"]["kernel"], expected["w3"][0].transpose(0, 1, 3, 2))
    for leaf, array in zip(("scale", "bias", "mean", "var"), expected["y1"], strict=True):
        np.testing.assert_array_equal(read["y1"][leaf], array)
    for leaf, array in zip(("kernel", "bias"), expected["t6"], strict=True):
        np.testing.assert_array_equal(read["t6"][leaf], array)
    assert all(array.dtype == np.float32 for arrays in read.values() for array in arrays.values())


def test_what_the_config_says(form, tmp_path):
    FORMS[form](tmp_path / "m", layers_of())
    network = read_keras(tmp_path / "m")
    options = form in CONFIGURED
    assert network.epsilon == (0.001 if options else None)
    assert network.resolution == (32 if options else None)
    if options:
        assert [layer.activation for layer in network.layers] == ["relu6"] * 2 + ["hard_swish"] * 2 + [None]


def test_a_composed_hard_swish_is_not_a_hard_sigmoid(tmp_path):
    layers = layers_of(("Conv2D", "Conv2D"))
    config = config_of(layers)
    listed = config["config"]["layers"]

    def put(klass, name, *before, **rest):
        nodes = [[[each, 0, 0, {"y": 3.0} if klass == "TFOpLambda" else {}] for each in before]]
        listed.append({"class_name": klass, "name": name, "config": {"name": name, **rest}, "inbound_nodes": nodes})

    for conv in ("z0", "y1"):
        put("TFOpLambda", f"{conv}_add", conv)
        put("ReLU", f"{conv}_relu", f"{conv}_add", max_value=6.0)
        put("TFOpLambda", f"{conv}_sixth", f"{conv}_relu")
    put("Multiply", "z0_mul", "z0", "z0_sixth")
    with h5py.File(tmp_path / "m", "w") as file:
        file.attrs["model_config"] = json.dumps(config)
        write_named(file.create_group("model_weights"), layers)
    assert [layer.activation for layer in read_keras(tmp_path / "m").layers] == ["hard_swish", "hard_sigmoid"]


ACTIVATING = ("Conv2D", "BatchNormalization", "Activation", "Dense")


@pytest.mark.parametrize(
    ("activation", "version", "read"),
    [
        ("relu", None, "relu"),
        ("hard_silu", None, "hard_swish"),
        ("linear", None, None),
        ("tanh", None, "tanh"),
        ("swish", None, "swish"),
        ("softmax", None, "softmax"),
        ({"class_name": "LeakyReLU", "config": {"negative_slope": 0.1}}, None, "leaky_relu"),
        ({"class_name": "function", "config": "relu6"}, None, "relu6"),
        ("hard_sigmoid", "3.12.1", "hard_sigmoid"),
        ("hard_sigmoid", "2.15.0", "hard_sigmoid of Keras 2"),
    ],
)
def test_activations_keep_their_names(activation, version, read, tmp_path):
    layers = layers_of(ACTIVATING)
    config = config_of(layers)
    config["config"]["layers"][3]["config"]["activation"] = activation
    whole(tmp_path / "m", layers)
    with h5py.File(tmp_path / "m", "r+") as file:
        file.attrs["model_config"] = json.dumps(config)
        if version:
            file.attrs["keras_version"] = version
    # The softmax of the last layer is none: it gives logits.
    assert [layer.activation for layer in read_keras(tmp_path / "m").layers] == [read, read, None]


@pytest.mark.parametrize(
    ("klass", "config", "read"),
    [
        ("ReLU", {"max_value": 4.0}, "ReLU"),
        ("ReLU", {"max_value": 6.0, "negative_slope": 0.1}, "ReLU"),
        ("ReLU", {"max_value": None}, "relu"),
        ("ELU", {"alpha": 1.0}, "elu"),
        ("TFOpLambda", {"function": "nn.relu6"}, "relu6"),
        ("TFOpLambda", {"function": "math.multiply"}, None),
    ],
)
def test_layers_that_are_activations(klass, config, read, tmp_path):
    layers = layers_of(("Conv2D", "ReLU"))
    model = config_of(layers)
    model["config"]["layers"][2] |= {"class_name": klass, "config": config}
    whole(tmp_path / "m", layers)
    with h5py.File(tmp_path / "m", "r+") as file:
        file.attrs["model_config"] = json.dumps(model)
    assert read_keras(tmp_path / "m").layers[0].activation == read


WINDOW = {"strides": [2, 2], "dilation_rate": [1, 1], "padding": "same"}


def window_of(path, form, zeros=None, **said):
    """Window of a depthwise convolution, after a layer of zeros if there is one."""
    layers = layers_of(("ZeroPadding2D", "DepthwiseConv2D") if zeros else ("ReLU", "DepthwiseConv2D"))
    FORMS[form](path, layers, **{layers[0][0]: {"padding": zeros} if zeros else {}, layers[1][0]: said})
    (layer,) = read_keras(path).layers
    return layer.stride, layer.dilation, layer.pads


@pytest.mark.parametrize("form", CONFIGURED)
def test_strides_dilations_and_paddings(form, tmp_path):
    path = tmp_path / "m"
    assert window_of(path, form) == (None, None, None)
    assert window_of(path, form, **WINDOW) == (2, 1, "same")
    assert window_of(path, form, strides=1, dilation_rate=[2, 2], padding="valid") == (1, 2, "valid")
    valid = WINDOW | {"padding": "valid"}
    for zeros, pads in {"[[0, 1], [0, 1]]": (0, 1), "[2, 2]": (2, 2), "1": (1, 1)}.items():
        assert window_of(path, form, json.loads(zeros), **valid) == (2, 1, pads)


@pytest.mark.parametrize(
    ("zeros", "changes", "match"),
    [
        (None, {"strides": [2, 1]}, "stride for rows"),
        (None, {"dilation_rate": [1, 2]}, "dilation for rows"),
        (None, {"padding": "causal"}, "'causal'"),
        ([[0, 1], [1, 1]], {"padding": "valid"}, r"\(\(0, 1\), \(1, 1\)\)"),
        ([[1, 1], [1, 1]], {"padding": "same"}, "padding 'same' after zeros"),
    ],
)
def test_windows_that_no_mobilenet_has(zeros, changes, match, tmp_path):
    with pytest.raises(UserError, match=match):
        window_of(tmp_path / "m", "whole", zeros, **WINDOW | changes)


@pytest.mark.parametrize("form", CONFIGURED)
def test_norms_without_scale_get_ones(form, tmp_path, monkeypatch):
    layers = [("n", "BatchNormalization", arrays_of(0, "BatchNormalization")[1:])]
    monkeypatch.setitem(NAMES, "BatchNormalization", NAMES["BatchNormalization"][1:])
    FORMS[form](tmp_path / "m", layers, n={"scale": False})
    (norm,) = read_keras(tmp_path / "m").layers
    np.testing.assert_array_equal(norm.arrays["scale"], np.ones(4))
    np.testing.assert_array_equal(norm.arrays["bias"], layers[0][2][0])


def test_long_lists_of_names_lie_in_pieces(tmp_path):
    layers = layers_of()
    legacy(tmp_path / "m", layers)
    with h5py.File(tmp_path / "m", "r+") as file:
        names = file.attrs["layer_names"]
        del file.attrs["layer_names"]
        file.attrs["layer_names0"], file.attrs["layer_names1"] = names[:3], names[3:]
    assert len(read_keras(tmp_path / "m").layers) == len(OURS)


def nested(path, paths):
    """A legacy file with one layer, a model whose arrays are listed as given."""
    shapes = {"kernel": (1, 1, 2, 2)}
    with h5py.File(path, "w") as file:
        file.attrs["layer_names"] = [b"inner"]
        group = file.create_group("inner")
        group.attrs["weight_names"] = [each.encode() for each in paths]
        for each in paths:
            group[each] = np.ones(shapes.get(each.split("/")[-1], (2,)), np.float32)


def test_nested_models_are_read_in_order_or_not_at_all(tmp_path):
    norm = ("gamma", "beta", "moving_mean", "moving_variance")
    trained = [f"{name}/{leaf}" for name in "ab" for leaf in norm[:2]]
    frozen = [f"{name}/{leaf}" for name in "ab" for leaf in norm[2:]]
    nested(tmp_path / "m", ["c/kernel", *trained, *frozen])
    assert [layer.name for layer in read_keras(tmp_path / "m").layers] == ["c", "a", "b"]
    nested(tmp_path / "m", [*trained[2:], *[f"a/{leaf}" for leaf in norm], *frozen[2:]])  # a was frozen
    with pytest.raises(UserError, match=r"frozen.*\.keras"):
        read_keras(tmp_path / "m")


@pytest.mark.parametrize("top", [None, "inner"])
@pytest.mark.parametrize("is_configured", [True, False])
def test_names_with_slashes(top, is_configured, tmp_path):
    """As in MobileNetV3 of Keras 2, where the names of all norms end in the same word."""
    names = ["a/Norm", "b/Norm"]
    inside = [listed("BatchNormalization", name, epsilon=0.001) for name in names]
    layers = [listed("Sequential", top, layers=inside)] if top else inside
    with h5py.File(tmp_path / "m", "w") as file:
        if is_configured:
            file.attrs["model_config"] = json.dumps({"class_name": "Sequential", "config": {"layers": layers}})
        group = file.create_group("model_weights")
        group.attrs["layer_names"] = [top.encode()] if top else [name.encode() for name in names]
        for name in names:
            holder = group.require_group(top or name)
            paths = [f"m/{name}/{leaf}:0" for leaf in NAMES["BatchNormalization"]]
            before = list(holder.attrs.get("weight_names", ()))
            holder.attrs["weight_names"] = np.array([*before, *(path.encode() for path in paths)], "S")
            for path, values in zip(paths, arrays_of(0, "BatchNormalization"), strict=True):
                holder[path] = values
    read_names = [layer.name for layer in read_keras(tmp_path / "m").layers]
    assert read_names == (names if is_configured else [f"m/{name}" for name in names])


def test_numbers_do_not_order_the_layers_around_a_nested_model(tmp_path):
    with h5py.File(tmp_path / "m", "w") as file:
        write_numbered(file, layers_of(("Conv2D", "Dense")))
        write_numbered(file.create_group("layers/functional"), layers_of(("DepthwiseConv2D",)))
    assert [layer.kind for layer in read_keras(tmp_path / "m").layers] == ["conv", "dense", "depthwise"]
    with h5py.File(tmp_path / "m", "r+") as file:
        write_numbered(file["layers"].create_group("sequential"), layers_of(("Conv2D",)))
    with pytest.raises(UserError, match=r"conv layers .*nested"):
        read_keras(tmp_path / "m")


# --- what comes before the first convolution --------------------------------------------------------------------


def listed(klass, name, before=None, numbers=None, **config):
    """Layer of a config as Keras 2 lists it; the constant of an operation is listed beside its input."""
    nodes = [[[before, 0, 0, numbers or {}]]] if before else []
    return {"class_name": klass, "name": name, "config": {"name": name, **config}, "inbound_nodes": nodes}


def operation(klass, name, before, *arguments):
    """Operation of keras.ops as Keras 3 lists it; "x" stands for the map."""
    tensor = {"class_name": "__keras_tensor__", "config": {"keras_history": [before, 0, 0]}}
    args = [tensor if each == "x" else each for each in arguments]
    return {
        "class_name": klass,
        "name": name,
        "config": {"name": name},
        "inbound_nodes": [{"args": args, "kwargs": {}}],
    }


def prepared(path, steps, size=(32, 32), learnt=None, is_nested=False, version=None):
    """Reads a file whose config has these layers, each a function of the one before, and then a convolution."""
    name, layers = "in", [listed("InputLayer", "in", batch_input_shape=[None, *size, 3])]
    for number, step in enumerate(steps):
        layers.append(step(f"s{number}", name))
        name = f"s{number}"
    conv = listed("Conv2D", "conv", "inner_in" if is_nested else name)
    if is_nested:
        inside = [listed("InputLayer", "inner_in", batch_input_shape=[None, 32, 32, 3]), conv]
        conv = listed("Functional", "base", name, layers=inside, output_layers=[["conv", 0, 0]])
    with h5py.File(path, "w") as file:
        file.attrs["model_config"] = json.dumps({"class_name": "Functional", "config": {"layers": [*layers, conv]}})
        file.attrs["keras_version"] = version or "2.4.0"
        group = file.create_group("model_weights")
        write_named(group, [("base" if is_nested else "conv", "Conv2D", arrays_of(0, "Conv2D"))])
        if is_nested:
            group["base"].attrs["weight_names"] = [b"conv/kernel:0"]
            group["base"].move("base/kernel:0", "conv/kernel:0")
        if learnt:
            group.attrs["layer_names"] = [b"base" if is_nested else b"conv", b"s0"]
            holder = group.create_group("s0")
            holder.attrs["weight_names"] = [b"mean:0", b"variance:0", b"count:0"]
            for leaf, value in zip(("mean:0", "variance:0", "count:0"), (*learnt, 7), strict=True):
                holder[leaf] = np.array(value, np.int64 if leaf == "count:0" else np.float32)
    network = read_keras(path)
    return network.mean, network.std, network.resolution, dict(network.view)


def layer(klass, **config):
    return lambda name, before: listed(klass, name, before, **config)


def tf_op(function, klass="TFOpLambda", **numbers):
    return lambda name, before: listed(klass, name, before, numbers, function=function)


def tf_constant_first(function, constant):
    def step(name, before):
        node = ["_CONSTANT_VALUE", -1, constant, {"y": [before, 0, 0]}]
        return listed("TFOpLambda", name, function=function) | {"inbound_nodes": [node]}

    return step


def op(klass, *arguments, **config):
    def step(name, before):
        made = operation(klass, name, before, *arguments)
        return made | {"config": made["config"] | config}

    return step


def tf1_op(kind, **constants):
    return layer("TensorFlowOpLayer", node_def={"op": kind}, constants={k.lstrip("_"): v for k, v in constants.items()})


def array(*values):
    return {"class_name": "__numpy__", "config": {"value": list(values), "dtype": "float32"}}


FLIP, ROTATE = layer("RandomFlip", mode="horizontal"), layer("RandomRotation", factor=0.1)
BYTES = layer("Rescaling", scale=1 / 255)
HALF, UNIT, IMAGENET = (0.5, 0.5), (0.0, 1.0), ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
NEGATIVE = tuple(-value for value in IMAGENET[0])


@pytest.mark.parametrize(
    ("steps", "mean", "std"),
    [
        ([], None, None),
        ([FLIP, layer("GaussianNoise", stddev=1.0), layer("Activation", activation="linear")], None, None),
        ([FLIP, BYTES, ROTATE], *UNIT),
        ([layer("Rescaling", scale=1 / 127.5, offset=-1.0)], *HALF),
        ([layer("Rescaling", scale=1 / 255, offset=-0.5)], 0.5, 1.0),
        ([BYTES, layer("Rescaling", scale=2.0, offset=-1.0)], *HALF),
        ([layer("Rescaling", scale=[1 / 255, 2 / 255, 4 / 255], offset=[0, -1, -1])], (0, 0.5, 0.25), (1, 0.5, 0.25)),
        ([layer("Custom>Rescaling", scale=1 / 255, offset=0)], *UNIT),
        (
            [BYTES, layer("Normalization", mean=[0.1, 0.2, 0.3], variance=[0.04, 0.09, 0.16])],
            (0.1, 0.2, 0.3),
            (0.2, 0.3, 0.4),
        ),
        ([layer("Normalization", axis=None, mean=127.5, variance=[[127.5**2]])], *HALF),
        ([layer("Normalization", mean=-1.0, variance=1 / 127.5**2, invert=True)], *HALF),
        ([tf_op("math.truediv", y=127.5, name=None), tf_op("math.subtract", y=1.0, name=None)], *HALF),
        (
            [tf_op("cast", dtype="float32"), tf_op("math.multiply", y=1 / 255), tf_op("__operators__.add", y=-0.5)],
            0.5,
            1.0,
        ),
        (
            [tf_op("math.truediv", y=255), tf_op("nn.bias_add", bias=NEGATIVE), tf_op("math.truediv", y=IMAGENET[1])],
            *IMAGENET,
        ),
        ([tf_op("math.truediv", y=-255), tf_constant_first("math.subtract", 0.0)], *UNIT),
        ([tf_constant_first("math.multiply", 1 / 255)], *UNIT),
        ([tf1_op("Cast"), tf1_op("RealDiv", _1=127.5), tf1_op("Sub", _1=1.0)], *HALF),
        ([op("Cast", "x", dtype="float32"), op("TrueDivide", "x", 127.5), op("Subtract", "x", 1)], *HALF),
        (
            [op("TrueDivide", "x", 255), op("Add", "x", array([NEGATIVE])), op("Divide", "x", array(*IMAGENET[1]))],
            *IMAGENET,
        ),
        ([op("Multiply", 1 / 255, "x")], *UNIT),
    ],
)
def test_what_layers_do_to_pixels(steps, mean, std, tmp_path):
    three = lambda value: value if value is None or isinstance(value, tuple) else (value,) * 3  # noqa: E731
    for is_nested in (False, True):
        result = prepared(tmp_path / "m", steps, is_nested=is_nested)
        assert (result[0], result[1]) == (three(mean), three(std))
        assert result[2:] == (32, {})


def test_what_a_normalization_has_learnt(tmp_path):
    for is_nested in (False, True):
        result = prepared(
            tmp_path / "m", [layer("Normalization")], learnt=([51, 0, 255], [255**2] * 3), is_nested=is_nested
        )
        assert result == ((0.2, 0.0, 1.0), (1.0, 1.0, 1.0), 32, {})


RESIZE = layer("Resizing", height=48, width=48)
ASPECT = layer("Resizing", height=64, width=64, crop_to_aspect_ratio=True, interpolation="bicubic")
SMOOTH = layer("Resizing", height=48, width=48, antialias=True)
CROP = layer("CenterCrop", height=48, width=48)
RANDOM_CROP = layer("RandomCrop", height=24, width=24)


@pytest.mark.parametrize(
    ("steps", "size", "version", "resolution", "view"),
    [
        ([RESIZE, BYTES], (None, None), None, 48, ("central", 1.0, "bilinear")),
        ([BYTES, ASPECT], (None, None), None, 64, ("resize_crop", 1.0, "bicubic")),
        ([ASPECT, FLIP, CROP], (None, None), None, 48, ("resize_crop", 0.75, "bicubic")),
        ([CROP, layer("CenterCrop", height=24, width=24)], (64, 64), None, 24, (None, 0.375, None)),
        ([CROP, layer("Resizing", height=24, width=24)], (96, 96), None, 24, (None, 0.5, "bilinear")),
        ([RESIZE], (90, 120), None, 48, (None, None, "bilinear")),
        ([], (90, 120), None, None, (None, None, None)),
        ([layer("CenterCrop", height=32, width=32)], (32, 32), None, 32, (None, None, None)),
        ([tf_op("image.resize", size=[48, 48], method="bicubic")], (None, None), None, 48, ("central", 1.0, "bicubic")),
        (
            [op("Resize", "x", size=[48, 48], interpolation="bilinear")],
            (None, None),
            None,
            48,
            ("central", 1.0, "bilinear"),
        ),
        ([SMOOTH], (None, None), None, 48, ("central", 1.0, "bilinear", True)),
        ([SMOOTH, RESIZE], (None, None), None, 48, ("central", 1.0, "bilinear", False)),
        ([tf_op("image.resize", size=[48, 48], antialias=True)], (90, 120), None, 48, (None, None, "bilinear", True)),
        ([op("Resize", "x", size=[48, 48], antialias=True)], (90, 120), None, 48, (None, None, "bilinear", True)),
        ([RANDOM_CROP], (32, 32), "2.9.0", 24, (None, None, "bilinear")),
        ([RANDOM_CROP], (32, 32), "3.1.0", 32, (None, None, None)),
    ],
)
def test_how_layers_resize_and_crop(steps, size, version, resolution, view, tmp_path):
    result = prepared(tmp_path / "m", steps, size, version=version)
    view = view if len(view) == 4 else (*view, None if view[2] is None else False)  # no layer of theirs does by default
    fields = dict(zip(("eval_crop", "eval_crop_fraction", "interpolation", "antialias"), view, strict=True))
    assert result[2:] == (resolution, {key: value for key, value in fields.items() if value is not None})


@pytest.mark.parametrize(
    ("step", "size"),
    [
        (layer("Lambda"), (32, 32)),
        (layer("Permute", dims=[2, 1, 3]), (32, 32)),
        (layer("AutoContrast"), (32, 32)),
        (layer("Activation", activation="tanh"), (32, 32)),
        (layer("BatchNormalization", epsilon=0.001), (32, 32)),
        (layer("Rescaling", scale=[1, 2], offset=0), (32, 32)),
        (layer("Normalization", mean=[[[1.0], [2.0], [3.0]]], variance=1.0), (32, 32)),
        (layer("Resizing", height=32, width=64), (32, 32)),
        (layer("Resizing", height=32, width=32, interpolation="nearest"), (32, 32)),
        (layer("Resizing", height=32, width=32, pad_to_aspect_ratio=True), (32, 32)),
        (layer("Resizing", height=32, width=32, crop_to_aspect_ratio=True), (32, 64)),
        (layer("CenterCrop", height=32, width=32), (None, None)),
        (layer("CenterCrop", height=32, width=32), (24, 24)),
        (tf_op("__operators__.getitem", "SlicingOpLambda", slice_spec=[{"step": -1}]), (32, 32)),
        (tf_op("cast", dtype="uint8"), (32, 32)),
        (tf_op("math.truediv", y=0), (32, 32)),
        (tf_constant_first("math.truediv", 1.0), (32, 32)),
        (op("Multiply", "x", "x"), (32, 32)),
        (op("GetItem", "x", [{"class_name": "__ellipsis__"}, 2]), (32, 32)),
        (op("Log", "x"), (32, 32)),
    ],
)
def test_layers_before_the_first_convolution_that_cannot_be_expressed(step, size, tmp_path):
    with pytest.raises(UserError, match=r"m: layer 's1'"):
        prepared(tmp_path / "m", [FLIP, step], size)


def test_pixels_that_are_inverted_and_a_mean_that_is_nowhere(tmp_path):
    with pytest.raises(UserError, match=r"multiply pixels by \[-1.0, -1.0, -1.0\]"):
        prepared(tmp_path / "m", [tf_constant_first("math.subtract", 255.0)])
    with pytest.raises(UserError, match=r"multiply pixels by \[1.0, -1.0, 1.0\]"):
        prepared(tmp_path / "m", [layer("Rescaling", scale=[1.0, -1.0, 1.0])])
    with pytest.raises(UserError, match=r"mean .*'s0'"):
        prepared(tmp_path / "m", [layer("Normalization")])


def test_a_layer_on_pixels_of_which_a_file_has_the_name_only(tmp_path):
    layers = layers_of(("Conv2D", "Dense"))
    for form in ("legacy", "numbered"):
        for name in ("rescaling", "resizing_1", "tf.math.truediv_2", "tf_op_lambda"):
            FORMS[form](tmp_path / "m", [(name, "Other", []), *layers])
            assert read_keras(tmp_path / "m").pixel_layers == {name: True}
        FORMS[form](tmp_path / "m", [("random_flip", "Other", []), ("re_lu", "ReLU", []), *layers])
        assert read_keras(tmp_path / "m").pixel_layers == {}
    with h5py.File(tmp_path / "m", "w") as file:
        write_numbered(file, [("rescaling", "Rescaling", []), ("d", "Dense", arrays_of(0, "Dense"))])
        write_numbered(file.create_group("layers/functional"), layers_of(("Conv2D",)))
        statistics = file.create_group("layers/functional/layers/normalization/vars")
        statistics.attrs["name"] = "mine"
        for leaf, value in enumerate((np.ones(3), np.ones(3), 7)):
            statistics[str(leaf)] = value
    assert read_keras(tmp_path / "m").pixel_layers == {"rescaling": False, "mine": True}


def test_layers_without_weights_that_no_mobilenet_has(tmp_path):
    order = ("Conv2D", "GlobalMaxPooling2D", "Dense", "Rescaling")
    whole(tmp_path / "m", layers_of(order))
    assert read_keras(tmp_path / "m").unsupported == ("y1 (GlobalMaxPooling2D)", "w3 (Rescaling)")
    whole(tmp_path / "m", layers_of(("Conv2D", "MaxPooling2D", "Conv2D")))
    refused(tmp_path / "m", r"y1 \(MaxPooling2D\)")


def test_activations_are_found_across_models_and_in_layers_that_are_shared(tmp_path):
    layers = [("a", "Conv2D", arrays_of(0, "Conv2D")), ("b", "Conv2D", arrays_of(1, "Conv2D"))]
    config = config_of([*layers, ("act", "ReLU", [])])
    listed_layers = {each["name"]: each for each in config["config"]["layers"]}
    listed_layers["act"]["inbound_nodes"] = [[["a", 0, 0, {}]], [["b", 0, 0, {}]]]
    listed_layers["b"]["inbound_nodes"] = [[["act", 0, 0, {}]]]
    config["config"]["layers"] = [listed_layers[name] for name in ("in", "a", "act", "b")]
    with h5py.File(tmp_path / "m", "w") as file:
        file.attrs["model_config"] = json.dumps(config)
        write_named(file.create_group("model_weights"), layers)
    assert [each.activation for each in read_keras(tmp_path / "m").layers] == ["relu6", "relu6"]
    inside = [listed("InputLayer", "i"), listed("Dense", "d", "i", activation="linear")]
    outside = [listed("InputLayer", "in"), listed("Functional", "base", "in", layers=inside, output_layers=["d", 0, 0])]
    outside.append(listed("Activation", "act", "base", activation="sigmoid"))
    with h5py.File(tmp_path / "m", "w") as file:
        file.attrs["model_config"] = json.dumps({"config": {"layers": outside}})
        write_named(file.create_group("model_weights"), [("d", "Dense", arrays_of(0, "Dense"))])
        file["model_weights"].move("d", "base")
        file["model_weights"].attrs["layer_names"] = [b"base"]
    assert [each.activation for each in read_keras(tmp_path / "m").layers] == ["sigmoid"]


# --- what is refused --------------------------------------------------------------------------------------------


def refused(path, match):
    with pytest.raises(UserError, match=match) as caught:
        read_keras(path)
    assert str(caught.value).startswith(str(path))
    assert "; " in str(caught.value)


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e300])
def test_values_that_are_not_finite(value, form, tmp_path):
    layers = layers_of()
    layers[0] = ("z0", "Conv2D", [np.full((3, 3, 3, 4), value)])
    FORMS[form](tmp_path / "m", layers)
    refused(tmp_path / "m", "NaN or infinity")


def test_integers(form, tmp_path):
    FORMS[form](tmp_path / "m", [("z0", "Conv2D", [np.ones((3, 3, 3, 4), np.int8)])])
    refused(tmp_path / "m", "int8")


def test_layers_that_no_mobilenet_has(form, tmp_path):
    layers = [*layers_of(), ("t", "Conv2DTranspose", [np.ones((2, 2, 2, 2, 2), np.float32)])]
    FORMS[form](tmp_path / "m", layers)
    refused(tmp_path / "m", "isn't one of|unlike any MobileNet")


def test_a_depth_multiplier(form, tmp_path):
    FORMS[form](tmp_path / "m", [("z0", "DepthwiseConv2D", [np.ones((3, 3, 4, 2), np.float32)])])
    refused(tmp_path / "m", r"depthwise layer 'z0' holds kernel \[3, 3, 2, 4\]")


def test_different_epsilons(tmp_path):
    config = config_of(layers_of())
    config["config"]["layers"][2]["config"]["epsilon"] = 1e-5
    whole(tmp_path / "m", layers_of())
    with h5py.File(tmp_path / "m", "r+") as file:
        file.attrs["model_config"] = json.dumps(config)
    refused(tmp_path / "m", "epsilons from 1e-05 to 0.001")


def test_a_third_array_of_a_norm_without_a_config(tmp_path):
    numbered(tmp_path / "m", [("n", "BatchNormalization", arrays_of(0, "BatchNormalization")[1:])])
    refused(tmp_path / "m", r"has 3 arrays.*\.keras")


def test_missing_groups(form, tmp_path):
    layers = layers_of()
    FORMS[form](tmp_path / "m", layers)
    if form == "zipped":
        with zipfile.ZipFile(tmp_path / "m", "w") as archive:
            archive.writestr("config.json", "{}")
        return refused(tmp_path / "m", r"zip .*model\.weights\.h5")
    with h5py.File(tmp_path / "m", "r+") as file:
        del file[{"whole": "model_weights/z0/z0", "legacy": "z0", "numbered": "layers/conv2d/vars"}[form]]
    refused(tmp_path / "m", "there is no")


def test_links_to_other_files(tmp_path):
    legacy(tmp_path / "other", layers_of())
    legacy(tmp_path / "m", layers_of())
    with h5py.File(tmp_path / "m", "r+") as file:
        del file["z0/z0/kernel:0"]
        file["z0/z0/kernel:0"] = h5py.ExternalLink("other", "z0/z0/kernel:0")
    refused(tmp_path / "m", "there is no 'z0/kernel:0'")
    (tmp_path / "secret").write_bytes(bytes(432))
    with h5py.File(tmp_path / "m", "r+") as file:
        del file["z0/z0/kernel:0"]
        file.create_dataset("z0/z0/kernel:0", (3, 3, 3, 4), "f4", external=[(str(tmp_path / "secret"), 0, 432)])
    refused(tmp_path / "m", "another file")


def test_sizes_that_would_fill_the_memory(tmp_path):
    legacy(tmp_path / "m", layers_of())
    with h5py.File(tmp_path / "m", "r+") as file:
        del file["z0/z0/kernel:0"]
        file.create_dataset("z0/z0/kernel:0", (1 << 20, 1 << 20, 1 << 20, 4), "f4", chunks=(1, 1, 1, 4))
    refused(tmp_path / "m", "arrays .* MiB")


def test_a_zip_member_that_unpacks_to_too_much(tmp_path):
    with zipfile.ZipFile(tmp_path / "m", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("config.json", bytes((1 << 26) + 1))
    refused(tmp_path / "m", r"config\.json .*64 MiB")


@pytest.mark.parametrize("content", [b"", b"\x89HDF\r\n\x1a\n", b"PK\3\4", b"not weights" * 100])
def test_other_files(content, tmp_path):
    (tmp_path / "m").write_bytes(content)
    refused(tmp_path / "m", "damaged, or not a Keras file")


@pytest.mark.parametrize("config", ["[" * 10**5, "1", "{}", '{"config": {"layers": [1]}}', '{"config": 3}'])
def test_configs_that_make_no_sense(config, tmp_path):
    whole(tmp_path / "m", layers_of())
    with h5py.File(tmp_path / "m", "r+") as file:
        del file.attrs["model_config"]
        file.attrs["model_config"] = config[:60000]
    refused(tmp_path / "m", "damaged, or not a Keras file")


def test_a_heap_of_strings_that_never_ends(tmp_path):
    """HDF5 itself would loop in this heap for ever."""
    whole(tmp_path / "m", layers_of())
    content = bytearray((tmp_path / "m").read_bytes())
    first = content.index(b"GCOL") + 16
    length = int.from_bytes(content[first + 8 : first + 16], "little")
    free = first + 16 + -(-length // 8) * 8
    content[free : free + 16] = bytes(16)
    (tmp_path / "m").write_bytes(content)
    refused(tmp_path / "m", "its strings are damaged")


def test_no_such_file(tmp_path):
    refused(tmp_path / "m", "there is no such file")


def test_damaged_files_are_refused_or_read(form, tmp_path):
    """Truncated and changed files give a network or one line. Only a few are tried, because HDF5 crashes on some."""
    FORMS[form](tmp_path / "m", layers_of())
    content = (tmp_path / "m").read_bytes()
    rng = np.random.default_rng(0)
    for trial in range(30):
        damaged = bytearray(content)
        if trial % 3 == 0:
            del damaged[rng.integers(len(content)) :]
        else:
            for place in rng.integers(len(content), size=rng.integers(1, 20)):
                damaged[place] = rng.integers(256)
        (tmp_path / "d").write_bytes(damaged)
        with contextlib.suppress(UserError):
            assert read_keras(tmp_path / "d").layers


def test_without_h5py(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "h5py", None)
    refused(tmp_path / "m", "h5py")


# --- files by others --------------------------------------------------------------------------------------------


def test_a_published_file(real_data):
    network = read_keras(real_data / "weights" / "vww_96.h5")
    assert [len(of_kind(network, kind)) for kind in ("conv", "depthwise", "norm", "dense")] == [14, 13, 27, 1]
    assert (network.epsilon, network.resolution) == (0.001, 96)
    assert {layer.activation for layer in network.layers} == {"relu", None}
    assert of_kind(network, "dense")[0].activation is None
    assert network.layers[0].arrays["kernel"].shape == (3, 3, 3, 8)


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of Keras with NumPy 2
@pytest.mark.parametrize(("name", "width"), [("MobileNet", 0.25), ("MobileNetV2", 0.35), ("MobileNetV3Small", 0.75)])
def test_what_keras_writes(name, width, tmp_path):
    keras = pytest.importorskip("keras")
    model = getattr(keras.applications, name)(weights=None, classes=7, input_shape=(96, 96, 3), alpha=width)
    rng = np.random.default_rng(0)
    model.set_weights([rng.uniform(0.5, 1.5, array.shape).astype(np.float32) for array in model.get_weights()])
    model.save_weights(tmp_path / "m.weights.h5")
    model.save(tmp_path / "m.keras")
    model.save(tmp_path / "m.h5")
    classes = {"conv": "Conv2D", "depthwise": "DepthwiseConv2D", "norm": "BatchNormalization", "dense": "Dense"}
    for file in ("m.weights.h5", "m.keras", "m.h5"):
        network = read_keras(tmp_path / file)
        for kind, klass in classes.items():
            wanted = [layer for layer in model.layers if type(layer).__name__ == klass]
            found = of_kind(network, kind)
            assert [layer.name for layer in found] == [layer.name for layer in wanted]
            for ours, theirs in zip(found, wanted, strict=True):
                for array, value in zip(ours.arrays.values(), theirs.get_weights(), strict=True):
                    value = value.transpose(0, 1, 3, 2) if kind == "depthwise" and value.ndim == 4 else value
                    np.testing.assert_array_equal(array, value)
        if file != "m.weights.h5":
            assert (network.epsilon, network.resolution) == (0.001, 96)
            convs = {layer.activation for layer in of_kind(network, "conv")}
            seen = {None, "relu", "hard_swish", "hard_sigmoid"} if "V3" in name else {None, "relu6"}
            assert convs == seen
