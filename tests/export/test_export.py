"""Exported files: every family in its own runtime, faults that the check must find, and the door."""

import collections
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from mnv2_jax import create_model, graph
from mnv2_jax.errors import UserError
from mnv2_jax.export import check, onnx_file, stablehlo
from mnv2_jax.export.function import Exportable
from mnv2_jax.weights.file import Preprocessing, Weights, WeightsInfo
from tests import cli
from tests.test_graph import drawn

onnx = pytest.importorskip("onnx", reason="pip install .[export]")
onnxruntime = pytest.importorskip("onnxruntime", reason="pip install .[export]")


def exportable(name="mobilenet_v2", resolution=64, pixels="uint8", outputs="raw", **options):
    model = create_model(name, 7, **options)
    info = WeightsInfo(labels=tuple("abcdefg"), preprocessing=Preprocessing(mean=(0.3, 0.4, 0.5), std=(0.2, 0.3, 0.4)))
    return Exportable(Weights(model, drawn(model), info), resolution, pixels, outputs)


def images_of(exported, batch):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (batch, exported.resolution, exported.resolution, 3), np.uint8)
    return check.to_input(images, exported.pixels)


def run_onnx(model, images):
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return dict(zip([out.name for out in session.get_outputs()], session.run(None, {"images": images}), strict=True))


@pytest.mark.parametrize(
    ("name", "resolution", "pixels", "outputs", "options"),
    [
        ("mobilenet_v1", 65, "uint8", "raw", {"width": 0.25, "padding": "keras_v1"}),
        ("mobilenet_v2", 97, "uint8", "answers", {"width": 0.35}),
        ("mobilenet_v2", 64, "float32", "raw", {"width": 0.35, "padding": "symmetric", "output_stride": 16}),
        ("mobilenet_v3_small", 64, "uint8", "raw", {"width": 0.35}),
        pytest.param("mobilenet_v4_conv_small", 64, "uint8", "raw", {"width": 0.5}, marks=pytest.mark.slow),
        pytest.param("mobilenet_v4_hybrid_medium", 64, "uint8", "answers", {"width": 0.25}, marks=pytest.mark.slow),
        pytest.param("resnet50", 64, "uint8", "raw", {}, marks=pytest.mark.slow),
    ],
)
def test_onnx_computes_what_the_model_does_at_any_batch(name, resolution, pixels, outputs, options):
    exported = exportable(name, resolution, pixels, outputs, **options)
    model = onnx_file.to_model(exported.graph(), exported.facts())
    onnx.checker.check_model(model, full_check=True)
    counts = collections.Counter(node.op_type for node in model.graph.node)
    assert not {"BatchNormalization", "Min"} & set(counts), counts  # folded; and relu6 is a Clip
    facts = {entry.key: entry.value for entry in model.metadata_props}
    assert json.loads(facts["labels"]) == list("abcdefg")
    assert json.loads(facts["preprocessing"])["mean"] == [0.3, 0.4, 0.5]
    for batch in (1, 3):
        images = images_of(exported, batch)
        ours, expected = run_onnx(model, images), check.expected_outputs(exported, images)
        assert ours.keys() == expected.keys() == ({"logits"} if outputs == "raw" else {"class", "probability"})
        for key, value in expected.items():
            assert ours[key].dtype == value.dtype
            np.testing.assert_allclose(ours[key], value, rtol=1e-4, atol=check.BOUND * max(1, abs(value).max()))


def test_stablehlo_is_one_file_for_all_platforms_and_batches(tmp_path):
    exported = exportable(width=0.35, depth=0.3)
    stablehlo.write(exported, tmp_path / "x.stablehlo")
    read = export.deserialize(bytearray((tmp_path / "x.stablehlo").read_bytes()))
    assert read.platforms == ("cpu", "cuda", "tpu")
    for batch in (1, 3):
        images = images_of(exported, batch)
        expected = check.expected_outputs(exported, images)["logits"]
        np.testing.assert_allclose(read.call(images)["logits"], expected, rtol=1e-4, atol=1e-5)
    assert json.loads((tmp_path / "x.json").read_text())["labels"] == list("abcdefg")


def test_an_operator_without_a_rule_is_named_with_its_layer():
    def function(x):
        with jax.named_scope("head"), jax.named_scope("ranking"):
            return {"out": jnp.sort(x.mean((1, 2)))}

    with pytest.raises(UserError, match=r"head/ranking: .*'sort'"):
        onnx_file.to_model(graph.trace(function, jax.ShapeDtypeStruct((1, 8, 8, 3), "float32")), {})


def test_the_axis_of_the_batch_may_not_move():
    def function(x):
        return {"out": x.reshape(64, 3)}

    with pytest.raises(UserError, match="batch"):
        onnx_file.to_model(graph.trace(function, jax.ShapeDtypeStruct((1, 8, 8, 3), "float32")), {})


# --- the door -----------------------------------------------------------------------------------------------


def swap_channels(model):
    kernel = next(x for x in model.graph.initializer if len(x.dims) == 4 and x.dims[0] > 1)
    array = onnx.numpy_helper.to_array(kernel).copy()
    array[[0, 1]] = array[[1, 0]]
    kernel.CopyFrom(onnx.numpy_helper.from_array(array, kernel.name))


@pytest.fixture
def tampered(monkeypatch):
    """Changes what the writer of ONNX makes."""

    def plant(change):
        to_model = onnx_file.to_model

        def changed(*args):
            model = to_model(*args)
            change(model)
            return model

        monkeypatch.setattr(onnx_file, "to_model", changed)

    return plant


def test_a_run_is_exported_and_checked(trained, tmp_path):
    result = cli.here("export.__main__", trained[0], f"--out={tmp_path / 'files'}", "--json")
    answer = cli.answer(result)
    assert set(answer["files"]) == {"stablehlo", "onnx"}
    for row in answer["files"].values():
        assert pathlib.Path(row["path"]).is_file()
        assert row["difference"] <= check.BOUND
        assert row["agreement"] == 1
        assert row["ms_one_core"] > 0
    again = cli.here("export.__main__", trained[0], f"--out={tmp_path / 'files'}")
    assert (again.returncode, again.stderr.count("\n")) == (2, 1)
    assert "--force" in again.stderr


def test_a_file_that_computes_something_else_is_rejected(trained, tmp_path, tampered):
    tampered(swap_channels)
    result = cli.here("export.__main__", trained[0], f"--out={tmp_path}", "--format=onnx")
    assert (result.returncode, result.stderr.count("\n")) == (1, 1)
    assert [path.suffix for path in tmp_path.iterdir()] == [".rejected"]


def test_exchanged_mean_and_std_are_found(tmp_path):
    right = exportable(width=0.35, depth=0.3)
    info = right.weights.info
    swapped = Preprocessing(mean=info.preprocessing.std, std=info.preprocessing.mean)
    wrong = right._replace(weights=right.weights._replace(info=WeightsInfo(preprocessing=swapped)))
    onnx_file.write(wrong, tmp_path / "x.onnx")
    images = images_of(right, 4)
    assert not check.is_right(check.check(tmp_path / "x.onnx", "onnx", images, check.expected_outputs(right, images)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out={}"], "RUN_OR_FILE"),
        (["nowhere.safetensors", "--out={}"], "nowhere.safetensors"),
        (["{}", "--out={}", "--format=caffe"], "'caffe'"),
        (["{}", "--out={}", "--resolution=4"], "--resolution"),
        (["{}", "--out={}", "--config.seed=3"], "--config.seed"),
    ],
)
def test_wrong_arguments_are_one_line(arguments, message, tmp_path):
    result = cli.here("export.__main__", *(argument.format(tmp_path) for argument in arguments))
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)
    assert message in result.stderr


def test_what_is_not_installed_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    result = cli.here("export.__main__", tmp_path, f"--out={tmp_path}", "--format=onnx")
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)
    assert "mnv2_jax[export]" in result.stderr
