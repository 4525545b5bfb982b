"""What the writers of files share: names of nodes, shapes with a free batch, errors, and weights in half precision."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mnv2_jax.errors import UserError
from mnv2_jax.export.function import INPUT
from mnv2_jax.graph import Graph, Node, Value, is_channels_last


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


def _layer_of(node: Node) -> str:
    return "/".join(node.scope) or "outside of the layers"


def in_half(array: np.ndarray) -> np.ndarray:
    """Rounds floats to half precision. What is too large becomes infinite without a warning; the check finds that."""
    with np.errstate(over="ignore"):
        return array.astype(np.float16)
