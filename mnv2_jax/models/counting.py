"""Counts parameters and multiply-adds of the traced network: nothing is computed, and no layer keeps its own count."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp

from mnv2_jax import graph
from mnv2_jax.models.base import Model
from mnv2_jax.models.registry import variable_shapes
from mnv2_jax.nn.forms import LIBRARY
from mnv2_jax.nn.resize import RESIZE


@dataclasses.dataclass(frozen=True)
class Layer:
    """A layer with parameters or multiply-adds."""

    name: str
    """Path of the layer in the parameters, such as ``block_1/depthwise``."""
    output_shape: tuple[int, ...] | None
    """Output shape [h, w, c] or [k] of the layer's convolution or matrix product at batch 1; None if it has none."""
    params: int
    madds: int


@dataclasses.dataclass(frozen=True)
class Summary:
    """Cost of a network at a resolution.

    params counts trainable values: kernels, biases, and the scales and biases of norms, not running statistics. madds
    counts the multiply-adds of convolutions and dense layers in inference at batch 1; one multiply-add is two FLOPs.
    Resizing a map isn't counted, as in the papers.
    """

    params: int
    madds: int
    layers: tuple[Layer, ...]


def count_layers(model: Model, size: int | tuple[int, int]) -> Summary:
    """Counts parameters and multiply-adds of each layer, for one image of a size: (height, width), or a square."""
    height, width = (size, size) if isinstance(size, int) else size
    image = jax.ShapeDtypeStruct((1, height, width, 3), jnp.float32)
    variables = variable_shapes(model)
    plain = model.with_forms(LIBRARY)  # each convolution is one operator; the counts are the same in any form
    traced = graph.abstract(lambda held: graph.trace(lambda x: plain.apply(held, x)[0], image), variables)
    params: dict[str, int] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(variables["params"]):
        name = "/".join(key.key for key in path[:-1])
        params[name] = params.get(name, 0) + math.prod(leaf.shape)
    shapes: dict[str, tuple[int, ...]] = {}
    madds: dict[str, int] = {}
    for node in traced.nodes:
        if RESIZE not in node.scope and (count := graph.madds_of(node)):
            name = _layer_of(node.scope, params)
            shapes[name] = node.outputs[0].shape[1:]  # the last product of a layer gives its output
            madds[name] = madds.get(name, 0) + count
    # Layers are in the order in which they compute. A norm comes after the layer that its name refers to. A layer that
    # has no product and follows none, such as a norm at the start of a block, comes after the last layer of its block.
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
    """Finds the layer of a scope: the longest run of its names that is the path of a layer with parameters.

    If there is none, it is the longest run that is the path of a block followed by one more name.
    """
    runs = [(scope[i:j], scope[i : j + 1]) for i in range(len(scope)) for j in range(i + 1, len(scope) + 1)]
    parents = {name.rpartition("/")[0] for name in params}
    layers = ["/".join(run) for run, _ in runs if "/".join(run) in params]
    layers = layers or ["/".join(longer) for run, longer in runs if "/".join(run) in parents]
    return max(layers, key=len, default="/".join(scope))
