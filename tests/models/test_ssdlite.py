"""SSDLite: parameters, multiply-adds and anchors as published, on every network."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mnv2_jax.models.anchors import anchors, map_sizes, shapes_of
from mnv2_jax.models.counting import count_layers
from mnv2_jax.models.registry import create_model, list_models

FACTS = json.loads((pathlib.Path(__file__).parents[1] / "golden" / "detection.json").read_text())["networks"]


def same_digits(value, published):
    return round(value, len(str(published).partition(".")[2])) == published


@pytest.mark.parametrize("facts", FACTS, ids=lambda facts: facts["name"])
def test_parameters_multiply_adds_and_anchors_are_the_published_ones(facts):
    model = create_model(**facts["model"], head="ssdlite")
    summary = count_layers(model, facts["size"])
    if "params" in facts:
        assert summary.params == facts["params"]
    else:
        assert same_digits(summary.params / 1e6, facts["params_m"])
    if "madds_b" in facts:
        assert same_digits(summary.madds / 1e9, facts["madds_b"])
    assert len(anchors(model.options.anchors, facts["size"], facts["size"])) == facts["anchors"]


@pytest.mark.parametrize("name", [*list_models("mobilenet*"), "resnet50"])
def test_every_network_gives_an_output_for_each_anchor(name):
    model = create_model(name, 3, head="ssdlite")
    variables = jax.eval_shape(model.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32))
    outputs, _ = jax.eval_shape(model.apply, variables, jax.ShapeDtypeStruct((2, 97, 65, 3), jnp.float32))
    count = len(anchors("tensorflow", 97, 65))
    assert (outputs["boxes"].shape, outputs["logits"].shape) == ((2, count, 4), (2, count, 4))
    names = {*variables["params"]}
    backbone = create_model(name, 3)
    assert {*backbone.parts} - {*backbone.head_parts} == {*model.parts} - {*model.head_parts} <= names


def test_anchors_lie_around_the_middles_of_positions():
    boxes = anchors("tensorflow", 300, 300)
    sizes = map_sizes(300, 300)
    assert sizes == ((19, 19), (10, 10), (5, 5), (3, 3), (2, 2), (1, 1))
    middles = (boxes[:, :2] + boxes[:, 2:]) / 2
    first = 19 * 19 * 3
    np.testing.assert_allclose(middles[:3], [[0.5 / 19] * 2] * 3)
    np.testing.assert_allclose(middles[3], [0.5 / 19, 1.5 / 19])
    np.testing.assert_allclose(middles[first], [0.05, 0.05])
    np.testing.assert_allclose(middles[-6:], 0.5)
    np.testing.assert_allclose((boxes[0, 2:] - boxes[0, :2]), 0.1)
    # TensorFlow's aspect ratio is width over height
    height, width = boxes[1, 2:] - boxes[1, :2]
    assert width / height == pytest.approx(2)


@pytest.mark.parity
def test_anchors_are_those_of_torchvision():
    import_timm = pytest.importorskip("mnv2_jax.bench.torch_rival").import_timm
    import_timm()
    torch = pytest.importorskip("torch")
    from torchvision.models.detection.anchor_utils import DefaultBoxGenerator
    from torchvision.models.detection.image_list import ImageList

    generator = DefaultBoxGenerator([[2, 3] for _ in range(6)], min_ratio=0.2, max_ratio=0.95)
    maps = [torch.zeros(1, 1, *size) for size in map_sizes(320, 320)]
    (theirs,) = generator(ImageList(torch.zeros(1, 3, 320, 320), [(320, 320)]), maps)
    ours = anchors("torchvision", 320, 320)[:, [1, 0, 3, 2]] * 320
    np.testing.assert_allclose(ours, theirs.numpy(), atol=1e-3)
    assert all(len(shapes) == 6 for shapes in shapes_of("torchvision"))
