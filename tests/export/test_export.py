"""Exported files: every family in its own runtime, faults that the check must find, and the door."""

import collections
import io
import json
import pathlib
import subprocess
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from PIL import Image

from mnv2_jax import graph
from mnv2_jax.errors import UserError
from mnv2_jax.export import __main__ as door
from mnv2_jax.export import check, evaluation, files, onnx_file, stablehlo, tflite_file
from mnv2_jax.export.idioms import recognise
from mnv2_jax.weights.file import Preprocessing, WeightsInfo, save_weights
from tests import cli
from tests.export.conftest import exportable, images_of, swap_channels

onnx = pytest.importorskip("onnx", reason="pip install .[export]")
onnxruntime = pytest.importorskip("onnxruntime", reason="pip install .[export]")
Interpreter = pytest.importorskip("ai_edge_litert.interpreter", reason="pip install .[export]").Interpreter


OPERATORS = {
    "mobilenet_v1": {"CONV_2D": 14, "DEPTHWISE_CONV_2D": 13, "MEAN": 1, "FULLY_CONNECTED": 1, "PAD": 1},
    "mobilenet_v2": {"CONV_2D": 35, "DEPTHWISE_CONV_2D": 17, "ADD": 11, "MEAN": 1, "FULLY_CONNECTED": 1},
    "mobilenet_v3_small": {"CONV_2D": 23, "DEPTHWISE_CONV_2D": 11, "HARD_SWISH": 19, "MEAN": 10},
    "mobilenet_v4_conv_small": {"CONV_2D": 30, "DEPTHWISE_CONV_2D": 15, "ADD": 11, "FULLY_CONNECTED": 2},
    "mobilenet_v4_hybrid_medium": {"BATCH_MATMUL": 16, "SOFTMAX": 9, "CONV_2D": 80, "DEPTHWISE_CONV_2D": 39},
    "resnet50": {"CONV_2D": 53, "MAX_POOL_2D": 1, "ADD": 17, "MEAN": 1, "FULLY_CONNECTED": 1},
}
"""Numbers of some operators of the LiteRT files: the layers of the papers' tables; a MUL and an ADD for the pixels."""


def run_onnx(model, images):
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return dict(zip([out.name for out in session.get_outputs()], session.run(None, {"images": images}), strict=True))


def open_tflite(content):
    """Returns the function from images to outputs, and the operators' counts."""
    interpreter = Interpreter(model_content=content, num_threads=2)
    counts = collections.Counter(each["op_name"] for each in interpreter._get_ops_details())

    def run(images):
        interpreter.resize_tensor_input(interpreter.get_input_details()[0]["index"], images.shape)
        return interpreter.get_signature_runner()(images=images)

    return run, counts


@pytest.mark.parametrize(
    ("name", "resolution", "pixels", "outputs", "options"),
    [
        ("mobilenet_v2", 97, "uint8", "answers", {"width": 0.35}),
        ("mobilenet_v3_small", 64, "float32", "raw", {"width": 0.35}),
        pytest.param(
            "mobilenet_v1", 65, "uint8", "raw", {"width": 0.25, "padding": "keras_v1"}, marks=pytest.mark.slow
        ),
        pytest.param(
            "mobilenet_v2",
            64,
            "float32",
            "raw",
            {"width": 0.35, "padding": "symmetric", "output_stride": 16},
            marks=pytest.mark.slow,
        ),
        pytest.param("mobilenet_v4_conv_small", 64, "uint8", "raw", {"width": 0.5}, marks=pytest.mark.slow),
        pytest.param("mobilenet_v4_hybrid_medium", 64, "uint8", "answers", {"width": 0.25}, marks=pytest.mark.slow),
        pytest.param("resnet50", 64, "uint8", "raw", {}, marks=pytest.mark.slow),
    ],
)
def test_a_file_computes_what_the_network_does_at_any_batch(name, resolution, pixels, outputs, options):
    exported = exportable(name, resolution, pixels, outputs, **options)
    traced, facts, images = exported.graph(), exported.facts(), images_of(exported, 3)
    expected = check.expected_outputs(exported, images)
    assert expected.keys() == ({"logits"} if outputs == "raw" else {"class", "probability"})

    model = onnx_file.to_model(traced, facts)
    onnx.checker.check_model(model, full_check=True)
    counts = collections.Counter(node.op_type for node in model.graph.node)
    assert not {"BatchNormalization", "Min", "Max"} & set(counts), counts  # folded; and relu6 is a Clip
    stored = {entry.key: entry.value for entry in model.metadata_props}
    assert json.loads(stored["labels"]) == list("abcdefg")
    assert json.loads(stored["preprocessing"])["mean"] == pytest.approx([0.3, 0.4, 0.5])

    content = tflite_file.to_bytes(traced, facts)
    assert zipfile.ZipFile(io.BytesIO(content)).read("labels.txt").decode().split() == list("abcdefg")
    assert content.count(b"M001") == 1  # the metadata that MediaPipe reads
    run, counts = open_tflite(content)
    for op, count in OPERATORS[name].items():
        assert counts[op] == count, (op, counts)
    for call in (run, lambda batch: run_onnx(model, batch)):
        for batch in (1, 3):
            ours = call(images[:batch])
            assert ours.keys() == expected.keys()
            for key, value in expected.items():
                assert ours[key].dtype == value.dtype
                bound = check.BOUNDS["float32"].difference * max(1, abs(value).max())
                np.testing.assert_allclose(ours[key], value[:batch], rtol=1e-4, atol=bound)
    if outputs == "raw":
        half = {"tflite": open_tflite(tflite_file.to_bytes(traced, facts, "float16"))[0](images)}
        half["onnx"] = run_onnx(onnx_file.to_model(traced, facts, "float16"), images)
        for each in half.values():
            np.testing.assert_allclose(each["logits"], expected["logits"], atol=2e-3 * abs(expected["logits"]).max())


def test_kernels_in_8_bits_make_a_quarter_of_the_file(v2):
    sizes = {storage: len(tflite_file.to_bytes(v2.graph, {}, storage)) for storage in ("float32", "float16", "dynamic")}
    assert sizes["float16"] < 0.56 * sizes["float32"]
    assert sizes["dynamic"] < 0.37 * sizes["float32"]
    run, _ = open_tflite(tflite_file.to_bytes(v2.graph, {}, "dynamic"))
    logits = v2.expected["logits"]
    np.testing.assert_allclose(run(v2.images)["logits"], logits, atol=0.05 * abs(logits).max())


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


def test_operators_that_our_networks_lack_are_written():
    kernel = np.random.default_rng(0).normal(size=(3, 5)).astype(np.float32)

    def best(x):
        places = jax.lax.top_k(x.mean((1, 2)), 4)[1]
        rows = x.at[places].get(mode="promise_in_bounds", wrap_negative_indices=False)
        return rows * jax.lax.div(places, jnp.full_like(places, 3))[:, None, None]

    def function(x):
        size = 0.5 + jnp.abs(x)
        return {
            "unary": jnp.exp(jnp.sin(x)) + jnp.cos(x) + jnp.log(size) + jnp.sqrt(size) - jnp.tanh(-x) + x**2,
            "powers": size**x + size**-3 + jax.lax.rsqrt(size) + 2 / size,
            "bounds": jnp.maximum(jnp.minimum(x, size), jnp.clip(x, -1, 1)) + jnp.clip(x, -0.5, 0.25),
            "softmax": jax.nn.softmax(x, axis=1) + jax.nn.gelu(x, approximate=True) * jax.nn.gelu(x, approximate=False),
            "reduced": x.max((1, 2)) + x.min((1, 2)) * x.sum((1, 2)) + x.mean((1, 2, 3))[:, None],
            "pooled": jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 3, 3, 1), (1, 2, 2, 1), "SAME"),
            "wide": jnp.concatenate([jnp.broadcast_to(x.max(-1, keepdims=True), (len(x), 8, 8, 5)), x], -1),
            "products": jnp.einsum("bhwc,bvwc->bwhv", x, x) + x.reshape(-1, 192).max(-1)[:, None, None, None],
            "dense": jax.nn.relu6(x.transpose(0, 2, 1, 3) @ kernel + 1),
            "chosen": jnp.where(((x > 0) & ~(x >= 1)) | (x <= -1), x, jnp.where(size < 1, 3, jnp.where(x == x, x, 0))),
            "cut": jnp.pad(x[:, 1:5, :, 1:], ((0, 0), (1, 2), (0, 0), (0, 1)), constant_values=3),
            "best": jax.vmap(best)(x),
        }

    traced = recognise(graph.trace(function, jax.ShapeDtypeStruct((1, 8, 8, 3), "float32")))
    x = np.random.default_rng(1).normal(size=(3, 8, 8, 3)).astype(np.float32)
    expected = [function(x[row : row + 1]) for row in range(3)]
    for ours in (open_tflite(tflite_file.to_bytes(traced, {}))[0](x), run_onnx(onnx_file.to_model(traced, {}), x)):
        for name in expected[0]:
            right = np.concatenate([outputs[name] for outputs in expected])
            np.testing.assert_allclose(ours[name], right, rtol=1e-4, atol=1e-4, err_msg=name)


@pytest.mark.parametrize("make", [onnx_file.to_model, tflite_file.to_bytes])
def test_what_a_format_lacks_is_named_with_its_layer(make):
    def ranking(x):
        with jax.named_scope("head"), jax.named_scope("ranking"):
            return {"out": jnp.sort(x.mean((1, 2)))}

    with pytest.raises(UserError, match=r"head/ranking: .*'sort'"):
        make(graph.trace(ranking, jax.ShapeDtypeStruct((1, 8, 8, 3), "float32")), {})

    def widened(x):
        return {"out": jnp.concatenate([x, jnp.ones_like(x)], -1)}

    with pytest.raises(UserError, match="concatenation"):
        make(graph.trace(widened, jax.ShapeDtypeStruct((1, 8, 8, 3), "float32")), {})

    def grouped(x):  # by examples of a batch that the format keeps free
        y = jnp.concatenate([x, 2 * x]).reshape(2, 8, 8, 3)
        return {"out": jax.lax.conv_general_dilated(y, kernel, (1, 1), "SAME", **layout, batch_group_count=2)}

    kernel, layout = jnp.ones((3, 3, 3, 4)), {"dimension_numbers": ("NHWC", "HWIO", "NHWC")}
    with pytest.raises(UserError, match="grouped batch"):
        make(graph.trace(grouped, jax.ShapeDtypeStruct((1, 8, 8, 3), "float32")), {})

    odd = {
        "steps": lambda x: x[:, ::2],
        "the batch": lambda x: jnp.pad(x, ((1, 1), (0, 0), (0, 0), (0, 0))),
        "integers": lambda x: x.argmax(-1) | 1,
        "gather": lambda x: jnp.ones((9, 3)).at[x.mean((1, 2)).argmax(-1)].get(mode="promise_in_bounds"),
    }
    for message, function in odd.items():
        with pytest.raises(UserError, match=message):
            make(graph.trace(lambda x, f=function: {"out": f(x)}, jax.ShapeDtypeStruct((1, 8, 8, 3), "float32")), {})

    def merging(x):
        return {"out": x.reshape(64, 3)}

    with pytest.raises(UserError, match="batch"):
        make(graph.trace(merging, jax.ShapeDtypeStruct((1, 8, 8, 3), "float32")), {})


# --- the door -----------------------------------------------------------------------------------------------


def test_a_run_is_exported_checked_and_evaluated(trained, tmp_path):
    flags = [f"--out={tmp_path / 'files'}", "--format=stablehlo,tflite", "--precision=float32,int8", "--json"]
    result = cli.here("export.__main__", trained[0], "--eval", "--calibration=40", *flags)
    rows = cli.answer(result)["files"]
    names = [(row["format"], row["precision"]) for row in rows]
    assert names == [("stablehlo", "float32"), ("tflite", "float32"), ("tflite", "int8")]
    recorded = trained[1]["eval"]["top1"]
    for row in rows:
        assert pathlib.Path(row["path"]).is_file()
        assert row["difference"] <= check.BOUNDS[row["precision"]].difference
        assert row["ms_one_core"] > 0
        assert row["network"] == pytest.approx(recorded)
        assert row["low"] <= row["file"] - row["network"] <= row["high"]
        if row["precision"] == "float32":
            assert (row["agreement"], row["file"]) == (1, row["network"])
        else:
            assert row["steps"] <= check.MOST_STEPS
    again = cli.here("export.__main__", trained[0], *flags)
    assert (again.returncode, again.stderr.count("\n")) == (2, 1)
    assert "--force" in again.stderr


def test_a_benchmark_without_data_measures_what_needs_none(tmp_path):
    exported, path = exportable(width=0.35, depth=0.3, resolution=32), tmp_path / "x.safetensors"
    save_weights(path, *exported.weights)
    flags = ("--format=tflite", "--precision=int8", "--json")
    result = cli.here("export.__main__", "benchmark", path, *flags)
    assert cli.answer(result)["files"] == []
    assert "--data" in result.stderr
    Image.fromarray(images_of(exported, 1)[0]).save(tmp_path / "one.png")
    (row,) = cli.answer(cli.here("export.__main__", "benchmark", path, *flags, f"--calibration={tmp_path}"))["files"]
    assert row["steps"] <= check.MOST_STEPS
    assert "score" not in row
    assert not pathlib.Path(row["path"]).exists()


def test_a_file_that_computes_something_else_is_rejected_and_the_old_one_stays(trained, tmp_path, tampered):
    tampered(swap_channels)
    old = tmp_path / f"{trained[0].name}.onnx"
    old.write_text("the file of yesterday")
    result = cli.here("export.__main__", trained[0], f"--out={tmp_path}", "--format=onnx", "--force")
    assert (result.returncode, result.stderr.count("\n")) == (1, 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == [old.name, f"{old.name}.rejected"]
    assert old.read_text() == "the file of yesterday"


def test_what_lies_beside_a_file_is_not_replaced_without_force(tmp_path):
    save_weights(tmp_path / "x.safetensors", *exportable(width=0.35, depth=0.3, resolution=32).weights)
    (tmp_path / "x.json").write_text("mine")
    result = cli.here("export.__main__", tmp_path / "x.safetensors", f"--out={tmp_path}", "--format=stablehlo")
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)
    assert "x.json" in result.stderr
    assert (tmp_path / "x.json").read_text() == "mine"


@pytest.mark.parametrize("old", ["file", "folder", "link"])
@pytest.mark.parametrize("new", ["file", "folder"])
def test_a_file_or_folder_takes_the_place_of_either(old, new, tmp_path):
    def make(path, kind):
        path = path / "a" if kind == "folder" else path
        path.parent.mkdir(exist_ok=True)
        path.write_text(kind)

    make(tmp_path / "linked", "folder")
    make(tmp_path / "new", new)
    if old == "link":
        (tmp_path / "old").symlink_to(tmp_path / "linked")
    else:
        make(tmp_path / "old", old)
    files._move(tmp_path / "new", tmp_path / "old")
    assert not (tmp_path / "new").exists()
    assert (tmp_path / "old").is_dir() == (new == "folder")
    assert [path.name for path in (tmp_path / "linked").iterdir()] == ["a"]


@pytest.mark.parametrize(
    ("source", "name"),
    [("..", "runs"), (".", "w0.35"), ("../w0.35/", "w0.35"), ("x.pt", "x"), ("timm/v2.in1k", "v2.in1k")],
)
def test_files_are_called_as_their_source(source, name, tmp_path, monkeypatch):
    (tmp_path / "runs" / "w0.35").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "runs" / "w0.35")
    pathlib.Path("x.pt").touch()
    assert door._stem(source) == name


def test_an_interrupt_leaves_nothing(tmp_path, monkeypatch):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    save_weights(tmp_path / "x.safetensors", *exportable(width=0.35, depth=0.3, resolution=32).weights)
    monkeypatch.setattr(check, "check", interrupt)
    with pytest.raises(KeyboardInterrupt):
        cli.here("export.__main__", tmp_path / "x.safetensors", f"--out={tmp_path / 'y'}", "--format=tflite")
    assert not list((tmp_path / "y").iterdir())


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_named(value, tmp_path):
    weights = exportable(width=0.35, depth=0.3, resolution=32).weights
    variables = jax.tree.map(np.copy, weights.variables)
    variables["params"]["classifier"]["kernel"][0, 0] = value
    save_weights(tmp_path / "x.safetensors", *weights._replace(variables=variables))
    result = cli.here("export.__main__", tmp_path / "x.safetensors", f"--out={tmp_path}", "--format=tflite")
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)
    assert "params/classifier/kernel" in result.stderr


def test_a_runtime_prints_nothing(v2, tmp_path):
    path, images = tmp_path / "x.tflite", tmp_path / "images.npy"
    tflite_file.write(path, v2.graph, {})
    np.save(images, v2.images)
    command = cli.command("export.runtimes", "tflite", path, images, tmp_path / "out.npz", "all")
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout + done.stderr == ""


@pytest.mark.parametrize("form", ["tflite", "onnx"])
def test_exchanged_mean_and_std_are_found(form, v2, tmp_path):
    info = v2.exported.weights.info
    swapped = Preprocessing(mean=info.preprocessing.std, std=info.preprocessing.mean)
    wrong = v2.exported._replace(weights=v2.exported.weights._replace(info=WeightsInfo(preprocessing=swapped)))
    path = tmp_path / f"x.{form}"
    {"tflite": tflite_file, "onnx": onnx_file}[form].write(path, wrong.graph(), {})
    with pytest.raises(check.RejectedError, match="differs"):
        check.check_bound(path, "float32", check.check(path, form, v2.images, v2.expected), len(v2.images))


def test_paired_intervals_hold_the_difference_and_shrink():
    assert evaluation.paired_interval(0, 0, 100)[1] < 0.03
    low, high = evaluation.paired_interval(2, 8, 400)
    assert low < -6 / 400 < high < 0.005
    assert high - low > np.subtract(*evaluation.paired_interval(20, 80, 4000)[::-1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out={}"], "RUN_OR_FILE"),
        (["nowhere.safetensors", "--out={}"], "nowhere.safetensors"),
        (["{}", "--out={}", "--format=caffe"], "'caffe'"),
        (["{}", "--out={}", "--precision=int4"], "'int4'"),
        (["{}", "--out={}", "--format=stablehlo", "--precision=int8"], "stablehlo"),
        (["{}", "--out={}", "--calibration=0"], "--calibration"),
        (["{}", "--out={}", "--calibration="], "--calibration"),
        (["{0}/x.safetensors", "--out={0}/y", "--precision=int8", "--calibration=nowhere"], "nowhere"),
        (["{0}/x.safetensors", "--out={0}/y", "--images", "nowhere"], "nowhere"),
        (["{}", "--out={}", "--eval", "--outputs=answers"], "--outputs=answers"),
        (["{0}/x.safetensors", "--out={0}/y", "--config.data.eval_split=test"], "--data"),
        (["{0}/x.safetensors", "--out={0}/y", "--eval"], "--data"),
        (["{0}/x.safetensors", "--out={0}/y", "--data=digits", "--config.data.resolution=32"], "preprocessing"),
        (["{0}/x.safetensors", "--out={0}/y", "--format=tflite", "--precision=int8"], "--data"),
        (["{}", "--out={}", "--resolution=4"], "--resolution"),
    ],
)
def test_wrong_arguments_are_one_line(arguments, message, tmp_path):
    if "x.safetensors" in arguments[0]:
        save_weights(tmp_path / "x.safetensors", *exportable(width=0.35, depth=0.3, resolution=32).weights)
    result = cli.here("export.__main__", *(argument.format(tmp_path) for argument in arguments))
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)
    assert message in result.stderr


def test_what_is_not_installed_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    result = cli.here("export.__main__", tmp_path, f"--out={tmp_path}", "--format=onnx")
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)
    assert "mnv2_jax[export]" in result.stderr
