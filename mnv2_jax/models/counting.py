"""Parameters and multiply-adds, read off the traced network: nothing is computed, and no layer keeps its own count."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core

from mnv2_jax.models.base import Model
from mnv2_jax.models.registry import variable_shapes
from mnv2_jax.nn.forms import LIBRARY


@dataclasses.dataclass(frozen=True)
class Layer:
    """A layer with parameters or multiply-adds."""

    name: str
    """Its path in the parameters, as ``block_1/depthwise``."""
    output_shape: tuple[int, ...] | None
    """Shape [h, w, c] or [k] of the output of its convolution or product at batch 1; None for a layer without one."""
    params: int
    madds: int


@dataclasses.dataclass(frozen=True)
class Summary:
    """Cost of a network at a resolution.

    params counts trainable values: kernels, biases, and the scales and biases of norms, not running statistics. madds
    counts the multiply-accumulates of convolutions and dense layers in inference at batch 1; one is two FLOPs.
    """

    params: int
    madds: int
    layers: tuple[Layer, ...]


def count_layers(model: Model, resolution: int) -> Summary:
    """Counts the network for one image [resolution, resolution, 3]."""
    image = jax.ShapeDtypeStruct((1, resolution, resolution, 3), jnp.float32)
    variables = variable_shapes(model)
    plain = model.with_forms(LIBRARY)  # a convolution an equation; the sums are the same in any form
    closed = jax.make_jaxpr(lambda v, x: plain.apply(v, x)[0])(variables, image)
    params: dict[str, int] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(variables["params"]):
        name = "/".join(key.key for key in path[:-1])
        params[name] = params.get(name, 0) + math.prod(leaf.shape)
    shapes: dict[str, tuple[int, ...]] = {}
    madds: dict[str, int] = {}
    for scope, shape, count in _products(closed.jaxpr, ()):
        name = _layer_of(scope, params)
        shapes[name] = shape[1:]  # the last product of a layer gives its output
        madds[name] = madds.get(name, 0) + count
    # Layers in the order in which they compute, each norm behind the layer that it follows in name; what has no product
    # and follows none, as a norm at the entrance of a block, stands behind the last layer of its block.
    names = list(madds) + [name for name in params if name not in madds]
    order = {name: place for place, name in enumerate(madds)}
    ends = {name.rpartition("/")[0]: place for name, place in order.items()}

    def place_of(name: str) -> tuple[int, str]:
        followed = order.get(name.removesuffix("_norm"), ends.get(name.rpartition("/")[0], -1))
        return order.get(name, followed), name

    names.sort(key=place_of)
    layers = tuple(Layer(name, shapes.get(name), params.get(name, 0), madds.get(name, 0)) for name in names)
    return Summary(sum(params.values()), sum(madds.values()), layers)


def _layer_of(scope: tuple[str, ...], params: dict[str, int]) -> str:
    """The longest run of a scope's names that is the path of a layer, or what follows that of a block."""
    runs = [(scope[i:j], scope[i : j + 1]) for i in range(len(scope)) for j in range(i + 1, len(scope) + 1)]
    parents = {name.rpartition("/")[0] for name in params}
    known = ["/".join(run) for run, _ in runs if "/".join(run) in params]
    known = known or ["/".join(longer) for run, longer in runs if "/".join(run) in parents]
    return max(known, key=len, default="/".join(scope))


def _products(jaxpr: Any, scope: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], tuple[int, ...], int]]:
    """Scope, output shape and multiply-adds of every convolution and matrix product that runs, in order."""
    for eqn in jaxpr.eqns:
        here = scope + tuple(part for part in str(eqn.source_info.name_stack).split("/") if part)
        if eqn.primitive.name in PRODUCTS:
            yield here, eqn.outvars[0].aval.shape, madds_of(eqn)
        elif eqn.primitive.name == "cond":
            yield from _products(branch_that_runs(eqn), here)
        else:
            turns = eqn.params["length"] if eqn.primitive.name == "scan" else 1
            for inner in jaxprs_in(eqn):
                for at, shape, count in _products(inner, here):
                    yield at, shape, turns * count


PRODUCTS = ("conv_general_dilated", "dot_general")
"""The primitives that have multiply-adds."""


def madds_of(eqn: Any) -> int:
    """Multiply-adds of an equation that is one of the `PRODUCTS`."""
    size = math.prod(eqn.outvars[0].aval.shape)
    if eqn.primitive.name == "conv_general_dilated":
        kernel = eqn.invars[1].aval.shape
        # The kernel's axis of input channels is that of one group already.
        return size * math.prod(kernel) // kernel[eqn.params["dimension_numbers"].rhs_spec[0]]
    (contracted, _), _ = eqn.params["dimension_numbers"]
    return size * math.prod(eqn.invars[0].aval.shape[axis] for axis in contracted)


def branch_that_runs(eqn: Any) -> core.Jaxpr:
    """The branch of a ``cond`` whose products are counted.

    Where the platform chooses, all do the same sums, and one as a convolution of all axes: that one.
    """

    def cost(branch: core.Jaxpr) -> tuple[int, list[int]]:
        found = list(_products(branch, ()))
        return sum(count for *_, count in found), [len(shape) for _, shape, _ in found]

    return max((branch.jaxpr for branch in eqn.params["branches"]), key=cost)


def jaxprs_in(eqn: Any) -> list[core.Jaxpr]:
    """The jaxprs that an equation calls."""
    found: list[Any] = jax.tree.leaves(list(eqn.params.values()), is_leaf=_is_jaxpr)
    return [getattr(value, "jaxpr", value) for value in found if _is_jaxpr(value)]


def _is_jaxpr(value: Any) -> bool:
    return isinstance(value, core.Jaxpr | core.ClosedJaxpr)
