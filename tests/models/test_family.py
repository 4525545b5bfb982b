"""Properties of every registered network."""

import dataclasses
import functools
import json
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mnv2_jax.config import NormConfig
from mnv2_jax.models.counting import count_layers
from mnv2_jax.models.network import Network
from mnv2_jax.models.plan import Plan
from mnv2_jax.models.registry import Model, create_model, list_models
from mnv2_jax.nn.forms import LIBRARY

GOLDEN = json.loads((pathlib.Path(__file__).parents[1] / "golden" / "mobilenet_v3.json").read_text())["channels"]
NAMES = list_models()
ONE_OF_EACH = ("mobilenet_v3_small", "mobilenet_v4_hybrid_medium", "resnet50")
"""Networks that together have every kind of start and end, and nearly every kind of block."""
CLASSES = 10


def create(name: str, **options) -> Model:
    """Creates a network that is as narrow as possible."""
    width = {} if name == "resnet50" else {"width": 0.25}
    return create_model(name, CLASSES, **(width | options))


def traced(model: Model):
    """Returns shapes and types of a model's variables."""
    return jax.eval_shape(model.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32))


@functools.cache
def shapes_of(name: str, width: float):
    return traced(create_model(name, CLASSES, width=width))


def shapes(model: Model):
    """Like `traced`, but once for all models that differ only in their forms and types."""
    return shapes_of(model.name, model.options.width)


def weights(variables):
    """Draws values for these shapes that keep activations at about 1, without compiling the initialiser."""
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        if path[-1].key == "kernel":
            return rng.normal(0, (2 / math.prod(leaf.shape[:-1])) ** 0.5, leaf.shape).astype(np.float32)
        return rng.uniform(0.8, 1.2, leaf.shape).astype(np.float32) * (path[-1].key in ("scale", "var"))

    return jax.tree_util.tree_map_with_path(draw, variables)


def images(batch, height, width):
    return np.random.default_rng(1).standard_normal((batch, height, width, 3)).astype(np.float32)


def abstract(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def create_quick(name, **options):
    """Creates a model whose convolutions compile in half the time; `nn/test_conv.py` tests that all forms agree."""
    return create(name, **options).with_forms(LIBRARY)


# --- names, shapes and types --------------------------------------------------------------------------------

LAYERS = {
    # The model and one block of each kind: its layers with a norm, then those without.
    ("mobilenet_v1", "block_1"): ("depthwise pointwise", ""),
    ("mobilenet_v2", "block_1"): ("depthwise project", ""),
    ("mobilenet_v2", "block_2"): ("expand depthwise project", ""),
    ("mobilenet_v3_large", "block_1"): ("depthwise project", ""),
    ("mobilenet_v3_large", "block_2"): ("expand depthwise project", ""),
    ("mobilenet_v3_large", "block_4"): ("expand depthwise project", "squeeze_excite"),
    ("mobilenet_v3_small", "block_1"): ("depthwise project", "squeeze_excite"),
    ("mobilenet_v3_small_minimalistic", "block_1"): ("depthwise project", ""),
    ("mobilenet_v3_large_minimalistic", "block_4"): ("expand depthwise project", ""),
    ("mobilenet_v4_conv_small", "block_1"): ("conv", ""),
    ("mobilenet_v4_conv_small", "block_5"): ("start_depthwise expand depthwise project", ""),
    ("mobilenet_v4_conv_small", "block_6"): ("expand depthwise project", ""),
    ("mobilenet_v4_conv_small", "block_10"): ("start_depthwise expand project", ""),
    ("mobilenet_v4_conv_medium", "block_1"): ("expand project", ""),
    ("mobilenet_v4_conv_medium", "block_10"): ("expand project", ""),
    ("mobilenet_v4_conv_large", "block_2"): ("start_depthwise expand depthwise project", ""),
    ("mobilenet_v4_hybrid_medium", "block_4"): ("start_depthwise expand depthwise project", "layer_scale"),
    ("mobilenet_v4_hybrid_medium", "block_8"): ("input key_depthwise value_depthwise", "query key value output"),
    ("mobilenet_v4_hybrid_large", "block_29"): ("input", "query key value output"),
    ("resnet50", "block_1"): ("reduce conv project shortcut", ""),
    ("resnet50", "block_2"): ("reduce conv project", ""),
}


@pytest.mark.parametrize(("name", "block"), LAYERS)
def test_parameters_are_named_as_a_checkpoint_should_read(name, block):
    params, (normed, without_norm) = shapes(create(name))["params"][block], LAYERS[name, block]
    expected = {f"{layer}_norm" for layer in normed.split()} | {*normed.split(), *without_norm.split()} - {"input"}
    attends = "query" in without_norm.split()
    assert set(params) == expected | ({"layer_scale"} if attends else set())
    if "squeeze_excite" in params:
        assert {key: set(leaves) for key, leaves in params["squeeze_excite"].items()} == {
            "reduce": {"kernel", "bias"},
            "expand": {"kernel", "bias"},
        }


def test_every_network_has_its_blocks_named():
    assert {name for name, _ in LAYERS} == set(NAMES)


def outer(name):
    """Names the layers of a network outside its blocks."""
    ends = {"stem", "stem_norm", "classifier"}
    if "_v2" in name or "_v3" in name:
        ends |= {"head", "head_norm"}
    return ends | ({"hidden"} if "_v3" in name else {"hidden", "hidden_norm"} if "_v4" in name else set())


@pytest.mark.parametrize("name", NAMES)
def test_endpoints_have_their_strides_and_types(name):
    model = create(name, dtype="bfloat16", padding="symmetric")
    variables, strides = shapes(model), model.endpoint_strides
    points = jax.eval_shape(model.endpoints, variables, abstract(2, 65, 97, 3))
    blocks = [f"block_{i}" for i in range(1, len(model.plan.blocks) + 1)]
    pool, head = ["pool"] * (name == "resnet50"), ["head"] * ("head" in outer(name))
    assert list(strides) == ["stem", *pool, *blocks, *head]
    assert list(strides.values()) == sorted(strides.values())
    assert list(strides.values())[-1] == 32
    assert set(variables["params"]) == outer(name) | set(blocks)
    hidden = {"hidden"} & outer(name)
    assert set(points) == {*strides, "pooled", "logits"} | hidden
    for point, stride in strides.items():
        assert points[point].shape[:3] == (2, -(-65 // stride), -(-97 // stride)), point
        assert points[point].dtype == jnp.bfloat16, point
    assert points["logits"].shape == (2, CLASSES)
    assert {points[point].dtype for point in ("pooled", "logits", *hidden)} == {jnp.dtype("float32")}


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_bfloat16_ends_in_float32_in_training_too(name):
    model = create(name, dtype="bfloat16", dropout=0.0)
    variables = traced(model)
    logits, state = jax.eval_shape(lambda v, x: model.apply(v, x, train=True), variables, abstract(32, 32, 32, 3))
    assert {leaf.dtype for leaf in jax.tree.leaves((logits, state, variables))} == {jnp.dtype("float32")}
    like = jax.tree.map(lambda leaf: leaf.shape, {"batch_stats": variables["batch_stats"]})
    assert jax.tree.map(lambda leaf: leaf.shape, state) == like


@pytest.mark.parametrize("name", NAMES)
def test_small_images_keep_a_map_of_4_by_4(name):
    model = create(name, strides=(1, 1, 2, 2, 2))
    last = list(model.endpoint_strides)[-1]
    assert 32 // model.endpoint_strides[last] == 4
    if name in ONE_OF_EACH:
        points = jax.eval_shape(model.endpoints, shapes(create(name)), abstract(1, 32, 32, 3))
        assert points[last].shape[1:3] == (4, 4)


def v3_channels(params, blocks):
    """Returns channels in the form of the golden table."""
    size = {name: jax.tree.map(lambda leaf: leaf.shape, tree) for name, tree in params.items()}
    rows, before = [], size["stem"]["kernel"][-1]
    for index in range(1, blocks + 1):
        block_size = size[f"block_{index}"]
        kernel_size, _, _, hidden = block_size["depthwise"]["kernel"]
        after = block_size["project"]["kernel"][-1]
        squeezed = block_size["squeeze_excite"]["reduce"]["kernel"][-1] if "squeeze_excite" in block_size else 0
        rows.append([kernel_size, before, hidden, after, squeezed])
        before = after
    ends = {"last_conv": size["head"]["kernel"][-1], "penultimate": size["hidden"]["kernel"][-1]}
    return {"stem": size["stem"]["kernel"][-1], "blocks": rows, **ends}


@pytest.mark.parametrize("table", GOLDEN)
def test_v3_channels_are_those_of_the_literature(table):
    size, width, rule = table.split("_")
    rule = {"slim": "standard"}.get(rule, rule)
    model = create_model(f"mobilenet_v3_{size}", CLASSES, width=float(width), width_rule=rule)
    plan, expected = model.plan, dict(GOLDEN[table])
    acts = {"relu": "RE", "hard_swish": "HS"}
    assert [[acts[block.options["act"]], block.stride] for block in plan.blocks] == [
        [act, stride] for *_, act, stride, _ in expected["blocks"]
    ]
    expected["blocks"] = [row[:5] for row in expected["blocks"]]
    assert v3_channels(traced(model)["params"], len(plan.blocks)) == expected


@pytest.mark.parametrize(("size", "params"), [("large", 2_569_352), ("small", 1_099_672)])
def test_reduced_tails_of_torchvision_have_its_parameters(size, params):
    """Torchvision 0.29's mobilenet_v3_*(reduced_tail=True); the paper's are in models/test_heads.py."""
    model = create_model(f"mobilenet_v3_{size}", 1000, reduced_tail="torchvision")
    assert count_layers(model, 224).params == params


# --- output stride and padding ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "block"),
    [
        # Squeeze-excite takes its mean over a denser map, and attention sees more places: by construction these are
        # other functions. What is left of their families has neither.
        ("mobilenet_v1", "block_13"),
        ("mobilenet_v3_large_minimalistic", "head"),
        ("mobilenet_v4_conv_small", "block_17"),
        ("resnet50", "block_16"),
    ],
)
def test_dilation_computes_the_same_map_more_densely(name, block):
    coarse, dense = (create_quick(name, padding="symmetric", output_stride=stride) for stride in (32, 16))
    variables, x = weights(shapes(coarse)), images(1, 72, 40)
    assert traced(coarse) == traced(dense)
    assert (list(coarse.endpoint_strides)[-1], dense.endpoint_strides[block]) == (block, 16)
    a, b = (jax.jit(lambda v, x, model=model: model.endpoints(v, x)[block])(variables, x) for model in (coarse, dense))
    assert b.shape[1:3] == (5, 3)
    assert np.std(a) > 0.01
    np.testing.assert_allclose(a, b[:, ::2, ::2], atol=1e-4 * float(np.abs(a).max()))


def test_padding_of_keras_v1_differs_at_odd_sizes_only():
    ours, keras = create_quick("mobilenet_v1"), create_quick("mobilenet_v1", padding="keras_v1")
    variables = weights(shapes(ours))
    run = [jax.jit(model.endpoints) for model in (ours, keras)]
    even, same = (endpoints(variables, images(1, 64, 32)) for endpoints in run)
    jax.tree.map(np.testing.assert_array_equal, even, same)
    # 68 -> 34 -> 17: the block that halves 17 is the first to see an odd size.
    a, b = (endpoints(variables, images(1, 68, 68)) for endpoints in run)
    order = list(ours.endpoint_strides)
    odd = next(point for point in order if ours.endpoint_strides[point] == 8)
    for point in order[: order.index(odd)]:
        np.testing.assert_array_equal(a[point], b[point])
    assert (a[odd].shape[1:3], b[odd].shape[1:3]) == ((9, 9), (8, 8))


# --- training -----------------------------------------------------------------------------------------------


def shortened(model: Model) -> Model:
    """Keeps the first block of each kind and the blocks that halve the map; the others only repeat them."""
    params, published = shapes(model)["params"], model.plan
    seen_kinds, blocks = set(), []
    for index, block in enumerate(published.blocks, 1):
        kind = jax.tree.structure(params[f"block_{index}"])
        if block.stride == 2 or kind not in seen_kinds:
            blocks.append(block)
        seen_kinds.add(kind)
    short = dataclasses.replace(published, blocks=tuple(blocks))

    def plan_of(_) -> Plan:
        return short

    return dataclasses.replace(model, module=Network(model.options, model.norm, plan_of))


@pytest.mark.slow  # nn/test_blocks.py tests it block by block
@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_a_step_of_training_reaches_every_parameter(name):
    model = shortened(create_quick(name, norm=NormConfig(group_size=2), dropout=0.0))
    variables, x = weights(traced(model)), images(2, 64, 64)

    def loss(params):
        both = {"params": params, "batch_stats": variables["batch_stats"]}
        logits, state = model.apply(both, x, train=True)
        return -jax.nn.log_softmax(logits)[:, 0].mean(), state

    gradients, state = jax.jit(jax.grad(loss, has_aux=True))(variables["params"])
    for path, leaf in jax.tree_util.tree_leaves_with_path((gradients, state)):
        assert np.isfinite(leaf).all(), path
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradients):
        assert np.abs(leaf).max() > 0, path
    changed = jax.tree.map(lambda a, b: bool((a != b).any()), state["batch_stats"], variables["batch_stats"])
    assert all(jax.tree.leaves(changed))
