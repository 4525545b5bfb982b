import functools
import json
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mnv2_jax.models.heads.classifier import Classifier, dropout
from mnv2_jax.models.registry import Model, create_model

GOLDEN = json.loads((pathlib.Path(__file__).parents[1] / "golden" / "mobilenet_v2.json").read_text())
create = functools.partial(create_model, "mobilenet_v2", 10, width=0.35)


def shapes(model: Model):
    return jax.eval_shape(model.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32))


def weights(model: Model, dtype=np.float32):
    """Draws variables that keep activations at about 1, without compiling the initialiser."""
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        if path[-1].key in ("kernel",):
            return rng.normal(0, (2 / math.prod(leaf.shape[:-1])) ** 0.5, leaf.shape).astype(dtype)
        return rng.uniform(0.8, 1.2, leaf.shape).astype(dtype) * (path[-1].key in ("scale", "var"))

    return jax.tree_util.tree_map_with_path(draw, shapes(model))


def images(batch, height, width=None, dtype=np.float32):
    return np.random.default_rng(1).standard_normal((batch, height, width or height, 3)).astype(dtype)


# --- the table ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("table", ["channels_by_width", "channels_corenet_stem32"])
def test_channels_are_those_of_the_literature(table):
    rule = "corenet" if "corenet" in table else "standard"
    for width, expected in GOLDEN[table].items():
        model = create_model("mobilenet_v2", 10, width=float(width), width_rule=rule)
        params = shapes(model)["params"]
        channels = {name: jax.tree.map(lambda leaf: leaf.shape[-1], tree) for name, tree in params.items()}
        rows, before = [], channels["stem"]["kernel"]
        for index, block in enumerate(model.plan.blocks, 1):
            of_block = channels[f"block_{index}"]
            after = of_block["project"]["kernel"]
            residual = block.stride == 1 and before == after
            rows.append([before, of_block["depthwise"]["kernel"], after, block.stride, int(residual)])
            before = after
        actual = {"stem": channels["stem"]["kernel"], "last": channels["head"]["kernel"], "blocks": rows}
        assert actual == expected


def test_parameters_are_named_as_a_checkpoint_should_read():
    params = shapes(create())["params"]
    assert set(params) == {"stem", "stem_norm", "head", "head_norm", "classifier"} | {
        f"block_{i}" for i in range(1, 18)
    }
    assert set(params["block_1"]) == {"depthwise", "depthwise_norm", "project", "project_norm"}
    assert set(params["block_2"]) == set(params["block_1"]) | {"expand", "expand_norm"}
    assert params["block_2"]["depthwise"]["kernel"].shape == (3, 3, 1, 48)


def test_endpoints_have_their_strides():
    model = create(padding="symmetric")
    points = jax.eval_shape(model.endpoints, shapes(model), jax.ShapeDtypeStruct((2, 65, 97, 3), jnp.float32))
    assert list(model.endpoint_strides) == ["stem", *(f"block_{i}" for i in range(1, 18)), "head"]
    assert set(points) == {*model.endpoint_strides, "pooled", "logits"}
    for name, stride in model.endpoint_strides.items():
        assert points[name].shape[:3] == (2, -(-65 // stride), -(-97 // stride)), name
    assert points["pooled"].shape == (2, 1280)
    assert points["logits"].shape == (2, 10)


@pytest.mark.parametrize(
    ("resolution", "options", "last"),
    [
        (224, {}, 7),
        (96, {}, 3),
        (64, dict(strides=(1, 2, 2, 2, 2)), 4),
        (32, dict(strides=(1, 1, 2, 2, 2)), 4),
        (32, dict(strides=(2, 2, 2, 1, 2)), 2),
        (32, {}, 1),
    ],
)
def test_the_table_of_small_images(resolution, options, last):
    model = create(**options)
    assert resolution // model.endpoint_strides["head"] == last


# --- output stride ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("output_stride", [pytest.param(8, marks=pytest.mark.slow), 16])
def test_dilation_computes_the_same_map_more_densely(output_stride):
    coarse, dense = create(padding="symmetric"), create(padding="symmetric", output_stride=output_stride)
    variables, x = weights(coarse), images(1, 72)
    assert jax.tree.structure(shapes(coarse)) == jax.tree.structure(shapes(dense))
    a, b = (jax.jit(model.endpoints)(variables, x)["head"] for model in (coarse, dense))
    skip = 32 // output_stride
    assert dense.endpoint_strides["head"] == output_stride
    assert b.shape[1] == -(-72 // output_stride)
    np.testing.assert_allclose(a, b[:, ::skip, ::skip], atol=1e-4)


# --- dropout and head ---------------------------------------------------------------------------------------


def test_dropout_of_a_row_depends_on_its_key_alone():
    keys, x = jax.random.split(jax.random.key(3), 6), jnp.ones((6, 400))
    dropped = dropout(x, keys, 0.25)
    order = np.array([3, 0, 5, 1, 2, 4])
    np.testing.assert_array_equal(dropped[order], dropout(x, keys[order], 0.25))
    np.testing.assert_array_equal(dropped[:2], dropout(x[:2], keys[:2], 0.25))
    assert set(np.unique(dropped)) == {np.float32(0), np.float32(1 / 0.75)}
    assert float((dropped == 0).mean()) == pytest.approx(0.25, abs=0.03)
    assert len(np.unique(dropped, axis=0)) == 6


def test_training_with_dropout_needs_keys():
    head = Classifier(num_classes=3, dropout=0.5, kernel_init=jax.nn.initializers.zeros)
    x = jnp.ones((2, 4))
    variables = head.init(jax.random.key(0), x, False, None)
    with pytest.raises(ValueError, match=r"dropout=0\.5.*dropout_keys"):
        head.apply(variables, x, True, None)


# --- the model as functions ---------------------------------------------------------------------------------


def test_evaluation_is_by_image_leaves_the_state_and_traces_once():
    model = create()
    variables, x, traces = weights(model), images(4, 32), []

    @jax.jit
    def infer(variables, x):
        traces.append(1)
        return model.apply(variables, x)

    logits, state = infer(variables, x)
    jax.tree.map(np.testing.assert_array_equal, state, {"batch_stats": variables["batch_stats"]})
    swapped, _ = infer(variables, jnp.asarray(x[::-1].copy()))
    np.testing.assert_allclose(logits, swapped[::-1], atol=1e-5)
    assert len(traces) == 1
    assert logits.dtype == jnp.float32


def test_init_gives_plain_dicts_that_follow_the_key():
    model = create()
    init = jax.jit(model.init)
    x = images(2, 32)
    one, repeated, other = init(jax.random.key(0), x), init(jax.random.key(0), x), init(jax.random.key(1), x)
    assert type(one) is dict
    assert set(one) == {"params", "batch_stats"}
    assert type(one["params"]["block_1"]["project"]) is dict
    jax.tree.map(np.testing.assert_array_equal, one, repeated)
    assert not np.array_equal(one["params"]["stem"]["kernel"], other["params"]["stem"]["kernel"])
    assert not one["params"]["classifier"]["bias"].any()
    assert jax.tree.structure(one) == jax.tree.structure(weights(model))


def test_bfloat16_computes_in_it_and_ends_in_float32():
    model = create(dtype="bfloat16")
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 32))
    points = jax.eval_shape(model.endpoints, shapes(model), jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32))
    assert {name for name, point in points.items() if point.dtype == jnp.float32} == {"pooled", "logits"}
    assert points["block_9"].dtype == jnp.bfloat16
    train = functools.partial(model.apply, train=True)
    logits, state = jax.eval_shape(
        lambda v, x, k: train(v, x, dropout_keys=k),
        shapes(model),
        jax.ShapeDtypeStruct((32, 32, 32, 3), "float32"),
        keys,
    )
    floats = jax.tree.leaves((logits, state, shapes(model)))
    assert {leaf.dtype for leaf in floats} == {jnp.dtype("float32")}
