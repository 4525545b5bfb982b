"""Files of a detection: raw outputs and boxes at any batch, integers up to the head, and how boxes are compared."""

import collections
import dataclasses

import jax
import numpy as np
import pytest

from mnv2_jax import create_model, graph
from mnv2_jax.config import build
from mnv2_jax.export import check, onnx_file, quantise, tflite_file
from mnv2_jax.export.function import Exportable
from mnv2_jax.export.idioms import recognise
from mnv2_jax.graph import CONV, DOT, Value
from mnv2_jax.models.anchors import anchors
from mnv2_jax.tasks.box_lists import BoxLists
from mnv2_jax.weights.file import Preprocessing, Weights, WeightsInfo, save_weights
from tests import cli
from tests.export.test_export import open_tflite, run_onnx
from tests.tasks import framed
from tests.test_graph import drawn

onnx = pytest.importorskip("onnx", reason="pip install .[export]")
LABELS = ("cat", "dog", "newt")


def surer(variables):
    """Enlarges the kernels of the classes, so that some are probable."""
    for name, part in variables["params"].items():
        if name.endswith("_classifier"):
            part["kernel"] *= 8
    return variables


@pytest.fixture(scope="module")
def exported():
    """A small network."""
    model = create_model("mobilenet_v2", len(LABELS), width=0.1, depth=0.3, head="ssdlite")
    preprocessing = Preprocessing(resolution=64, eval_min_score=0.05, eval_max_boxes=60)
    info = WeightsInfo(task="detection", labels=LABELS, preprocessing=preprocessing)
    return Exportable(Weights(model, surer(drawn(model)), info), (64, 64), "uint8", "answers")


@pytest.fixture(scope="module")
def images():
    """Coarse patterns, which differ more than noise does."""
    coarse = np.random.default_rng(0).integers(0, 256, (3, 4, 4, 3), np.uint8)
    return coarse.repeat(16, 1).repeat(16, 2)


@pytest.fixture(scope="module")
def traced(exported):
    return exported.graph()


@pytest.fixture(scope="module")
def expected(exported, images):
    return check.expected_outputs(exported, images)


def both(made):
    """Returns the functions of an ONNX and a LiteRT file, and their operators."""
    model = onnx_file.to_model(made, {})
    onnx.checker.check_model(model, full_check=True)
    run, counts = open_tflite(tflite_file.to_bytes(made, {}))
    return {
        "onnx": (lambda x: run_onnx(model, x), collections.Counter(node.op_type for node in model.graph.node)),
        "tflite": (run, counts),
    }


def test_raw_outputs_are_the_networks_and_the_predictors_fast_operators(exported, images):
    raw = exported._replace(outputs="raw")
    right = check.expected_outputs(raw, images)
    files = both(raw.graph())
    for run, counts in files.values():
        assert not counts["Einsum"]
        for batch in (1, 3):
            ours = run(images[:batch])
            assert ours.keys() == right.keys() == {"boxes", "logits"}
            for name, value in right.items():
                np.testing.assert_allclose(ours[name], value[:batch], rtol=1e-4, atol=1e-5 * abs(value).max())
    assert files["tflite"][1]["FULLY_CONNECTED"] == 12


def test_boxes_of_a_file_are_those_of_the_network_at_any_batch(traced, images, expected):
    counts = (expected["probability"] > 0).sum(1)
    assert counts.min() > 10
    assert len({tuple(row) for row in expected["class"]}) == 3
    for run, _ in both(traced).values():
        for batch in (1, 3):
            ours = run(images[:batch])
            assert {name: (x.shape, x.dtype) for name, x in ours.items()} == {
                name: (x[:batch].shape, x.dtype) for name, x in expected.items()
            }
            np.testing.assert_array_equal(ours["class"], expected["class"][:batch])
            for name in ("box", "probability"):
                np.testing.assert_allclose(ours[name], expected[name][:batch], atol=2e-6)


def test_the_integers_end_at_the_predictors(exported, traced, images, expected):
    quantised = quantise.quantise(traced, [image[None] for image in images])
    products = [node for node in traced.nodes if node.op in (CONV, DOT) and not isinstance(node.operands[1], Value)]
    last = max(place for place, node in enumerate(quantised.graph.nodes) if node in quantised.nodes)
    assert sum(node.op in (CONV, DOT) for node in quantised.nodes) == len(products) + 1  # and that of the pixels
    assert quantised.graph.nodes[last].op == DOT
    in_floats = {node.op for node in quantised.graph.nodes if node not in quantised.nodes}
    assert in_floats >= {"concatenate", "exp", "softmax", "top_k", DOT}
    assert not any(node.op == "concatenate" for node in quantised.nodes)
    answers = [run(images) for run, _ in both(quantised).values()]
    compare = check.comparison_of(exported)
    assert compare(answers[0], answers[1]).agreement > 0.97
    for each in answers:
        assert compare(expected, each).agreement > 0.5


@pytest.mark.parametrize(("scores", "classes", "most"), [("softmax", 5, 40), ("sigmoid", 1, 120)])
def test_a_choice_among_boxes_that_overlap_is_written(scores, classes, most):
    """With one class there are fewer anchors than places, so the answers are filled up."""
    config = build({"model": {"head": "ssdlite", "box_scores": scores}, "data": {"crop": "none"}})
    data = dataclasses.replace(config.data, resolution=64, eval_min_score=0.2, eval_max_boxes=most)
    lists = BoxLists(tuple("abcde"[:classes]), config.model, data)
    count = len(anchors(config.model.anchors, 64, 64))

    def decode(answers, x):
        return answers.decode({"boxes": x[..., :4], "logits": x[..., 4:]})

    x = np.random.default_rng(0).normal(0, 2, (3, count, 5 + classes)).astype(np.float32)
    x[..., :4] /= 5  # near their anchors, which overlap
    right = jax.device_get(jax.jit(lambda x: decode(lists, x))(x))
    loose = BoxLists(lists.labels, config.model, dataclasses.replace(data, eval_nms_iou=1.0))
    dropped = jax.device_get(jax.jit(lambda x: decode(loose, x))(x))["probability"].sum() - right["probability"].sum()
    assert dropped > 1
    plain = lists.without_loops()
    traced = recognise(graph.trace(lambda x: decode(plain, x), jax.ShapeDtypeStruct((1, *x.shape[1:]), "float32")))
    for run, _ in both(traced).values():
        for batch in (1, 3):
            ours = run(x[:batch])
            np.testing.assert_array_equal(ours["class"], right["class"][:batch])
            for name in ("box", "probability"):
                np.testing.assert_allclose(ours[name], right[name][:batch], atol=2e-6)
    assert ((right["class"] == -1) == (right["probability"] == 0)).all()


def test_boxes_are_compared_wherever_they_stand(exported, expected):
    compare = check.comparison_of(exported)
    assert compare(expected, expected)[:2] == (0, 1)
    order = np.random.default_rng(0).permutation(60)
    assert compare(expected, {name: x[:, order] for name, x in expected.items()})[:2] == (0, 1)
    nearly = {**expected, "probability": expected["probability"] * np.float32(0.999)}
    likeness = compare(expected, nearly)
    assert likeness.agreement == 1
    assert likeness.difference == pytest.approx(expected["probability"].max() / 1000, rel=1e-3)
    lacking = {name: x[:, 1:] for name, x in expected.items()}
    share = expected["probability"][:, 0].sum() / expected["probability"].sum()
    assert compare(expected, lacking).agreement == pytest.approx(1 - share)
    assert compare(lacking, expected).agreement == pytest.approx(1 - share)  # a box that should have been dropped
    assert compare(expected, {**expected, "class": (expected["class"] + 1) % 3}).agreement < 0.5
    assert compare(expected, {**expected, "box": expected["box"] * 0.9}).agreement < 0.5
    none = {**expected, "probability": 0 * expected["probability"]}
    assert compare(expected, none).agreement == 0
    assert compare(none, none).agreement == 1
    assert np.isnan(compare(expected, {**expected, "probability": expected["probability"] * np.nan}).agreement)


def test_labels_are_told_of_classes_alone(exported, traced):
    """A detection's logits have a column more than there are labels."""
    assert tflite_file.to_bytes(traced, exported.facts()).count(b"labels.txt") == 3  # of `class`, and a zip's two names
    for columns, count in ((3, 3), (4, 2)):
        spec = jax.ShapeDtypeStruct((1, 8, 8, columns), "float32")
        made = graph.trace(lambda x: {"logits": 2 * x}, spec)
        assert tflite_file.to_bytes(made, exported.facts()).count(b"labels.txt") == count


@pytest.fixture
def flags(exported, tmp_path):
    """Arguments of the door for a small network of the classes of `tests.tasks.framed`, and those data."""
    pytest.importorskip("pycocotools", reason="pip install .[detection]")
    model = create_model("mobilenet_v2", len(framed.CLASSES), width=0.1, depth=0.3, head="ssdlite")
    info = dataclasses.replace(exported.weights.info, labels=framed.CLASSES)
    save_weights(tmp_path / "x.safetensors", model, surer(drawn(model)), info)
    options = ("--config.data.crop=none", "--config.loss.label_smoothing=0", f"--out={tmp_path}", "--json")
    return (tmp_path / "x.safetensors", "--data=framed", "--modules=tests.tasks.framed", *options)


def test_boxes_of_files_are_checked(flags):
    answers = ("--format=stablehlo,tflite", "--outputs=answers")
    for row in cli.answer(cli.here("export.__main__", *flags, *answers))["files"]:
        assert row["agreement"] > 0.99
        assert row["difference"] < 1e-5


@pytest.mark.slow
def test_files_are_scored_as_the_network(flags):
    raw = ("--format=onnx", "--precision=float32,int8", "--eval", "--calibration=2")
    first, second = cli.answer(cli.here("export.__main__", *flags, *raw))["files"]
    assert first["score"] == "ap"
    assert first["network"] > 0
    assert first["file"] == pytest.approx(first["network"], rel=1e-3)
    assert second["file"] == pytest.approx(first["network"], abs=0.05)
