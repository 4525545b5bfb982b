"""What the writers of files share: names of nodes, shapes with a free batch, errors, and weights in half precision."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jax.lax import GatherScatterMode

from mnv2_jax.errors import UserError
from mnv2_jax.export.function import INPUT
from mnv2_jax.graph import Graph, Node, Value, is_channels_last

COMPARISONS = frozenset({"eq", "ge", "gt", "le", "lt"})
"""Operators that compare numbers."""


def names_of(graph: Graph) -> dict[Value, str]:
    """Returns a name for each value: `INPUT`, or the number, the layer and the operator of the node that makes it."""
    names = dict.fromkeys(graph.inputs, INPUT)
    for number, node in enumerate(graph.nodes):
        names.update(dict.fromkeys(node.outputs, f"{number}/{'/'.join((*node.scope, node.op))}"))
    return names


def with_free_batch(node: Node, shape: Sequence[int]) -> list[int]:
    """Returns the shape to which a node reshapes, with -1 for its first axis, that of the batch.

    Raises:
      UserError: naming the layer, if the batch, 1 in the graph, isn't the first axis before and after.
    """
    if not (shape and shape[0] == 1 and np.shape(node.operands[0])[:1] == (1,)):
        raise UserError(f"{_layer_of(node)}: {node.op} moves the axis of the batch, which can't be exported")
    return [-1, *shape[1:]]


def no_rule(node: Node, form: str, what: str) -> UserError:
    """Returns the error for a node that a format can't be written for."""
    return UserError(f"{_layer_of(node)}: {form} has no rule for {what} here; --format=stablehlo takes every operator")


def check_convolution(node: Node, form: str) -> None:
    """Refuses a convolution that a format has no operator for.

    Raises:
      UserError: naming the layer, for another layout than [b, h, w, c], a dilated input, groups of the batch, or a
        kernel that depends on the image.
    """
    if not is_channels_last(node) or {*node.params["lhs_dilation"], node.params["batch_group_count"]} != {1}:
        raise no_rule(node, form, "a convolution of this layout, dilated input or grouped batch")
    if isinstance(node.operands[1], Value):
        raise no_rule(node, form, "a kernel that depends on the image")


def known_of(node: Node, place: int) -> np.ndarray:
    """Returns a known operand in the type in which its node reads it."""
    dtype = node.output.dtype
    if node.op in COMPARISONS:
        dtype = next(x.dtype for x in node.operands if isinstance(x, Value))
    elif node.op == "select_n" and place == 0:
        dtype = np.bool_
    return np.asarray(node.operands[place], dtype)


def slice_of(node: Node, form: str) -> list[tuple[int, int]]:
    """Returns the start and the end of what a node cuts out along each axis, of which that of the batch stays whole.

    Raises:
      UserError: naming the layer, for a slice of the batch, or with steps.
    """
    starts, ends, steps = node.params["start_indices"], node.params["limit_indices"], node.params["strides"]
    if set(steps or (1,)) != {1} or (starts[0], ends[0]) != (0, np.shape(node.operands[0])[0]):
        raise no_rule(node, form, "a slice with steps, or of the batch")
    return list(zip(starts, ends, strict=True))


def pads_of(node: Node, form: str) -> list[tuple[int, int]]:
    """Returns how much a node pads each axis before and after.

    Raises:
      UserError: naming the layer, where it pads the batch, cuts off, or pads in between.
    """
    pads = node.params["padding_config"]
    if pads[0] != (0, 0, 0) or any(low < 0 or high < 0 or between for low, high, between in pads):
        raise no_rule(node, form, "a padding of the batch, in between or of less than nothing")
    return [(low, high) for low, high, _ in pads]


def check_rows(node: Node, form: str) -> None:
    """Refuses a gather that doesn't take rows of each example's array [b, n, ...] by the example's numbers [b, ..., 1].

    Raises:
      UserError: naming the layer.
    """
    numbers, shape, rank = node.params["dimension_numbers"], np.shape(node.operands[0]), len(node.output.shape)
    right = {
        "offset_dims": tuple(range(rank - len(shape) + 2, rank)),
        "collapsed_slice_dims": (1,),
        "start_index_map": (1,),
        "operand_batching_dims": (0,),
        "start_indices_batching_dims": (0,),
    }
    is_right = all(tuple(getattr(numbers, name)) == axes for name, axes in right.items())
    is_whole = tuple(node.params["slice_sizes"]) == (1, 1, *shape[2:])
    is_sure = node.params["mode"] == GatherScatterMode.PROMISE_IN_BOUNDS  # formats differ in what they do with others
    if not (is_right and is_whole and is_sure and all(isinstance(operand, Value) for operand in node.operands)):
        raise no_rule(node, form, "a gather that is more than rows by their right numbers, for each image")


def check_bool(node: Node, form: str) -> None:
    """Refuses a choice by an integer, or bits of integers: formats have operators for true and false.

    Raises:
      UserError: naming the layer.
    """
    if node.operands[0].dtype != np.bool_:
        raise no_rule(node, form, f"{node.op!r} of integers")


def _layer_of(node: Node) -> str:
    return "/".join(node.scope) or "outside of the layers"


def in_half(array: np.ndarray) -> np.ndarray:
    """Rounds floats to half precision. What is too large becomes infinite without a warning; the check finds that."""
    with np.errstate(over="ignore"):
        return array.astype(np.float16)
