"""Checks that every network of the package passes, for one of your own.

from mnv2_jax.testing import check_model

def test_my_network():
    check_model("my_network", width=0.25)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mnv2_jax.config import NormConfig
from mnv2_jax.models.counting import count_layers
from mnv2_jax.models.network import part_of
from mnv2_jax.models.registry import Model, create_model, variable_shapes
from mnv2_jax.nn.forms import LIBRARY
from mnv2_jax.types import Variables

_CLASSES = 7


def check_model(name: str, **options: Any) -> None:
    """Makes sure of what training, fine-tuning, evaluation and counting rely on. Nothing of accuracy or size is asked.

    Args:
      name: of a registered model.
      **options: as for `create_model`; the narrower, the faster.

    Raises:
      AssertionError: saying what doesn't hold.
      UserError: if there is no such model or option.
    """
    options = {"norm": NormConfig(group_size=4), **options}
    model = create_model(name, _CLASSES, **options)
    assert model == create_model(name, _CLASSES, **options), f"{name}: the same options give another model"
    assert hash(model) == hash(create_model(name, _CLASSES, **options)), f"{name}: equal models have other hashes"
    variables = variable_shapes(model)
    _check_variables(model, variables)
    _check_endpoints(model, variables)
    _check_dilation(name, options, variables)
    summary = count_layers(model, 64)
    held = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(variables["params"]))
    assert summary.params == held, f"{name}: {summary.params} parameters are counted, {held} are held"
    assert summary.madds > 0, f"{name}: no multiply-adds are counted"
    _check_values(model)


def _check_variables(model: Model, variables: Variables) -> None:
    parts = model.parts
    assert parts[0] == "stem", f"{model.name}: its parts begin with {parts[0]!r}, not 'stem'"
    assert parts[-1] == "classifier", f"{model.name}: its parts end with {parts[-1]!r}, not 'classifier'"
    found = {part_of(branch) for branch in variables["params"]}
    assert found == set(parts), f"{model.name}: parameters of {sorted(found ^ set(parts))} are in no part, or missing"
    for path, leaf in jax.tree_util.tree_leaves_with_path(variables):
        where = jax.tree_util.keystr(path, simple=True, separator="/")
        assert leaf.dtype == jnp.float32, f"{model.name}: {where} is {leaf.dtype}, not float32"
    stats = {part_of(branch) for branch in variables["batch_stats"]}
    assert stats <= set(parts), f"{model.name}: statistics of {sorted(stats - set(parts))} are in no part"


def _check_endpoints(model: Model, variables: Variables) -> None:
    strides = model.endpoint_strides
    assert [*strides.values()] == sorted(strides.values()), f"{model.name}: a map grows again: {strides}"
    points = jax.eval_shape(model.endpoints, variables, jax.ShapeDtypeStruct((2, 65, 97, 3), jnp.float32))
    for point, stride in strides.items():
        expected = 2, -(-65 // stride), -(-97 // stride)
        assert points[point].shape[:3] == expected, f"{model.name}: {point} is {points[point].shape}, not {expected}"
    logits = points["logits"]
    assert (logits.shape, logits.dtype) == ((2, _CLASSES), jnp.float32), f"{model.name}: its logits are {logits}"


def _check_dilation(name: str, options: dict[str, Any], variables: Variables) -> None:
    """A network of a smaller stride, and one that computes in bfloat16, have the same variables."""
    for change in ({"output_stride": 8}, {"dtype": "bfloat16"}, {"padding": "symmetric"}):
        other = create_model(name, _CLASSES, **options | change)
        assert variable_shapes(other) == variables, f"{name}: {change} changes its variables"
    dilated = create_model(name, _CLASSES, **options | {"output_stride": 8})
    assert max(dilated.endpoint_strides.values()) <= 8, f"{name}: output_stride=8 isn't followed"


def _check_values(model: Model) -> None:
    """On a norm group of small images, in the library's forms, which compile fastest; one compilation."""
    model = model.with_forms(LIBRARY)
    frozen, size = model.training_from("classifier"), model.norm.group_size
    images = np.random.default_rng(0).standard_normal((size, 32, 32, 3)).astype(np.float32)
    keys = jax.random.split(jax.random.key(1), size)

    @jax.jit
    def everything(images: Any) -> Any:
        variables = model.init(jax.random.key(0), images)

        def trained(params: Any) -> Any:
            logits, _ = frozen.apply({**variables, "params": params}, images, train=True, dropout_keys=keys)
            return (logits**2).sum()

        inferred, training = model.apply(variables, images), model.apply(variables, images, True, keys)
        return variables, inferred, training, jax.grad(trained)(variables["params"])

    variables, (logits, kept), (trained, moved), gradient = jax.device_get(everything(images))
    for leaf in jax.tree.leaves((variables, logits, trained, moved)):
        assert np.isfinite(leaf).all(), f"{model.name}: a value is not finite"
    before, kept, moved = (tree["batch_stats"] for tree in (variables, kept, moved))
    assert _all(np.array_equal, kept, before), f"{model.name}: inference changes its statistics"
    assert _all(lambda a, b: (a != b).any(), moved, before), f"{model.name}: a statistic stays in training"
    parts = {part_of(branch) for branch, leaves in gradient.items() if any(map(np.any, jax.tree.leaves(leaves)))}
    assert parts == {"classifier"}, f"{model.name}: trained from the classifier on, {sorted(parts)} have a gradient"


def _all(holds: Callable[[Any, Any], Any], a: Any, b: Any) -> bool:
    return all(map(bool, jax.tree.leaves(jax.tree.map(holds, a, b))))
