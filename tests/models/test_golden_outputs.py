"""Every network against torchvision's or timm's, whose outputs `tests/golden/make_outputs.py` wrote down."""

import jax
import numpy as np
import pytest

from mnv2_jax.models.registry import list_models
from mnv2_jax.nn.forms import LIBRARY
from tests.models import golden

GOLDEN = golden.load()
TOLERANCE = 1e-10
"""In deviations of an endpoint: 200 times what rounding makes of it."""
LATER = ("mobilenet_v4_conv_medium", "mobilenet_v4_conv_large", "mobilenet_v4_hybrid_large")
"""Their blocks are those of the hybrid ones: for `make test-all`."""


def first_off(found, expected):
    """The first endpoint whose checksums differ; also if they aren't numbers."""
    for point, sums in expected.items():
        if not np.abs(np.subtract(found[point], sums)).max() <= TOLERANCE * sums[1]:
            return point
    return None


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in LATER else []) for name in list_models()]
)
def test_outputs_are_those_of_the_reference(name, x64):
    theirs = GOLDEN[name]
    model = golden.create(name, theirs).with_forms(LIBRARY)
    ours = jax.jit(model.endpoints)(golden.weights(model), golden.images())
    assert set(ours) == set(theirs["endpoints"])
    found = {point: golden.checksums(output) for point, output in ours.items()}
    assert first_off(found, theirs["endpoints"]) is None
    # Each image as if it were alone, as theirs are.
    np.testing.assert_allclose(
        ours["logits"], theirs["logits"], rtol=0, atol=TOLERANCE * theirs["endpoints"]["logits"][1]
    )


def test_evaluation_in_float32_is_the_same_function_and_leaves_the_state():
    theirs = GOLDEN["mobilenet_v1"]
    model = golden.create("mobilenet_v1", theirs, "float32")
    variables, images = jax.tree.map(np.float32, (golden.weights(model), golden.images()))
    logits, state = jax.jit(model.apply)(variables, images)
    np.testing.assert_allclose(logits, theirs["logits"], rtol=0, atol=1e-5)
    jax.tree.map(np.testing.assert_array_equal, state, {"batch_stats": variables["batch_stats"]})


@pytest.mark.parity
@pytest.mark.parametrize("name", list_models())
def test_the_libraries_give_what_was_written_down(name, operators, x64):
    pytest.importorskip("timm", reason="pip install .[parity]")
    from tests.golden import make_outputs

    found, written = make_outputs.outputs(name), GOLDEN[name]
    assert {**found, "logits": None, "endpoints": None} == {**written, "logits": None, "endpoints": None}
    assert list(found["endpoints"]) == list(written["endpoints"])
    assert first_off(found["endpoints"], written["endpoints"]) is None
