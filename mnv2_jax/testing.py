"""Checks for a network of your own, which every network of the package passes.

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
from mnv2_jax.models.plan import part_of
from mnv2_jax.models.registry import Model, create_model, options_of, variable_shapes
from mnv2_jax.nn.forms import LIBRARY
from mnv2_jax.types import Variables

_CLASSES = 7


def check_model(name: str, **options: Any) -> None:
    """Checks what training, fine-tuning, evaluation and counting rely on. It asks for no accuracy and no size.

    Args:
      name: name of a registered model.
      **options: options of `create_model`; a narrow network is checked faster.

    Raises:
      AssertionError: naming the model and the property that it lacks.
      UserError: if there is no such model or option.
    """
    options = {"norm": NormConfig(group_size=4), **options}
    model = create_model(name, _CLASSES, **options)
    assert model == create_model(name, _CLASSES, **options), f"{name}: the same options give models that aren't equal"
    assert hash(model) == hash(create_model(name, _CLASSES, **options)), f"{name}: equal models have different hashes"
    variables = variable_shapes(model)
    _check_variables(model, variables)
    _check_endpoints(model, variables)
    _check_dilation(name, options, variables)
    _check_options(model, options)
    summary = count_layers(model, 64)
    held = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(variables["params"]))
    assert summary.params == held, f"{name}: {summary.params} parameters are counted, {held} are held"
    assert summary.madds > 0, f"{name}: no multiply-adds are counted"
    _check_values(model)


def _check_variables(model: Model, variables: Variables) -> None:
    parts = model.parts
    assert parts[0] == "stem", f"{model.name}: the first part is {parts[0]!r}, not 'stem'"
    assert parts[-1] == "classifier", f"{model.name}: the last part is {parts[-1]!r}, not 'classifier'"
    param_parts = {part_of(branch) for branch in variables["params"]}
    differing = sorted(param_parts ^ set(parts))
    assert param_parts == set(parts), f"{model.name}: {differing} have parameters but are no part, or the reverse"
    for path, leaf in jax.tree_util.tree_leaves_with_path(variables):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        assert leaf.dtype == jnp.float32, f"{model.name}: {name} is {leaf.dtype}, not float32"
    stats = {part_of(branch) for branch in variables["batch_stats"]}
    assert stats <= set(parts), f"{model.name}: {sorted(stats - set(parts))} have statistics but are no part"


def _check_endpoints(model: Model, variables: Variables) -> None:
    strides = model.endpoint_strides
    assert [*strides.values()] == sorted(strides.values()), f"{model.name}: a stride is smaller than before: {strides}"
    points = jax.eval_shape(model.endpoints, variables, jax.ShapeDtypeStruct((2, 65, 97, 3), jnp.float32))
    for point, stride in strides.items():
        expected = 2, -(-65 // stride), -(-97 // stride)
        shape = points[point].shape
        assert shape[:3] == expected, f"{model.name}: {point} has the shape {shape}; expected {(*expected, 'c')}"
    for number, block in enumerate(model.plan.blocks, 1):
        channels, features = points[f"block_{number}"].shape[-1], block.options.get("features")
        assert features in (None, channels), f"{model.name}: block_{number} has {channels} channels, not {features=}"
    logits = points["logits"]
    assert (logits.shape, logits.dtype) == ((2, _CLASSES), jnp.float32), f"{model.name}: the logits are {logits}"


def _check_dilation(name: str, options: dict[str, Any], variables: Variables) -> None:
    """Checks that stride, compute type and padding leave the variables as they are, and that the stride is kept."""
    for change in ({"output_stride": 8}, {"dtype": "bfloat16"}, {"padding": "symmetric"}):
        changed = create_model(name, _CLASSES, **options | change)
        assert variable_shapes(changed) == variables, f"{name}: {change} changes the variables"
    dilated = create_model(name, _CLASSES, **options | {"output_stride": 8})
    assert max(dilated.endpoint_strides.values()) <= 8, f"{name}: output_stride=8 still gives a larger stride"


def _check_options(model: Model, options: dict[str, Any]) -> None:
    """Checks that each option with which the network was registered changes its plan."""
    current = model.options
    others = {
        "width": 2 * current.width,
        "depth": 0.25 if current.depth == 1 else 1.0,
        "activation": "relu" if current.activation == "hard_swish" else "hard_swish",
    }
    for option in options_of(model.name):
        changed = create_model(model.name, _CLASSES, **options | {option: others[option]})
        assert changed.plan != model.plan, f"{model.name}: {option}={others[option]} changes nothing in its plan"


def _check_values(model: Model) -> None:
    """Checks values, statistics and gradients on one norm group of small images.

    All of it is one compilation, in the library's forms of the layers, which compile fastest.
    """
    model = model.with_forms(LIBRARY)
    frozen, size = model.training_from("classifier"), model.norm.group_size
    images = np.random.default_rng(0).standard_normal((size, 32, 32, 3)).astype(np.float32)
    keys = jax.random.split(jax.random.key(1), size)

    @jax.jit
    def run_all(images: Any) -> Any:
        variables = model.init(jax.random.key(0), images)

        def loss(params: Any) -> Any:
            logits, _ = frozen.apply({**variables, "params": params}, images, train=True, dropout_keys=keys)
            return (logits**2).sum()

        inference, training = model.apply(variables, images), model.apply(variables, images, True, keys)
        return variables, inference, training, jax.grad(loss)(variables["params"])

    variables, (logits, eval_state), (train_logits, train_state), gradient = jax.device_get(run_all(images))
    for leaf in jax.tree.leaves((variables, logits, train_logits, train_state)):
        assert np.isfinite(leaf).all(), f"{model.name}: a value is not finite"
    stats, eval_stats, train_stats = (tree["batch_stats"] for tree in (variables, eval_state, train_state))
    assert _all(np.array_equal, eval_stats, stats), f"{model.name}: inference changes the statistics"
    assert _all(lambda a, b: (a != b).any(), train_stats, stats), f"{model.name}: training leaves a statistic unchanged"
    parts = {part_of(branch) for branch, leaves in gradient.items() if any(map(np.any, jax.tree.leaves(leaves)))}
    assert parts == {"classifier"}, f"{model.name}: with training from the classifier on, {sorted(parts)} get gradients"


def _all(holds: Callable[[Any, Any], Any], a: Any, b: Any) -> bool:
    return all(map(bool, jax.tree.leaves(jax.tree.map(holds, a, b))))
