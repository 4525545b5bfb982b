"""`bench.forms` finds a network's convolutions, and checks and times every form of them."""

import itertools
import types

import jax.numpy as jnp
import numpy as np
import pytest

from mnv2_jax.bench import forms
from mnv2_jax.bench.forms import Case, Shape
from mnv2_jax.models.registry import create_model, list_models
from mnv2_jax.nn.forms import DEPTHWISE, POINTWISE, Form
from mnv2_jax.presets import native_resolution

TINY = Shape(5, 6, 3, 3, 3, 2, 1)


def broken(x, kernel, *rest):
    raise NotImplementedError("no such kernel\nand much more")


def test_mobilenet_v2s_convolutions():
    shapes = forms.shapes_of(create_model("mobilenet_v2", 1000), 224)
    assert [(s.height, s.channels_in, s.stride) for s in shapes["depthwise"]] == [
        *((112, 32, 1), (112, 96, 2), (56, 144, 1), (56, 144, 2), (28, 192, 1)),
        *((28, 192, 2), (14, 384, 1), (14, 576, 1), (14, 576, 2), (7, 960, 1)),
    ]
    assert all(s.channels_in == s.channels_out and s.kernel_size == 3 for s in shapes["depthwise"])
    assert shapes["image"] == [Shape(224, 224, 3, 32, 3, 2, 1)]
    assert str(shapes["image"][0]) == "224×224×3→32 3×3 stride 2"
    assert {s.kernel_size for s in shapes["pointwise"]} == {1}
    assert shapes["dense"] == []


@pytest.mark.slow
def test_all_depthwise_convolutions():
    shapes = {}
    for name in list_models():
        depthwise = forms.shapes_of(create_model(name, 1000), native_resolution(name))["depthwise"]
        shapes |= {shape: name for shape in reversed(depthwise) if shape not in shapes}
    assert len(shapes) == 83
    assert {shape.kernel_size for shape in shapes} == {3, 5}
    assert {shape.dilation for shape in shapes} == {1}
    dense = forms.shapes_of(create_model("mobilenet_v2", 1000, output_stride=8), 224)["depthwise"]
    assert {shape.dilation for shape in dense} == {1, 2, 4}


def test_a_case():
    case = Case(kind="depthwise", shape=TINY, batch_size=4, dtype="bfloat16", padding="symmetric")
    assert case.array_shapes == ((4, 5, 6, 3), (3, 3, 1, 3), (4, 3, 3, 3))
    assert case.bytes_moved == 2 * (4 * 5 * 6 * 3 + 4 * 3 * 3 * 3)
    x, kernel, dy = case.arrays()
    assert ((x.shape, kernel.shape, dy.shape), x.dtype) == (case.array_shapes, jnp.bfloat16)
    assert not np.array_equal(x.ravel()[:50], dy.ravel()[:50])
    large = Case(kind="pointwise", shape=Shape(56, 56, 24, 8, 1, 1, 1), batch_size=8, dtype="float32")
    x, kernel, _ = large.arrays()  # has more values than are drawn
    assert x.size > forms._DRAWN
    assert kernel.shape == (1, 1, 24, 8)
    assert float(jnp.std(x)) == pytest.approx(1, rel=0.02)
    assert len(np.unique(x[:, 0, 0, 0])) == 8


def test_forms_are_checked():
    case = Case(kind="depthwise", shape=TINY, batch_size=2, dtype="float32")
    wrong = Form(lambda x, k, w: 1.1 * DEPTHWISE["lax"].value(x, k, w), *DEPTHWISE["lax"][1:])
    checked_forms = {"shifted": DEPTHWISE["shifted"], "wrong": wrong, "broken": Form(broken, broken, broken)}
    right, inaccurate, failed = forms.check_forms([case], checked_forms)
    assert right | {"errors": None} == {
        "kind": "depthwise",
        "form": "shifted",
        "shape": "5×6×3 3×3 stride 2",
        "dtype": "float32",
        "errors": None,
    }
    assert right["errors"].keys() == set(forms.PARTS)
    assert all(error < 1e-6 for error in right["errors"].values())
    assert inaccurate["errors"]["value"] == pytest.approx(0.1, rel=1e-4)
    assert inaccurate["errors"]["kernel_gradient"] < 1e-6
    assert failed["error"] == "NotImplementedError: no such kernel"


def test_a_form_that_fails_on_one_shape_hides_no_other():
    def picky(x, kernel, window):
        return broken(x, kernel) if x.shape[1] == 6 else POINTWISE["matmul"].value(x, kernel, window)

    shapes = Shape(5, 5, 3, 4, 1, 1, 1), Shape(6, 6, 3, 4, 1, 1, 1)
    cases = [Case(kind="pointwise", shape=shape, batch_size=2, dtype="float32") for shape in shapes]
    first, second = forms.check_forms(cases, {"picky": Form(picky, *POINTWISE["matmul"][1:])})
    assert max(first["errors"].values()) < 1e-5
    assert "no such kernel" in second["error"]


def test_forms_are_timed(monkeypatch):
    ticks = itertools.count()
    monkeypatch.setattr(forms, "time", types.SimpleNamespace(perf_counter=lambda: next(ticks)))
    shapes = Shape(5, 5, 3, 4, 1, 1, 1), Shape(6, 6, 3, 4, 1, 1, 1)
    cases = [Case(kind="pointwise", shape=shape, batch_size=2, dtype="float32") for shape in shapes]
    timed_forms = {"lax": POINTWISE["lax"], "broken": Form(broken, broken, broken), "matmul": POINTWISE["matmul"]}
    rows = list(forms.time_forms(cases, timed_forms, inner=2, repeats=2))
    timed = [row for row in rows if "microseconds" in row]
    assert [(row["form"], row["shape"], row["part"]) for row in timed] == [
        (name, str(shape), part) for name in ("lax", "matmul") for shape in shapes for part in forms.PARTS
    ]
    assert {row["microseconds"] for row in timed} == {1e6 / 2}  # both repetitions take one second together
    assert {row["bytes_moved"] for row in timed} == {case.bytes_moved for case in cases}
    (row,) = (row for row in rows if row not in timed)
    assert row == {"kind": "pointwise", "form": "broken", "unavailable": "NotImplementedError: no such kernel"}


def test_forms_of_this_platform():
    assert set(forms.forms_here("depthwise")) == set(DEPTHWISE) - {"triton"}
    assert set(forms.forms_here("pointwise")) == set(POINTWISE)
