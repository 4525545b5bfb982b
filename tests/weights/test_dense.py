"""Files of dense networks, with the names and shapes of the libraries' own models. Parity tests compare the values."""

import dataclasses
import functools
import json
import pathlib

import numpy as np
import pytest
import safetensors.numpy

from mnv2_jax.config import HEAD, Config, InitConfig, Loaded, ModelConfig, NormConfig
from mnv2_jax.data.mask_classes import VOC
from mnv2_jax.errors import UserError
from mnv2_jax.models.counting import count_layers
from mnv2_jax.models.plan import places
from mnv2_jax.models.registry import create_model
from mnv2_jax.training.initial import resolve_weights
from mnv2_jax.weights import by_order, load
from mnv2_jax.weights.by_name import to_timm
from mnv2_jax.weights.file import flatten, read_weights, save_weights, shapes_of, unflatten
from mnv2_jax.weights.layers import ForeignLayer, ForeignNetwork
from mnv2_jax.weights.load import load_weights

GOLDEN = json.loads((pathlib.Path(__file__).parents[1] / "golden" / "dense_state_dicts.json").read_text())
TORCHVISION = {
    "width_rule": "torchvision",
    "padding": "symmetric",
    "align_corners": False,
    "output_stride": 16,
    "dilation_from": "same",
}
CORENET = {"padding": "symmetric", "align_corners": True, "output_stride": 8, "width_rule": "corenet"}
EXPECTED = {
    "torchvision lraspp": ("mobilenet_v3_large", TORCHVISION | {"head": "lraspp", "head_channels": 128}, 520),
    "torchvision deeplabv3": (
        "mobilenet_v3_large",
        TORCHVISION | {"head": "deeplabv3", "head_channels": 256, "aspp_rates": (12, 24, 36), "aspp_conv": True},
        520,
    ),
    "transformers deeplabv3": (
        "mobilenet_v2",
        {"padding": "same", "align_corners": True, "output_stride": 8, "head": "deeplabv3"},
        513,
    ),
    "corenet deeplabv3": (
        "mobilenet_v2",
        CORENET | {"head": "deeplabv3", "head_channels": 512, "aspp_rates": (12, 24, 36), "aux_head": True},
        512,
    ),
}
LEFT_OUT = {"torchvision deeplabv3": "aux_classifier.", "transformers deeplabv3": "mobilenet_v2.conv_1x1."}
PUBLISHED = {"torchvision lraspp": 3_221_538, "torchvision deeplabv3": 11_029_328, "corenet deeplabv3": 7_956_886}
AUX = {"torchvision deeplabv3": 10 * 40 * 9 + 20 + 10 * 21 + 21, "corenet deeplabv3": -(128 * 96 * 9 + 256 + 129 * 150)}
"""Parameters that the published number has more than ours."""


def state_dict(key):
    rng = np.random.default_rng(0)
    return {
        name: rng.uniform(0.5, 1.5, tuple(map(int, text.split("x")))).astype(np.float32)
        for name, text in GOLDEN[key].items()
    }


def write(path, state):
    path.write_bytes(safetensors.numpy.save(state))
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    top = tmp_path_factory.mktemp("dense")
    return {key: write(top / f"{key.replace(' ', '_')}.safetensors", state_dict(key)) for key in EXPECTED}


@pytest.fixture(scope="module")
def loaded(files):
    return {key: load_weights(path) for key, path in files.items()}


@pytest.mark.parametrize("key", EXPECTED)
def test_every_tensor_finds_its_place_and_the_head_its_options(key, loaded, tmp_path):
    weights = loaded[key]
    name, options, resolution = EXPECTED[key]
    classes = 150 if key.startswith("corenet") else 21
    assert weights.model == create_model(name, classes, norm=weights.model.norm, **options)
    info = weights.info
    assert (info.task, info.source, info.preprocessing.resolution) == ("segmentation", key.split()[0], resolution)
    assert info.labels == (VOC if classes == 21 else ())
    given = {name: array for name, array in state_dict(key).items() if not name.startswith(LEFT_OUT.get(key, "-"))}
    leaves = flatten(weights.variables)
    assert sum(leaf.size for leaf in leaves.values()) == sum(array.size for array in given.values())
    # All but the scales of the head's norms are what they were.
    held = {leaf.tobytes() for place, leaf in leaves.items() if place.startswith("batch_stats")}
    assert held == {array.tobytes() for name, array in given.items() if "running" in name}
    if key in PUBLISHED:
        count = sum(leaf.size for place, leaf in leaves.items() if place.startswith("params"))
        assert count + AUX.get(key, 0) == PUBLISHED[key]
    save_weights(tmp_path / "ours.safetensors", *weights)
    read = read_weights(tmp_path / "ours.safetensors")
    assert (read.model, read.info) == (weights.model, info)


def test_scales_of_the_head_make_up_for_its_epsilon(loaded):
    weights, state = loaded["torchvision lraspp"], state_dict("torchvision lraspp")
    scale = weights.variables["params"]["lraspp"]["conv_norm"]["scale"]
    var, given = state["classifier.cbr.1.running_var"], state["classifier.cbr.1.weight"]
    assert weights.model.norm.epsilon == 1e-3
    np.testing.assert_allclose(scale / np.sqrt(var + 1e-3), given / np.sqrt(var + 1e-5), rtol=1e-6)
    assert any("epsilon of 1e-05" in note for note in weights.info.notes)
    block = weights.variables["params"]["block_1"]["depthwise_norm"]["scale"]
    np.testing.assert_array_equal(block, state["backbone.1.block.0.1.weight"])


def test_the_pooled_image_of_transformers_comes_first(loaded):
    kernel = loaded["transformers deeplabv3"].variables["params"]["aspp"]["project"]["kernel"][0, 0]
    given = state_dict("transformers deeplabv3")["segmentation_head.conv_projection.convolution.weight"][:, :, 0, 0].T
    np.testing.assert_array_equal(kernel, np.concatenate([given[256:], given[:256]]))


def test_the_config_of_transformers(tmp_path):
    path = write(tmp_path / "model.safetensors", state_dict("transformers deeplabv3"))
    labels = tuple(f"c{i}" for i in range(21))
    facts = {"architectures": ["MobileNetV2ForSemanticSegmentation"], "output_stride": 16, "tf_padding": False}
    (tmp_path / "config.json").write_text(json.dumps(facts | {"id2label": dict(enumerate(labels))}))
    weights = load_weights(path)
    assert (weights.model.options.output_stride, weights.model.options.padding) == (16, "symmetric")
    assert weights.info.labels == labels


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"hidden_act": "swish"}, r"config\.json: hidden_act='swish', .*'relu6'"),
        ({"id2label": {"1": "cat"}}, r"id2label=.*from 0"),
        ({"id2label": [1]}, r"id2label=.*from 0"),
        ({"output_stride": 7}, r"output_stride=7"),
    ],
)
def test_a_config_of_transformers_that_is_another_network(facts, message, tmp_path):
    path = write(tmp_path / "model.safetensors", {"segmentation_head.conv_aspp.convolution.weight": np.ones((2, 2))})
    (tmp_path / "config.json").write_text(
        json.dumps({"architectures": ["MobileNetV2ForSemanticSegmentation"], **facts})
    )
    with pytest.raises(UserError, match=message) as error:
        load_weights(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({"classifier.cbr.1.bias": None}, {}, r"head=lraspp.*missing: classifier\.cbr\.1\.bias"),
        ({"classifier.extra.weight": np.ones(1, np.float32)}, {}, r"left over: classifier\.extra\.weight"),
        ({}, {"library": "timm"}, "torchvision's lraspp, which timm doesn't have"),
        ({}, {"labels": ["a", "b"]}, "21 classes, but got 2 labels"),
    ],
)
def test_what_is_refused(change, options, message, tmp_path):
    state = {name: array for name, array in (state_dict("torchvision lraspp") | change).items() if array is not None}
    with pytest.raises(UserError, match=message) as error:
        load_weights(write(tmp_path / "w.safetensors", state), **options)
    assert "\n" not in str(error.value)


def test_wrapped_in_a_checkpoint(tmp_path):
    state = {f"model.{name}": array for name, array in state_dict("torchvision lraspp").items()}
    weights = load_weights(write(tmp_path / "w.safetensors", state | {"other.weight": np.ones(1, np.float32)}))
    assert weights.model.options.head == "lraspp"
    assert any("other" in note for note in weights.info.notes)


def test_timm_has_no_dense_networks(loaded):
    with pytest.raises(UserError, match="timm has no"):
        to_timm(loaded["torchvision lraspp"])


@pytest.mark.parametrize(
    ("head", "evaluates", "keys"),
    [("load", False, HEAD), ("new", False, ()), ("new", True, (*HEAD, "output_stride"))],
)
@pytest.mark.parametrize("own", [{}, {"head": "lraspp", "head_channels": 64, "aux_head": True}])
def test_a_config_takes_the_head_from_the_weights(head, evaluates, keys, own, files):
    path = str(files["torchvision deeplabv3"])
    model = ModelConfig(name="mobilenet_v3_large", **own)
    before = Config(model=model, init=InitConfig(weights=path, head=head), task="segmentation")
    after, weights = resolve_weights(Loaded("x", before, {}), evaluates=evaluates)
    taken = {key: getattr(weights.model.options, key) for key in ("width_rule", "padding", "dilation_from", *keys)}
    assert after.model == dataclasses.replace(model, **taken)
    assert ("model.aspp_conv" in Loaded("x", before, {}).from_weights) == (head == "load")
    if head == "load":
        with pytest.raises(UserError, match=r"config has model\.head_channels=") as error:
            resolve_weights(Loaded("x", replaced(before, head_channels=32), {"model.head_channels": "flag"}))
        assert "\n" not in str(error.value)


def replaced(settings, **model):
    return dataclasses.replace(settings, model=dataclasses.replace(settings.model, **model))


def test_a_classifier_gives_no_dense_head(tmp_path):
    model = create_model("mobilenet_v1", 3, width=0.25)
    leaves = {name: np.ones(shape, np.float32) for name, shape in shapes_of(model).items()}
    save_weights(tmp_path / "w.safetensors", model, unflatten(leaves))
    options = ModelConfig(name="mobilenet_v1", width=0.25, head="deeplabv3")
    settings = Config(model=options, init=InitConfig(weights=str(tmp_path / "w.safetensors")))
    with pytest.raises(UserError, match=r"give --config\.init\.head=new"):
        resolve_weights(Loaded("x", settings, {}))


@pytest.fixture(scope="module")
def of_tflite():
    """Model and content of a TFLite file of the small DeepLabv3, width 0.5 in multiples of 4, output stride 16."""
    options = dict(head="deeplabv3", head_channels=24, output_stride=16, width=0.5, width_rule="divisor4")
    model = create_model("mobilenet_v2", 21, align_corners=True, norm=NormConfig(decay=0.997), **options)
    at = dict(zip(("stem", *(f"block_{i}" for i in range(1, 18))), places(model.plan, model.options), strict=True))
    rng = np.random.default_rng(0)
    layers = []
    for name in (row.name for row in count_layers(model, 64).layers):
        shape = shapes_of(model).get(f"params/{name}/kernel")
        if shape is None:
            continue
        shape = (1, 1, *shape) if len(shape) == 2 else shape
        arrays = {"kernel": rng.normal(size=shape).astype(np.float32), "bias": np.ones(shape[-1:], np.float32)}
        place = at.get(name.split("/")[0])
        window = {"stride": place.stride, "dilation": place.dilation} if place and shape[0] > 1 else {"stride": 1}
        linear = name == "classifier" or (name.endswith("/project") and name.startswith("block_"))
        act = None if linear else "relu" if name.startswith("aspp/") else "relu6"
        said = {"activation": act, "dilation": 1, "pads": "same", **window}
        layers.append(ForeignLayer(name, "depthwise" if shape[2] == 1 else "conv", arrays, **said))
    known = dict(source="tflite", folded=True, epsilon=None, resolution=513, mean=(0.5,) * 3, std=(0.5,) * 3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(by_order, "count_layers", functools.cache(count_layers))
        yield model, ForeignNetwork(layers=tuple(layers), head="deeplabv3", align_corners=True, **known)


def load_tflite(network, monkeypatch, **options):
    monkeypatch.setattr(load, "kind_of", lambda path: "tflite")
    monkeypatch.setattr(load, "read_tflite", lambda path: network)
    return load_weights("deeplab.tflite", **options)


def test_a_tflite_file_says_its_width_and_its_stride(of_tflite, monkeypatch):
    model, network = of_tflite
    weights = load_tflite(network, monkeypatch)
    assert weights.model == model
    assert (weights.info.task, weights.info.labels, weights.info.preprocessing.mean) == (
        "segmentation",
        VOC,
        (0.5,) * 3,
    )
    kernels = {layer.name: layer.arrays["kernel"] for layer in network.layers}
    params = weights.variables["params"]
    np.testing.assert_array_equal(params["block_17"]["depthwise"]["kernel"], kernels["block_17/depthwise"])
    project = kernels["aspp/project"]  # the pooled image comes first
    expected = np.concatenate([project[:, :, 24:], project[:, :, :24]], 2)
    np.testing.assert_array_equal(params["aspp"]["project"]["kernel"], expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block_16/depthwise": {"dilation": 1}}, r"layer block_16/depthwise has .*dilation of 1, .*1 and 2"),
        ({"block_2/depthwise": {"pads": "valid"}}, r"block_2/depthwise has padding valid"),
        ({"aspp/pool": {"activation": "relu6"}}, r"aspp/pool is followed by relu6, .*relu;"),
    ],
)
def test_what_is_refused_of_a_tflite_file(change, message, of_tflite, monkeypatch):
    _, network = of_tflite
    layers = tuple(dataclasses.replace(layer, **change.get(layer.name, {})) for layer in network.layers)
    with pytest.raises(UserError, match=message) as error:
        load_tflite(dataclasses.replace(network, layers=layers), monkeypatch)
    assert "\n" not in str(error.value)
