"""Options, heads and preprocessing that are read from Keras and TFLite files besides the arrays."""

import dataclasses
import functools
import json
import pathlib
import shutil
from contextlib import nullcontext

import numpy as np
import pytest

from mnv2_jax.errors import UserError
from mnv2_jax.models.counting import count_layers
from mnv2_jax.models.registry import create_model
from mnv2_jax.weights import by_order, load
from mnv2_jax.weights.by_order import (
    facts_of,
    is_binary,
    leaves_of,
    num_classes,
    of_two_classes,
    without_other_head,
)
from mnv2_jax.weights.file import shapes_of, unflatten
from mnv2_jax.weights.keras_files import read_keras
from mnv2_jax.weights.layers import ForeignLayer, ForeignNetwork
from mnv2_jax.weights.tflite_files import read_tflite
from mnv2_jax.weights.unfold import are_folded

V1, V2, V3 = "mobilenet_v1", "mobilenet_v2", "mobilenet_v3_small"
PATH = pathlib.Path("w")
HALVING = {
    V1: ["stem", *(f"block_{i}/depthwise" for i in (2, 4, 6, 12))],
    V2: ["stem", *(f"block_{i}/depthwise" for i in (2, 4, 7, 14))],
    V3: ["stem", *(f"block_{i}/depthwise" for i in (1, 2, 4, 9))],
}
TWOS = (2, 2, 2, 2, 2)


# --- networks made by hand --------------------------------------------------------------------------------------


def followed_by(ours, name):
    """Activation of a layer: relu6 by default in V1 and V2; relu in V3-Small's blocks up to the third."""
    block, _, layer = ours.partition("/")
    if layer == "project" or ours == "classifier":
        return None
    if "squeeze_excite" in layer:
        return "relu" if layer.endswith("reduce") else "hard_sigmoid"
    if name == V3:
        return "relu" if block in ("block_1", "block_2", "block_3") else "hard_swish"
    return "relu6"


names_of = functools.cache(lambda model: [row.name for row in count_layers(model, 64).layers])


def loaded(network, name, **preprocessing):
    """Loads a `ForeignNetwork` as if it came from a file."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(load, "kind_of", lambda path: network.source)
        patch.setattr(load, f"read_{network.source}", lambda path: network)
        width = 0.25 if name == V1 else 0.35
        return load.load_weights(PATH, name, width=width, width_rule="standard", preprocessing=preprocessing or None)


@pytest.fixture(autouse=True, scope="module")
def _traced_once():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(by_order, "count_layers", functools.cache(count_layers))
        yield


def foreign(name, change=lambda ours, kernel: {}, resolution=96, source="keras"):
    """A network as it would be read from a file, with changes to each layer."""
    model = create_model(name, 2, width=0.25 if name == V1 else 0.35)
    shapes = shapes_of(model)
    layers = []
    for ours in names_of(model):
        shape = shapes.get(f"params/{ours}/kernel")
        if shape is None:
            continue
        kind = "dense" if ours == "classifier" else "depthwise" if shape[2:3] == (1,) else "conv"
        shape = (1, 1, *shape) if kind == "conv" and len(shape) == 2 else shape
        said = {"activation": followed_by(ours, name)}
        if kind != "dense":
            said |= dict(stride=2 if ours in HALVING[name] else 1, dilation=1, pads="same")
            said |= change(ours, shape[0])
        layers.append(ForeignLayer(ours, kind, {"kernel": np.ones(shape, np.float32)}, **said))
    known = dict(source=source, folded=True, epsilon=None, resolution=resolution, mean=None, std=None)
    return model, ForeignNetwork(layers=tuple(layers), **known)


def facts(name, change=lambda ours, kernel: {}, **rest):
    return facts_of(PATH, *foreign(name, change, **rest))


def on(layers, **said):
    return lambda ours, kernel: said if ours in layers else {}


@pytest.mark.parametrize("name", [V1, V2, V3])
def test_what_is_published(name):
    assert facts(name) == dict(strides=TWOS, padding="same")


@pytest.mark.parametrize("name", [V1, V2, V3])
def test_a_file_of_weights_says_nothing(name):
    nothing = dict.fromkeys(("stride", "dilation", "pads", "activation"))
    assert facts(name, lambda ours, kernel: nothing) == {}


@pytest.mark.parametrize("name", [V1, V2, V3])
@pytest.mark.parametrize("strides", [(1, 1, 1, 1, 1), (1, 2, 2, 2, 2), (2, 2, 1, 1, 2)])
def test_strides_stand_at_the_published_places(name, strides):
    asked = dict(zip(HALVING[name], strides, strict=True))
    change = lambda ours, kernel: {"stride": asked.get(ours, 1)}  # noqa: E731
    assert facts(name, change) == dict(strides=strides, padding="same")


def symmetric(ours, kernel):
    return {"pads": (kernel // 2, kernel // 2)} if kernel > 1 else {"pads": "valid"}


@pytest.mark.parametrize("name", [V1, V2, V3])
@pytest.mark.parametrize("resolution", [None, 75, 96, 225])
def test_zeros_as_of_pytorch(name, resolution):
    assert facts(name, symmetric, resolution=resolution)["padding"] == "symmetric"
    # Converters write "same" where that is the same.
    change = lambda ours, kernel: symmetric(ours, kernel) if ours in HALVING[name] else {}  # noqa: E731
    assert facts(name, change, resolution=resolution)["padding"] == "symmetric"
    first = lambda ours, kernel: {"stride": 1, "pads": "same"} if ours == "stem" else change(ours, kernel)  # noqa: E731
    assert facts(name, first, resolution=resolution) == dict(strides=(1, 2, 2, 2, 2), padding="symmetric")


def padded(name, *pads):
    """Changes the pads of the halving layers. Pads are for kernels of 3; kernels of 5 get one more on both sides."""
    given = dict(zip(HALVING[name], pads, strict=True))

    def change(ours, kernel):
        pads = given.get(ours, "same")
        return {"pads": pads if pads in ("same", "valid") else tuple(zeros + kernel // 2 - 1 for zeros in pads)}

    return change


@pytest.mark.parametrize(("name", "padding"), [(V1, "keras_v1"), (V2, "same"), (V3, "same")])
@pytest.mark.parametrize("stem", ["same", (0, 1)])
@pytest.mark.parametrize("resolution", [None, 96])
def test_zeros_as_of_keras_at_even_sizes(name, padding, stem, resolution):
    change = padded(name, stem, *[(0, 1)] * 4)
    assert facts(name, change, resolution=resolution)["padding"] == padding


@pytest.mark.parametrize("name", [V2, V3])
def test_zeros_as_of_keras_at_sizes_that_are_odd_in_places(name):
    change = padded(name, "same", (0, 1), (1, 1), (0, 1), (1, 1))  # 75, 38, 19, 10, 5
    assert facts(name, change, resolution=75)["padding"] == "same"
    with pytest.raises(UserError, match=rf"{HALVING[name][2]} .*\(1, 1\)"):
        facts(name, change, resolution=96)


def test_keras_mobilenet_pads_after_the_map_at_any_size():
    assert facts(V1, padded(V1, "same", *[(0, 1)] * 4), resolution=75)["padding"] == "keras_v1"
    with pytest.raises(UserError, match=r"stem .*padding"):
        facts(V1, padded(V1, (0, 1), *[(0, 1)] * 4), resolution=75)


@pytest.mark.parametrize(
    ("pads", "at"),
    [
        (["same", "valid", "same", "same", "same"], 1),
        (["valid", (1, 1), (1, 1), (1, 1), (1, 1)], 0),
        (["same", (1, 1), (1, 1), (1, 1), (1, 1)], 1),
        (["same", (0, 1), (0, 1), (0, 1), "valid"], 4),
        ([(1, 1), (1, 1), (1, 1), (0, 1), (1, 1)], 3),
        ([(1, 1), (1, 1), "same", (1, 1), (1, 1)], 2),
        (["same", (1, 0), (1, 0), (1, 0), (1, 0)], 1),
    ],
)
def test_other_paddings_are_refused(pads, at):
    with pytest.raises(UserError, match=rf"^w: .*{HALVING[V1][at]} .*padding"):
        facts(V1, padded(V1, *pads))


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        (dict(stride=2), "stride of 2 .*dilation of 1, .*mobilenet_v1 .* 1 and 1"),
        (dict(dilation=2), "stride of 1 .*dilation of 2"),
        (dict(pads="valid"), "padding valid .*kernel of 3 .*stride of 1"),
        (dict(pads=(0, 2)), r"padding \(0, 2\)"),
        (dict(activation="tanh"), "block_3/depthwise .*tanh, .*mobilenet_v1 .*relu6"),
        (dict(activation="relu"), "relu6, .*mobilenet_v1 .*relu;"),
        (dict(activation=None), "no known activation, .*mobilenet_v1 .*relu6"),
    ],
)
def test_a_layer_unlike_ours_is_refused(changes, match):
    with pytest.raises(UserError, match=match):
        facts(V1, on(["block_3/depthwise"], **changes))


def test_strides_of_the_halving_layers_are_1_or_2():
    for changes in (dict(stride=3), dict(stride=0), dict(dilation=2)):
        with pytest.raises(UserError, match=r"mobilenet_v1 .*1 or 2 and 1"):
            facts(V1, on(["stem"], **changes))


@pytest.mark.parametrize(("name", "activation"), [(V1, "relu"), (V2, "relu")])
def test_relu_is_an_option_of_v1_and_v2(name, activation):
    change = lambda ours, kernel: {"activation": activation if followed_by(ours, name) else None}  # noqa: E731
    assert facts(name, change) == dict(strides=TWOS, padding="same", activation="relu")


@pytest.mark.parametrize(
    ("name", "layer", "activation"),
    [
        (V2, "block_3/project", "relu6"),
        (V2, "stem", "swish"),
        (V3, "block_1/depthwise", "relu6"),
        (V3, "block_9/expand", "relu"),
        (V3, "stem", "hard_sigmoid"),
    ],
)
def test_every_layer_has_the_activation_of_ours(name, layer, activation):
    with pytest.raises(UserError, match=f"{layer} .*{activation}, .*{name}"):
        facts(name, on([layer], activation=activation))


def test_tflite_may_hide_an_activation_in_a_range():
    assert facts(V1, on(["stem"], activation=None), source="tflite") == dict(strides=TWOS, padding="same")
    with pytest.raises(UserError, match="tanh"):
        facts(V1, on(["stem"], activation="tanh"), source="tflite")


def test_layers_that_are_missing_are_listed():
    model, network = foreign(V1)
    fewer = ForeignNetwork(**{**vars(network), "layers": network.layers[1:]})
    with pytest.raises(UserError, match=r"mobilenet_v1 .*missing: classifier"):
        facts_of(PATH, model, fewer)


def test_a_bias_before_a_norm_is_taken_out_of_its_mean_and_the_epsilon_is_the_files():
    model, network = foreign(V1)
    assert are_folded(model, unflatten(leaves_of(PATH, model, network)))  # as in TFLite's files: its norms only add
    rng, layers = np.random.default_rng(0), []
    for layer in network.layers:
        channels = layer.arrays["kernel"].shape[-1]
        if layer.kind == "dense":
            layers.append(layer)
            continue
        layers.append(dataclasses.replace(layer, arrays={**layer.arrays, "bias": rng.normal(size=channels)}))
        norm = {leaf: rng.uniform(1, 2, channels) for leaf in ("scale", "bias", "mean", "var")}
        layers.append(ForeignLayer(f"{layer.name}_norm", "norm", norm))
    network = dataclasses.replace(network, layers=tuple(layers), folded=False, epsilon=0.02)
    read, variables, _ = loaded(network, V1)
    assert read.norm.epsilon == 0.02
    assert read.options == model.options
    before, after = (next(x.arrays for x in layers if x.name == f"block_2/depthwise{end}") for end in ("", "_norm"))
    statistics, params = (variables[kind]["block_2"]["depthwise_norm"] for kind in ("batch_stats", "params"))
    np.testing.assert_array_equal(statistics["mean"], after["mean"] - before["bias"])
    np.testing.assert_array_equal(params["bias"], after["bias"])


# --- layers after global pooling ---------------------------------------------------------------------------------


def behind(name, *widths):
    """A network with dense layers of these widths after global pooling instead of its head."""
    model, network = foreign(name)
    parts = model.head_parts
    before = shapes_of(model)[f"params/{parts[0]}/kernel"][0]
    layers = [layer for layer in network.layers if layer.name not in parts]
    for number, width in enumerate(widths):
        said = {"activation": "hard_swish"} if number < len(widths) - 1 else {}
        layers.append(ForeignLayer(f"d{number}", "dense", {"kernel": np.ones((before, width), np.float32)}, **said))
        before = width
    return model, dataclasses.replace(network, layers=tuple(layers))


@pytest.mark.parametrize(
    ("name", "widths", "absent", "is_refused"),
    [
        (V1, [], ("classifier",), False),
        (V2, [], ("classifier",), False),
        (V3, [], ("hidden", "classifier"), False),
        (V2, [2], (), False),
        (V2, [100, 3], ("classifier",), True),
        (V3, [1024], ("classifier",), False),
        (V3, [1024, 2], (), False),
        (V3, [7], ("hidden", "classifier"), True),
        (V3, [1024, 64, 7], ("classifier",), True),
    ],
)
def test_heads_that_are_missing_or_others(name, widths, absent, is_refused):
    model, network = behind(name, *widths)
    if is_refused:
        with pytest.raises(UserError, match=rf"^w: .*dense d{len(widths) - 1} \[.*head=new"):
            without_other_head(PATH, model, network, "load")
    else:
        assert without_other_head(PATH, model, network, "load") == (network, absent)
    left, found = without_other_head(PATH, model, network, "new")
    assert found == absent
    leaves = leaves_of(PATH, model, left, absent)
    assert set(leaves) == set(shapes_of(model, absent))
    # No layer of these files has a bias, nor has a converter's that left out zeros.
    assert not any(np.any(leaf) for place, leaf in leaves.items() if place.endswith("/bias"))


@pytest.mark.parametrize("activation", [None, "sigmoid"])
def test_one_logit_is_two_classes(activation):
    model, network = behind(V2, 1)
    *earlier, last = network.layers
    last = dataclasses.replace(last, arrays={**last.arrays, "bias": np.full(1, 3, np.float32)}, activation=activation)
    assert not is_binary(behind(V2, 2)[1])
    for widened in (last, dataclasses.replace(last, arrays={"kernel": last.arrays["kernel"]})):
        network = dataclasses.replace(network, layers=(*earlier, widened))
        assert without_other_head(PATH, model, network, "load") == (network, ())
        assert is_binary(network)
        leaves = leaves_of(PATH, model, of_two_classes(network))
        np.testing.assert_array_equal(leaves["params/classifier/kernel"], [[0, 1]] * 1280)
        np.testing.assert_array_equal(leaves["params/classifier/bias"], [0, 3 if "bias" in widened.arrays else 0])


@pytest.mark.parametrize(("units", "activation"), [(2, "sigmoid"), (2, "relu"), (1, "tanh")])
def test_last_layers_that_give_no_logits(units, activation):
    model, network = behind(V2, units)
    *earlier, last = network.layers
    network = dataclasses.replace(network, layers=(*earlier, dataclasses.replace(last, activation=activation)))
    with pytest.raises(UserError, match=rf"dense d0 \[1280, {units}\] with {activation}"):
        without_other_head(PATH, model, network, "load")
    assert without_other_head(PATH, model, network, "new")[1] == ("classifier",)
    pooled = dataclasses.replace(behind(V2, 2)[1], unsupported=("pool (GlobalMaxPooling2D)",))
    with pytest.raises(UserError, match=r"pool \(GlobalMaxPooling2D\)"):
        without_other_head(PATH, model, pooled, "load")
    *earlier, hidden, last = behind(V2, 100, 3)[1].layers  # a hidden layer without an activation is no classifier
    network = dataclasses.replace(network, layers=(*earlier, dataclasses.replace(hidden, activation=None), last))
    assert without_other_head(PATH, model, network, "new")[1] == ("classifier",)


# --- what it says of images -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "pixel_layers", "layer"),
    [
        (V2, {}, None),
        (V2, {"rescaling": True}, "'rescaling'"),
        (V3, {"rescaling_3": True, "tf.math.multiply": True}, None),
        (V3, {"rescaling": True, "rescaling_1": False}, "'rescaling_1'"),
        (V3, {"normalization": True}, "'normalization'"),
    ],
)
def test_layers_without_numbers_ask_for_mean_and_std(name, pixel_layers, layer):
    network = dataclasses.replace(foreign(name)[1], pixel_layers=pixel_layers)
    loaded(network, name, mean=(0, 0, 0), std=(1, 1, 1))
    with pytest.raises(UserError, match=rf"^w: .*{layer}.*--mean .*--std$") if layer else nullcontext():
        loaded(network, name, mean=(0, 0, 0))


def test_what_a_file_says_of_images_wins_over_the_custom():
    stated = dict(mean=(0.0, 0.1, 0.2), std=(1.0, 0.9, 0.8), resolution=48, view={"eval_crop": "central"})
    network = foreign(V2)[1]
    preprocessing = loaded(dataclasses.replace(network, **stated), V2).info.preprocessing
    assert (preprocessing.mean, preprocessing.std, preprocessing.resolution) == (stated["mean"], stated["std"], 48)
    assert (preprocessing.eval_crop, preprocessing.interpolation, preprocessing.antialias) == (
        "central",
        "bilinear",
        False,
    )
    smooth = dataclasses.replace(network, view={"interpolation": "bicubic", "antialias": True})
    assert loaded(smooth, V2).info.preprocessing.antialias
    assert not loaded(dataclasses.replace(network, source="tflite"), V2).info.preprocessing.antialias
    with pytest.raises(UserError, match=r"^w: .*data\.std"):
        loaded(dataclasses.replace(network, std=(300.0,) * 3), V2)


# --- files by others --------------------------------------------------------------------------------------------


def read(path, name, width):
    network = read_tflite(path) if path.suffix == ".tflite" else read_keras(path)
    return facts_of(path, create_model(name, num_classes(path, network), width=width), network)


@pytest.mark.parametrize(
    ("file", "name", "width", "options"),
    [
        ("vww_96.h5", V1, 0.25, {"activation": "relu"}),
        ("vww_96_float.tflite", V1, 0.25, {"activation": "relu"}),
        ("mobilenet_v1_0.25_128_quant.tflite", V1, 0.25, {}),
        ("tf2_mobilenet_v2_1.0_224_ptq.tflite", V2, 1.0, {}),
    ],
)
def test_published_files(file, name, width, options, real_data):
    assert read(real_data / "weights" / file, name, width) == dict(strides=TWOS, padding="same", **options)


@pytest.mark.parametrize(
    ("edit", "expected"),
    [
        ({"strides": [1, 1]}, dict(strides=(1, 1, 1, 1, 1), padding="same", activation="relu")),
        ({"dilation_rate": [2, 2]}, "dilation of 2, .*mobilenet_v1"),
        ({"padding": "valid"}, "padding valid"),
        ({"activation": "tanh"}, "tanh, .*mobilenet_v1 .*relu6"),
        ({"activation": "swish"}, "swish, .*mobilenet_v1 .*relu6"),
        ({"activation": "linear"}, "no known activation"),
        ({"strides": [2, 1]}, "stride for rows"),
    ],
)
def test_an_edited_config(edit, expected, real_data, tmp_path):
    h5py = pytest.importorskip("h5py")
    path = tmp_path / "w.h5"
    shutil.copyfile(real_data / "weights" / "vww_96.h5", path)
    with h5py.File(path, "r+") as file:
        config = json.loads(file.attrs["model_config"])
        for layer in config["config"]["layers"]:
            is_activation = layer["class_name"] == "Activation"
            if is_activation or "Conv2D" in layer["class_name"]:
                layer["config"] |= {key: value for key, value in edit.items() if is_activation == (key == "activation")}
        del file.attrs["model_config"]
        file.attrs["model_config"] = json.dumps(config)
    if isinstance(expected, dict):
        assert read(path, V1, 0.25) == expected
    else:
        with pytest.raises(UserError, match=expected) as error:
            read(path, V1, 0.25)
        assert str(error.value).startswith(f"{path}: ")


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of Keras with NumPy 2
@pytest.mark.parametrize("size", [96, 75])
@pytest.mark.parametrize(
    ("theirs", "options", "name", "padding"),
    [
        ("MobileNet", {"alpha": 0.25}, V1, "keras_v1"),
        ("MobileNetV2", {}, V2, "same"),
        ("MobileNetV3Small", {}, V3, "same"),
        ("MobileNetV3Large", {}, "mobilenet_v3_large", "same"),
        ("MobileNetV3Small", {"minimalistic": True}, "mobilenet_v3_small_minimalistic", "same"),
    ],
)
def test_keras_applications(theirs, options, name, padding, size, tmp_path):
    keras = pytest.importorskip("keras")
    model = getattr(keras.applications, theirs)(weights=None, classes=7, input_shape=(size, size, 3), **options)
    for form in ("h5", "keras"):
        model.save(tmp_path / f"m.{form}")
        assert read(tmp_path / f"m.{form}", name, options.get("alpha", 1.0)) == dict(strides=TWOS, padding=padding)
    model.save_weights(tmp_path / "m.weights.h5")
    assert read(tmp_path / "m.weights.h5", name, options.get("alpha", 1.0)) == {}
