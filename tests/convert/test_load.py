"""Files of PyTorch libraries, by the names and shapes of their own models; parity tests compare the values."""

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

from mnv2_jax.convert import layers
from mnv2_jax.convert.by_name import timm_options, to_timm
from mnv2_jax.convert.conventions import CONVENTIONS
from mnv2_jax.convert.load import load_weights
from mnv2_jax.convert.names import TABLES
from mnv2_jax.data import imagenet
from mnv2_jax.errors import UserError
from mnv2_jax.models.registry import create_model
from mnv2_jax.models.weights import Weights, WeightsInfo, flatten, save_weights, shapes_of, unflatten

GOLDEN = json.loads((pathlib.Path(__file__).parents[1] / "golden" / "state_dicts.json").read_text())
INFO = WeightsInfo()
MODELS = [key for key in GOLDEN if key != "about"]


def state_dict(key, classes=None):
    """Random tensors of a library's names and shapes, the classifier cut to so many classes."""
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
    assert model.module.model.padding == "symmetric"
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
    with pytest.raises(UserError, match="says itself what it holds"):
        load_weights(tmp_path / "w.safetensors", "mobilenet_v1")


def test_the_library_matters_where_the_file_cannot_tell(tmp_path):
    state = state_dict("timm mobilenet_v3_large")
    plain = load_weights(write(tmp_path / "a.safetensors", state), "mobilenet_v3_large")
    by_flag = load_weights(tmp_path / "a.safetensors", "mobilenet_v3_large", library="timm_tf")
    by_name = load_weights(write(tmp_path / "tf_mobilenetv3_large_100.safetensors", state), "mobilenet_v3_large")
    assert plain.model.module.model.padding == "symmetric"
    for read in (by_flag, by_name):
        assert (read.model.module.model.padding, read.model.module.norm.epsilon) == ("same", 1e-3)
        assert (read.info.source, read.info.preprocessing.mean) == ("timm_tf", (0.5, 0.5, 0.5))


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
    with pytest.raises(UserError, match="2 labels for 3 classes"):
        load_weights(tmp_path / "w.safetensors", "mobilenet_v1", labels=["a", "b"])


def test_preprocessing_that_is_known_better_wins(tmp_path):
    path = write(tmp_path / "w.safetensors", state_dict("timm mobilenet_v1"))
    asked = dict(resolution=192, eval_crop_fraction=0.95, mean=(0.0, 0.0, 0.0))
    told = load_weights(path, "mobilenet_v1", preprocessing=asked).info.preprocessing
    assert (told.resolution, told.eval_crop_fraction, told.mean, told.std) == (192, 0.95, (0, 0, 0), (0.5, 0.5, 0.5))
    with pytest.raises(UserError, match="unknown preprocessing 'batch_size'"):
        load_weights(path, "mobilenet_v1", preprocessing=dict(batch_size=3))
    with pytest.raises(UserError, match=r"data\.interpolation='cubic' is not a choice; did you mean 'bicubic'"):
        load_weights(path, "mobilenet_v1", preprocessing=dict(interpolation="cubic"))


def changed(**changes):
    return {name: array for name, array in (state_dict("timm mobilenet_v1") | changes).items() if array is not None}


@pytest.mark.parametrize(
    ("state", "said"),
    [
        (changed(**{"blocks.0.0.bn1.bias": None}), "missing: blocks.0.0.bn1.bias"),
        (changed(**{"extra.weight": np.ones(3, np.float32)}), "left over: extra.weight"),
        (changed(**{"bn1.weight": np.ones(31, np.float32)}), r"another shape: bn1.weight is \[31\] instead of \[32\]"),
        (changed(**{"bn1.weight": np.full(32, np.nan, np.float32)}), "bn1.weight isn't of finite"),
        (changed(**{"bn1.weight": np.ones(32, np.int32)}), "bn1.weight isn't of finite floating-point numbers"),
        (changed(**{"classifier.weight": None}), "no tensor classifier.weight, so no classifier"),
        ({"a": np.ones(3, np.float32)}, r"no library's names that we know \(a, …\)"),
        (state_dict("timm mobilenet_v3_large"), "not the weights of mobilenet_v1 .*missing: "),
    ],
)
def test_what_is_not_the_model_is_listed(state, said, tmp_path):
    with pytest.raises(UserError, match=said) as error:
        load_weights(write(tmp_path / "w.safetensors", state), "mobilenet_v1")
    assert str(error.value).startswith(f"{tmp_path / 'w.safetensors'}: ")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("w.bin.txt", b"hello", "not a file of weights that we can read"),
        ("w.safetensors", b"", "not a whole safetensors file"),
        ("w.safetensors", b"\xff" * 40, "not a whole safetensors file"),
        ("w.h5", b"\x89HDF\r\n\x1a\n" + bytes(100), "w.h5: "),
        ("w.tflite", b"\0\0\0\0TFL3" + bytes(100), "w.tflite: "),
        ("w.keras", b"PK\x03\x04" + bytes(100), "damaged, or not a Keras or PyTorch file"),
    ],
)
def test_damaged_files_are_one_line(name, content, said, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=said) as error:
        load_weights(tmp_path / name, "mobilenet_v1")
    assert "\n" not in str(error.value)


def test_a_file_that_cannot_be_read_is_not_called_damaged():
    said = rf"w\.keras: can't be read \({os.strerror(errno.EIO)}\)"
    file = pathlib.Path("/proc/self/mem")  # reads at its begin fail as those of a bad disk do
    with pytest.raises(UserError, match=said) as error, layers.reading(pathlib.Path("w.keras"), "Keras"):
        file.read_bytes()
    assert "damaged" not in str(error.value)


def test_a_truncated_file_is_refused(tmp_path):
    path = write(tmp_path / "w.safetensors", state_dict("timm mobilenet_v1", classes=2))
    whole = path.read_bytes()
    for length in (0, 4, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match="not a whole safetensors file"):
            load_weights(path, "mobilenet_v1")


class Runs:
    """What a hostile pickle would do when it is read."""

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
    with pytest.raises(UserError, match=r"w\.pth: (holds Python objects that could run code|reading PyTorch's own)"):
        load_weights(path, "mobilenet_v1")
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("nowhere.pth", "mobilenet_v2"), "nowhere.pth: can't be read"),
        ((".", "mobilenet_v2"), "a folder, and not a file of weights"),
        (("timm/mobilenetv9_100", None), "no weights are known by the name"),
        (("torchvision/mobilenet_v2.v2", "mobilenet_v1"), None),
    ],
)
def test_sources_that_are_none(arguments, said, monkeypatch, tmp_path):
    monkeypatch.setenv("MNV2_JAX_CACHE", str(tmp_path))
    with pytest.raises(UserError, match=said):
        load_weights(*arguments)


def test_a_foreign_file_needs_a_model(tmp_path):
    path = write(tmp_path / "w.safetensors", state_dict("timm mobilenet_v1"))
    with pytest.raises(UserError, match="doesn't say which network it holds"):
        load_weights(path)
    with pytest.raises(UserError, match="a state dict, which keras doesn't write"):
        load_weights(path, "mobilenet_v1", library="keras")
    with pytest.raises(UserError, match="num_classes follows from the file"):
        load_weights(path, "mobilenet_v1", num_classes=3)
    with pytest.raises(UserError, match="can't be read"):
        load_weights("x" * 300, "mobilenet_v1")
    with pytest.raises(UserError, match="can't be read"):
        load_weights("~nosuchuser/x.pth", "mobilenet_v1")
    with pytest.raises(UserError, match=r"no resnet50 of corenet that we can read; .* mobilenet_v1, mobilenet_v2"):
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
    with pytest.raises(UserError, match=f"timm has no mobilenet_v1 .*: not model.{next(iter(options))}"):
        to_timm(zeros("mobilenet_v1", width=0.25, **options))


def test_every_table_has_its_convention():
    assert set(TABLES) <= set(CONVENTIONS)
