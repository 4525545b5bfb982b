"""Files of PyTorch libraries, with the names and shapes of their own models. Parity tests compare the values."""

import errno
import json
import os
import pathlib
import pickle
import zipfile

import jax
import numpy as np
import pytest
import safetensors.numpy

from mnv2_jax.data import imagenet
from mnv2_jax.errors import UserError
from mnv2_jax.models.registry import create_model
from mnv2_jax.weights import layers
from mnv2_jax.weights.by_name import timm_options, to_timm
from mnv2_jax.weights.conventions import CONVENTIONS
from mnv2_jax.weights.file import Weights, WeightsInfo, flatten, save_weights, shapes_of, unflatten
from mnv2_jax.weights.load import load_weights
from mnv2_jax.weights.names import TABLES

GOLDEN = json.loads((pathlib.Path(__file__).parents[1] / "golden" / "state_dicts.json").read_text())
INFO = WeightsInfo()
MODELS = [key for key in GOLDEN if key != "about"]


def state_dict(key, classes=None):
    """Random tensors with a library's names and shapes; the classifier is cut to a number of classes."""
    rng = np.random.default_rng(0)
    last = max(name for name in GOLDEN[key] if name.startswith(("classifier", "fc")))
    head = last.rpartition(".")[0]
    state = {}
    for name, text in GOLDEN[key].items():
        shape = tuple(map(int, text.split("x")))
        if classes and name.startswith(f"{head}."):
            shape = (classes, *shape[1:])
        state[name] = rng.uniform(0.5, 1.5, shape).astype(np.float32)
    return state


def write(path, state, **metadata):
    path.write_bytes(safetensors.numpy.save(state, metadata or None))
    return path


@pytest.mark.parametrize("key", MODELS)
def test_every_tensor_of_a_library_finds_its_place(key, tmp_path):
    library, name = key.split()
    state = state_dict(key)
    model, variables, info = load_weights(write(tmp_path / "w.safetensors", state), name)
    assert (model.name, model.num_classes, info.source) == (name, 1000, library)
    assert model.options.padding == "symmetric"
    assert info.labels == imagenet.class_names()
    # The same numbers, each once: what went in is what came out, whatever the order of the axes.
    ours = np.sort(np.concatenate([leaf.ravel() for leaf in flatten(variables).values()]))
    theirs = np.sort(np.concatenate([array.ravel() for array in state.values()]))
    np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("key", [key for key in MODELS if key.startswith("timm")])
def test_back_to_timm_is_exact(key, tmp_path):
    state = state_dict(key)
    back = to_timm(load_weights(write(tmp_path / "w.safetensors", state), key.split()[1]))
    counters = {name for name in back if name.endswith("num_batches_tracked")}
    assert set(back) - counters == set(state)
    for name, array in state.items():
        np.testing.assert_array_equal(back[name], array)
    assert all(back[name].shape == () and back[name].dtype == np.int64 for name in counters)
    assert len(counters) == sum(name.endswith("running_mean") for name in state)


def test_a_file_of_ours_says_what_it_holds(tmp_path):
    model = create_model("mobilenet_v1", 3, width=0.25)
    variables = jax.tree.map(
        lambda leaf: np.ones(leaf.shape, np.float32),
        jax.eval_shape(model.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 32, 32, 3), "float32")),
    )
    save_weights(tmp_path / "w.safetensors", model, variables, WeightsInfo(labels=("a", "b", "c")))
    read = load_weights(tmp_path / "w.safetensors")
    assert (read.model, read.info.labels) == (model, ("a", "b", "c"))
    with pytest.raises(UserError, match=r"model .*options"):
        load_weights(tmp_path / "w.safetensors", "mobilenet_v1")


def test_the_library_matters_where_the_file_cannot_tell(tmp_path):
    state = state_dict("timm mobilenet_v3_large")
    plain = load_weights(write(tmp_path / "a.safetensors", state), "mobilenet_v3_large")
    by_flag = load_weights(tmp_path / "a.safetensors", "mobilenet_v3_large", library="timm_tf")
    by_name = load_weights(write(tmp_path / "tf_mobilenetv3_large_100.safetensors", state), "mobilenet_v3_large")
    assert (plain.model.options.padding, plain.info.preprocessing.antialias) == ("symmetric", True)
    for read in (by_flag, by_name):
        assert (read.model.options.padding, read.model.norm.epsilon) == ("same", 1e-3)
        assert (read.info.source, read.info.preprocessing.mean) == ("timm_tf", (0.5, 0.5, 0.5))
        assert not read.info.preprocessing.antialias


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        (dict(arch="tf_mobilenetv3_large_100"), ("timm_tf", "same", 1e-3)),
        (dict(backbone="hf-hub:timm/tf_mobilenetv3_large_100.in1k"), ("timm_tf", "same", 1e-3)),
        (dict(architecture="mobilenetv3_large_100.ra_in1k"), ("timm", "symmetric", 1e-5)),
        (dict(arch="mobilenetv3_large_100", name="tf_experiment"), ("timm", "symmetric", 1e-5)),
    ],
)  # fmt: skip
def test_the_architecture_said_in_the_file(metadata, expected, tmp_path):
    path = write(tmp_path / "w.safetensors", state_dict("timm mobilenet_v3_large"), **metadata)
    model, _, info = load_weights(path)
    assert model.name == "mobilenet_v3_large"
    assert (info.source, model.options.padding, model.norm.epsilon) == expected
    assert any(next(iter(metadata.values())) in note for note in info.notes)
    assert load_weights(path, "mobilenet_v3_large", library="timm").info.source == "timm"
    with pytest.raises(UserError, match=r"w\.safetensors.*mobilenet_v3_large.*mobilenet_v1"):
        load_weights(path, "mobilenet_v1")


def test_an_architecture_that_is_none_of_the_librarys_says_nothing(tmp_path):
    path = write(
        tmp_path / "x.safetensors", state_dict("timm mobilenet_v3_large"), arch="tf_mobilenetv3_large_100_mine"
    )
    assert load_weights(path, "mobilenet_v3_large").info.source == "timm_tf"  # but for the library
    write(path, state_dict("timm mobilenet_v3_large"), arch="tf_mine")
    assert load_weights(path, "mobilenet_v3_large").info.source == "timm"
    path = write(tmp_path / "w.safetensors", state_dict("timm mobilenet_v1"), arch="mobilenet_v2", model="mobilenetv1")
    assert load_weights(path, "mobilenet_v1").info.source == "timm"
    write(path, state_dict("torchvision mobilenet_v2"), arch="mobilenet_v2")
    assert load_weights(path).info.source == "torchvision"


@pytest.mark.parametrize(
    ("key", "names"),
    [
        ("timm mobilenet_v1", ["classifier.bias"]),
        ("torchvision mobilenet_v2", ["classifier.1.bias"]),
        ("torchvision mobilenet_v3_small", ["classifier.0.bias", "classifier.3.bias"]),
        ("timm mobilenet_v3_large", ["blocks.2.0.se.conv_expand.bias", "conv_head.bias"]),
    ],
)  # fmt: skip
def test_a_bias_that_a_converter_dropped_is_zero(key, names, tmp_path):
    whole, model = state_dict(key), key.split()[1]
    dropped = {name: array for name, array in whole.items() if name not in names}
    read = load_weights(write(tmp_path / "a.safetensors", dropped), model)
    zeros = {name: np.zeros_like(array) if name in names else array for name, array in whole.items()}
    same = load_weights(write(tmp_path / "b.safetensors", zeros), model)
    jax.tree.map(np.testing.assert_array_equal, read.variables, same.variables)
    assert all(any(name in note and "zero" in note for note in read.info.notes) for name in names)


def renamed(key, before, after):
    return {name.replace(before, after, 1): array for name, array in state_dict(key).items()}


def linear(name, outputs, inputs):
    return {f"{name}.weight": np.ones((outputs, inputs), np.float32), f"{name}.bias": np.ones(outputs, np.float32)}


@pytest.mark.parametrize(
    ("key", "before", "after"),
    [
        ("timm mobilenet_v1", "classifier.", "classifier.1."),
        ("torchvision mobilenet_v2", "classifier.1.", "classifier."),
        ("torchvision mobilenet_v3_small", "classifier.3.", "classifier.3.1."),
    ],
)
def test_the_one_dense_layer_behind_the_mean_is_the_classifier(key, before, after, tmp_path):
    read = load_weights(write(tmp_path / "w.safetensors", renamed(key, before, after)), key.split()[1])
    expected = state_dict(key)[f"{before}weight"]
    np.testing.assert_array_equal(read.variables["params"]["classifier"]["kernel"], expected.T)
    assert any(f"the classifier is {after.rstrip('.')}" in note for note in read.info.notes)


@pytest.mark.parametrize(
    ("key", "head", "absent"),
    [
        ("timm mobilenet_v1", {}, ("classifier",)),  # reset_classifier(0)
        ("torchvision mobilenet_v3_small", {}, ("hidden", "classifier")),
        ("torchvision mobilenet_v3_small", linear("classifier", 1000, 576), ("hidden", "classifier")),
        ("torchvision resnet50", linear("fc.0", 64, 2048) | linear("fc.3", 1000, 64), ("classifier",)),
        ("timm mobilenet_v1", linear("classifier.fc", 9, 1024) | linear("classifier.fc2", 1000, 9), ("classifier",)),
    ],
)
def test_without_a_classifier_of_ours_a_new_one_is_wanted(key, head, absent, tmp_path):
    name = key.split()[1]
    body = {name: array for name, array in state_dict(key).items() if not name.startswith(("classifier", "fc"))}
    path = write(tmp_path / "w.safetensors", {f"backbone.{name}": array for name, array in (body | head).items()})
    with pytest.raises(UserError, match=r"init\.head=new"):
        load_weights(path, name)
    read = load_weights(path, name, head="new")
    assert (read.absent, read.info.labels) == (absent, ())
    assert flatten(read.variables).keys() == shapes_of(read.model, absent).keys()


def test_background_is_dropped_and_other_classes_are_not_imagenet(tmp_path):
    key = "timm mobilenet_v3_large"
    state = state_dict(key, classes=1001)
    path = write(tmp_path / "w.safetensors", state)
    model, variables, info = load_weights(path, "mobilenet_v3_large", library="timm_tf")
    assert (model.num_classes, info.labels[0]) == (1000, "tench")
    named = load_weights(path, "mobilenet_v3_large", library="timm_tf", labels=["background", *map(str, range(1000))])
    assert named.model.num_classes == 1001
    assert load_weights(path, "mobilenet_v3_large").model.num_classes == 1001  # PyTorch's have no background
    key = "timm mobilenet_v1"
    np.testing.assert_array_equal(variables["params"]["classifier"]["bias"], state["classifier.bias"][1:])
    np.testing.assert_array_equal(variables["params"]["classifier"]["kernel"], state["classifier.weight"][1:].T)
    write(tmp_path / "w.safetensors", state_dict(key, classes=3))
    assert load_weights(tmp_path / "w.safetensors", "mobilenet_v1").info.labels == ()
    named = load_weights(tmp_path / "w.safetensors", "mobilenet_v1", labels=["a", "b", "c"])
    assert (named.info.labels, named.info.class_ids) == (("a", "b", "c"), ())
    with pytest.raises(UserError, match=r"3 classes.* 2 labels"):
        load_weights(tmp_path / "w.safetensors", "mobilenet_v1", labels=["a", "b"])


def test_preprocessing_that_is_known_better_wins(tmp_path):
    path = write(tmp_path / "w.safetensors", state_dict("timm mobilenet_v1"))
    given = dict(resolution=192, eval_crop_fraction=0.95, mean=(0.0, 0.0, 0.0))
    preprocessing = load_weights(path, "mobilenet_v1", preprocessing=given).info.preprocessing
    assert (preprocessing.resolution, preprocessing.eval_crop_fraction, preprocessing.mean, preprocessing.std) == (
        192,
        0.95,
        (0, 0, 0),
        (0.5, 0.5, 0.5),
    )
    with pytest.raises(UserError, match="'batch_size'"):
        load_weights(path, "mobilenet_v1", preprocessing=dict(batch_size=3))
    with pytest.raises(UserError, match=r"data\.interpolation='cubic'.*'bicubic'"):
        load_weights(path, "mobilenet_v1", preprocessing=dict(interpolation="cubic"))
    published = dict(input_size=[3, 160, 160], crop_pct=0.9, interpolation="bicubic", mean=[0.1] * 3, std=[0.2] * 3)
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "mobilenetv1_125", "pretrained_cfg": published}))
    preprocessing = load_weights(path, width=1.0, preprocessing=given).info.preprocessing
    assert (preprocessing.resolution, preprocessing.mean, preprocessing.std, preprocessing.interpolation) == (
        192,
        (0, 0, 0),
        (0.2,) * 3,
        "bicubic",
    )


NAMES = ["n1", "n2", "n3"]


@pytest.mark.parametrize(
    ("config", "labels", "class_ids"),
    [
        (dict(label_names=NAMES), ("n1", "n2", "n3"), ()),
        (dict(label_names=NAMES, label_descriptions={"n1": "cat", "n2": "dog"}), ("cat", "dog", "n3"), tuple(NAMES)),
        (dict(label_names={"2": "n3", "0": "n1", "1": "n2"}), ("n1", "n2", "n3"), ()),
        (dict(label_names={"2": "n3"}), ("class 0", "class 1", "n3"), ()),
        (dict(num_classes=3, label_names={"0": "n1"}), ("n1", "class 1", "class 2"), ()),
        (dict(pretrained_cfg=dict(label_names=NAMES, label_descriptions={"n2": "b"})), ("n1", "b", "n3"), tuple(NAMES)),
        (dict(pretrained_cfg=dict(labels=NAMES)), ("n1", "n2", "n3"), ()),
        (dict(label_names=NAMES, pretrained_cfg=dict(label_names=["other"])), ("n1", "n2", "n3"), ()),
        (dict(label_names=[], label_descriptions=None), (), ()),
    ],
)  # fmt: skip
def test_class_names_of_the_config_beside(config, labels, class_ids, tmp_path):
    path = write(tmp_path / "model.safetensors", state_dict("timm mobilenet_v1", classes=3))
    content = {"architecture": "mobilenetv1_100", "pretrained_cfg": {}} | config
    (tmp_path / "config.json").write_text(json.dumps(content))
    info = load_weights(path).info
    assert (info.labels, info.class_ids) == (labels, class_ids)
    assert load_weights(path, labels=["x", "y", "z"]).info.labels == ("x", "y", "z")


@pytest.mark.parametrize(
    "config",
    [
        dict(label_names="cat"), dict(label_names=[1, 2, 3]), dict(label_names={"a": "b"}), dict(label_names=["a", ""]),
        dict(label_names={"0": "a", "00": "b"}), dict(label_names=NAMES, label_descriptions=["a"]),
        dict(label_names=NAMES, label_descriptions={"n1": 1}), dict(num_classes=2, label_names=NAMES),
        dict(num_classes=10**12, label_names=NAMES), dict(label_names=NAMES[:2]),
    ],
    ids=str,
)  # fmt: skip
def test_class_names_that_cannot_be(config, tmp_path):
    path = write(tmp_path / "model.safetensors", state_dict("timm mobilenet_v1", classes=3))
    (tmp_path / "config.json").write_text(
        json.dumps({"architecture": "mobilenetv1_100", "pretrained_cfg": {}} | config)
    )
    with pytest.raises(UserError, match=r"config\.json: label_|model\.safetensors: .*2 labels") as error:
        load_weights(path)
    assert "\n" not in str(error.value)


def changed(**changes):
    return {name: array for name, array in (state_dict("timm mobilenet_v1") | changes).items() if array is not None}


@pytest.mark.parametrize(
    ("state", "pattern"),
    [
        (changed(**{"blocks.0.0.bn1.bias": None}), "missing: blocks.0.0.bn1.bias"),
        (changed(**{"extra.weight": np.ones(3, np.float32)}), "left over: extra.weight"),
        (changed(**{"bn1.weight": np.ones(31, np.float32)}), r"another shape: bn1.weight is \[31\] instead of \[32\]"),
        (changed(**{"bn1.weight": np.full(32, np.nan, np.float32)}), "bn1.weight .*finite"),
        (changed(**{"bn1.weight": np.ones(32, np.int32)}), "bn1.weight .*floating-point"),
        (changed(**{"classifier.weight": None}), r"global pooling .*classifier\.bias"),
        ({"a": np.ones(3, np.float32)}, r"\(a, …\)"),
        (state_dict("timm mobilenet_v3_large"), "mobilenet_v1 .*missing: "),
    ],
)
def test_what_is_not_the_model_is_listed(state, pattern, tmp_path):
    with pytest.raises(UserError, match=pattern) as error:
        load_weights(write(tmp_path / "w.safetensors", state), "mobilenet_v1")
    assert str(error.value).startswith(f"{tmp_path / 'w.safetensors'}: ")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "content", "pattern"),
    [
        ("w.bin.txt", b"hello", "w.bin.txt: .*weights"),
        ("w.safetensors", b"", "complete safetensors"),
        ("w.safetensors", b"\xff" * 40, "complete safetensors"),
        ("w.h5", b"\x89HDF\r\n\x1a\n" + bytes(100), "w.h5: "),
        ("w.tflite", b"\0\0\0\0TFL3" + bytes(100), "w.tflite: "),
        ("w.keras", b"PK\x03\x04" + bytes(100), "damaged, or not a Keras or PyTorch file"),
    ],
)
def test_damaged_files_are_one_line(name, content, pattern, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=pattern) as error:
        load_weights(tmp_path / name, "mobilenet_v1")
    assert "\n" not in str(error.value)


def test_a_file_that_cannot_be_read_is_not_called_damaged():
    pattern = rf"w\.keras: can't be read \({os.strerror(errno.EIO)}\)"
    file = pathlib.Path("/proc/self/mem")  # reads at its begin fail as those of a bad disk do
    with pytest.raises(UserError, match=pattern) as error, layers.reading(pathlib.Path("w.keras"), "Keras"):
        file.read_bytes()
    assert "damaged" not in str(error.value)


def test_a_truncated_file_is_refused(tmp_path):
    path = write(tmp_path / "w.safetensors", state_dict("timm mobilenet_v1", classes=2))
    whole = path.read_bytes()
    for length in (0, 4, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match="complete safetensors"):
            load_weights(path, "mobilenet_v1")


class Runs:
    """Object of a hostile pickle, which runs code when it is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (pathlib.Path.touch, (self.path,))


@pytest.mark.parametrize("form", ["archive", "plain"])
def test_a_pickle_that_executes_is_not_executed(form, tmp_path):
    content = pickle.dumps({"conv_stem.weight": Runs(tmp_path / "executed")}, protocol=2)
    path = tmp_path / "w.pth"
    if form == "plain":
        path.write_bytes(content)
    else:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("w/data.pkl", content)
            archive.writestr("w/version", "3\n")
    with pytest.raises(UserError, match=r"w\.pth: .*(class getattr|needs torch)"):
        load_weights(path, "mobilenet_v1")
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("arguments", "pattern"),
    [
        (("nowhere.pth", "mobilenet_v2"), "nowhere.pth: can't be read"),
        ((".", "mobilenet_v2"), "folder"),
        (("timm/mobilenetv9_100", None), "timm/mobilenetv9_100"),
        (("torchvision/mobilenet_v2.v2", "mobilenet_v1"), None),
    ],
)
def test_sources_that_are_none(arguments, pattern, monkeypatch, tmp_path):
    monkeypatch.setenv("MNV2_JAX_CACHE", str(tmp_path))
    with pytest.raises(UserError, match=pattern):
        load_weights(*arguments)


def test_a_foreign_file_needs_a_model(tmp_path):
    path = write(tmp_path / "w.safetensors", state_dict("timm mobilenet_v1"))
    with pytest.raises(UserError, match="name of the model"):
        load_weights(path)
    with pytest.raises(UserError, match=r"state dict.*keras"):
        load_weights(path, "mobilenet_v1", library="keras")
    with pytest.raises(UserError, match="num_classes"):
        load_weights(path, "mobilenet_v1", num_classes=3)
    with pytest.raises(UserError, match="can't be read"):
        load_weights("x" * 300, "mobilenet_v1")
    with pytest.raises(UserError, match="can't be read"):
        load_weights("~nosuchuser/x.pth", "mobilenet_v1")
    with pytest.raises(UserError, match=r"resnet50 .*corenet.* mobilenet_v1, mobilenet_v2"):
        load_weights(path, "resnet50", library="corenet")
    with pytest.raises(UserError, match="unknown model 'mobilenet_v7'"):
        load_weights(path, "mobilenet_v7", library="timm")


def zeros(name, **options):
    model = create_model(name, 2, **options)
    return Weights(model, unflatten({n: np.zeros(shape, np.float32) for n, shape in shapes_of(model).items()}), INFO)


def test_what_timm_is_called_with():
    weights = zeros("mobilenet_v2", width=0.35, activation="relu")
    assert to_timm(weights)["blocks.1.0.conv_dw.weight"].shape == (48, 1, 3, 3)
    assert timm_options(weights) == {"num_classes": 2, "pad_type": "same", "bn_eps": 1e-3, "act_layer": "relu"}
    assert timm_options(zeros("resnet50", padding="symmetric")) == {"num_classes": 2}


@pytest.mark.parametrize(
    "options",
    [dict(padding="keras_v1"), dict(width_rule="corenet"), dict(strides=(1, 2, 2, 2, 2)), dict(output_stride=8)],
)
def test_what_timm_has_not_is_refused(options):
    with pytest.raises(UserError, match=rf"mobilenet_v1 .*model\.{next(iter(options))}"):
        to_timm(zeros("mobilenet_v1", width=0.25, **options))


def test_every_table_has_its_convention():
    assert set(TABLES) <= set(CONVENTIONS)
