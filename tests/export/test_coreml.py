"""Core ML packages: what is written, computed by JAX from the file alone, and the door."""

import collections
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mnv2_jax import graph
from mnv2_jax.errors import UserError
from mnv2_jax.export import check, coreml, idioms, mil, runtimes
from mnv2_jax.weights.file import WeightsInfo
from tests import cli
from tests.export.conftest import exportable, images_of

with coreml.quiet():
    ct = pytest.importorskip("coremltools", reason="pip install .[coreml]")
pytestmark = pytest.mark.parity
LABELS = ("crane", "b", "c", "d", "e", "f", "crane")
BOUND = check.BOUNDS["float32"].difference


def labelled(name="mobilenet_v2", pixels="uint8", outputs="raw", **options):
    """A network with two classes of one name."""
    plain = exportable(name, 64, pixels, outputs, **options)
    info = WeightsInfo(labels=LABELS, preprocessing=plain.weights.info.preprocessing)
    return plain._replace(weights=plain.weights._replace(info=info))


def write(exported, path, storage="float32"):
    """Writes the package of a network."""
    coreml.write(path, exported, exported.graph(), storage)


def description(path):
    return ct.utils.load_spec(str(path)).description


def operators(path):
    """How often each operator occurs in a file, and the kernels of its products in order."""
    model = ct.utils.load_spec(str(path))
    weights = path / "Data" / "com.apple.CoreML" / "weights"
    program = ct.converters.mil.frontend.milproto.load.load(model, model.specificationVersion, str(weights))
    found = program.functions["main"].operations
    counts = collections.Counter(op.op_type for op in found if op.op_type != "const")
    kernels = [op.weight.val for op in found if op.op_type in ("conv", "linear")]
    return counts, kernels


@pytest.mark.parametrize(
    ("name", "pixels", "outputs", "options"),
    [
        ("mobilenet_v2", "uint8", "raw", {"width": 0.35}),
        ("mobilenet_v2", "float32", "answers", {"width": 0.35, "padding": "symmetric", "output_stride": 16}),
        pytest.param("mobilenet_v1", "uint8", "raw", {"width": 0.25, "padding": "keras_v1"}, marks=pytest.mark.slow),
        pytest.param("mobilenet_v3_small", "uint8", "answers", {"width": 0.35}, marks=pytest.mark.slow),
        pytest.param("mobilenet_v4_conv_small", "uint8", "raw", {"width": 0.5}, marks=pytest.mark.slow),
        pytest.param("mobilenet_v4_hybrid_medium", "float32", "raw", {"width": 0.25}, marks=pytest.mark.slow),
        pytest.param("resnet50", "uint8", "raw", {}, marks=pytest.mark.slow),
    ],
)
def test_a_package_holds_the_folded_network_and_computes_it(name, pixels, outputs, options, tmp_path):
    exported, path = labelled(name, pixels, outputs, **options), tmp_path / "x.mlpackage"
    write(exported, path)
    counts, kernels = operators(path)
    products = [node for node in exported.graph().nodes if node.op in (graph.CONV, graph.DOT)]
    known = [node.operands[1] for node in products if not isinstance(node.operands[1], graph.Value)]
    assert counts["conv"] == sum(node.op == graph.CONV for node in products)
    assert len(kernels) == len(known)
    for kernel, folded in zip(kernels, known, strict=True):
        np.testing.assert_array_equal(kernel, folded.transpose(3, 2, 0, 1) if folded.ndim == 4 else folded.T)
    assert not {"batch_norm", "cast", "pad", "maximum", "minimum"} & set(counts), counts
    if "hybrid" not in name:
        assert counts["transpose"] == (pixels == "float32"), counts  # an image is [1, c, h, w] already

    (source,) = description(path).input
    assert source.name == "images"
    assert source.type.WhichOneof("Type") == ("imageType" if pixels == "uint8" else "multiArrayType")
    images = images_of(exported, 2)
    ours, expected = mil.open_package(str(path))(images), check.expected_outputs(exported, images)
    assert ours.keys() == expected.keys() == ({"logits"} if outputs == "raw" else {"class", "probability"})
    for key, value in expected.items():
        assert ours[key].dtype == value.dtype
        np.testing.assert_allclose(ours[key], value, rtol=1e-4, atol=BOUND * max(1, abs(value).max()))


def test_logits_with_labels_are_a_classifier(tmp_path):
    exported, path = labelled(width=0.35, depth=0.3), tmp_path / "x.mlpackage"
    write(exported, path)
    told = description(path)
    kinds = {output.name: output.type.WhichOneof("Type") for output in told.output}
    assert kinds == {"classLabel": "stringType", "classLabel_probs": "dictionaryType", "logits": "multiArrayType"}
    assert told.predictedFeatureName == "classLabel"
    model = ct.utils.load_spec(str(path)).mlProgram.functions["main"]
    (block,) = model.block_specializations.values()
    classes = block.operations[-1].inputs["classes"].arguments[0].value.immediateValue.list.values
    names = [each.immediateValue.tensor.strings.values[0] for each in classes]
    assert names == ["crane (0)", "b", "c", "d", "e", "f", "crane (6)"]
    facts = told.metadata.userDefined
    assert tuple(json.loads(facts["labels"])) == LABELS
    assert json.loads(facts["preprocessing"])["mean"] == [0.3, 0.4, 0.5]
    assert "layout" not in json.loads(facts["input"])


@pytest.mark.parametrize(("precision", "share", "bound"), [("float16", 0.55, 2e-3), ("dynamic", 0.4, 2e-2)])
def test_fewer_bits_are_smaller_and_close(precision, share, bound, tmp_path):
    exported = labelled(width=0.35)
    paths = [tmp_path / "full.mlpackage", tmp_path / "less.mlpackage"]
    write(exported, paths[0])
    write(exported, paths[1], precision)
    images = images_of(exported, 2)
    expected = check.expected_outputs(exported, images)
    full, less = (check.check(path, "coreml", images, expected) for path in paths)
    assert full.difference < BOUND
    assert BOUND / 10 < less.difference < bound
    assert less.size_mb < share * full.size_mb


def test_an_operator_without_a_rule_is_named_with_its_layer():
    def function(x):
        with jax.named_scope("head"), jax.named_scope("ranking"):
            return {"out": jnp.sort(x.mean((1, 2)))}

    with pytest.raises(UserError, match=r"head/ranking: .*'sort'"):
        coreml.to_program(graph.trace(function, jax.ShapeDtypeStruct((1, 8, 8, 3), "float32")))


def test_operators_that_our_networks_lack_are_written(tmp_path):
    def function(x):
        products = jnp.einsum("bhwc,bvwc->bwhv", x, x)
        pooled = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 3, 3, 1), (1, 2, 2, 1), "SAME")
        wide = jnp.broadcast_to(jnp.tanh(x).max(-1, keepdims=True), (1, 8, 8, 5))
        return {
            "products": products,
            "pooled": jax.nn.gelu(pooled, approximate=False) + jax.lax.rsqrt(1 + pooled**2),
            "wide": jnp.concatenate([wide, jnp.clip(x, -0.5, 0.25)], -1),
        }

    spec = jax.ShapeDtypeStruct((1, 8, 8, 3), "float32")
    program = coreml.to_program(idioms.recognise(graph.trace(function, spec)))
    coreml.convert(program).save(str(tmp_path / "x.mlpackage"))
    x = np.random.default_rng(0).normal(size=spec.shape).astype(np.float32)
    ours = mil.open_package(str(tmp_path / "x.mlpackage"))(x)
    for name, value in function(x).items():
        np.testing.assert_allclose(ours[name], value, rtol=1e-5, atol=1e-5)


# --- the door -----------------------------------------------------------------------------------------------


def test_the_table_says_what_was_not_verified(trained, tmp_path):
    result = cli.here("export.__main__", trained[0], f"--out={tmp_path}", "--format=coreml")
    assert (result.returncode, result.stderr) == (0, "")
    assert ("not run in Core ML" in result.stdout) == bool(runtimes.STAND_INS)
    result = cli.here("export.__main__", trained[0], f"--out={tmp_path}", "--format=coreml", "--force", "--json")
    (row,) = cli.answer(result)["files"]
    assert pathlib.Path(row["path"]).is_dir()
    assert row["size_mb"] > 0.1
    assert (row["ms_one_core"] is None) == ("stand_in" in row) == bool(runtimes.STAND_INS)


class Phone:
    """Answers as Core ML does on a Mac: for one image of Pillow, a text and a dictionary besides arrays."""

    def __init__(self, path, compute_units):
        assert compute_units == ct.ComputeUnit.CPU_ONLY
        self.spec, self.run = ct.utils.load_spec(path), mil.open_package(path)

    def get_spec(self):
        return self.spec

    def predict(self, inputs):
        return {"classLabel": "b", "classLabel_probs": {}} | self.run(np.asarray(inputs["images"])[None])


def test_a_mac_predicts(monkeypatch, tmp_path):
    exported, path = labelled(width=0.35, depth=0.3), tmp_path / "x.mlpackage"
    write(exported, path)
    monkeypatch.setattr(runtimes, "STAND_INS", {})
    monkeypatch.setattr(ct.models, "MLModel", Phone)
    images = images_of(exported, 3)
    outputs = runtimes.RUNTIMES["coreml"](str(path), 1)(images)
    np.testing.assert_allclose(outputs["logits"], check.expected_outputs(exported, images)["logits"], atol=1e-5)
    assert outputs.keys() == {"logits"}


def test_a_package_that_computes_something_else_is_rejected(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(coreml, "_bias", lambda biases: {})
    for _ in range(2):  # the second one replaces what was rejected before
        result = cli.here("export.__main__", trained[0], f"--out={tmp_path}", "--format=coreml")
        assert (result.returncode, result.stderr.count("\n")) == (1, 1)
        assert [path.suffix for path in tmp_path.iterdir()] == [".rejected"]
