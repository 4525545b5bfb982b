"""An inference function as a list of operators, for writing it in other formats, for counting, and for folding norms.

    function, image shape ──► trace ──► Graph ──► fold ──► Graph ──► run, or a writer of another format

Calls are inlined, a choice by platform is the one for platforms without forms of their own (XLA's convolutions), values
that don't depend on the input are computed, and a broadcast of an operand is left to the operator that reads it.
"""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax.extend import core

from mnv2_jax.nn.conv import conv, depthwise_conv
from mnv2_jax.nn.window import Window
from mnv2_jax.types import Array, PyTree

CONV, DOT = "conv_general_dilated", "dot_general"
"""Operators with multiply-adds. In a folded graph they may have a third operand: a bias [1, …, 1, c]."""

ELEMENTWISE = frozenset(
    {
        *("abs", "add", "and", "ceil", "clamp", "convert_element_type", "cos", "div", "eq", "erf", "erf_inv", "erfc"),
        *("exp", "exp2", "expm1", "floor", "ge", "gt", "integer_pow", "is_finite", "le", "log", "log1p", "logistic"),
        *("lt", "max", "min", "mul", "ne", "neg", "not", "or", "pow", "rem", "round", "rsqrt", "select_n", "sign"),
        *("sin", "sqrt", "square", "sub", "tanh", "xor"),
        *("clip", "gelu", "hard_swish"),  # of export/idioms.py
    }
)
"""Operators whose operands are broadcast to the shape of the output."""

_SAME = ("copy", "copy_p", "stop_gradient", "optimization_barrier")
"""Operators that return their operand."""


@dataclasses.dataclass(frozen=True, eq=False)
class Value:
    """An array that depends on the input of the graph."""

    shape: tuple[int, ...]
    dtype: Any


Operand: TypeAlias = Value | Array
"""An array that depends on the input, or a known array."""


class Idiom(NamedTuple):
    """What several primitives compute together, under a name; used as a primitive is."""

    name: str
    function: Callable[..., Array]
    multiple_results: bool = False

    def bind(self, *operands: Array, **params: Any) -> Array:
        """Computes it."""
        return self.function(*operands, **params)


@dataclasses.dataclass(frozen=True, eq=False)
class Node:
    """An operator of the graph."""

    primitive: core.Primitive | Idiom
    operands: tuple[Operand, ...]
    outputs: tuple[Value, ...]
    params: Mapping[str, Any]
    """Parameters of the primitive. Only nodes that hold programs of their own (loops) have jaxprs in them."""
    scope: tuple[str, ...]
    """Names of the modules that contain the operator, outermost first."""
    clip: tuple[float, float] | None = None
    """Bounds of the output, such as those of an activation; None: it has none."""

    @property
    def op(self) -> str:
        """Name of the primitive."""
        name: str = self.primitive.name
        return name

    @property
    def output(self) -> Value:
        """The only output."""
        (output,) = self.outputs
        return output


class Graph(NamedTuple):
    """Operators in the order in which they are computed."""

    inputs: tuple[Value, ...]
    nodes: tuple[Node, ...]
    outputs: PyTree
    """Tree of operands."""


class _Item(NamedTuple):
    """A variable of the program that is traced: an operand that is to be broadcast to a shape of the same rank."""

    operand: Operand
    shape: tuple[int, ...]


# --- tracing ------------------------------------------------------------------------------------------------


def trace(function: Callable[..., PyTree], *specs: jax.ShapeDtypeStruct) -> Graph:
    """Traces a function of arrays.

    Known values are those that the function closes over, such as a network's variables. They may be tracers: under
    `jax.jit` and `jax.grad` the values of the graph are functions of them.

    Args:
      function: a pure function from arrays to a pytree of arrays.
      *specs: shapes and types of its arguments.
    """
    closed, shapes = jax.make_jaxpr(function, return_shape=True)(*specs)
    inputs = tuple(Value(spec.shape, spec.dtype) for spec in specs)
    tracer = _Tracer()
    known = [_Item(value, jnp.shape(value)) for value in closed.consts]
    items = tracer.follow(closed.jaxpr, [*known, *(_Item(value, value.shape) for value in inputs)], ())
    outputs = [tracer.whole(item, ()) for item in items]
    return Graph(inputs, tuple(tracer.nodes), jax.tree.unflatten(jax.tree.structure(shapes), outputs))


class _Tracer:
    """Collects the nodes of a program."""

    def __init__(self) -> None:
        self.nodes: list[Node] = []

    def follow(self, jaxpr: core.Jaxpr, arguments: Sequence[_Item], scope: tuple[str, ...]) -> list[_Item]:
        """Adds the nodes of a program, whose constants come first in ``arguments``; returns its outputs."""
        items: dict[Any, _Item] = dict(zip((*jaxpr.constvars, *jaxpr.invars), arguments, strict=True))

        def item_of(var: Any) -> _Item:
            return _Item(var.val, jnp.shape(var.val)) if isinstance(var, core.Literal) else items[var]

        for eqn in jaxpr.eqns:
            inner_scope = scope + tuple(part for part in str(eqn.source_info.name_stack).split("/") if part)
            results = self._equation(eqn, [item_of(var) for var in eqn.invars], inner_scope)
            items.update(zip(eqn.outvars, results, strict=True))
        return [item_of(var) for var in jaxpr.outvars]

    def _equation(self, eqn: Any, operands: list[_Item], scope: tuple[str, ...]) -> list[_Item]:
        op, shapes = eqn.primitive.name, [var.aval.shape for var in eqn.outvars]
        if op in _SAME:
            return operands
        if op == "platform_index":
            return [_Item(eqn.params["platforms"].index(None), ())]
        if op == "cond" and not isinstance(operands[0].operand, Value):
            branch = eqn.params["branches"][int(operands[0].operand)]
            return self._call(branch, operands[1:], scope)
        inner = list(jaxprs_in(eqn))
        if op not in ("scan", "while", "cond") and len(inner) == 1 and len(inner[0].jaxpr.invars) == len(operands):
            return self._call(inner[0], operands, scope)
        if op == "broadcast_in_dim" and len(operands) == 1:
            return [self._broadcast(operands[0], eqn.params, scope)]
        if op not in ELEMENTWISE:
            operands = [_Item(self.whole(item, scope), item.shape) for item in operands]
        arrays = [item.operand for item in operands if not isinstance(item.operand, Value)]
        if len(arrays) == len(operands):
            if op in ELEMENTWISE:
                arrays = list(jnp.broadcast_arrays(*arrays))
            results = _bind(eqn.primitive, arrays, eqn.params)
            return [_Item(result, shape) for result, shape in zip(results, shapes, strict=True)]
        computed = shapes  # an operator of operands that are all to be broadcast is computed before the broadcast
        if op in ELEMENTWISE:
            computed = [jnp.broadcast_shapes(*(jnp.shape(item.operand) for item in operands))]
        dtypes = (var.aval.dtype for var in eqn.outvars)
        outputs = tuple(Value(shape, dtype) for shape, dtype in zip(computed, dtypes, strict=True))
        self.nodes.append(Node(eqn.primitive, tuple(item.operand for item in operands), outputs, eqn.params, scope))
        return [_Item(output, shape) for output, shape in zip(outputs, shapes, strict=True)]

    def _call(self, closed: core.ClosedJaxpr, operands: Sequence[_Item], scope: tuple[str, ...]) -> list[_Item]:
        constants = [_Item(value, jnp.shape(value)) for value in closed.consts]
        return self.follow(closed.jaxpr, [*constants, *operands], scope)

    def _broadcast(self, item: _Item, params: Mapping[str, Any], scope: tuple[str, ...]) -> _Item:
        """Gives the operand the rank of the result, with axes of size 1 where it is repeated."""
        shape, small = tuple(params["shape"]), [1] * len(params["shape"])
        for axis, size in zip(params["broadcast_dimensions"], jnp.shape(item.operand), strict=True):
            small[axis] = size
        if isinstance(item.operand, Value):
            return _Item(self._apply(jax.lax.reshape, item.operand, scope, new_sizes=tuple(small)), shape)
        return _Item(jnp.reshape(item.operand, small), shape)

    def whole(self, item: _Item, scope: tuple[str, ...]) -> Operand:
        """Returns the operand of an item after its broadcast."""
        if jnp.shape(item.operand) == item.shape:
            return item.operand
        if isinstance(item.operand, Value):
            axes = tuple(range(len(item.shape)))
            return self._apply(
                jax.lax.broadcast_in_dim, item.operand, scope, shape=item.shape, broadcast_dimensions=axes
            )
        return jnp.broadcast_to(item.operand, item.shape)

    def _apply(self, function: Callable[..., Array], value: Value, scope: tuple[str, ...], **options: Any) -> Value:
        """Adds the one operator that a function of JAX applies to a value; none if it returns its argument."""
        spec = jax.ShapeDtypeStruct(value.shape, value.dtype)
        jaxpr = jax.make_jaxpr(lambda x: function(x, **options))(spec).jaxpr
        for eqn in jaxpr.eqns:
            (var,) = eqn.outvars
            output = Value(var.aval.shape, var.aval.dtype)
            self.nodes.append(Node(eqn.primitive, (value,), (output,), eqn.params, scope))
            value = output
        return value


def jaxprs_in(eqn: Any) -> Iterator[core.ClosedJaxpr]:
    """Yields the programs that an equation or a node calls."""
    for value in jax.tree.leaves(list(eqn.params.values()), is_leaf=_is_jaxpr):
        if isinstance(value, core.Jaxpr):
            yield core.ClosedJaxpr(value, ())
        elif isinstance(value, core.ClosedJaxpr):
            yield value


def _is_jaxpr(value: Any) -> bool:
    return isinstance(value, core.Jaxpr | core.ClosedJaxpr)


def _bind(primitive: core.Primitive | Idiom, operands: Iterable[Array], params: Mapping[str, Any]) -> list[Array]:
    results = primitive.bind(*operands, **params)
    return list(results) if primitive.multiple_results else [results]


# --- known values -------------------------------------------------------------------------------------------


def known(graph: Graph) -> list[Array]:
    """Returns the known operands that are tracers, in order: under `jax.jit`, the functions of its arguments."""
    return [operand for operand in _operands(graph) if isinstance(operand, jax.core.Tracer)]


def with_known(graph: Graph, arrays: Iterable[Array]) -> Graph:
    """Returns the graph with these arrays in the places of `known`."""
    remaining = iter(arrays)

    def replaced(operand: Operand) -> Operand:
        return next(remaining) if isinstance(operand, jax.core.Tracer) else operand

    nodes = [dataclasses.replace(node, operands=tuple(map(replaced, node.operands))) for node in graph.nodes]
    return graph._replace(nodes=tuple(nodes), outputs=jax.tree.map(replaced, graph.outputs))


def abstract(make: Callable[[PyTree], Graph], variables: PyTree) -> Graph:
    """Returns the graph that a function makes of variables, or of their shapes, without computing anything.

    Its `known` operands stand for arrays and can only be replaced.
    """
    graphs: list[Graph] = []

    def record(variables: PyTree) -> list[Array]:
        graphs.append(make(variables))
        return known(graphs[0])

    jax.eval_shape(record, variables)
    return graphs[0]


def readers_of(graph: Graph) -> collections.Counter[Value]:
    """Counts how often each value is read, by operators or as an output."""
    return collections.Counter(operand for operand in _operands(graph) if isinstance(operand, Value))


def without_unread(graph: Graph) -> Graph:
    """Returns the graph without the operators on which no output depends."""
    read = {operand for operand in jax.tree.leaves(graph.outputs) if isinstance(operand, Value)}
    kept = []
    for node in reversed(graph.nodes):
        if read.intersection(node.outputs):
            read.update(operand for operand in node.operands if isinstance(operand, Value))
            kept.append(node)
    return graph._replace(nodes=tuple(reversed(kept)))


def _operands(graph: Graph) -> Iterator[Operand]:
    for node in graph.nodes:
        yield from node.operands
    yield from jax.tree.leaves(graph.outputs)


# --- counting -----------------------------------------------------------------------------------------------


def madds_of(node: Node) -> int:
    """Counts the multiply-adds of a convolution or a matrix product; 0 for other operators.

    A loop has those of all its turns, a choice by a value those of the costliest branch.
    """
    if node.op == CONV:
        kernel = jnp.shape(node.operands[1])
        # The kernel's axis of input channels has the size of one group already.
        return math.prod(node.output.shape) * math.prod(kernel) // kernel[node.params["dimension_numbers"].rhs_spec[0]]
    if node.op == DOT:
        (contracted, _), _ = node.params["dimension_numbers"]
        shape = jnp.shape(node.operands[0])
        return math.prod(node.output.shape) * math.prod(shape[axis] for axis in contracted)
    costs = [sum(map(madds_of, _nodes_of(closed))) for closed in jaxprs_in(node)]
    turns: int = node.params.get("length", 1)
    return turns * (max(costs) if node.op == "cond" else sum(costs))


def _nodes_of(closed: core.ClosedJaxpr) -> list[Node]:
    """Returns the nodes of a program that a node holds."""
    tracer = _Tracer()
    values = [Value(aval.shape, aval.dtype) for aval in closed.in_avals]
    tracer.follow(closed.jaxpr, [_Item(x, jnp.shape(x)) for x in (*closed.consts, *values)], ())
    return tracer.nodes


# --- folding ------------------------------------------------------------------------------------------------


def fold(graph: Graph) -> Graph:
    """Folds factors and offsets per channel, such as those of a norm, into the convolution or dense layer before them.

    The function is the same up to rounding. A value that something else reads as well is left as it is.
    """
    readers = readers_of(graph)
    nodes: list[Node] = []
    made: dict[Value, int] = {}  # place in `nodes` of the product that makes a value
    for node in graph.nodes:
        found = _channel_operand(node)
        if found is not None and readers[found[0]] == 1 and found[0] in made:
            place = made[found[0]]
            nodes[place] = _folded(nodes[place], node, found[1])
            made[node.output] = place
            continue
        if _has_known_kernel(node):
            made[node.output] = len(nodes)
        nodes.append(node)
    return graph._replace(nodes=tuple(nodes))


def _has_known_kernel(node: Node) -> bool:
    """Whether the node is a convolution or a dense layer whose output channels are the last axis of a known kernel."""
    if node.op not in (CONV, DOT) or node.clip or any(isinstance(operand, Value) for operand in node.operands[1:]):
        return False
    numbers = node.params["dimension_numbers"]
    if node.op == CONV:
        return is_channels_last(node)
    (lhs, rhs), batch = numbers
    return batch == ((), ()) and tuple(lhs) == (len(node.operands[0].shape) - 1,) and tuple(rhs) == (0,)


def is_channels_last(node: Node) -> bool:
    """Whether a convolution maps [b, h, w, i] by a kernel [r, s, i, o] to [b, h, w, o]."""
    lhs, rhs, out = node.params["dimension_numbers"]
    return (tuple(lhs), tuple(rhs), tuple(out)) == ((0, 3, 1, 2), (3, 2, 0, 1), (0, 3, 1, 2))


def _channel_operand(node: Node) -> tuple[Value, Array] | None:
    """Returns value and known operand of a sum, difference or product of a value and a number for each channel."""
    if node.op not in ("add", "sub", "mul"):
        return None
    first, second = node.operands
    if not isinstance(first, Value) and node.op != "sub":
        first, second = second, first
    if not isinstance(first, Value) or isinstance(second, Value) or first.shape != node.output.shape:
        return None
    shape = jnp.shape(second)
    return (
        (first, second) if math.prod(shape) in (1, *shape[-1:]) and shape[-1:] in ((), (1,), first.shape[-1:]) else None
    )


def _folded(product: Node, node: Node, operand: Array) -> Node:
    """Applies a node's factor or offset to the kernel and the bias of a product."""
    x, *arrays = product.operands
    kernel, *biases = [array for array in arrays if not isinstance(array, Value)]
    rank, channels = len(node.output.shape), node.output.shape[-1]
    each = jnp.broadcast_to(jnp.reshape(operand, -1), (channels,))
    if node.op == "mul":
        kernel, biases = (kernel * _last_axis(each, kernel.ndim), [bias * _last_axis(each, rank) for bias in biases])
    else:
        offset = _last_axis(-each if node.op == "sub" else each, rank)
        biases = [biases[0] + offset] if biases else [offset]
    return dataclasses.replace(product, operands=(x, kernel, *biases), outputs=node.outputs, clip=node.clip)


def _last_axis(each: Array, rank: int) -> Array:
    return each.reshape((1,) * (rank - 1) + (-1,))


# --- running ------------------------------------------------------------------------------------------------


def run(graph: Graph, *inputs: Array) -> PyTree:
    """Computes the outputs; convolutions use the fast forms of the platform for which the program is lowered."""
    values = values_of(graph, *inputs)
    return jax.tree.map(lambda operand: values[operand] if isinstance(operand, Value) else operand, graph.outputs)


def values_of(graph: Graph, *inputs: Array) -> dict[Value, Array]:
    """Computes every value of the graph."""
    values: dict[Value, Array] = dict(zip(graph.inputs, inputs, strict=True))
    for node in graph.nodes:
        operands = [values[operand] if isinstance(operand, Value) else operand for operand in node.operands]
        values.update(zip(node.outputs, compute(node, operands), strict=True))
    return values


def compute(node: Node, operands: Sequence[Array]) -> list[Array]:
    """Computes the outputs of a node from its operands."""
    operands = [jnp.asarray(operand) for operand in operands]
    if node.op in (CONV, DOT):
        x, kernel, *biases = operands
        y = _convolve(node, x, kernel) if node.op == CONV else _bind(node.primitive, (x, kernel), node.params)[0]
        results = [y + biases[0] if biases else y]
    else:
        if node.op in ELEMENTWISE:
            operands = [jnp.broadcast_to(operand, node.output.shape) for operand in operands]
        results = _bind(node.primitive, operands, node.params)
    return results if node.clip is None else [jnp.clip(result, *node.clip) for result in results]


def _convolve(node: Node, x: Array, kernel: Array) -> Array:
    """Convolves by `nn.conv` where that has the same geometry, else by XLA's convolution."""
    params = node.params
    (stride, *strides), (dilation, *dilations) = params["window_strides"], params["rhs_dilation"]
    groups, pads = params["feature_group_count"], tuple(map(tuple, params["padding"]))
    windows = (Window(stride, dilation, padding) for padding in ("same", "symmetric", "trailing"))
    window = next((window for window in windows if window.pads(x, kernel) == pads), None)
    is_usual = (
        is_channels_last(node)
        and (strides, dilations, set(params["lhs_dilation"])) == ([stride], [dilation], {1})
        and params["batch_group_count"] == 1
        and groups in (1, x.shape[-1])
    )
    if window is None or not is_usual:
        return _bind(node.primitive, (x, kernel), params)[0]
    convolve = depthwise_conv if groups > 1 or kernel.shape[2] < x.shape[-1] else conv
    return convolve(x, kernel, stride=stride, dilation=dilation, padding=window.padding)
