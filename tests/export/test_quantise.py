"""Integers: grids, channels without a kernel, corrected biases, and the check of each operator by itself."""

import jax
import numpy as np
import pytest

from mnv2_jax import graph
from mnv2_jax.export import biases, check, onnx_file, quantise, tflite_file
from mnv2_jax.export.quantise import kernel_grid, range_grid
from tests.export.conftest import small

pytest.importorskip("ai_edge_litert", reason="pip install .[export]")
pytest.importorskip("onnxruntime", reason="pip install .[export]")
WRITERS = {"tflite": tflite_file.write, "onnx": onnx_file.write}


def test_a_grid_holds_zero_and_the_ends_of_its_range():
    for low, high in ((-1.3, 2.4), (0.0, 6.0), (-5.0, 0.0), (0.5, 2.0), (0.0, 0.0)):
        grid = range_grid(low, high)
        assert grid.reals(grid.integers(np.zeros(1))) == 0
        ends = grid.reals(np.array([-128, 127], np.int8))
        step = float(grid.scale)
        assert ends[0] <= min(low, 0) + step / 2
        assert ends[1] >= max(high, 0) - step / 2
        numbers = np.linspace(low, high, 99)
        assert abs(grid.reals(grid.integers(numbers)) - numbers).max() <= step * 0.51


def test_a_kernel_uses_127_of_each_channel():
    kernel = np.random.default_rng(0).normal(size=(3, 3, 4, 5)).astype(np.float32) * np.arange(5, dtype=np.float32)
    grid = kernel_grid(kernel)
    assert abs(grid.integers(kernel)).reshape(-1, 5).max(axis=0).tolist() == [0, 127, 127, 127, 127]


def test_the_bias_of_a_channel_without_a_kernel_fits():
    kernel = np.zeros((1, 1, 3, 4), np.float32)
    kernel[..., 1] = 1e-9

    def function(x):
        y = jax.lax.conv_general_dilated(x, kernel, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        return {"out": jax.nn.relu6(y + np.float32([[[[2.5, 2.5, -1, 0]]]])).mean((1, 2)) @ np.eye(4, dtype="f")}

    traced = graph.fold(graph.trace(function, jax.ShapeDtypeStruct((1, 8, 8, 3), "float32")))
    quantised = quantise.quantise(traced, [np.full((1, 8, 8, 3), 0.5, np.float32)])
    node = next(node for node in quantised.graph.nodes if node.op == "conv_general_dilated")
    integers, grid = quantised.arrays[node, 2]
    assert abs(integers.astype(float)).max() <= 2**30 + 1
    np.testing.assert_allclose(grid.reals(integers), [2.5, 2.5, -1, 0], rtol=1e-6)


def test_corrected_biases_keep_the_means_of_channels(v2):
    images = [image[None] for image in v2.images]
    plain = quantise.quantise(v2.graph, images)
    errors = {}
    for name, quantised in (("plain", plain), ("corrected", biases.correct(plain, images))):
        outputs = [simulated(quantised, image) for image in images]
        errors[name] = np.abs(np.mean(outputs, axis=0) - v2.expected["logits"].mean(axis=0)).max()
    assert errors["corrected"] < errors["plain"] / 2


def simulated(quantised, image):
    """Computes the logits in floats from integers, operator by operator."""
    values = dict(zip(quantised.graph.inputs, [image], strict=True))
    for node in quantised.graph.nodes:
        is_integer = node in quantised.nodes
        held = biases.known_reals(quantised, node) if is_integer else {}
        operands = [values[x] if isinstance(x, graph.Value) else held.get(k, x) for k, x in enumerate(node.operands)]
        for output, array in zip(node.outputs, graph.compute(node, operands), strict=True):
            grid = quantised.grids.get(output)
            values[output] = np.asarray(array) if grid is None else grid.reals(grid.integers(np.asarray(array)))
    return values[quantised.graph.outputs["logits"]]


@pytest.mark.parametrize("form", WRITERS)
def test_every_operator_of_a_file_is_right_and_faults_are_found(form, v2, tmp_path):
    path, facts = tmp_path / f"x.{form}", v2.exported.facts()
    WRITERS[form](path, v2.quantised, facts)
    assert check.check_steps(path, form, v2.quantised, v2.images) <= 1
    checked = check.check(path, form, v2.images, v2.expected)
    check.check_bound(path, "int8", checked, len(v2.images))

    WRITERS[form](path, v2.graph, facts)  # a file in floats that is called int8
    with pytest.raises(check.RejectedError, match="integers"):
        check.check_steps(path, form, v2.quantised, v2.images)

    key = next(key for key in reversed(v2.quantised.arrays) if key[1] == 2)
    bias, grid = v2.quantised.arrays[key]
    saturated = {**v2.quantised.arrays, key: (np.clip(bias, *np.quantile(bias, [0.3, 0.7])).astype(np.int32), grid)}
    WRITERS[form](path, v2.quantised._replace(arrays=saturated), facts)
    with pytest.raises(check.RejectedError, match="steps"):
        check.check_steps(path, form, v2.quantised, v2.images)


def test_scales_of_values_are_scalars_as_older_runtimes_want_them(v2):
    model = onnx_file.to_model(v2.quantised, {})
    ranks = {constant.name: len(constant.dims) for constant in model.graph.initializer}
    rounding = [node for node in model.graph.node if node.op_type == "QuantizeLinear"]
    assert {ranks[name] for node in rounding for name in node.input[1:]} == {0}


def test_float_images_are_rounded_to_their_255_steps():
    net = small(pixels="float32", width=0.35, depth=0.3, resolution=32)
    (image,) = net.quantised.graph.inputs
    grid = net.quantised.grids[image]
    np.testing.assert_allclose(grid.reals(grid.integers(net.images)), net.images, atol=1e-6)


def test_what_follows_the_last_product_stays_in_floats():
    net = small(outputs="answers", width=0.35, depth=0.3, resolution=32)
    in_floats = [node.op for node in net.quantised.graph.nodes if node not in net.quantised.nodes]
    assert in_floats == ["softmax", "top_k"]
