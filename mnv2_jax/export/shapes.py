"""What the writers of files share: names of nodes, and shapes with a free batch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mnv2_jax.errors import UserError
from mnv2_jax.graph import Node


def node_name(node: Node, number: int) -> str:
    """Returns the name of a node's output: its number in the graph, its layer and its operator."""
    return f"{number}/{'/'.join((*node.scope, node.op))}"


def integers_name(name: str, layout: str) -> str:
    """Returns the name of the integers of an output, by its layout: NHWC, which the graph has, or NCHW."""
    return name if layout == "NHWC" else f"{name}:{layout}"


def with_free_batch(node: Node, shape: Sequence[int]) -> list[int]:
    """Returns the shape to which a node reshapes, with -1 for its first axis, that of the batch.

    Raises:
      UserError: naming the layer, if the batch, 1 in the graph, isn't the first axis before and after.
    """
    if not (shape and shape[0] == 1 and np.shape(node.operands[0])[:1] == (1,)):
        raise UserError(f"{'/'.join(node.scope)}: {node.op} moves the axis of the batch, which can't be exported")
    return [-1, *shape[1:]]
