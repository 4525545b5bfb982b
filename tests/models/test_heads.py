"""Dense heads: parameters and multiply-adds as published, and the same function of the features under every head."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mnv2_jax.config import NormConfig
from mnv2_jax.models.counting import count_layers
from mnv2_jax.models.heads.deeplabv3 import aux_point
from mnv2_jax.models.heads.lraspp import low_point
from mnv2_jax.models.registry import create_model
from mnv2_jax.nn.resize import resize_bilinear, resize_each, weights_of

FACTS = json.loads((pathlib.Path(__file__).parents[1] / "golden" / "segmentation.json").read_text())
SMALL = dict(name="mobilenet_v2", num_classes=5, width=0.1, depth=0.3, head_channels=8)


@pytest.mark.parametrize("facts", FACTS["networks"], ids=lambda facts: facts["name"])
def test_parameters_and_multiply_adds_are_the_published_ones(facts):
    options = {key: tuple(value) if isinstance(value, list) else value for key, value in facts["model"].items()}
    summary = count_layers(create_model(**options), tuple(facts["size"]))
    not_counted = sum(layer.params for layer in summary.layers if layer.name.startswith("aux"))
    assert not_counted == facts.get("aux_params", 0)
    if "params" in facts:
        assert summary.params - not_counted == facts["params"]
    else:
        assert round(summary.params / 1e6, 2) == facts["params_m"]
    if "madds_b" in facts:
        digits = len(str(facts["madds_b"]).partition(".")[2])
        assert round(summary.madds / 1e9, digits) == pytest.approx(facts["madds_b"], abs=facts.get("within", 0))


@pytest.mark.parametrize("head", ["deeplabv3", "lraspp"])
def test_the_parameters_of_the_features_have_the_same_names_under_every_head(head):
    """So weights of one task start another."""
    names = {}
    for each in ("classifier", head):
        model = create_model(**SMALL, head=each)
        names[each] = set(model.parts) - set(model.head_parts)
    assert names[head] == names["classifier"] - {"head"}


@pytest.mark.parametrize("head", ["deeplabv3", "lraspp"])
@pytest.mark.parametrize("output_stride", [8, 16, 32])
def test_maps_have_the_size_of_the_output_stride_for_images_that_are_not_square(head, output_stride):
    model = create_model(**SMALL, head=head, output_stride=output_stride, aux_head=head == "deeplabv3")
    variables = jax.eval_shape(model.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32))
    image = jax.ShapeDtypeStruct((2, 65, 97, 3), jnp.float32)
    outputs, _ = jax.eval_shape(model.apply, variables, image)
    stride = 8 if head == "lraspp" else output_stride
    assert outputs["logits"].shape == (2, -(-65 // stride), -(-97 // stride), 5)
    assert "aux" not in outputs
    if head == "deeplabv3":
        keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 2))
        trained = jax.eval_shape(
            lambda v, x, k: create_model(**SMALL, head=head, aux_head=True, norm=NormConfig(group_size=2)).apply(
                v, x, train=True, dropout_keys=k
            ),
            variables,
            image,
            keys,
        )
        assert trained[0]["aux"].shape[-1] == 5


def test_running_statistics_stay_as_they_are_while_weights_train():
    norm = NormConfig(group_size=2, statistics="running")
    model = create_model(**SMALL, head="deeplabv3", dropout=0.0, norm=norm)
    images = jax.random.normal(jax.random.key(1), (2, 32, 48, 3))
    variables = model.init(jax.random.key(0), images)

    def loss(params):
        outputs, state = model.apply({**variables, "params": params}, images, train=True)
        return jnp.square(outputs["logits"]).sum(), state

    grads, state = jax.jit(jax.grad(loss, has_aux=True))(variables["params"])
    before, after = variables["batch_stats"], state["batch_stats"]
    same = {name: all(jax.tree.leaves(jax.tree.map(np.array_equal, before[name], after[name]))) for name in before}
    assert {name for name, is_same in same.items() if not is_same} == {"aspp"}
    assert float(jnp.abs(grads["stem"]["kernel"]).max()) > 0


def test_taps_are_those_of_the_published_networks():
    v2, v3 = (create_model(name, 5).plan for name in ("mobilenet_v2", "mobilenet_v3_large"))
    assert (aux_point(v2), low_point(v3), low_point(v2)) == ("block_13", "block_4", "block_4")


@pytest.mark.parametrize("align_corners", [False, True])
def test_resizing_keeps_constants_lines_and_corners(align_corners):
    for old, new in ((3, 9), (5, 4), (1, 6), (4, 4), (2, 1)):
        weights = weights_of(old, new, align_corners)
        np.testing.assert_allclose(weights.sum(1), 1)
        assert (weights >= 0).all()
        if align_corners and new > 1:
            np.testing.assert_allclose(weights @ np.arange(old), np.linspace(0, old - 1, new), atol=1e-12)
    x = jax.random.normal(jax.random.key(0), (2, 4, 5, 3))
    method = resize_bilinear(x, (9, 7), align_corners=align_corners)
    assert method.shape == (2, 9, 7, 3)
    if not align_corners:
        expected = jax.image.resize(x, (2, 9, 7, 3), "bilinear")
        np.testing.assert_allclose(method, expected, atol=1e-6)


@pytest.mark.parametrize("align_corners", [False, True])
def test_maps_are_resized_by_factors_of_their_own_as_each_alone(align_corners):
    maps = jax.random.normal(jax.random.key(0), (2, 4, 5, 3))
    sizes = ((9, 11), (3, 8))
    ends = 1 if align_corners else 0
    scales = jnp.array([[(new - ends) / (old - ends) for new, old in zip(size, (4, 5), strict=True)] for size in sizes])
    both = resize_each(maps, scales, (10, 12), align_corners=align_corners)
    for one, resized, (height, width) in zip(maps, both, sizes, strict=True):
        alone = resize_bilinear(one[None], (height, width), align_corners=align_corners)[0]
        np.testing.assert_allclose(resized[:height, :width], alone, atol=1e-5)
