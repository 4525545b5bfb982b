"""Converted TFLite files against the TFLite runtime, on real files."""

import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mnv2_jax.weights.load import load_weights

pytestmark = [
    pytest.mark.parity,
    pytest.mark.skipif(not os.environ.get("MNV2_JAX_DATA"), reason="MNV2_JAX_DATA names no folder of real weights"),
]


@pytest.mark.parametrize("file", ["vww_96.h5", "vww_96_float.tflite"])
def test_outputs_are_those_of_the_runtime(file):
    interpreter = pytest.importorskip("ai_edge_litert.interpreter")
    weights = pathlib.Path(os.environ["MNV2_JAX_DATA"]) / "weights"
    theirs = interpreter.Interpreter(str(weights / "vww_96_float.tflite"))
    theirs.allocate_tensors()
    model, variables, _ = load_weights(weights / file, "mobilenet_v1", width=0.25)
    rng = np.random.default_rng(0)
    for _ in range(5):
        image = rng.uniform(0, 1, (1, 96, 96, 3)).astype(np.float32)
        theirs.set_tensor(theirs.get_input_details()[0]["index"], image)
        theirs.invoke()
        expected = theirs.get_tensor(theirs.get_output_details()[0]["index"])
        logits, _ = model.apply(jax.device_put(variables), jnp.asarray(image))
        np.testing.assert_allclose(jax.nn.softmax(logits), expected, atol=1e-4)
