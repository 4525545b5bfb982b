"""The weights file: it is read exactly as it was written, and every error is one line."""

import dataclasses
import errno
import json
import os
import struct

import jax
import numpy as np
import pytest
import safetensors.numpy

from mnv2_jax.config import NormConfig
from mnv2_jax.errors import UserError
from mnv2_jax.models.registry import create_model
from mnv2_jax.weights import file as weights
from mnv2_jax.weights.file import Preprocessing, WeightsInfo, read_weights, save_weights

MODEL = create_model(
    "mobilenet_v1", 3, width=0.05, padding="keras_v1", strides=(1, 1, 2, 2, 2), norm=NormConfig(group_size=8)
)
INFO = WeightsInfo(
    preprocessing=Preprocessing(
        resolution=96, mean=(0.5, 0.25, 0.125), eval_crop="central", interpolation="bicubic", antialias=False
    ),
    labels=("cat", "dog", "größe"),
    class_ids=("n01", "n02", "n03"),
    source="somebody",
    notes=("Was turned round.", "And back."),
)


def draw(model, dtype=np.float32):
    rng = np.random.default_rng(0)
    shapes = weights.shapes_of(model)
    return weights.unflatten({name: rng.standard_normal(shape).astype(dtype) for name, shape in shapes.items()})


@pytest.fixture
def saved(tmp_path):
    save_weights(tmp_path / "saved.safetensors", MODEL, draw(MODEL), INFO)
    return tmp_path / "saved.safetensors"


def message_of(call, *arguments):
    """Message of the `UserError` that a call raises; must be one line."""
    with pytest.raises(UserError) as caught:
        call(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def with_metadata(path, edit):
    """Replaces our metadata in a file: ``edit`` returns a new dict, or the text."""
    content = path.read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    about = edit(json.loads(json.loads(content[8 : 8 + size])["__metadata__"]["mnv2_jax"]))
    text = about if isinstance(about, str) else json.dumps(about)
    path.write_bytes(safetensors.numpy.save(safetensors.numpy.load(content), {"mnv2_jax": text}))
    return path


# --- round trip ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "dtype"),
    [
        (MODEL, np.float32),
        (MODEL, np.float64),
        (create_model("mobilenet_v2", 2, width=0.1, depth=1.5, width_rule="divisor4", activation="relu"), np.float32),
        (create_model("mobilenet_v3_small", 2, width=0.25, dtype="bfloat16", output_stride=16), np.float32),
        (create_model("mobilenet_v4_hybrid_medium", 2, width=0.125, init="truncated_normal"), np.float32),
    ],
    ids=lambda value: value.name if isinstance(value, weights.Model) else value.__name__,
)
def test_what_is_saved_is_read_to_the_bit(model, dtype, tmp_path):
    variables, path = draw(model, dtype), tmp_path / "new" / "w.safetensors"
    save_weights(path, model, variables)
    read = read_weights(path)
    assert read.model == model
    assert hash(read.model) == hash(model)
    assert read.info == WeightsInfo()
    assert jax.tree.structure(read.variables) == jax.tree.structure(variables)
    for saved_leaf, read_leaf in zip(jax.tree.leaves(variables), jax.tree.leaves(read.variables), strict=True):
        assert (saved_leaf.dtype, saved_leaf.tobytes()) == (read_leaf.dtype, read_leaf.tobytes())


def test_info_is_read_as_it_was_saved(saved):
    assert read_weights(saved).info == INFO
    assert weights.is_written_by_us(saved)
    assert saved.stat().st_mode & 0o777 == 0o644


def test_a_file_that_is_older_than_antialias_was_seen_with_it(saved):
    def older(about):
        del about["info"]["preprocessing"]["antialias"]
        return about

    read = read_weights(with_metadata(saved, older)).info.preprocessing
    assert read == dataclasses.replace(INFO.preprocessing, antialias=True)


def test_arrays_of_jax_and_views_are_saved_too(tmp_path):
    variables = jax.tree.map(lambda leaf: jax.numpy.asarray(leaf), draw(MODEL))
    turned = jax.tree.map(lambda leaf: np.asarray(leaf).T.copy().T, variables)  # in another order in memory
    for index, tree in enumerate((variables, turned)):
        save_weights(tmp_path / f"{index}.safetensors", MODEL, tree)
    assert (tmp_path / "0.safetensors").read_bytes() == (tmp_path / "1.safetensors").read_bytes()


def test_half_precision_is_read_as_float32(tmp_path):
    tensors = {name: np.full(3, 1.5, np.dtype(name)) for name in (jax.numpy.bfloat16.dtype.name, "float16")}
    path = tmp_path / "half.safetensors"
    path.write_bytes(safetensors.numpy.save(tensors))
    read, _ = weights.read_safetensors(path)
    assert {name: (leaf.dtype, leaf.tolist()) for name, leaf in read.items()} == dict.fromkeys(
        tensors, (np.float32, [1.5] * 3)
    )


# --- what can't be saved ------------------------------------------------------------------------------------


def missing(tree):
    del tree["params"]["stem"]


def left_over(tree):
    tree["params"]["extra"] = {"kernel": np.zeros(3)}


def of_another_shape(tree):
    tree["params"]["classifier"]["bias"] = np.zeros(4)


WRONG = [
    (missing, "missing: params/stem/kernel"),
    (left_over, "left over: params/extra/kernel"),
    (of_another_shape, "of another shape: params/classifier/bias is [4] instead of [3]"),
]


@pytest.mark.parametrize(("edit", "message"), WRONG)
def test_variables_that_are_not_the_models_are_not_saved(edit, message, tmp_path):
    tree = draw(MODEL)
    edit(tree)
    error_text = message_of(save_weights, tmp_path / "w.safetensors", MODEL, tree)
    assert error_text == (
        "variables: not the weights of mobilenet_v1 width=0.05 padding=keras_v1 with 3 classes; " + message
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("value", [draw(MODEL)["params"], [1, 2], None, {}, np.zeros(3)], ids=type)
def test_what_are_no_variables_is_not_saved(value, tmp_path):
    error_text = message_of(save_weights, tmp_path / "w.safetensors", MODEL, value)
    assert "missing: batch_stats/block_1/depthwise_norm/mean" in error_text
    assert " more" in error_text  # not hundreds of names
    assert len(error_text) < 2000


@pytest.mark.parametrize("key", ["labels", "class_ids"])
def test_names_are_as_many_as_classes(key, tmp_path):
    error_text = message_of(
        save_weights, tmp_path / "w.safetensors", MODEL, draw(MODEL), WeightsInfo(**{key: ("a", "b")})
    )
    assert error_text.startswith(f"{tmp_path / 'w.safetensors'}: ")
    assert f"2 {key} for 3 classes" in error_text


@pytest.mark.parametrize("step", ["replace", "fsync"])
def test_a_file_that_is_there_stays_where_writing_fails(step, saved, monkeypatch):
    before = saved.read_bytes()

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, step, fail)
    error_text = message_of(save_weights, saved, MODEL, draw(MODEL))
    assert error_text.startswith(f"{saved}: ")
    assert "No space left on device" in error_text
    assert saved.read_bytes() == before
    assert list(saved.parent.iterdir()) == [saved]


def test_a_folder_that_is_a_file_is_refused(saved):
    assert f"{saved / 'w.safetensors'}: " in message_of(save_weights, saved / "w.safetensors", MODEL, draw(MODEL))


# --- what can't be read -------------------------------------------------------------------------------------


def test_a_truncated_file_is_refused(saved):
    content = saved.read_bytes()
    for size in [*range(10), *np.linspace(10, len(content) - 1, 20).astype(int)]:
        saved.write_bytes(content[:size])
        for call in (read_weights, weights.is_written_by_us):
            assert message_of(call, saved).startswith(f"{saved}: isn't a complete safetensors file (")


def test_a_flipped_byte_is_refused_or_changes_a_value(saved):
    content = saved.read_bytes()
    (header,) = struct.unpack("<Q", content[:8])
    variables = read_weights(saved).variables
    rng = np.random.default_rng(0)
    refused = []
    for place in [*range(8), *rng.integers(8, 8 + header, 24), *rng.integers(8 + header, len(content), 2)]:
        flipped = bytearray(content)
        flipped[place] ^= 1 << rng.integers(8)
        saved.write_bytes(flipped)
        try:
            read = read_weights(saved)
        except UserError as error:
            refused.append(str(error))
        else:
            assert jax.tree.structure(read.variables) == jax.tree.structure(variables)
    assert len(refused) > 20
    assert all(line.startswith(f"{saved}: ") and "\n" not in line for line in refused)


TORCH = safetensors.numpy.save({"conv.weight": np.zeros(3, np.float32)}, {"format": "pt"})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "isn't a complete safetensors file"),
        (b"These are no weights.\n" * 100, "isn't a complete safetensors file"),
        (b"\xff" * 100, "isn't a complete safetensors file"),
        (struct.pack("<Q", 2**62) + b"{}", "isn't a complete safetensors file"),
        (TORCH, "mnv2_jax didn't write this file; convert it with python -m mnv2_jax.convert"),
        (safetensors.numpy.save({"x": np.zeros(3)}), "mnv2_jax didn't write this file"),
        (None, "there is no such file; correct the path"),
    ],
    ids=["empty", "text", "ones", "long", "torch", "bare", "none"],
)
def test_what_is_no_file_of_ours_is_refused(content, message, tmp_path):
    path = tmp_path / "w.safetensors"
    if content is not None:
        path.write_bytes(content)
    assert message_of(read_weights, path).startswith(f"{path}: {message}")
    assert os.strerror(errno.EISDIR) in message_of(read_weights, tmp_path)


def test_types_that_numpy_lacks_are_refused(tmp_path):
    path = tmp_path / "float8.safetensors"
    header = json.dumps({"x": {"dtype": "F8_E4M3", "shape": [3], "data_offsets": [0, 3]}}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + b"abc")
    assert message_of(read_weights, path).startswith(f"{path}: ")


def put(section, **values):
    return lambda about: about | {section: about[section] | values}


def without(key):
    return lambda about: {name: value for name, value in about.items() if name != key}


DAMAGED = [
    *((without(key), f"the metadata are damaged ('{key}')") for key in ("version", "model", "norm", "info")),
    (lambda about: "{", "the metadata are damaged (Expecting"),
    (lambda about: "3", "the metadata are damaged ("),
    (lambda about: "[" * 100_000, "the metadata are damaged ("),
    (
        lambda about: about | {"version": 2},
        "has version 2 of the format, but this mnv2_jax reads version 1; update mnv2_jax",
    ),
    (lambda about: about | {"model": 3}, "config key 'model' is a section"),
    (lambda about: about | {"info": 3}, "the metadata are damaged ("),
    (put("model", colour=1), "unknown config key 'model.colour'"),
    (put("model", name="mobilnet_v1"), "unknown model 'mobilnet_v1'; did you mean 'mobilenet_v1'"),
    (put("model", width=-1), "model.width=-1.0 is out of range"),
    (put("model", width=None), "model.width=None is NoneType; expected float"),
    (put("model", width=1), "not the weights of mobilenet_v1 padding=keras_v1 with 3 classes; of another shape: "),
    (put("model", num_classes=None), "model.num_classes is not set"),
    (put("model", num_classes=4), "3 labels for 4 classes"),
    (put("model", depth=2.0), "model.depth=2.0: mobilenet_v1 "),
    (put("norm", group_size=0), "norm.group_size=0 is out of range"),
    (put("info", preprocessing={"resolution": 0}), "data.resolution=0 is out of range"),
    (put("info", preprocessing={"resolutoin": 96}), "'resolutoin' of the preprocessing; did you mean 'resolution'"),
    (put("info", preprocessing=3), "the metadata are damaged ("),
    (put("info", colour=1), "the metadata are damaged ("),
    (put("info", labels=[*"abcd"]), "4 labels for 3 classes"),
    (put("info", labels=3), "the metadata are damaged (labels isn't text)"),
    (put("info", labels="abc"), "the metadata are damaged (labels isn't text)"),
    (put("info", class_ids=[1, 2, 3]), "the metadata are damaged (class_ids isn't text)"),
    (put("info", source=None), "the metadata are damaged (source isn't text)"),
    (put("info", notes=[{}]), "the metadata are damaged (notes isn't text)"),
]


@pytest.mark.parametrize(("edit", "message"), DAMAGED)
def test_damaged_metadata_are_refused(edit, message, saved):
    error_text = message_of(read_weights, with_metadata(saved, edit))
    assert error_text.startswith(f"{saved}: ")
    assert message in error_text


@pytest.mark.parametrize(("edit", "message"), WRONG)
def test_tensors_that_are_not_the_models_are_refused(edit, message, saved):
    with safetensors.safe_open(saved, framework="numpy") as file:
        metadata = file.metadata()
    tree = draw(MODEL)
    edit(tree)
    saved.write_bytes(safetensors.numpy.save(weights.flatten(tree), metadata))
    assert message in message_of(read_weights, saved)


def test_a_file_that_cannot_be_read_is_not_called_damaged(tmp_path):
    (tmp_path / "w.safetensors").symlink_to("/proc/self/mem")  # reads at its begin fail as those of a bad disk do
    error_text = message_of(read_weights, tmp_path / "w.safetensors")
    assert os.strerror(errno.EIO) in error_text
    assert "damaged" not in error_text


def test_whole_numbers_are_no_weights(saved):
    with safetensors.safe_open(saved, framework="numpy") as file:
        metadata = file.metadata()
    leaves = weights.flatten(draw(MODEL))
    leaves["params/stem/kernel"] = leaves["params/stem/kernel"].astype(np.int32)
    saved.write_bytes(safetensors.numpy.save(leaves, metadata))
    assert "not floating-point: params/stem/kernel" in message_of(read_weights, saved)


def test_changed_preprocessing_is_checked():
    changed = weights.preprocessing_from({"resolution": 128}, INFO.preprocessing)
    assert changed == dataclasses.replace(INFO.preprocessing, resolution=128)
    assert "did you mean 'resolution'" in message_of(
        weights.preprocessing_from, {"resolutoin": 128}, INFO.preprocessing
    )
