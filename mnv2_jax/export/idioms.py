"""Names what several operators compute together, so that a format can write it as one operator.

sub, div ──► one factor and one offset per channel ──► folded into the product before them
max, min ──► clip ──► `graph.Node.clip` of the product or sum before it
clip of a line, times the value ──► hard_swish        … erfc … ──► gelu
exp / sum of exp ──► softmax                           sum / count ──► mean
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from mnv2_jax.graph import CONV, DOT, Graph, Idiom, Node, Operand, Value, fold, readers_of, without_unread
from mnv2_jax.types import Array


def _line(x: Array, scale: Array, offset: Array) -> Array:
    return x * scale + offset


def _clip(x: Array, low: float, high: float) -> Array:
    return jnp.clip(x, low, high)


def _mean(x: Array, axes: Sequence[int]) -> Array:
    return x.mean(axes)


_LINE = Idiom("line", _line)  # it is written as `mul` and `add`
CLIP = Idiom("clip", _clip)
"""Of x, with params `low` and `high`."""
HARD_SWISH = Idiom("hard_swish", jax.nn.hard_swish)
GELU = Idiom("gelu", lambda x: jax.nn.gelu(x, approximate=False))
SOFTMAX = Idiom("softmax", jax.nn.softmax)
"""Over the last axis."""
MEAN = Idiom("mean", _mean)
"""Over the param `axes`, which the output doesn't have."""

_Made: TypeAlias = Mapping[Value, Node]
"""The nodes so far by their outputs."""


def recognise(graph: Graph) -> Graph:
    """Returns a graph of the same function, up to rounding, with fewer operators. The known values must be arrays."""
    made: dict[Value, Node] = {}
    nodes: list[Node] = []

    def add(node: Node) -> None:
        for rule in _RULES.get(node.op, ()):
            replacement = rule(node, made)
            if replacement:
                for each in replacement:
                    add(each)
                return
        nodes.append(node)
        made.update(dict.fromkeys(node.outputs, node))

    for node in graph.nodes:
        add(node)
    graph = without_unread(graph._replace(nodes=tuple(nodes)))
    graph = graph._replace(nodes=tuple(part for node in graph.nodes for part in _parts(node)))
    return _with_clips(fold(graph))


# --- lines: a factor and an offset for each channel ---------------------------------------------------------


def _to_line(node: Node, made: _Made) -> list[Node]:
    """Turns a sum, difference, product or quotient with a number for each channel into a line."""
    values = [operand for operand in node.operands if isinstance(operand, Value)]
    if len(values) != 1 or values[0].shape != node.output.shape or not jnp.issubdtype(node.output.dtype, jnp.floating):
        return []
    (x,) = values
    scale: np.ndarray
    offset: np.ndarray
    one, zero = np.ones(()), np.zeros(())
    if node.op == "neg":
        scale, offset = -one, zero
    else:
        known = _per_channel(next(operand for operand in node.operands if operand is not x), x.shape)
        is_first = node.operands[0] is x
        if known is None or (node.op == "div" and not is_first):
            return []
        if node.op == "div":
            known = one / known  # not below: a 0 that is added would be divided by
        scale, offset = {
            "add": (one, known),
            "sub": (one, -known) if is_first else (-one, known),
            "mul": (known, zero),
            "div": (known, zero),
        }[node.op]
    return [_replaced(node, _LINE, (x, scale, offset))]


def _joined(node: Node, made: _Made) -> list[Node]:
    """Joins a line with what makes its operand: another line, bounds, or a sum over axes."""
    x, scale, offset = _line_of(node)
    inner = made.get(x)
    if inner is None:
        return []
    if inner.op == "line":
        x, inner_scale, inner_offset = _line_of(inner)
        return [_replaced(node, _LINE, (x, inner_scale * scale, inner_offset * scale + offset))]
    if inner.op == "clip" and scale.size == offset.size == 1 and scale > 0:  # in front of it, a product may take it in
        value = Value(x.shape, x.dtype)
        line = _replaced(dataclasses.replace(node, outputs=(value,)), _LINE, (inner.operands[0], scale, offset))
        low, high = (float(inner.params[name] * scale + offset) for name in ("low", "high"))
        return [line, _replaced(node, CLIP, (value,), low=low, high=high)]
    if inner.op == "reduce_sum" and scale.size == 1 and not offset.any():
        axes, shape = tuple(inner.params["axes"]), np.shape(inner.operands[0])
        if math.isclose(float(scale) * math.prod(shape[axis] for axis in axes), 1, rel_tol=1e-6):
            return [_replaced(node, MEAN, (inner.operands[0],), axes=axes)]
    return []


def _parts(node: Node) -> list[Node]:
    """Writes a line as a product and a sum, without a factor 1 or an offset 0."""
    if node.op != "line":
        return [node]
    x, scale, offset = _line_of(node)
    primitives = [(jax.lax.mul_p, scale)] * bool((scale != 1).any())
    primitives += [(jax.lax.add_p, offset)] * bool((offset != 0).any())
    primitives = primitives or [(jax.lax.mul_p, scale)]
    values = [*(Value(x.shape, x.dtype) for _ in primitives[1:]), node.output]
    parts = []
    for (primitive, known), value in zip(primitives, values, strict=True):
        known = np.asarray(known, x.dtype)
        if known.ndim:
            known = known.reshape((1,) * (len(x.shape) - 1) + (-1,))
        parts.append(_replaced(dataclasses.replace(node, outputs=(value,)), primitive, (x, known)))
        x = value
    return parts


def _per_channel(operand: Operand, shape: tuple[int, ...]) -> np.ndarray | None:
    """Returns a known operand as float64 [] or [c], if it is a number, or one for each channel of ``shape``."""
    known = np.asarray(operand, np.float64)
    if known.size == 1:
        return known.reshape(())
    return known.reshape(-1) if known.shape[-1:] == shape[-1:] and known.size == shape[-1] else None


# --- bounds -------------------------------------------------------------------------------------------------


def _to_clip(node: Node, made: _Made) -> list[Node]:
    """Turns a maximum or minimum with a number into a clip, joined with one before it."""
    values = [operand for operand in node.operands if isinstance(operand, Value)]
    others = [operand for operand in node.operands if not isinstance(operand, Value)]
    if len(values) != 1 or values[0].shape != node.output.shape or any(np.size(other) != 1 for other in others):
        return []
    bounds = [float(np.asarray(other).reshape(())) for other in others]
    low, high = {"max": (bounds[0], math.inf), "min": (-math.inf, bounds[0]), "clamp": (bounds[0], bounds[-1])}[node.op]
    x: Operand = values[0]
    inner = _maker(x, made)
    if inner is not None and inner.op == "clip":
        inner_low, inner_high = inner.params["low"], inner.params["high"]
        if max(low, inner_low) <= min(high, inner_high):
            x, low, high = inner.operands[0], max(low, inner_low), min(high, inner_high)
    return [_replaced(node, CLIP, (x,), low=low, high=high)]


def _with_clips(graph: Graph) -> Graph:
    """Moves a clip into the product or sum that makes its operand, if nothing else reads that."""
    readers = readers_of(graph)
    nodes: list[Node] = []
    made: dict[Value, int] = {}
    for node in graph.nodes:
        x = node.operands[0]
        place = made.get(x) if isinstance(x, Value) and readers[x] == 1 else None
        if node.op == "clip" and place is not None and nodes[place].clip is None:
            clip = (node.params["low"], node.params["high"])
            nodes[place] = dataclasses.replace(nodes[place], outputs=node.outputs, clip=clip)
            made[node.output] = place
            continue
        if node.op in (CONV, DOT, "add", "sub", "mul"):
            made[node.output] = len(nodes)
        nodes.append(node)
    return graph._replace(nodes=tuple(nodes))


# --- functions ----------------------------------------------------------------------------------------------


def _to_activation(node: Node, made: _Made) -> list[Node]:
    """Recognises x · clip(x / 6 + 1/2, 0, 1) and x / 2 · erfc(-x / √2)."""
    for first, second in (node.operands, node.operands[::-1]):
        inner = _maker(second, made)
        line = _maker(inner.operands[0], made) if inner is not None and inner.op in ("clip", "erfc") else None
        if inner is None or line is None or line.op != "line":
            continue
        x, half = line.operands[0], _maker(first, made)
        if inner.op == "clip":
            bounds = (inner.params["low"], inner.params["high"])
            if x is first and _is_line(line, 1 / 6, 1 / 2) and np.allclose(bounds, (0, 1)):
                return [_replaced(node, HARD_SWISH, (x,))]
        elif half is not None and half.operands[0] is x and _is_line(half, 1 / 2, 0) and _is_line(line, -(0.5**0.5), 0):
            return [_replaced(node, GELU, (x,))]
    return []


def _is_line(node: Node, scale: float, offset: float) -> bool:
    """Whether a node is a line with these numbers for all channels."""
    if node.op != "line":
        return False
    _, *numbers = _line_of(node)
    return np.allclose(numbers[0], scale, rtol=1e-6) and np.allclose(numbers[1], offset, rtol=1e-6)


def _to_softmax(node: Node, made: _Made) -> list[Node]:
    """Recognises exp(x) / sum of exp(x) over the last axis, where x may have an offset that is constant along it."""
    exp, kept = (_maker(operand, made) for operand in node.operands)
    if exp is None or kept is None or exp.op != "exp" or kept.op not in ("reshape", "expand_dims"):
        return []
    total = _maker(kept.operands[0], made)
    last = len(exp.output.shape) - 1
    if total is None or total.op != "reduce_sum" or total.operands[0] is not exp.output:
        return []
    if tuple(total.params["axes"]) != (last,) or kept.output.shape != (*exp.output.shape[:-1], 1):
        return []
    x = exp.operands[0]
    shifted = _maker(x, made)
    if shifted is not None and shifted.op == "sub" and np.shape(shifted.operands[1])[-1:] == (1,):
        x = shifted.operands[0]
    return [_replaced(node, SOFTMAX, (x,))]


def _maker(operand: Operand, made: _Made) -> Node | None:
    return made.get(operand) if isinstance(operand, Value) else None


def _line_of(node: Node) -> tuple[Value, np.ndarray, np.ndarray]:
    """Returns value, scale and offset of a line; numbers are float64, [] or [c]."""
    operands: Any = node.operands
    return operands


def _replaced(node: Node, primitive: Any, operands: tuple[Any, ...], **params: Any) -> Node:
    return dataclasses.replace(node, primitive=primitive, operands=operands, params=params)


_RULES: Mapping[str, Sequence[Callable[[Node, _Made], list[Node]]]] = {
    "add": (_to_line,),
    "sub": (_to_line,),
    "neg": (_to_line,),
    "mul": (_to_line, _to_activation),
    "div": (_to_line, _to_softmax),
    "line": (_joined,),
    "max": (_to_clip,),
    "min": (_to_clip,),
    "clamp": (_to_clip,),
}
