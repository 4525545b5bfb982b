"""Integers for a network: 8 bits for values and kernels, 32 for biases, from the ranges of values on images.

A real number is scale · (q - zero_point). Values have q in -128..127 and one scale; a kernel has q in -127..127, zero
point 0 and a scale for each output channel; a bias has the scale of its product. This is the scheme of Jacob et al.,
"Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference" (2018), as the 8-bit
specification of TFLite has it.

    graph ──► products of channels instead of factors ──► ranges on images ──► grids ──► kernels, biases ──► Quantised
                                                                            `export.biases` ──► corrected biases

What follows the last convolution or dense layer, such as a softmax over classes or the choice of boxes, stays in
floats, and so does an operator that has no integer form.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mnv2_jax import graph as graphs
from mnv2_jax.errors import UserError
from mnv2_jax.graph import CONV, DOT, Graph, Node, Value
from mnv2_jax.nn.resize import RESIZE

_LARGEST_BIAS = 2**30
"""Largest integer of a bias; half of what fits, so that the sum of products can be added to it."""
UNSIGNED = 128
"""What is added to int8 where a format has uint8."""


class Grid(NamedTuple):
    """The real numbers that integers stand for."""

    scale: Any
    """float32, [], or [c] for the last axis of a kernel or bias."""
    zero_point: int = 0

    def integers(self, x: np.ndarray, dtype: Any = np.int8) -> np.ndarray:
        """Rounds real numbers to the nearest integers of a type; what lies outside becomes its end."""
        q = np.rint(np.asarray(x, np.float64) / np.asarray(self.scale, np.float64)) + self.zero_point
        ends = np.iinfo(dtype)
        return np.clip(q, ends.min, ends.max).astype(dtype)

    def reals(self, q: np.ndarray) -> np.ndarray:
        """Returns the numbers that integers stand for, as float32."""
        return ((q.astype(np.float64) - self.zero_point) * self.scale).astype(np.float32)


class Quantised(NamedTuple):
    """A graph, and which of it is computed in integers."""

    graph: Graph
    grids: Mapping[Value, Grid]
    """Grids of the values that are read or written as integers."""
    nodes: frozenset[Node]
    """Nodes that are computed in integers."""
    arrays: Mapping[tuple[Node, int], tuple[np.ndarray, Grid]]
    """Integers of the known operands of those nodes, by node and place."""


def in_floats(graph: Graph) -> Quantised:
    """Returns a graph of which nothing is computed in integers."""
    return Quantised(graph, {}, frozenset(), {})


def quantise(graph: Graph, images: Iterable[np.ndarray]) -> Quantised:
    """Quantises a graph whose known values are arrays. `export.biases` then corrects its biases.

    Args:
      graph: what `export.function.Exportable.graph` returns.
      images: the input for calibration, as the graph takes it, one image each, [1, h, w, 3].
    """
    graph = _with_channel_products(graph)
    nodes = _integer_nodes(graph)
    grids = _grids(graph, nodes, ranges_of(up_to(graph, nodes), images))
    arrays = {key: pair for node in nodes for key, pair in _known_integers(node, grids).items()}
    return Quantised(graph, grids, frozenset(nodes), arrays)


def kernel_grid(kernel: np.ndarray, least: np.ndarray | float = 0.0) -> Grid:
    """Returns the grid of a kernel: the largest value of each channel of the last axis is 127.

    Args:
      kernel: the kernel.
      least: the least scale of each channel, [c].
    """
    largest = abs(np.asarray(kernel)).max(axis=tuple(range(kernel.ndim - 1)))
    scale = np.maximum(largest / 127, least)
    return Grid(np.where(scale > 0, scale, 1).astype(np.float32))


# --- which operators ----------------------------------------------------------------------------------------

_PIXELS = {"uint8": Grid(np.float32(1), -128), "float32": Grid(np.float32(1 / 255), -128)}  # 0..255 and 0..1
_FIXED = {  # as runtimes want them
    "logistic": Grid(np.float32(1 / 256), -128),
    "softmax": Grid(np.float32(1 / 256), -128),
    "tanh": Grid(np.float32(1 / 128), 0),
}
_OWN_RANGE = frozenset({CONV, DOT, "add", "sub", "mul", "clip", "hard_swish", "gelu", "mean"})
_OPERANDS_GRID = frozenset({"reshape", "squeeze", "expand_dims", "transpose", "concatenate", "reduce_window_max"})
CAST = "convert_element_type"


def _with_channel_products(graph: Graph) -> Graph:
    """Writes a factor and an offset for each channel as a convolution of each channel: one rounding instead of two."""
    nodes = list(graph.nodes)
    for place, node in enumerate(nodes):
        x, *others = node.operands
        if node.op == "mul" and isinstance(x, Value) and len(x.shape) == 4 and not isinstance(others[0], Value):
            channels = x.shape[-1]
            if np.size(others[0]) == channels > 1:
                kernel = np.asarray(others[0]).reshape(1, 1, 1, channels)
                operands: tuple[Any, ...] = (x, kernel)
                product = _channel_product(x)
                nodes[place] = dataclasses.replace(
                    node, primitive=product.primitive, params=product.params, operands=operands
                )
    folded = graphs.fold(graph._replace(nodes=tuple(nodes)))
    return folded._replace(nodes=tuple(map(_with_bias, folded.nodes)))


def _with_bias(node: Node) -> Node:
    """Gives a product with a known kernel a bias of zeros if it has none, so that it can be corrected."""
    if node.op not in (CONV, DOT) or len(node.operands) > 2 or isinstance(node.operands[1], Value):
        return node
    zeros: Any = np.zeros((1,) * (len(node.output.shape) - 1) + node.output.shape[-1:], node.output.dtype)
    return dataclasses.replace(node, operands=(*node.operands, zeros))


def _channel_product(x: Value) -> Node:
    def function(x: Any, kernel: Any) -> Any:
        numbers, channels = ("NHWC", "HWIO", "NHWC"), x.shape[-1]
        return jax.lax.conv_general_dilated(
            x, kernel, (1, 1), "VALID", dimension_numbers=numbers, feature_group_count=channels
        )

    specs = (jax.ShapeDtypeStruct(shape, x.dtype) for shape in (x.shape, (1, 1, 1, x.shape[-1])))
    (node,) = graphs.trace(function, *specs).nodes
    return node


def _integer_nodes(graph: Graph) -> list[Node]:
    """Returns the nodes up to the last convolution or dense layer whose operator has an integer form."""
    layers = (
        place
        for place, node in enumerate(graph.nodes)
        if node.op in (CONV, DOT) and not isinstance(node.operands[1], Value) and RESIZE not in node.scope
    )
    last = max(layers, default=-1)
    has_form = {*_OWN_RANGE, *_OPERANDS_GRID, *_FIXED}

    def is_integer(node: Node) -> bool:
        if RESIZE in node.scope:  # rounding weights of interpolation would move the borders of classes
            return False
        if node.op == CAST:
            return node.operands[0] in graph.inputs and node.operands[0].dtype == np.uint8
        return node.op in has_form and bool(jnp.issubdtype(node.output.dtype, jnp.floating))

    return [node for node in graph.nodes[: last + 1] if is_integer(node)]


def up_to(graph: Graph, nodes: Collection[Node]) -> Graph:
    """Returns a graph up to the last of these nodes; what follows, such as a choice of boxes, may be costly."""
    last = max((place for place, node in enumerate(graph.nodes) if node in nodes), default=-1)
    return graph._replace(nodes=graph.nodes[: last + 1])


# --- ranges and grids ---------------------------------------------------------------------------------------


def ranges_of(graph: Graph, images: Iterable[np.ndarray]) -> dict[Value, tuple[float, float]]:
    """Computes the smallest and the largest number of every float value over images, one at a time.

    Raises:
      UserError: if one of them is NaN or infinite.
    """
    floats: list[Value] = []

    def extremes(image: Any) -> Any:
        values = graphs.values_of(graph, image)
        floats[:] = [value for value in values if jnp.issubdtype(value.dtype, jnp.floating)]
        return jnp.stack([jnp.stack([values[value].min(), values[value].max()]) for value in floats])

    measure = jax.jit(extremes)
    measured = np.stack([np.asarray(measure(image)) for image in images])
    if not np.isfinite(measured).all():
        raise UserError(
            "the network computes NaN or infinity on the images for calibration; give other images, or other weights"
        )
    low, high = measured[..., 0].min(axis=0), measured[..., 1].max(axis=0)
    return dict(zip(floats, zip(low.tolist(), high.tolist(), strict=True), strict=True))


def range_grid(low: float, high: float) -> Grid:
    """Returns the grid of 256 numbers from ``low`` to ``high``, with 0 among them."""
    low, high = min(low, 0.0), max(high, 0.0)
    scale = (high - low) / 255 or 1.0
    return Grid(np.float32(scale), round(-128 - low / scale))


def _grids(graph: Graph, nodes: Iterable[Node], ranges: Mapping[Value, tuple[float, float]]) -> dict[Value, Grid]:
    """Returns the grids of all values that nodes read or write; those that an operator only moves share one."""
    nodes = list(nodes)
    group: dict[Value, list[Value]] = {}
    for node in nodes:
        values = [x for x in (*node.operands, *node.outputs) if isinstance(x, Value)]
        for value in values:
            group.setdefault(value, [value])
        if node.op in _OPERANDS_GRID:
            joined = list(dict.fromkeys(member for value in values for member in group[value]))
            group.update(dict.fromkeys(joined, joined))
    fixed = {node.output: _FIXED[node.op] for node in nodes if node.op in _FIXED}
    fixed |= {node.output: _PIXELS["uint8"] for node in nodes if node.op == CAST}
    fixed |= {x: _PIXELS["float32"] for x in graph.inputs if x.dtype == np.float32}
    grids = {}
    for value, members in group.items():
        if value.dtype == np.uint8:
            continue
        lows, highs = zip(*(ranges[member] for member in members), strict=True)
        grids[value] = next((fixed[x] for x in members if x in fixed), range_grid(min(lows), max(highs)))
    return grids


# --- known operands -----------------------------------------------------------------------------------------


def _known_integers(node: Node, grids: Mapping[Value, Grid]) -> dict[tuple[Node, int], tuple[np.ndarray, Grid]]:
    """Returns the integers of a node's known operands, by node and place."""
    known = {place: np.asarray(x) for place, x in enumerate(node.operands) if not isinstance(x, Value)}
    if node.op not in (CONV, DOT):
        made = {place: (x, range_grid(float(x.min()), float(x.max()))) for place, x in known.items()}
        return {(node, place): (grid.integers(x), grid) for place, (x, grid) in made.items()}
    if 1 not in known:
        return {}
    (x, *_), kernel = [x for x in node.operands if isinstance(x, Value)], known[1]
    x_scale = grids[x].scale
    bias = known[2].reshape(-1) if 2 in known else np.zeros(kernel.shape[-1], np.float32)
    # A channel that is nearly 0 would have so small a scale that its bias doesn't fit into 32 bits
    grid = kernel_grid(kernel, abs(bias) / (x_scale * _LARGEST_BIAS))
    bias_grid = Grid((x_scale * grid.scale).astype(np.float32))
    pairs = {(node, 1): (grid.integers(kernel), grid)}
    if 2 in known:
        pairs[node, 2] = (bias_grid.integers(bias, np.int32), bias_grid)
    return pairs
