"""Biases that make up for what rounding does to the means of channels.

After Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction" (2019), section 4.2, with
means that are measured on images. Products are corrected in order, each on inputs with the errors of those before it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import jax
import numpy as np

from mnv2_jax import graph as graphs
from mnv2_jax.export.quantise import Quantised, up_to
from mnv2_jax.graph import Node, Value

MOST_IMAGES = 32
"""Images on which means are measured; all values of a layer are held for each of them, twice."""

_Values: TypeAlias = dict[Value, np.ndarray]
"""The values of one image that are still to be read."""


def correct(quantised: Quantised, images: Sequence[np.ndarray]) -> Quantised:
    """Shifts each bias so that rounding leaves the mean of every channel over the images as it is.

    Args:
      quantised: the graph.
      images: the input, one image each, [1, h, w, 3]; the first `MOST_IMAGES` are used.
    """
    graph, arrays = quantised.graph, dict(quantised.arrays)
    unread = graphs.readers_of(graph)
    exact: list[_Values] = [dict(zip(graph.inputs, [image], strict=True)) for image in images[:MOST_IMAGES]]
    rounded: list[_Values] = [dict(values) for values in exact]
    for node in up_to(graph, quantised.nodes).nodes:
        run, is_integer = _before_clip(node), node in quantised.nodes
        right = [run(values, {}) for values in exact]
        held = known_reals(quantised, node) if is_integer else {}
        actual = [run(_on_grids(quantised, node, values) if is_integer else values, held) for values in rounded]
        if (node, 2) in arrays:
            shift = np.mean([_channel_means(x[0] - y[0]) for x, y in zip(right, actual, strict=True)], axis=0)
            bias, grid = arrays[node, 2]
            arrays[node, 2] = (grid.integers(grid.reals(bias) + shift, np.int32), grid)
            change = grid.reals(arrays[node, 2][0]) - grid.reals(bias)
            actual = [[y + change for y in outputs] for outputs in actual]
        for values, outputs in zip((*exact, *rounded), (*right, *actual), strict=True):
            clipped = outputs if node.clip is None else [np.clip(output, *node.clip) for output in outputs]
            values.update(zip(node.outputs, clipped, strict=True))
        for operand in node.operands:
            if isinstance(operand, Value):
                unread[operand] -= 1
                if not unread[operand]:
                    for values in (*exact, *rounded):
                        del values[operand]
    return quantised._replace(arrays=arrays)


def known_reals(quantised: Quantised, node: Node) -> dict[int, np.ndarray]:
    """Returns the numbers that the integers of a node's known operands stand for, by place."""
    places = [place for place, operand in enumerate(node.operands) if not isinstance(operand, Value)]
    pairs = {place: quantised.arrays[node, place] for place in places}
    return {place: grid.reals(x).reshape(np.shape(node.operands[place])) for place, (x, grid) in pairs.items()}


def _before_clip(node: Node) -> Callable[[_Values, Mapping[int, np.ndarray]], list[np.ndarray]]:
    """Returns the function that computes a node without its bounds from values and from other known operands."""
    compute = jax.jit(lambda operands: graphs.compute(dataclasses.replace(node, clip=None), operands))

    def run(values: _Values, held: Mapping[int, np.ndarray]) -> list[np.ndarray]:
        operands = [values[x] if isinstance(x, Value) else held.get(place, x) for place, x in enumerate(node.operands)]
        return [np.asarray(output) for output in compute(operands)]

    return run


def _on_grids(quantised: Quantised, node: Node, values: _Values) -> _Values:
    """Rounds the operands of a node to their grids."""
    grids: Mapping[Any, Any] = quantised.grids
    operands = [x for x in node.operands if isinstance(x, Value)]
    return {x: grids[x].reals(grids[x].integers(values[x])) if x in grids else values[x] for x in operands}


def _channel_means(x: np.ndarray) -> np.ndarray:
    return x.reshape(-1, x.shape[-1]).mean(axis=0)
