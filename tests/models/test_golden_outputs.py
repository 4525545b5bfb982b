"""Compares every network with torchvision's or timm's, whose outputs `tests/golden/make_outputs.py` recorded."""

import jax
import numpy as np
import pytest

from mnv2_jax.models.registry import list_models
from mnv2_jax.nn.forms import LIBRARY
from tests.models import golden

GOLDEN = golden.load()
TOLERANCE = 1e-10
"""Tolerance in standard deviations of an endpoint: 200 times the effect of rounding."""
LATER = ("mobilenet_v4_conv_medium", "mobilenet_v4_conv_large", "mobilenet_v4_hybrid_large")
"""Networks for `make test-all` only: their blocks are those of the hybrid networks."""


def first_off(actual, expected):
    """Returns the first endpoint whose checksums differ or are NaN."""
    for point, sums in expected.items():
        if not np.abs(np.subtract(actual[point], sums)).max() <= TOLERANCE * sums[1]:
            return point
    return None


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in LATER else []) for name in list_models()]
)
def test_outputs_are_those_of_the_reference(name, x64):
    reference = GOLDEN[name]
    model = golden.create(name, reference).with_forms(LIBRARY)
    outputs = jax.jit(model.endpoints)(golden.weights(model), golden.images())
    assert set(outputs) == set(reference["endpoints"])
    actual = {point: golden.checksums(output) for point, output in outputs.items()}
    assert first_off(actual, reference["endpoints"]) is None
    # Each image is computed separately, as in the reference.
    np.testing.assert_allclose(
        outputs["logits"], reference["logits"], rtol=0, atol=TOLERANCE * reference["endpoints"]["logits"][1]
    )


def test_evaluation_in_float32_is_the_same_function_and_leaves_the_state():
    reference = GOLDEN["mobilenet_v1"]
    model = golden.create("mobilenet_v1", reference, "float32")
    variables, images = jax.tree.map(np.float32, (golden.weights(model), golden.images()))
    logits, state = jax.jit(model.apply)(variables, images)
    np.testing.assert_allclose(logits, reference["logits"], rtol=0, atol=1e-5)
    jax.tree.map(np.testing.assert_array_equal, state, {"batch_stats": variables["batch_stats"]})


@pytest.mark.parity
@pytest.mark.parametrize("name", list_models())
def test_the_libraries_give_what_was_written_down(name, operators, x64):
    pytest.importorskip("timm", reason="pip install .[parity]")
    from tests.golden import make_outputs

    actual, written = make_outputs.outputs(name), GOLDEN[name]
    assert {**actual, "logits": None, "endpoints": None} == {**written, "logits": None, "endpoints": None}
    assert list(actual["endpoints"]) == list(written["endpoints"])
    assert first_off(actual["endpoints"], written["endpoints"]) is None
