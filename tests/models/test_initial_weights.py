"""Every parameter of a network is drawn as its kind of layer; tests/test_recipes.py compares the rows themselves."""

import dataclasses
import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mnv2_jax.config import ModelConfig
from mnv2_jax.models.network import DROP_PATH_RULES
from mnv2_jax.models.registry import create_model
from mnv2_jax.nn.initializers import INITS, AttentionInitializers, Initializers

ATTENTION = ("query", "key", "value", "output", "key_depthwise", "value_depthwise")


def constant(number):
    return lambda key, shape, dtype: jnp.full(shape, number, dtype)


def kind_of(path):
    """Returns a kernel's field of `Initializers` or `AttentionInitializers`, and whether it is the latter."""
    *above, layer, _ = path
    if layer in ATTENTION:
        return {"key": "shared", "value": "shared"}.get(layer, layer.rpartition("_")[2]), True
    kind = "squeeze_excite" if "squeeze_excite" in above else "depthwise" if "depthwise" in layer else layer
    return kind if kind in ("squeeze_excite", "depthwise", "hidden", "classifier") else "conv", False


NETWORKS = {
    # With the number of different values. MobileNetV2 is made of V3's block.
    "mobilenet_v1": ({"width": 0.25}, 6),
    "mobilenet_v3_small": ({"width": 0.35}, 15),
    "mobilenet_v4_hybrid_medium": ({"width": 0.125}, 15),
    "resnet50": ({}, 5),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_every_parameter_is_drawn_as_its_kind_of_layer(name, monkeypatch):
    marks = {kind: 2.0 + place for place, kind in enumerate(f.name for f in dataclasses.fields(Initializers))}
    parts = {f.name: 100.0 * place for place, f in enumerate(dataclasses.fields(AttentionInitializers), 1)}
    marked = Initializers(
        **{kind: constant(marks[kind]) for kind in ("conv", "depthwise", "squeeze_excite", "hidden", "classifier")},
        squeeze_excite_bias=lambda channels_in: constant(-channels_in),
        classifier_bias=lambda channels_in: constant(-channels_in),
        attention=lambda heads, kv_stride: AttentionInitializers(
            **{part: constant(mark + 10 * heads + kv_stride) for part, mark in parts.items()}
        ),
    )
    monkeypatch.setitem(INITS, "corenet_v3", marked)  # no other test draws by it, so no compiled draw is cached
    options, kinds = NETWORKS[name]
    variables = create_model(name, 2, init="corenet_v3", **options).init(
        jax.random.key(0), jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    )
    leaves = {tuple(key.key for key in path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(variables)[0]}
    drawn_kinds = set()
    for path, leaf in leaves.items():
        if path[-1] == "kernel":
            kind, attends = kind_of(path)
            smaller = (*path[:-2], "key_depthwise", "kernel") in leaves
            expected = parts[kind] + 10 * 4 + (2 if smaller else 1) if attends else marks[kind]
        elif path[-1] == "bias" and {"squeeze_excite", "classifier"} & set(path):
            expected = -leaves[(*path[:-1], "kernel")].shape[0]
        else:
            expected = {"scale": 1, "var": 1, "bias": 0, "mean": 0}[path[-1]]
            expected = 1e-5 if "layer_scale" in path else expected
        assert (np.asarray(leaf) == np.float32(expected)).all(), (path, np.unique(leaf), expected)
        drawn_kinds.add(expected)
    assert len(drawn_kinds) == kinds, drawn_kinds


def test_the_rows_are_the_choices_of_the_config():
    assert sorted(INITS) == sorted(typing.get_args(typing.get_type_hints(ModelConfig)["init"]))
    assert sorted(DROP_PATH_RULES) == sorted(typing.get_args(typing.get_type_hints(ModelConfig)["drop_path_rule"]))


def test_ours_draws_depthwise_kernels_of_one_group_and_all_else_as_kaiming_fan_out():
    default, other = INITS[ModelConfig.init], INITS["kaiming_fan_out"]
    assert dataclasses.replace(default, depthwise=other.depthwise) == other
    kernel = default.depthwise(jax.random.key(0), (3, 3, 1, 512), jnp.float32)
    assert np.std(kernel) == pytest.approx((2 / 9) ** 0.5, rel=0.05)
